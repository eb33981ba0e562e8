"""Common interface of evaluation on environments and on supervised tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ProcessGroup
from metarl.envs.errors import check_whole
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

    def __post_init__(self) -> None:
        for key, least in (("episodes", 1), ("steps", 0), ("seed", 0), ("workers", 0)):
            check_whole(key, getattr(self, key), least)
            object.__setattr__(self, key, int(getattr(self, key)))


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
    unit: str = "step"
    """What the policy adapts in: a step, or an episode."""


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

    @abstractmethod
    def scratch(self, like: MetaPolicy, learning_rate: float) -> dict[str, Curve]:
        """Return the curves of training from scratch on each task, by name."""

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
