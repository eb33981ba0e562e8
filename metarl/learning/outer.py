"""Outer optimizers: map meta-parameters and a problem to better meta-parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from metarl.envs.errors import check_one_of
from metarl.learning.losses import Loss
from metarl.learning.meta_gradients.problem import Problem
from metarl.models.networks import Params
from metarl.parts import Part, fixed

OuterState = dict[str, Tensor]
"""State of an outer optimizer between steps. It is part of every checkpoint."""

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class OuterOptimizer(Part, ABC):
    """Base class of outer optimizers. The fields are the options `outer.*`.

    An optimizer uses only the problem: its `gradient`, and if it has them `evaluate`, `linearize`
    and the samples.
    """

    section: ClassVar[str] = "outer"
    name: ClassVar[str]
    """Name of `--outer`."""
    needs_policy: ClassVar[bool] = False
    """Whether it supports only samples of policies, not examples of a data set."""
    learns: ClassVar[bool] = True
    """Whether it changes the meta-parameters."""

    schedule: Schedule = "constant"
    """Decay of the step over the run: constant, or cosine, to zero at the end."""

    def __post_init__(self) -> None:
        check_one_of(self.key("schedule"), self.schedule, get_args(Schedule))

    def rate(self, progress: float) -> float:
        """Return the factor of the step size at a progress of the run in [0, 1]."""
        return cosine(progress) if self.schedule == "cosine" else 1.0

    def change(self, planned: int, total: int, iteration: int) -> str:
        """Return, in words, what changes if a run ends at iteration `total` instead of `planned`.

        Args:
            iteration: current iteration of the run.
        """
        before, now = (self.rate(iteration / end) for end in (planned, total))
        if before == now:
            return ""
        return (
            f"{self.key('schedule')} {self.schedule}: the outer step continues at {now:.2f} of its"
            f" size, not {before:.2f}, and is zero at iteration {total}"
        )

    def loss(self, loss: Loss) -> Loss:
        """Return the outer loss that this optimizer minimizes, given the algorithm's outer loss."""
        return loss

    @abstractmethod
    def init(self, meta: Params) -> OuterState:
        """Return the state before the first step."""

    @abstractmethod
    def step(
        self, problem: Problem, meta: Params, state: OuterState, rate: float = 1.0
    ) -> tuple[Params, OuterState, dict[str, Any]]:
        """Return new meta-parameters, the new state, and statistics.

        Args:
            problem: the meta-objective of one iteration.
            meta: meta-parameters, not stacked.
            state: state from `init` or the previous step.
            rate: factor of the step size, see `rate`.

        Returns:
            Statistics include `finite`. It is False if a number was not finite. Then parameters and
            state are unchanged.
        """


@dataclass(frozen=True, kw_only=True)
class NoUpdate(OuterOptimizer):
    """Keep the meta-parameters unchanged."""

    name: ClassVar[str] = "none"
    learns: ClassVar[bool] = False

    schedule: Schedule = fixed("constant")

    def init(self, meta: Params) -> OuterState:
        return {}

    def step(
        self, problem: Problem, meta: Params, state: OuterState, rate: float = 1.0
    ) -> tuple[Params, OuterState, dict[str, Any]]:
        return meta, state, {"finite": True}


def cosine(progress: float) -> float:
    """Return a cosine decay from 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
