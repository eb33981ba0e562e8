"""E-MAML (Stadie et al. 2018): credit the pre-update sampling for the post-update return.

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad L_support(theta)        policy gradient, K steps
        sample query episodes with theta'
        credit = return of the query episodes - its expected value
    g = d/dtheta mean (L_query(theta') - c credit log pi_theta(support actions))
    theta = TRPO step along g                               mean KL of the theta' <= max_kl

alpha is inner.step_sizes, K is inner.steps, c is meta.sampling_coef, max_kl is outer.max_kl.
A regression of returns on the task vectors of the other tasks predicts the expected value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarl.algorithms.algorithm import Algorithm
from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.envs.errors import UserError
from metarl.learning.losses import Batch, log_ratio
from metarl.learning.meta_gradients.problem import Objective, Sampled
from metarl.learning.meta_gradients.unrolled import Unrolled
from metarl.models.networks import Dist
from metarl.parts import tunable


@dataclass(frozen=True, kw_only=True)
class SamplingCredit(Unrolled):
    """The exact meta-gradient, plus the term of the sampling distribution."""

    needs_policy: ClassVar[bool] = True

    # 1 is the weight of the paper: unbiased, with the variance of the score of all task samples.
    sampling_coef: float = tunable(1.0, 0.0, 1.0)
    """Weight of the term that credits pre-update sampling for the post-update return."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("sampling_coef")

    def objective(self, sampled: Sampled) -> Objective:
        query = sampled.adapted.batches[-1]
        assert isinstance(query, Batch)
        credit = self.sampling_coef * sampling_credit(query, sampled.pool.process_group)

        def term(model: Any, output: Dist, batch: Batch, chunk: slice) -> Tensor:
            return -(credit[chunk].to(batch.weight.device) * log_ratio(model, output, batch))

        return replace(sampled.objective, support_terms=(term,) if self.sampling_coef else ())

    def check(self, steps: int) -> None:
        if steps < 1:
            raise UserError(f"e-maml needs inner.steps of at least 1, got {steps}")


_TASKS_PER_FEATURE = 4
_LEAST_SCALE = 0.1


def sampling_credit(query: Batch, process_group: ProcessGroup = ALONE) -> Tensor:
    """Return each task's return after adaptation minus its expected value, as credit, [T].

    T are the tasks of this rank. The expected value is estimated from the tasks of all ranks.

    Stadie et al. 2018, eq. 4 (arXiv:1803.01118): let R' be the return after adaptation. Besides the
    policy gradient of the query episodes, the gradient of E[R'] has the term E[(R' - b) grad log
    pi(support)]. The baseline b of a task, see `leave_one_out`, does not depend on the task's own
    episodes, so it does not change the expectation.

    A query loss is a mean over steps of advantages, in units of their scale. The credit has the
    same units: it is divided by the mean length of a query episode and by the scale. The scale is
    bounded below by a tenth of the root mean square of all tasks' scales. Without this bound, a
    task whose query episodes have equal returns would have a scale near zero. If every query
    episode of a task diverged, its credit is 0.
    """
    after, scales = query.rollout, query.advantage_scale
    assert after is not None
    assert scales is not None
    earned = after.mean_returns()
    length = after.valid.sum(dim=(1, 2)) / (~after.diverged).sum(dim=1)
    everywhere = process_group.gather(earned)
    expected = leave_one_out(process_group.gather(after.tasks), everywhere)
    surplus = earned - expected[process_group.block(len(everywhere))]
    usual = process_group.gather(scales).square().mean().sqrt()
    credit = surplus / (length * scales.clamp(min=_LEAST_SCALE * usual))
    return credit.nan_to_num(nan=0.0).to(query.weight.dtype)


def leave_one_out(tasks: Tensor, values: Tensor) -> Tensor:
    """Return a prediction of each task's value from the other tasks, [T] float64.

    The prediction is a linear regression on 1, the task vector and its squares, fitted to the other
    tasks. With fewer than four tasks per feature, it is the mean of the other tasks. A single task
    has prediction 0. NaN values are not used, and their prediction is NaN.

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
        # Scaling only reduces rounding: the span of the features does not change.
        spread = x.std(dim=0, correction=0)
        z = (x - x.mean(dim=0)) / torch.where(spread > 0.0, spread, 1.0)
        features = torch.cat([torch.ones(count, 1, dtype=x.dtype), z, z.square()], dim=1)
        # The residual of a fit without task t is e_t / (1 - h_t), h the diagonal of the hat matrix.
        hat = features @ torch.linalg.pinv(features, rtol=1e-10)
        left = 1.0 - hat.diagonal()
        alone = left < 1e-6  # the other tasks cannot predict this task
        fitted = y - (y - hat @ y) / torch.where(alone, 1.0, left)
        others = torch.where(alone, others, fitted)
    predicted[known] = others
    return predicted


e_maml = Algorithm(
    name="e-maml",
    summary="adds the credit of pre-update sampling for the post-update return",
    citation="Stadie et al. 2018, arXiv:1803.01118; Al-Shedivat et al. 2018, arXiv:1710.03641",
    meta=SamplingCredit(),
)
