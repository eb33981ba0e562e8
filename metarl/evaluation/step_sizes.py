"""The step sizes of each row of an evaluation: given, tuned, or the preset's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from metarl.config.resolve import reference_step_sizes
from metarl.envs.errors import NonFiniteError, UserError
from metarl.evaluation.evaluator import Evaluator, Sizes
from metarl.evaluation.groups import START
from metarl.plain_json import finite
from metarl.policies.meta_policy import MetaPolicy

FACTORS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Factors of a policy's own step size in training, among which `tune_step_sizes` chooses."""


@dataclass
class StepSizes:
    """The step sizes that each row is evaluated with."""

    given: Mapping[str, tuple[float, ...]]
    """Given sizes by argument of `evaluate`."""
    tuner: Evaluator | None = None
    """Measures one step on validation tasks; None: nothing is tuned."""
    tried: dict[str, dict[float, float]] = field(default_factory=dict)
    """The measure after one step, mean of tasks and seeds, by row and factor of its size."""

    arguments: ClassVar[Mapping[str, str]] = {
        "untrained": "random_step_sizes",
        "pretrained": "pretrained_step_sizes",
    }
    """Arguments of `evaluate`, by the role of a reference."""

    def check(self, references: Iterable[MetaPolicy]) -> None:
        """Raise UserError if pretrained step sizes are given, and no reference is pretrained."""
        key = self.arguments["pretrained"]
        if self.given[key] and all(p.algorithm.role != "pretrained" for p in references):
            raise UserError(f"{key} has no effect: no reference is a pretrained policy")

    def own(self, name: str, members: Sequence[MetaPolicy]) -> Sizes:
        """Return the step sizes of the evaluated policy."""
        return self._of(name, members, self.given["step_sizes"], ())

    def reference(self, name: str, members: Sequence[MetaPolicy]) -> Sizes:
        """Return the step sizes of a reference: given, tuned, or as its preset has them."""
        algorithm = members[0].algorithm
        given = self.given.get(self.arguments.get(algorithm.role, ""), ())
        usual = reference_step_sizes(members[0].setup, algorithm.name)
        return self._of(name, members, given, usual)

    def start(self, start: MetaPolicy) -> Sizes:
        """Return the step sizes of the random initialization; by default the evaluated policy's."""
        usual = reference_step_sizes(start.setup, START) or self.given["step_sizes"]
        return self._of(START, [start], self.given[self.arguments["untrained"]], usual)

    def _of(
        self,
        name: str,
        members: Sequence[MetaPolicy],
        given: tuple[float, ...],
        usual: tuple[float, ...],
    ) -> Sizes:
        if given or self.tuner is None:
            return given or usual or None
        tried = self.tried[name] = _tuned(self.tuner, members)
        if not tried:
            return None
        sign = self.tuner.measure.sign
        return _scaled(max(tried, key=lambda factor: sign * tried[factor]))

    def to_json(self) -> dict[str, Any]:
        """Return what was tried, plain JSON values."""
        return finite({n: [[f, x] for f, x in tried.items()] for n, tried in self.tried.items()})


def _tuned(evaluator: Evaluator, members: Sequence[MetaPolicy]) -> dict[float, float]:
    """Return the measure after one step, mean of tasks and seeds, by the factor of its size.

    None are tried if the policy learned its sizes, or takes no step. A factor whose step is not
    finite has the worst value, minus or plus infinity.
    """
    algorithm = members[0].algorithm
    if algorithm.inner.learns_step_sizes or not algorithm.takes_inner_steps:
        return {}
    returns = {}
    for factor in FACTORS:
        try:
            returns[factor] = evaluator.curve(members, _scaled(factor)).returns[1]
        except NonFiniteError:
            returns[factor] = -math.inf * evaluator.measure.sign
    return returns


def _scaled(factor: float) -> Callable[[MetaPolicy], Sequence[float]]:
    """Return a factor of the first step size in training, then half of that, by policy."""

    def sizes(policy: MetaPolicy) -> Sequence[float]:
        first = factor * policy.training_step_sizes[0]
        return (first, first / 2)

    return sizes
