"""Task families: make an environment from a task, or a vector environment from many tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_whole
from metarl.envs.tasks import TaskDistribution, Tasks

if TYPE_CHECKING:
    from metarl.envs.vector import TaskVectorEnv


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks that differ by a task vector, and the distribution of that vector."""

    domain: ClassVar[str]
    """Kind of learning that the tasks are for: reinforcement or supervised."""

    name: str
    """Name in tables, figures and run folders."""
    tasks: TaskDistribution
    """Distribution of the task vector."""
    description: str = ""
    """One line for `metarl families`."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Units of task components and info entries, for the axes of pictures."""
    source: tuple[str, Mapping[str, Any]] | None = field(default=None, compare=False)
    """Name and options from which `find_family` rebuilds this family; None if made by hand."""

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, TaskDistribution):
            raise UserError(
                f"{self.name}: tasks must be a distribution, such as"
                f" Uniform({{'mass': (0.5, 2.0)}}), got {self.tasks!r}"
            )

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes the family from others, besides its name and its tasks.

        Values are texts, numbers or lists of these.
        """
        return {"kind": self.domain}


@dataclass(frozen=True, kw_only=True)
class TaskFamily(Family, ABC):
    """Environments that differ by a task vector, and the distribution of that vector."""

    domain: ClassVar[str] = "reinforcement"

    horizon: int
    """Steps after which an episode is truncated."""
    achieved: Mapping[str, str] = field(default_factory=dict)
    """Maps a task component to the entry of `info` that should reach it, a number for each step.

    An example is {"velocity": "x_velocity"}. Two entries are a position in the plane."""

    kept: ClassVar[tuple[str, ...]] = ()
    """Entries of `info` that training needs, a number for each step."""
    parallel: ClassVar[bool] = False
    """Whether several vector environments of the family may run on threads of one process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(f"{self.name}: horizon", self.horizon, 1)

    def identity(self) -> dict[str, Any]:
        return {"kind": "environments", "horizon": int(self.horizon)}

    @abstractmethod
    def make(
        self, task: ArrayLike | None = None, *, render_mode: str | None = None
    ) -> gym.Env[Any, Any]:
        """Return one environment.

        Args:
            task: task of every episode, [task_dim]. None: every reset draws one.
            render_mode: as in `gymnasium.make`.

        Raises:
            UserError: the environment cannot be made, or refuses the task or render_mode.
        """

    @abstractmethod
    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> TaskVectorEnv:
        """Return num_tasks x episodes environments as one vector environment, task-major.

        Args:
            num_tasks: number of tasks.
            episodes: sub-environments of each task.
            options: `autoreset_mode`, `render_mode`, and `threads` for families that are stepped
                natively.

        Raises:
            UserError: a number is below 1, or the environments cannot be made.
        """

    def optimal_return(self, tasks: Tasks) -> NDArray[np.float64] | None:
        """Return the best mean return of each task [n], or None if it is not known exactly."""
        return None
