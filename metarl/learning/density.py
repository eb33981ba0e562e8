"""Check that learning sees the densities of the sampled actions. It runs once, at the start.

All policy losses compare log-densities of the learning pass with log-densities of sampling. The two
may differ because of batch normalization or dropout, or because `log_prob` is not the density of
`sample`. Then every gradient is wrong, although all numbers stay finite.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import CHUNK
from metarl.envs.errors import UserError
from metarl.learning.adapter import Adapter
from metarl.learning.losses import Batch
from metarl.models.distributions import Gaussian
from metarl.models.networks import Dist, Params
from metarl.models.policies import PolicyModel

LARGEST = 1e-4
"""Bound on a task's mean |log-ratio| at the sampling parameters, in excess of rounding."""

_ROUNDINGS = 64.0  # units in the last place that the two passes may differ by
_DEVIATIONS = 8.0  # standard deviations of a sum with mean zero
_COMPONENTS = 64  # checked components of a distribution parameter
_SHIFT = 0.5  # shift in standard deviations

Sums = dict[str, Tensor]
"""By distribution parameter, [2, size]: a sum of terms with mean zero, and the sum of their
squares."""


def check_density(
    adapter: Adapter, fast: Params, slow: Params, batch: Batch, pool: ChunkPool, *, whole: bool
) -> None:
    """Compare the log-densities of samples with the log-densities of the learning pass.

    Args:
        fast, slow: parameters of the sampling policies; `fast` is stacked.
        batch: the samples.
        whole: whether the batch contains all sampled episodes. Without the diverged episodes, the
            remaining actions do not follow the policy's distribution.

    Raises:
        UserError: the densities differ, or they are not the densities of the sampled actions.
    """

    def one(chunk: slice) -> tuple[Tensor, Tensor, Sums]:
        part = batch.map(lambda x: x[chunk])
        theta = {name: p[chunk] for name, p in fast.items()}
        return _compared(adapter, theta, slow, part)

    parts = pool.map(one, slices(len(batch.weight), CHUNK))
    gap = torch.cat([part[0] for part in parts])
    rounding = torch.cat([part[1] for part in parts])
    if bool((gap > LARGEST + rounding).any()):
        raise UserError(
            f"the policy's log-densities differ by {float(gap.max()):.2g} on average between"
            f" sampling and learning, at most {LARGEST:g} is allowed: its output must not depend on"
            " the batch or on chance (batch normalization, dropout)"
        )
    for name in parts[0][2] if whole else ():
        total, square = torch.stack([part[2][name] for part in parts]).sum(0)
        if bool((total.abs() > _DEVIATIONS * square.sqrt()).any()):
            raise UserError(
                "the policy's log_prob is not the log-density of its sample: it does"
                f" not fit the sampled actions with respect to {name.partition(' ')[0]}"
            )


def _compared(
    adapter: Adapter, fast: Params, slow: Params, batch: Batch
) -> tuple[Tensor, Tensor, Sums]:
    """Return each task's mean |log-ratio| and the part that rounding explains, [T], and `Sums`."""
    policy = adapter.model
    assert isinstance(policy, PolicyModel)
    seen = batch.observation
    if seen.is_floating_point():
        seen = seen.detach().clone().requires_grad_()
    output = adapter.output(fast, slow, dataclasses.replace(batch, observation=seen))
    leaves = {name: x.detach().requires_grad_() for name, x in output.items()}
    log_prob = policy.log_prob(leaves, batch.action)
    slopes = torch.autograd.grad(log_prob.sum(), list(leaves.values()), materialize_grads=True)
    log_prob = log_prob.detach()
    # First order: a relative error of each number times the derivative with respect to it.
    error = log_prob.abs()
    for x, slope in zip(leaves.values(), slopes, strict=True):
        error = error + (slope * x.detach()).abs().sum(-1)
    moving = [(x, g) for x, g in zip(output.values(), slopes, strict=True) if x.requires_grad]
    if moving:
        values, cotangents = zip(*moving, strict=True)
        (back,) = torch.autograd.grad(values, seen, cotangents, materialize_grads=True)
        error = error + (back * seen.detach()).abs().flatten(2).sum(-1)
    gap = (batch.weight * (log_prob - batch.old_log_prob).abs()).sum(1)
    unit = _ROUNDINGS * torch.finfo(log_prob.dtype).eps
    rounding = unit * (batch.weight * error).sum(1)
    scores = dict(zip(leaves, slopes, strict=True))
    valid = batch.weight > 0
    exact = policy.distribution.exact({name: x.detach() for name, x in leaves.items()})
    if exact is not None:
        valid = valid & exact
    sums = _score_sums(policy, output, scores, valid)
    if isinstance(policy.distribution, Gaussian):
        sums["mean of ratios"] = _ratio_sums(policy, output, scores["mean"], batch, valid)
    return gap, rounding, sums


def _score_sums(policy: PolicyModel, dist: Dist, scores: Dist, valid: Tensor) -> Sums:
    """Return sums of scores, the derivatives of log-densities: E[grad log pi(a)] = 0.

    The derivatives are taken along each component and along the parameter itself, the temperature
    for logits. The squares are at least their expectation under the Fisher metric: for a rare
    category, all sampled squares may be almost zero.
    """
    fixed = {name: x.detach() for name, x in dist.items()}
    sums = {}
    for name, score in scores.items():
        columns: list[Tensor] = []
        moved = curved = False
        for i in range(min(score.shape[-1], _COMPONENTS) + 1):
            along = torch.zeros_like(score)
            if i:
                along[..., i - 1] = 1.0
            else:
                along = fixed[name]
            tangent = {n: torch.zeros_like(x) for n, x in fixed.items()} | {name: along}
            expected = (policy.fisher(fixed, tangent)[name] * along).sum(-1)[valid].double().sum()
            found = (score * along).sum(-1)[valid].double()
            square = torch.maximum(found.square().sum(), expected)
            moved, curved = moved or bool(found.any()), curved or bool(expected != 0.0)
            columns.append(torch.stack([found.sum(), square]))
        sums[name] = torch.stack(columns, dim=1)
        if moved and not curved:
            raise UserError(
                f"policy.distribution {policy.distribution.label}: the Fisher product of {name} is"
                " 0, and its log_prob is not constant: its kl has no second derivative there, so"
                " define fisher"
            )
    return sums


def _ratio_sums(
    policy: PolicyModel, dist: Dist, score: Tensor, batch: Batch, valid: Tensor
) -> Tensor:
    """Return sums of likelihood ratios to shifted means, minus 1, [2, size].

    E[pi'(a) / pi(a)] = 1. Scores also have mean zero for a density of another width; these ratios
    do not.
    """
    fixed = {name: x.detach() for name, x in dist.items()}
    here = policy.log_prob(fixed, batch.action)
    sums = []
    for i in range(min(score.shape[-1], _COMPONENTS)):
        size = score[..., i][valid].square().mean().sqrt().clamp(min=1e-12)
        shifted = {**fixed, "mean": fixed["mean"].clone()}
        shifted["mean"][..., i] += _SHIFT / size
        ratio = (policy.log_prob(shifted, batch.action) - here)[valid].exp().double() - 1.0
        sums.append(torch.stack([ratio.sum(), ratio.square().sum()]))
    return torch.stack(sums, dim=1)
