"""Returns and generalized advantages, masked and in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.envs.errors import NonFiniteError, UserError, check_one_of
from metarl.learning.baselines import Baseline
from metarl.learning.inner_loop import check_finite
from metarl.learning.losses import Batch, make_batch
from metarl.models.networks import Params
from metarl.models.policies import PolicyModel
from metarl.parts import Part, tunable
from metarl.sampling.trajectories import Rollout
from metarl.sampling.trials import baseline_input

TASKS_AT_ONCE = 2
"""Number of tasks whose advantages are estimated at once, so that their features stay in cache."""

_BLOCK = 1024  # steps per matrix of discounts
_REFITS = 3  # fits to lambda-returns after the first fit


Targets = Literal["returns", "lambda-returns"]


def discounted_sum(x: Tensor, factor: float) -> Tensor:
    """Discounted sum of future values, y[t] = sum_l factor^l x[t + l].

    An episode fills the front of its row and zeros follow, so the sum needs no mask. Long rows are
    summed block by block from the end. The memory grows with H, not with its square.

    Args:
        x: [..., H]

    Returns:
        [..., H]
    """
    if x.shape[-1] > _BLOCK:
        parts, rest = [], torch.zeros_like(x[..., :1])
        for part in reversed(x.split(_BLOCK, dim=-1)):
            left = torch.arange(part.shape[-1], 0, -1, device=x.device)  # steps to the block end
            powers = torch.as_tensor(factor, dtype=x.dtype, device=x.device) ** left
            parts.append(discounted_sum(part, factor) + powers * rest)
            rest = parts[-1][..., :1]
        return torch.cat(parts[::-1], dim=-1)
    steps = torch.arange(x.shape[-1], device=x.device)
    ahead = steps[:, None] - steps[None, :]  # how far row s lies ahead of column t
    powers = torch.as_tensor(factor, dtype=x.dtype, device=x.device) ** ahead.clamp(min=0)
    return x @ torch.where(ahead >= 0, powers, 0.0)


def gae(reward: Tensor, value: Tensor, discount: float, gae_lambda: float) -> Tensor:
    """Generalized advantages, A[t] = sum_l (discount * gae_lambda)^l delta[t + l].

    Schulman et al. 2016, eq. 16 (arXiv:1506.02438), with
    delta[t] = r[t] + discount V[t + 1] - V[t]. The horizon ends the task: the value after the last
    step is zero.

    Args:
        reward, value: [..., H], zero where not valid; real steps come first.
        discount, gae_lambda: gamma and lambda.

    Returns:
        [..., H], zero where not valid.
    """
    following = torch.nn.functional.pad(value[..., 1:], (0, 1))
    return discounted_sum(reward + discount * following - value, discount * gae_lambda)


@dataclass(frozen=True, kw_only=True)
class Advantages(Part):
    """Estimation of advantages. The fields are the options `advantage.*`."""

    section: ClassVar[str] = "advantage"

    discount: float = 0.99
    """Discount of future rewards (gamma)."""
    gae_lambda: float = tunable(1.0, 0.8, 1.0)
    """Lambda of generalized advantage estimation; 1 uses whole returns."""
    targets: Targets = "returns"
    """Targets of the baseline: discounted returns, as in the papers, or lambda-returns, which have
    less noise with few episodes. lambda-returns need gae_lambda below 1."""
    normalize: bool = True
    """Scale each task's advantages to mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        self.require_fraction("discount", "gae_lambda")
        check_one_of(self.key("targets"), self.targets, get_args(Targets))
        if self.targets != "returns" and self.gae_lambda == 1.0:
            raise UserError(
                f"{self.key('targets')} {self.targets} needs {self.key('gae_lambda')} below 1:"
                " at 1 they equal the returns"
            )


def estimate(
    rollout: Rollout, options: Advantages, baseline: Baseline, state: Params, pool: ChunkPool
) -> tuple[Tensor, Tensor]:
    """Return a rollout's advantages, [T, E, H] float32, zero where not valid, and their scale.

    The baseline is fitted to the discounted returns of each task in this rollout. With targets
    "lambda-returns", it is then fitted to its own lambda-returns, value + advantage. They rely on
    the fit instead of noisy future rewards (Sutton & Barto 2018, section 12.1). Advantages are
    normalized by the standard deviation over the valid steps of a task. The scale is their divisor,
    [T] float64.
    """

    seen = baseline_input(rollout)

    def one(chunk: slice) -> tuple[Tensor, Tensor]:
        valid, reward = rollout.valid[chunk], rollout.reward[chunk].double()
        fit = baseline.fit(state, seen[chunk], valid)
        if not callable(fit):
            raise UserError(
                f"baseline {baseline.label}: fit must return a function of targets, got {fit!r}"
            )

        def fitted(target: Tensor) -> tuple[Tensor, Tensor]:
            value = fit(target)
            _check_values(baseline, value, target)
            return value, gae(reward, value, options.discount, options.gae_lambda)

        value, advantage = fitted(discounted_sum(reward, options.discount))
        for _ in range(_REFITS if options.targets == "lambda-returns" else 0):
            value, advantage = fitted(value + advantage)
        scale = torch.ones(len(valid), dtype=torch.float64)
        if options.normalize:
            advantage, scale = normalize(advantage, valid)
        return advantage.float(), scale

    advantages, scales = zip(*pool.map(one, slices(len(rollout.valid), TASKS_AT_ONCE)), strict=True)
    return torch.cat(advantages), torch.cat(scales)


def _check_values(baseline: Baseline, value: Any, target: Tensor) -> None:
    """Raise UserError unless values are finite numbers in the shape of their targets."""
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != list(target.shape):
        raise UserError(
            f"baseline {baseline.label} must return values {list(target.shape)}, got {shape}"
        )
    if not bool(value.isfinite().all()):
        raise NonFiniteError(f"the baseline {baseline.label} gives values that are not finite")


def normalize(advantage: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale each task's valid advantages to mean 0, standard deviation 1.

    Args:
        advantage, valid: [T, E, H].

    Returns:
        [T, E, H], and the divisor of each task, [T].
    """
    count = valid.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    mean = advantage.sum(dim=(1, 2), keepdim=True) / count
    centred = torch.where(valid, advantage - mean, 0.0)
    scale = (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt() + 1e-8
    return centred / scale, scale.flatten()


def to_batch(
    policy: PolicyModel,
    rollout: Rollout,
    options: Advantages,
    baseline: Baseline,
    state: Params,
    pool: ChunkPool,
) -> Batch:
    """Return a rollout's samples with their advantages.

    Args:
        state: state of the baseline.

    Raises:
        NonFiniteError: a sampled value is not a finite number.
    """
    names = ("reward", "observation", "last_observation", "action")
    check_finite({name: getattr(rollout, name) for name in names}, rollout.tasks)
    advantage, scale = estimate(rollout, options, baseline, state, pool)
    return make_batch(policy, rollout, advantage, scale)
