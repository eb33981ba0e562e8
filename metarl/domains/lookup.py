"""Domain of a family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metarl.domains.domain import Domain
from metarl.domains.reinforcement import Reinforcement
from metarl.domains.supervised import Supervised
from metarl.envs.family import Family
from metarl.envs.registry import domain_name

DOMAINS: Mapping[str, Domain] = {kind.name: kind() for kind in (Reinforcement, Supervised)}


def domain_of(family: Family) -> Domain:
    """Return the domain of a family."""
    return DOMAINS[family.domain]


def domain_named(family: str, options: Mapping[str, Any] | None = None) -> Domain:
    """Return the domain of a family by name; reinforcement learning if it cannot be created.

    The error is raised later, when the family is created.
    """
    return DOMAINS[domain_name(family, options) or Reinforcement.name]
