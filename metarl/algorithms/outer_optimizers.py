"""Outer optimizers by name: those of this package, any class of torch.optim, or a user's own."""

from __future__ import annotations

from typing import Any

import torch

from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.registry import import_attribute
from metarl.learning.gradient_steps import (
    ClippedSurrogate,
    optimizer_named,
    optimizer_names,
    optimizer_part,
)
from metarl.learning.outer import NoUpdate, OuterOptimizer
from metarl.learning.trust_region import TrustRegion

OUTER: dict[str, type[OuterOptimizer]] = {
    kind.name: kind for kind in (TrustRegion, ClippedSurrogate, NoUpdate)
}


def find_outer(what: Any) -> OuterOptimizer:
    """Return an outer optimizer.

    Args:
        what: the optimizer itself, the name of one (`trust-region`, `clipped`, `adamw`, ...),
            `module:attribute`, or a class of torch.optim.

    Raises:
        UserError: it is something else.
    """
    found = what
    if isinstance(what, str):
        named = ":" in what
        found = import_attribute(what, "an outer optimizer") if named else _named(what.lower())
    if isinstance(found, OuterOptimizer):
        return found
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return optimizer_part(found)()
    if isinstance(found, type) and issubclass(found, OuterOptimizer):
        return found()
    raise UserError(
        f"outer must be an outer optimizer or a class of torch.optim, got {what!r}"
        f"{did_you_mean(what, [*OUTER, *optimizer_names()])}"
    )


def _named(name: str) -> Any:
    return OUTER.get(name) or optimizer_named(name)
