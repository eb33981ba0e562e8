"""Outer steps by Adam: one on a plain gradient, or several on a clipped objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from metarl.envs.errors import UserError
from metarl.learning.meta_gradients import Evaluation, Problem, QueryProblem
from metarl.learning.stopwatch import Stopwatch
from metarl.learning.trust_region import OuterState
from metarl.models.networks import Params, unflatten


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """The outer step with Adam."""

    learning_rate: float = 1e-3
    """Adam's step size."""
    steps: int = 1
    """Gradient steps on one iteration's samples."""
    minibatches: int = 1
    """Parts that the samples are split into. Each step uses one part, in turn, so that as many
    steps as parts make one pass over the samples."""
    clip: float = 0.3
    """Likelihood ratios are clipped to 1 +- this, where the algorithm clips them."""
    max_kl: float = 0.05
    """Upper bound on the mean KL of the adapted policies from those that drew the query samples. No
    further step is taken beyond it, and the whole update is shortened until it is within it."""
    max_norm: float = 10.0
    """Upper bound on the gradient's norm: a longer one is scaled down to it before it enters Adam's
    moments, which it would spoil for hundreds of steps."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "steps", "minibatches", "clip", "max_kl", "max_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"adam.{name} must be positive, got {getattr(self, name)}")
        if self.learning_rate == math.inf:
            raise UserError("adam.learning_rate must be finite, got inf")


class Adam:
    """Kingma & Ba 2015 (arXiv:1412.6980) on a problem's gradient, for one or more steps."""

    def __init__(self, config: AdamConfig) -> None:
        self.config = config

    def init(self, meta: Params) -> OuterState:
        """Return zero moments for every meta-parameter."""
        state = {f"mean.{name}": torch.zeros_like(p) for name, p in meta.items()}
        state |= {f"square.{name}": torch.zeros_like(p) for name, p in meta.items()}
        return {**state, "steps": torch.zeros(())}

    def step(
        self, problem: Problem, meta: Params, state: OuterState, rate: float = 1.0
    ) -> tuple[Params, OuterState, dict[str, Any]]:
        """Return new meta-parameters, moments and statistics; `rate` scales the step size.

        A gradient that is not finite leaves both as they were, with `finite` False; one longer than
        `max_norm` is scaled to it, and counted. Steps end where the KL is above its bound. Where
        the problem can tell, surrogate and KL over all samples are measured afterwards, and a step
        beyond the bound is shortened: nothing else keeps Adam from leaving the region that the
        samples tell of. Examples of a data set tell of all.
        """
        watch = Stopwatch()
        stats: dict[str, Any] = {
            "finite": True, "kl": math.nan, "outer_steps": 0, "bounded_gradients": 0,
        }  # fmt: skip
        new, moments = meta, state
        for step in range(self.config.steps):
            known = () if step else problem.iterates
            gradient, found = problem.gradient(new, step, known)
            norm, loss = float(gradient.norm()), found.pop("loss", None)
            if not math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
                return meta, state, {**stats, "finite": False, "gradient_norm": norm}
            if found.pop("kl", 0.0) > self.config.max_kl and step:
                break
            if step == 0:
                before = math.nan if loss is None else -loss
                stats |= {"surrogate_before": before, "gradient_norm": norm, **found}
            if norm > self.config.max_norm:
                gradient = gradient * (self.config.max_norm / norm)
                stats["bounded_gradients"] += 1
            new, moments = self._move(new, unflatten(gradient, meta), moments, rate)
            stats["outer_steps"] = step + 1
        stats["seconds_gradient"] = watch.lap()
        stats["surrogate_after"], stats["line_search_steps"] = math.nan, 0
        if isinstance(problem, QueryProblem) and problem.drawn:
            new, after, scale = shorten(problem, meta, new, self.config.max_kl)
            stats |= {"surrogate_after": -after.loss, "kl": after.kl, "step_scale": scale}
            stats["seconds_evaluate"] = watch.lap()
        return new, moments, stats

    def _move(
        self, meta: Params, gradient: Params, state: OuterState, rate: float
    ) -> tuple[Params, OuterState]:
        optimizer = torch.optim.Adam(
            leaves := [p.clone() for p in meta.values()], lr=rate * self.config.learning_rate
        )
        for leaf, (name, slope) in zip(leaves, gradient.items(), strict=True):
            leaf.grad = slope
            optimizer.state[leaf] = {
                "step": state["steps"].clone(),
                "exp_avg": state[f"mean.{name}"].clone(),
                "exp_avg_sq": state[f"square.{name}"].clone(),
            }
        optimizer.step()
        new = {"steps": state["steps"] + 1.0}
        for leaf, name in zip(leaves, meta, strict=True):
            new[f"mean.{name}"] = optimizer.state[leaf]["exp_avg"]
            new[f"square.{name}"] = optimizer.state[leaf]["exp_avg_sq"]
        return dict(zip(meta, leaves, strict=True)), new


def shorten(
    problem: QueryProblem, meta: Params, new: Params, max_kl: float
) -> tuple[Params, Evaluation, float]:
    """Return the step from `meta` to `new` cut to within a KL, its evaluation, and its share.

    After ten cuts the step is given up.
    """
    candidate, share = new, 1.0
    for _ in range(10):
        after = problem.evaluate(candidate)
        if after.kl <= max_kl:
            return candidate, after, share
        # The KL grows with the square of the step.
        ratio = max_kl / after.kl if math.isfinite(after.kl) else 0.0
        share *= min(max(0.9 * math.sqrt(ratio), 0.1), 0.9)
        candidate = {name: p + share * (new[name] - p) for name, p in meta.items()}
    return meta, problem.evaluate(meta), 0.0


class NoUpdate:
    """No outer step: meta-parameters stay as they are."""

    def init(self, meta: Params) -> OuterState:
        """Return the state before the first step: none."""
        return {}

    def step(
        self, problem: Problem, meta: Params, state: OuterState, rate: float = 1.0
    ) -> tuple[Params, OuterState, dict[str, Any]]:
        """Return everything as it is."""
        return meta, state, {"finite": True}
