"""Outer optimizers and baselines by name, built in or from `module:attribute`."""

from __future__ import annotations

from typing import Any

import torch

from metarl.envs.errors import UserError, did_you_mean
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
from metarl.parts import find_part

OUTER: dict[str, type[OuterOptimizer]] = {
    kind.name: kind for kind in (TrustRegion, ClippedSurrogate, NoUpdate)
}
BASELINES: dict[str, type[Baseline]] = {
    kind.name: kind for kind in (LinearFeatures, ZeroBaseline, Critic)
}


def find_outer(what: Any) -> OuterOptimizer:
    """Return an outer optimizer.

    Args:
        what: an outer optimizer, the name of one (`trust-region`, `clipped`, `adamw`, ...),
            `module:attribute`, or a class of torch.optim.

    Raises:
        UserError: the value is something else.
    """

    def adapt(found: Any) -> Any:
        optimizer = isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
        return optimizer_part(found) if optimizer else found

    def known(name: str) -> Any:
        return OUTER.get(name) or optimizer_named(name.lower())

    made = find_part(what, OuterOptimizer, "outer", known, adapt)
    if made is None:
        hint = did_you_mean(what, [*OUTER, *optimizer_names()])
        raise UserError(
            f"outer must be an outer optimizer or a class of torch.optim, got {what!r}{hint}"
        )
    return made


def find_baseline(what: Any) -> Baseline:
    """Return a baseline.

    Args:
        what: a baseline, the name of one (`linear`, `zero`, `critic`), or `module:attribute`.

    Raises:
        UserError: the value is something else.
    """
    made = find_part(what, Baseline, "baseline", BASELINES.get)
    if made is None:
        raise UserError(f"baseline must be a baseline, got {what!r}{did_you_mean(what, BASELINES)}")
    return made
