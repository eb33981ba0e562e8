"""What pre-update sampling earns for the post-update return: E-MAML's credit."""

from __future__ import annotations

import torch
from torch import Tensor

from metarl.distributed.process_group import ALONE, Ranks
from metarl.learning.inner_loop import Adapted

_TASKS_PER_FEATURE = 4
_LEAST_SCALE = 0.1


def post_update_credit(adapted: Adapted, ranks: Ranks = ALONE) -> Tensor:
    """Return what each task's support episodes earned beyond what was to be expected, [T].

    T are the tasks of this rank; what is to be expected of one is told by those of all ranks.

    Stadie et al. 2018, eq. 4 (arXiv:1803.01118): the gradient of E[R'], R' the return after
    adaptation, has the term E[(R' - b) grad log pi(support)] besides the policy gradient of the
    query episodes. The baseline b of a task, see `leave_one_out`, does not depend on its own
    episodes, so that it leaves the expectation as it is. A query loss is a mean over steps of
    advantages in units of their scale, and this is in the same units: divided by the mean length of
    a query episode and by the scale, or where that is more by a tenth of the root mean square of
    all tasks' scales: a task whose query episodes all earn the same has next to none. A task whose
    every query episode diverged is credited nothing.
    """
    after = adapted.rollouts[-1]
    earned = after.mean_returns()
    length = after.valid.sum(dim=(1, 2)) / (~after.diverged).sum(dim=1)
    everywhere = ranks.gather(earned)
    expected = leave_one_out(ranks.gather(after.tasks), everywhere)
    surplus = earned - expected[ranks.block(len(everywhere))]
    scales = adapted.advantage_scales[-1]
    usual = ranks.gather(scales).square().mean().sqrt()
    credit = surplus / (length * scales.clamp(min=_LEAST_SCALE * usual))
    return credit.nan_to_num(nan=0.0).to(adapted.batches[-1].weight.dtype)


def leave_one_out(tasks: Tensor, values: Tensor) -> Tensor:
    """Return each task's value as the other tasks predict it, [T] float64.

    The prediction is that of a linear regression on 1, the task vector and its squares, fitted to
    the others; where they are too few for that, fewer than four a feature, it is their mean. A
    single task is predicted 0. Values that are NaN predict nothing, and are predicted NaN.

    Args:
        tasks: [T, task_dim] float64.
        values: [T] float64.
    """
    known = torch.isfinite(values)
    y, x = values[known], tasks[known]
    count = len(y)
    predicted = torch.full_like(values, torch.nan)
    if count < 2:
        predicted[known] = 0.0
        return predicted
    others = (y.sum() - y) / (count - 1)
    dim = x.shape[1]
    if dim and count >= _TASKS_PER_FEATURE * (1 + 2 * dim):
        # Scaled for the sake of rounding alone: the span of the features is the same.
        spread = x.std(dim=0, correction=0)
        z = (x - x.mean(dim=0)) / torch.where(spread > 0.0, spread, 1.0)
        features = torch.cat([torch.ones(count, 1, dtype=x.dtype), z, z.square()], dim=1)
        # The residual of a fit without task t is e_t / (1 - h_t), h the diagonal of the hat matrix.
        hat = features @ torch.linalg.pinv(features, rtol=1e-10)
        left = 1.0 - hat.diagonal()
        alone = left < 1e-6  # nothing is known of a task that alone has some feature
        fitted = y - (y - hat @ y) / torch.where(alone, 1.0, left)
        others = torch.where(alone, others, fitted)
    predicted[known] = others
    return predicted
