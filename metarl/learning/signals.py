"""How much of what learning follows is signal: agreement of gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metarl.learning.adapter import Adapter
from metarl.models.networks import Params, stack
from metarl.models.samples import Samples

_TASKS = 4  # of which one measure is taken: a tenth of the work of a whole step


def inner_gradient_cosine(adapter: Adapter, meta: Params, batch: Samples) -> float:
    """Return the cosine of the inner gradients of two halves of a task's episodes.

    A mean over the first tasks of the batch. At 0 the step that adapts is noise; at 1 more episodes
    would not change its direction.

    Args:
        adapter: how tasks adapt.
        meta: the meta-parameters that drew the samples.
        batch: samples of the first inner step.

    Returns:
        NaN if a task has a single episode, or the samples are no episodes in order.
    """
    count = getattr(batch, "episodes", 0)
    half = count // 2
    if half < 1:
        return math.nan
    part = batch.map(lambda x: x[:_TASKS])
    tasks, samples = part.weight.shape
    places = torch.arange(samples, device=part.weight.device).view(1, count, -1)
    fast, slow, _ = adapter.split(meta)
    slopes = []
    for episodes in (slice(0, half), slice(half, 2 * half)):
        some = part.select(places[:, episodes].expand(tasks, -1, -1))
        theta = {n: p.detach().requires_grad_() for n, p in stack(fast, tasks).items()}
        loss = adapter.inner_loss(theta, slow, some).sum()
        slopes.append(_flat(torch.autograd.grad(loss, list(theta.values()))))
    return float(torch.cosine_similarity(*slopes, dim=1).mean())


def _flat(parts: tuple[Tensor, ...]) -> Tensor:
    """Return gradients of stacked parameters side by side, [T, all], float64."""
    return torch.cat([part.flatten(1).double() for part in parts], dim=1)
