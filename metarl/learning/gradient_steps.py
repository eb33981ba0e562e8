"""Outer steps with torch.optim: one gradient step, or several on a clipped objective."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarl.envs.errors import UserError
from metarl.learning.losses import Loss, clipped_ratio
from metarl.learning.meta_gradients.problem import Evaluation, Problem, QueryProblem
from metarl.learning.outer import OuterOptimizer, OuterState
from metarl.learning.stopwatch import Stopwatch
from metarl.models.networks import Params, unflatten
from metarl.parts import tunable

_STARTED = "started"


@dataclass(frozen=True, kw_only=True)
class GradientSteps(OuterOptimizer):
    """Gradient steps with an optimizer of torch.optim. See `optimizer_part`."""

    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    arguments: ClassVar[tuple[str, ...]] = ()
    """Options that are arguments of the optimizer."""

    learning_rate: float = tunable(1e-3, 3e-4, 3e-2, log=True)
    """Step size of the optimizer."""
    steps: int = tunable(1, 1, 10)
    """Gradient steps on one iteration's samples."""
    max_norm: float = 10.0
    """Upper bound on the norm of the gradient. A longer gradient is scaled down before it enters
    the moments of the optimizer, which it would distort for hundreds of steps."""
    max_kl: float = tunable(0.05, 5e-3, 0.2, log=True, of_policies=True)
    """Upper bound on the mean KL between adapted and sampling policies on the query samples. Steps
    stop beyond the bound, and the whole update is shortened until it is within."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("learning_rate", "steps")
        for name in ("max_norm", "max_kl"):
            self.require(name, getattr(self, name) > 0.0, "positive")

    def init(self, meta: Params) -> OuterState:
        """Return the state before the first step: zeros in its final shapes."""
        leaves = [torch.zeros_like(p) for p in meta.values()]
        _, state = self.advance(leaves, list(meta), leaves, {}, self.learning_rate)
        return {name: torch.zeros_like(x) for name, x in state.items()}

    def step(
        self, problem: Problem, meta: Params, state: OuterState, rate: float = 1.0
    ) -> tuple[Params, OuterState, dict[str, Any]]:
        """Return new meta-parameters, the optimizer's state and statistics; `rate` scales the step.

        If the gradient is not finite, parameters and state are unchanged and `finite` is False. A
        gradient longer than `max_norm` is scaled to it and counted. If policies drew the samples,
        steps stop when the KL exceeds its bound. Then surrogate and KL are measured over all
        samples, and an update beyond the bound is shortened.
        """
        watch = Stopwatch()
        stats: dict[str, Any] = {
            "finite": True, "kl": math.nan, "outer_steps": 0, "bounded_gradients": 0,
        }  # fmt: skip
        new, moments = meta, state
        for step in range(self.steps):
            known = () if step else problem.iterates
            gradient, found = problem.gradient(new, known)
            norm, loss = float(gradient.norm()), found.pop("loss", None)
            if not math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
                return meta, state, {**stats, "finite": False, "gradient_norm": norm}
            kl = found.pop("kl", 0.0)
            if step and self.policies and kl > self.max_kl:
                break
            if step == 0:
                before = math.nan if loss is None else -loss
                stats |= {"surrogate_before": before, "gradient_norm": norm, **found}
            if norm > self.max_norm:
                gradient = gradient * (self.max_norm / norm)
                stats["bounded_gradients"] += 1
            slopes = list(unflatten(gradient, meta).values())
            leaves, moments = self.advance(
                list(new.values()), list(meta), slopes, moments, rate * self.learning_rate
            )
            new = dict(zip(meta, leaves, strict=True))
            stats["outer_steps"] = step + 1
        if not all(bool(p.isfinite().all()) for p in new.values()):
            return meta, state, {**stats, "finite": False}
        stats["seconds_gradient"] = watch.lap()
        stats["surrogate_after"], stats["line_search_steps"] = math.nan, 0
        if self.policies:
            assert isinstance(problem, QueryProblem)
            new, after, scale = shorten(problem, meta, new, self.max_kl)
            stats |= {"surrogate_after": -after.loss, "kl": after.kl, "step_scale": scale}
            stats["seconds_evaluate"] = watch.lap()
        return new, moments, stats

    def advance(
        self,
        values: list[Tensor],
        names: list[str],
        slopes: list[Tensor],
        state: OuterState,
        learning_rate: float,
    ) -> tuple[list[Tensor], OuterState]:
        """Return parameters and optimizer state after one step of the optimizer."""
        leaves = [p.clone() for p in values]
        arguments = {name: getattr(self, name) for name in self.arguments}
        try:
            optimizer = self.optimizer(leaves, lr=learning_rate, **arguments)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise UserError(f"outer {self.name} cannot be created: {error}") from error
        for leaf, name, slope in zip(leaves, names, slopes, strict=True):
            leaf.grad = slope
            if state.get(_STARTED):
                for entry in _entries(state, name):
                    optimizer.state[leaf][entry] = state[f"{name}/{entry}"].clone()
        try:
            optimizer.step()
        except (TypeError, RuntimeError) as error:  # it needs a closure, or sparse gradients
            raise UserError(f"outer {self.name} cannot take a plain step: {error}") from error
        new = {_STARTED: torch.ones(())}
        for leaf, name in zip(leaves, names, strict=True):
            for entry, value in optimizer.state[leaf].items():
                if isinstance(value, Tensor):
                    new[f"{name}/{entry}"] = value
                elif value is not None:
                    raise UserError(
                        f"outer {self.name} keeps {entry} as {type(value).__name__}: only tensors"
                        " are kept from step to step"
                    )
        return leaves, new


def _entries(state: OuterState, name: str) -> list[str]:
    return [key.rpartition("/")[2] for key in state if key.rpartition("/")[0] == name]


def shorten(
    problem: QueryProblem, meta: Params, new: Params, max_kl: float
) -> tuple[Params, Evaluation, float]:
    """Shorten the step from `meta` to `new` to a KL bound; return it, its evaluation and its share.

    After ten cuts the update is rejected.
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


_NOT_OPTIONS = ("params", "lr", "foreach", "fused", "capturable", "differentiable", "maximize")


@cache
def optimizer_part(optimizer: type[torch.optim.Optimizer]) -> type[GradientSteps]:
    """Return the part of an optimizer class. Its options are the arguments of the optimizer."""
    options: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(optimizer).parameters.items():
        default = _plain_default(parameter)
        if default is not None and name not in _NOT_OPTIONS:
            kind = tuple[float, ...] if isinstance(default, tuple) else type(default)
            options.append((name, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(
        optimizer.__name__,
        options,
        bases=(GradientSteps,),
        frozen=True,
        kw_only=True,
        namespace={
            "__doc__": f"Gradient steps with {optimizer.__module__}.{optimizer.__name__}.",
            "__module__": __name__,
            "name": optimizer.__name__.lower(),
            "optimizer": optimizer,
            "arguments": tuple(name for name, _, _ in options),
        },
    )


def _plain_default(parameter: inspect.Parameter) -> Any:
    """Return an argument's default if it is a number, a bool or a tuple of numbers; else None."""
    default, annotation = parameter.default, parameter.annotation
    if isinstance(default, tuple):
        return default if all(isinstance(x, int | float) for x in default) else None
    if isinstance(default, int) and not isinstance(default, bool):
        # torch writes `momentum: float = 0`, other packages `momentum=0`.
        unknown = annotation is inspect.Parameter.empty and default == 0
        return float(default) if unknown or "float" in str(annotation) else default
    return default if isinstance(default, bool | float) else None


def optimizer_named(name: str) -> type[torch.optim.Optimizer] | None:
    """Return a class of torch.optim by its name in lower case, or None if it does not exist."""
    return _optimizers().get(name)


def optimizer_names() -> list[str]:
    """Return the names of torch.optim's classes in lower case."""
    return sorted(_optimizers())


def _optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    base = torch.optim.Optimizer
    kinds = [x for x in vars(torch.optim).values() if isinstance(x, type) and issubclass(x, base)]
    return {kind.__name__.lower(): kind for kind in kinds if kind is not base}


Adam: Any = optimizer_part(torch.optim.Adam)
"""Kingma & Ba 2015 (arXiv:1412.6980)."""


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate(Adam):
    """PPO's clipped objective, with several steps of Adam on the whole batch.

    Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    """

    name: ClassVar[str] = "clipped"
    needs_policy: ClassVar[bool] = True

    steps: int = tunable(5, 1, 10)
    """Gradient steps on one iteration's samples."""
    clip: float = tunable(0.3, 0.05, 0.5)
    """Clip likelihood ratios to 1 +- this value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("clip", self.clip > 0.0, "positive")

    def loss(self, loss: Loss) -> Loss:
        return partial(clipped_ratio, clip=self.clip)
