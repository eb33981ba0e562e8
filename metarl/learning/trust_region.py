"""TRPO's step: natural gradient by conjugate gradient, then a line search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarl.envs.errors import UserError
from metarl.learning.linear_solves import conjugate_gradient
from metarl.learning.meta_gradients import Evaluation, Problem, UnrolledProblem
from metarl.learning.stopwatch import Stopwatch
from metarl.models.networks import Params, flatten, unflatten


@dataclass(frozen=True, kw_only=True)
class TrustRegionConfig:
    """The outer step with a trust region (TRPO)."""

    max_kl: float = 0.01
    """Upper bound on the mean KL of the adapted policies from those that drew the query samples."""
    cg_iterations: int = 10
    """Iterations of the conjugate gradient method."""
    cg_damping: float = 1e-5
    """Added to the Fisher matrix's diagonal."""
    line_search_steps: int = 15
    """Step lengths that the line search tries before it gives the update up."""
    backtrack: float = 0.8
    """Factor between one step length and the next."""
    growth_steps: int = 0
    """Longer steps that the line search tries if the first one is accepted with a KL well below the
    bound; 0 never lengthens a step."""
    fisher_fraction: float = 0.1
    """Fraction of each task's samples used in Fisher-vector products, at least 200 of them; the
    gradient and the line search use all samples."""

    def __post_init__(self) -> None:
        for name in ("max_kl", "cg_iterations", "line_search_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"trust_region.{name} must be positive and finite, got {getattr(self, name)}"
                )
        if self.growth_steps < 0:
            raise UserError(
                f"trust_region.growth_steps must not be negative, got {self.growth_steps}"
            )
        if not 0.0 <= self.cg_damping < math.inf:
            raise UserError(
                f"trust_region.cg_damping must be finite and not negative, got {self.cg_damping}"
            )
        if not 0.0 < self.fisher_fraction <= 1.0:
            raise UserError(
                f"trust_region.fisher_fraction must be in (0, 1], got {self.fisher_fraction}"
            )
        if not 0.0 < self.backtrack < 1.0:
            raise UserError(f"trust_region.backtrack must be in (0, 1), got {self.backtrack}")


_AIM = 0.9  # of the KL bound, for a step that grows

OuterState = dict[str, Tensor]
"""What an outer optimizer keeps from step to step; a part of every checkpoint."""


class TrustRegion:
    """Schulman et al. 2015, appendix C (arXiv:1502.05477), on the post-adaptation objective."""

    def __init__(self, config: TrustRegionConfig) -> None:
        self.config = config

    def init(self, meta: Params) -> OuterState:
        """Return the state before the first step: none."""
        return {}

    def step(
        self, problem: Problem, meta: Params, state: OuterState, rate: float = 1.0
    ) -> tuple[Params, OuterState, dict[str, Any]]:
        """Return new meta-parameters, the state and statistics; `rate` scales the KL bound.

        Along the natural gradient, the longest step tried that improves the surrogate within the
        KL bound is taken, both measured over all samples. With `growth_steps` a first step that the
        bound would let go further goes on for as long as the surrogate improves: `step_scale` is
        how far, in units of the first step. Where no step improves, or the gradient is not finite,
        the meta-parameters come back as they were, with `line_search_steps` 0 and `finite` telling
        which.
        """
        config = self.config
        watch = Stopwatch()
        if not isinstance(problem, UnrolledProblem):
            raise TypeError(f"a trust region needs an UnrolledProblem, got {type(problem)}")
        gradient, found = problem.gradient(meta)
        before = found["loss"]
        max_kl = rate * config.max_kl
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
        with problem.linearize(meta, problem.iterates) as fisher:

            def damped(v: Tensor) -> Tensor:
                return fisher(v) + config.cg_damping * v

            direction, residual = conjugate_gradient(damped, -gradient, config.cg_iterations)
        curvature = float(direction @ (-gradient - residual))  # x'Ax, with no further product
        stats["seconds_conjugate_gradient"] = watch.lap()
        if not (math.isfinite(curvature) and curvature > 0.0):
            stats["finite"] = math.isfinite(curvature)
            return meta, state, stats
        full = math.sqrt(2.0 * max_kl / curvature) * direction
        scale, after, tried = self._line_search(problem, meta, full, before, max_kl)
        if scale:
            stats.update(surrogate_after=-after.loss, kl=after.kl, line_search_steps=tried)
            meta = _moved(meta, full, scale)
        if config.growth_steps:
            stats["step_scale"] = scale
        stats["seconds_line_search"] = watch.lap()
        return meta, state, stats

    def _line_search(
        self, problem: UnrolledProblem, meta: Params, full: Tensor, before: float, max_kl: float
    ) -> tuple[float, Evaluation, int]:
        """Return the length to go, in units of the first step; its evaluation; and steps tried."""
        config = self.config
        scale, after = 1.0, problem.evaluate(_moved(meta, full, 1.0))
        tried = 1
        while not (after.loss < before and after.kl <= max_kl):
            if tried == config.line_search_steps:
                return 0.0, after, 0
            scale = config.backtrack**tried
            after = problem.evaluate(_moved(meta, full, scale))
            tried += 1
        for _ in range(config.growth_steps if tried == 1 else 0):
            # The KL grows about with the square of the step: aim below the bound, and no further
            # than twice as far, since the surrogate is known where it was sampled.
            room = math.sqrt(_AIM * max_kl / after.kl) if after.kl > 0.0 else 2.0
            if room < 1.0 / config.backtrack:
                break
            longer = min(room, 2.0) * scale
            found = problem.evaluate(_moved(meta, full, longer))
            tried += 1
            if not (found.loss < after.loss and found.kl <= max_kl):
                break
            scale, after = longer, found
        return scale, after, tried


def _moved(meta: Params, step: Tensor, scale: float) -> Params:
    return unflatten(flatten(meta) + scale * step, meta)
