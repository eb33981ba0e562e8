"""Signal measures of learning: agreement of gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metarl.learning.adapter import Adapter
from metarl.models.networks import Params, stack
from metarl.models.samples import Samples

_TASKS = 4  # tasks per measure: a tenth of the work of a whole step


def inner_gradient_cosine(adapter: Adapter, meta: Params, batch: Samples) -> float:
    """Return the cosine between the inner gradients of two halves of a task's episodes.

    It is a mean over the first tasks of the batch. At 0, the inner step is noise. At 1, more
    episodes would not change its direction.

    Args:
        adapter: adapter of the tasks.
        meta: meta-parameters that drew the samples.
        batch: samples of the first inner step.

    Returns:
        NaN if a task has only one episode, or if the samples are not ordered episodes.
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
    """Return gradients of stacked parameters concatenated, [T, all], float64."""
    return torch.cat([part.flatten(1).double() for part in parts], dim=1)
