"""Common interface of evaluation on environments and on supervised tasks."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ProcessGroup
from metarl.envs.errors import UserError, check_whole
from metarl.envs.family import Family
from metarl.evaluation.curves import Curve, Measure
from metarl.evaluation.statistics import Floats
from metarl.policies.meta_policy import MetaPolicy
from metarl.policies.policy import Policy
from metarl.runs.fingerprint import Spaces
from metarl.sampling.rollouts import RandomKey

Sizes = Sequence[float] | Callable[[MetaPolicy], Sequence[float]] | None
"""Sizes of the inner steps, given or by policy; None: the policy's step sizes."""

EPISODES = 20
"""Default number of episodes per task."""
STEPS = 3
"""Default number of inner steps."""

EPISODES_PER_STEP = (1, 5, 10, 20)
"""Default numbers of episodes per inner step, if returns are measured against experience."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an evaluation; see `evaluate`.

    Raises:
        UserError: a number is out of range.
    """

    episodes: int = EPISODES
    steps: int = STEPS
    seed: int = 0
    deterministic: bool = False
    workers: int = 0
    experience: int = 0
    episodes_per_step: Sequence[int] | None = None
    """None: each of `EPISODES_PER_STEP` that allows an inner step."""

    def __post_init__(self) -> None:
        least = {"episodes": 1, "steps": 0, "seed": 0, "workers": 0, "experience": 0}
        for key, smallest in least.items():
            object.__setattr__(self, key, check_whole(key, getattr(self, key), smallest))
        self.step_episodes()

    def step_episodes(self) -> tuple[int, ...]:
        """Return the numbers of episodes per inner step of the curves against experience.

        Raises:
            UserError: a number is out of range, or given twice.
        """
        given, most = self.episodes_per_step, self.experience
        if given is None:
            return tuple(n for n in EPISODES_PER_STEP if n <= most)
        numbers = list(given) if np.iterable(given) else [given]
        for n in numbers:
            check_whole("episodes_per_step", n, 1)
            if n > most:
                raise UserError(
                    f"episodes_per_step {n} needs an experience of {n} episodes or more, got"
                    f" {most}: raise experience, or give smaller numbers"
                )
        if not numbers or len({*numbers}) < len(numbers):
            raise UserError(f"episodes_per_step must be different numbers, got {given!r}")
        return tuple(map(int, numbers))


@dataclass(frozen=True)
class OneTask:
    """Result of adaptation to one task."""

    values: tuple[float, float]
    """The measure before and after adaptation."""
    measure: Measure
    steps: int
    samples: str
    """Samples of each inner step, in words."""
    policy: Policy | None = None
    """The adapted policy, if it can be saved."""
    unit: str = "inner step"
    """Unit of adaptation: inner steps, or episodes of a trial."""


class Evaluator(ABC):
    """Base class of evaluators, which use the same tasks and random numbers for all policies.

    Args:
        family: family of the tasks.
        tasks: [T, task_dim]
        key: key of the random streams.
        options: number of steps and other options.
        pool: threads, and the processes that share the tasks.
        check: check the environments first, once.
    """

    def __init__(
        self,
        family: Family,
        tasks: Floats,
        key: RandomKey,
        options: Options,
        pool: ChunkPool,
        *,
        check: bool = True,
    ) -> None:
        self.family, self.all_tasks, self.key = family, tasks, key
        self.options, self.pool, self.check = options, pool, check

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """Measure of the curves."""

    @staticmethod
    @abstractmethod
    def require(family: Family, options: Options, process_group: ProcessGroup) -> None:
        """Raise UserError if an option has no effect on the tasks of a family."""

    @staticmethod
    def spaces(family: Family) -> Spaces | None:
        """Return the observation and action space of environments; None for a data set."""
        return None

    @staticmethod
    @abstractmethod
    def on_one_task(
        meta: MetaPolicy,
        task: NDArray,
        *,
        steps: int = 1,
        episodes: int = EPISODES,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> OneTask:
        """Adapt a policy to one task like `MetaPolicy.adapt`, and measure it before and after.

        Raises:
            UserError: an option has no effect.
        """

    @abstractmethod
    def curve(self, members: Sequence[MetaPolicy], sizes: Sizes) -> Curve:
        """Return the curve of a policy's seeds; an oracle takes no step."""

    def repeated(self, count: int) -> Evaluator:
        """Return an evaluator with the same tasks and environments, but other random numbers.

        Args:
            count: number of the repeat; 0 has the same random numbers.
        """
        other = copy.copy(self)
        first = self.key.first_task + count * len(self.all_tasks)
        other.key = dataclasses.replace(self.key, first_task=first)
        return other

    @abstractmethod
    def scratch(
        self, like: MetaPolicy, learning_rate: float
    ) -> tuple[dict[str, Curve], dict[str, Curve]]:
        """Return curves of training from scratch on each task, by name.

        Returns:
            curves with the experience of 0 ... K inner steps, and with ten times as much. Curves
            against experience, if it is measured.
        """

    def own_rows(self) -> dict[str, Curve]:
        """Return the curves of references that need no policy, by name."""
        return {}

    def settled(self, curves: Mapping[str, Curve]) -> dict[str, Curve]:
        """Return the final curves after all are measured."""
        return dict(curves)

    @abstractmethod
    def setting(self) -> dict[str, Any]:
        """Return the setting of the measured values, as JSON values."""

    def close(self) -> None:  # noqa: B027  (there may be nothing to close)
        """Close the environments."""
