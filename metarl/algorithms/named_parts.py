"""Outer optimizers and baselines by name, built in or from `module:attribute`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.registry import import_attribute
from metarl.learning.baselines import Baseline, LinearFeatures, ZeroBaseline
from metarl.learning.critic import Critic
from metarl.learning.gradient_steps import (
    ClippedSurrogate,
    optimizer_named,
    optimizer_names,
    optimizer_part,
)
from metarl.learning.outer import NoUpdate, OuterOptimizer
from metarl.learning.trust_region import TrustRegion
from metarl.parts import Part

OUTER: dict[str, type[OuterOptimizer]] = {
    kind.name: kind for kind in (TrustRegion, ClippedSurrogate, NoUpdate)
}
BASELINES: dict[str, type[Baseline]] = {
    kind.name: kind for kind in (LinearFeatures, ZeroBaseline, Critic)
}


def find_outer(what: Any) -> OuterOptimizer:
    """Return an outer optimizer.

    Args:
        what: the optimizer itself, the name of one (`trust-region`, `clipped`, `adamw`, ...),
            `module:attribute`, or a class of torch.optim.

    Raises:
        UserError: it is something else.
    """
    found = _named("outer", what, lambda name: OUTER.get(name) or optimizer_named(name.lower()))
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        found = optimizer_part(found)
    made = _made(found, OuterOptimizer, what)
    if made is None:
        hint = did_you_mean(what, [*OUTER, *optimizer_names()])
        raise UserError(
            f"outer must be an outer optimizer or a class of torch.optim, got {what!r}{hint}"
        )
    return made


def find_baseline(what: Any) -> Baseline:
    """Return a baseline.

    Args:
        what: the baseline itself, the name of one (`linear`, `zero`, `critic`), or
            `module:attribute`.

    Raises:
        UserError: it is something else.
    """
    made = _made(_named("baseline", what, BASELINES.get), Baseline, what)
    if made is None:
        raise UserError(f"baseline must be a baseline, got {what!r}{did_you_mean(what, BASELINES)}")
    return made


def _named(kind: str, what: Any, known: Callable[[str], Any]) -> Any:
    """Return what a name stands for; anything else as it is."""
    if not isinstance(what, str):
        return what
    return import_attribute(what, f"the {kind}") if ":" in what else known(what)


P = TypeVar("P", bound=Part)


def _made(found: Any, kind: type[P], what: Any) -> P | None:
    """Return a part, made if it is a class, with its chosen name; None for other objects."""
    if isinstance(found, type) and issubclass(found, kind):
        found = found()
    if not isinstance(found, kind):
        return None
    named = isinstance(what, str) and ":" in what
    return dataclasses.replace(found, source=what) if named else found
