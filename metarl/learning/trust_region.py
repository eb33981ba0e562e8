"""TRPO step: natural gradient with conjugate gradient, then a line search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarl.learning.linear_solves import conjugate_gradient
from metarl.learning.meta_gradients.problem import Evaluation, Problem
from metarl.learning.meta_gradients.unrolled import UnrolledProblem
from metarl.learning.outer import OuterOptimizer, OuterState
from metarl.learning.stopwatch import Stopwatch
from metarl.models.networks import Params, flatten, unflatten
from metarl.models.samples import Samples
from metarl.parts import tunable

FISHER_SAMPLES = 200
"""Minimum number of valid samples per task in Fisher products, if that many exist."""


@dataclass(frozen=True, kw_only=True)
class TrustRegion(OuterOptimizer):
    """Trust-region policy optimization on the post-adaptation objective.

    Schulman et al. 2015, appendix C (arXiv:1502.05477).
    """

    name: ClassVar[str] = "trust-region"
    needs_policy: ClassVar[bool] = True

    max_kl: float = tunable(0.01, 2e-3, 0.2, log=True)
    """Upper bound on the mean KL between adapted and sampling policies on the query samples."""
    cg_iterations: int = 10
    """Iterations of the conjugate gradient method."""
    cg_damping: float = 1e-5
    """Value added to the diagonal of the Fisher matrix."""
    line_search_steps: int = 15
    """Maximum number of step lengths in the line search; then the update is rejected."""
    backtrack: float = 0.8
    """Factor between one step length and the next."""
    fisher_fraction: float = 0.1
    """Fraction of each task's samples in Fisher-vector products, at least 200 samples. The gradient
    and the line search use all samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("max_kl", "cg_iterations", "line_search_steps")
        self.require_not_negative("cg_damping")
        self.require("fisher_fraction", 0.0 < self.fisher_fraction <= 1.0, "in (0, 1]")
        self.require("backtrack", 0.0 < self.backtrack < 1.0, "in (0, 1)")

    def init(self, meta: Params) -> OuterState:
        """Return the state before the first step: empty."""
        return {}

    def step(
        self, problem: Problem, meta: Params, state: OuterState, rate: float = 1.0
    ) -> tuple[Params, OuterState, dict[str, Any]]:
        """Return new meta-parameters, the state and statistics; `rate` scales the KL bound.

        Take the longest tried step along the natural gradient that improves the surrogate within
        the KL bound. Both are measured over all samples. If no step improves the surrogate, or if
        the gradient is not finite, return the meta-parameters unchanged. Then `line_search_steps`
        is 0, and `finite` tells the two cases apart.
        """
        watch = Stopwatch()
        if not isinstance(problem, UnrolledProblem):
            raise TypeError(f"a trust region needs an UnrolledProblem, got {type(problem)}")
        gradient, found = problem.gradient(meta)
        before = found["loss"]
        max_kl = rate * self.max_kl
        stats: dict[str, Any] = {
            "surrogate_before": -before,
            "surrogate_after": -before,
            "kl": 0.0,
            "line_search_steps": 0,
            "gradient_norm": float(gradient.norm()),
            "gradient_agreement": found.get("gradient_agreement", math.nan),
            "finite": bool(torch.isfinite(gradient).all()) and math.isfinite(before),
        }
        stats["seconds_gradient"] = watch.lap()
        if not stats["finite"] or stats["gradient_norm"] == 0.0:
            return meta, state, stats
        chosen = fisher_samples(problem, self.fisher_fraction)
        with problem.linearize(meta, problem.iterates, chosen) as fisher:

            def damped(v: Tensor) -> Tensor:
                return fisher(v) + self.cg_damping * v

            direction, residual = conjugate_gradient(damped, -gradient, self.cg_iterations)
        curvature = float(direction @ (-gradient - residual))  # x'Ax, without a further product
        stats["seconds_conjugate_gradient"] = watch.lap()
        if not (math.isfinite(curvature) and curvature > 0.0):
            stats["finite"] = math.isfinite(curvature)
            return meta, state, stats
        full = math.sqrt(2.0 * max_kl / curvature) * direction
        found_step = self._line_search(problem, meta, full, before, max_kl)
        if found_step is not None:
            meta, after, tried = found_step
            stats.update(surrogate_after=-after.loss, kl=after.kl, line_search_steps=tried)
        stats["seconds_line_search"] = watch.lap()
        return meta, state, stats

    def _line_search(
        self, problem: UnrolledProblem, meta: Params, full: Tensor, before: float, max_kl: float
    ) -> tuple[Params, Evaluation, int] | None:
        """Return the first acceptable candidate, its evaluation and the number of steps tried."""
        for tried in range(self.line_search_steps):
            candidate = _moved(meta, full, self.backtrack**tried)
            after = problem.evaluate(candidate)
            if after.loss < before and after.kl <= max_kl:
                return candidate, after, tried + 1
        return None


def _moved(meta: Params, step: Tensor, scale: float) -> Params:
    return unflatten(flatten(meta) + scale * step, meta)


def fisher_samples(problem: UnrolledProblem, fraction: float) -> list[Tensor | None]:
    """Return, for each batch, the samples for Fisher products, in the format of `Batch.select`.

    At least a fraction of every task's valid samples is used, and at least `FISHER_SAMPLES` or all.
    Invalid samples only pad rows, after all valid ones. None stands for a whole batch. Recurrent
    policies, and losses that need whole episodes, get whole episodes. The task with the largest
    need, in the whole process group, determines the number of samples.
    """
    return [_selection(problem, batch, fraction) for batch in problem.batches]


def _selection(problem: UnrolledProblem, batch: Samples, fraction: float) -> Tensor | None:
    group, episodes = problem.pool.process_group, problem.whole_episodes(batch)
    valid = batch.weight.cpu() > 0
    tasks, samples = valid.shape
    units = episodes or samples
    order = problem.permutation(units)  # the same for every batch
    known = valid.sum(dim=1)
    needed = (fraction * known.double()).round().long()
    needed = needed.clamp(min=FISHER_SAMPLES).minimum(known)
    if episodes:
        steps = valid.view(tasks, units, -1).sum(dim=2)[:, order]
        place = (steps == 0).long().argsort(dim=1, stable=True)
        seen = steps.gather(1, place).cumsum(dim=1)
        most = group.largest(int((seen < needed.unsqueeze(1)).sum(dim=1).max()))
        count = min(most + 1, units)
        horizon = samples // units
        first = order[place[:, :count]] * horizon
        some = first.unsqueeze(2) + torch.arange(horizon)
    else:
        count = max(group.largest(int(needed.max())), 1)
        place = (~valid[:, order]).long().argsort(dim=1, stable=True)
        some = order[place[:, :count]].sort(dim=1).values
    return None if some[0].numel() >= samples else some
