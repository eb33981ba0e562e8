"""Algorithms, one file each. The docstring of a file is the algorithm's pseudocode.

To add one, add a file with an `Algorithm` to this folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from functools import cache

from metarl.algorithms.algorithm import Algorithm
from metarl.envs.errors import UserError, check_name, did_you_mean
from metarl.envs.registry import import_attribute

__all__ = ["Algorithm", "algorithms", "find_algorithm"]


@cache
def algorithms() -> dict[str, Algorithm]:
    """Return the built-in algorithms by name: meta-learners, then references, then the oracle."""
    found: dict[str, Algorithm] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Algorithm):
                found[value.name] = dataclasses.replace(value, source=value.name)

    def place(item: tuple[str, Algorithm]) -> tuple[bool, bool, str]:
        name, algorithm = item
        return algorithm.reference, algorithm.task_conditioned, name

    return dict(sorted(found.items(), key=place))


def find_algorithm(what: str | Algorithm) -> Algorithm:
    """Return an algorithm.

    Args:
        what: a name, `module:attribute`, or an algorithm, which is returned unchanged.

    Raises:
        UserError: it does not exist, or the module cannot be imported.
    """
    if isinstance(what, Algorithm):
        return what
    if isinstance(what, str) and ":" in what:
        found = import_attribute(what, "an algorithm")
        if not isinstance(found, Algorithm):
            raise UserError(f"{what} must be a metarl.Algorithm, got {type(found).__name__}")
        return dataclasses.replace(found, source=what)
    check_name("an algorithm", what, "such as 'maml-trpo'")
    known = algorithms()
    if what not in known:
        raise UserError(
            f"unknown algorithm {what!r}{did_you_mean(what, known)} Run 'metarl algorithms' for the"
            " list"
        )
    return known[what]
