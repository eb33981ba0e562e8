"""Tasks of an evaluation: held-out or chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_one_of, check_whole
from metarl.envs.single import task_vector
from metarl.envs.tasks import TaskDistribution
from metarl.evaluation.statistics import Floats
from metarl.sampling.rollouts import RandomKey

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class TaskChoice:
    """Tasks of an evaluation, and the corresponding validation tasks."""

    distribution: TaskDistribution
    count: int
    seed: int
    drawn: bool = False
    """Sample the test tasks, instead of covering the split evenly."""
    chosen: Floats | None = None
    """[count, task_dim]; they replace the test tasks."""

    @staticmethod
    def of(
        distribution: TaskDistribution,
        tasks: int | ArrayLike,
        *,
        seed: int,
        drawn: bool = False,
        split: str = "test",
    ) -> TaskChoice:
        """Return the choice of a number of held-out tasks, or of the tasks [n, task_dim].

        Raises:
            UserError: `tasks` is neither, a value is not allowed, or an option that selects
                held-out tasks is given with chosen ones.
        """
        check_one_of("split", split, ("test", "validation"))
        array: NDArray[Any]
        try:
            array = np.asarray(tasks, np.float64)
        except (TypeError, ValueError):  # strings, or ragged
            array = np.empty(0)
        if np.isscalar(tasks) or array.ndim == 0:
            return TaskChoice(distribution, check_whole("tasks", tasks, 1), seed, drawn)
        names = distribution.names
        if array.ndim != 2 or array.shape[-1] != len(names) or not array.size:
            raise UserError(
                f"tasks must be a number of tasks, or tasks [n, {len(names)}] with the components"
                f" {', '.join(names)}, got {tasks!r}"
            )
        for key, selects in (("drawn", drawn), ("split", split != "test")):
            if selects:
                raise UserError(f"{key} selects held-out tasks: it has no effect on chosen tasks")
        rows = [task_vector(distribution, row) for row in array]
        return TaskChoice(distribution, len(rows), seed, drawn, np.stack(rows))

    def tasks(self, split: Split) -> tuple[Floats, RandomKey]:
        """Return tasks [count, task_dim], and the key of their random streams."""
        key = RandomKey(self.seed, split=split)
        if split == "validation":
            return self.distribution.validation(key.tasks(), self.count), key
        if self.chosen is not None:
            return self.chosen, key
        if self.drawn:
            return self.distribution.sample(key.tasks(), self.count, "test"), key
        return self.distribution.grid(self.count), key
