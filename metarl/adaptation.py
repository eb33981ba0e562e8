"""The inner update: theta' = theta - alpha grad L(theta), once for each batch.

All tasks adapt at once. Their losses are summed, never averaged: a parameter leaf has a task axis,
so the gradient of the sum is each task's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metarl.objectives import Batch
from metarl.policies import Params

StepSizes = dict[str, Tensor]
"""For each parameter [K, ...]: one entry an inner step, broadcast against the leaf."""


def constant_step_sizes(params: Params, sizes: Sequence[float]) -> StepSizes:
    """Return the same step sizes, one an inner step, for every parameter."""
    return {name: torch.tensor(sizes, dtype=p.dtype) for name, p in params.items()}


def step_size(step_sizes: StepSizes, name: str, k: int) -> Tensor:
    """Return the size of step k for a parameter; steps beyond those given repeat the last."""
    sizes = step_sizes[name]
    return sizes[min(k, len(sizes) - 1)]


def adapt(
    loss: Callable[[Params, Batch], Tensor],
    params: Params,
    step_sizes: StepSizes,
    batches: Sequence[Batch],
    *,
    order: int,
    at: Sequence[Params] | None = None,
) -> list[Params]:
    """Return the iterates theta_0 ... theta_K of K inner steps, each on a batch of its own.

    Finn et al. 2017, eq. 1 (arXiv:1703.03400).

    Args:
        loss: (stacked parameters, batch) -> [T].
        params: theta_0, stacked, [T, ...] each.
        step_sizes: see `StepSizes`.
        batches: K batches; none gives the identity.
        order: 2 keeps the graph through the gradient; 1 takes the gradient for a constant, so that
            theta_K depends on theta_0 with the identity as its Jacobian; 0 keeps no graph at all.
        at: values theta_1 ... theta_K to differentiate at. Batches that are a part of the samples
            then give the derivative of the step, while its value stays that of all samples.
    """
    iterates = [params]
    for k, batch in enumerate(batches):
        theta = iterates[-1]
        if order < 2:
            theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
        slope = torch.autograd.grad(
            loss(theta, batch).sum(), list(theta.values()), create_graph=order == 2
        )
        new = {
            name: p - step_size(step_sizes, name, k) * g
            for (name, p), g in zip(iterates[-1].items(), slope, strict=True)
        }
        if order == 0:
            new = {name: p.detach() for name, p in new.items()}
        elif at is not None:
            new = {name: at[k][name] + (p - p.detach()) for name, p in new.items()}
        iterates.append(new)
    return iterates
