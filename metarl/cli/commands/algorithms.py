"""List the algorithms and their papers."""

from __future__ import annotations

from dataclasses import dataclass

from metarl.cli.streams import say


@dataclass(frozen=True, kw_only=True)
class Algorithms:
    """Options of `metarl algorithms`."""


def algorithms(command: Algorithms) -> int:
    """Run `metarl algorithms`."""
    from metarl.algorithms import algorithms as known

    for algorithm in known().values():
        say(f"{algorithm.name:<18}{algorithm.summary}\n{'':<18}{algorithm.citation}")
    return 0
