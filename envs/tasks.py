"""Distributions of tasks: what varies, and how training and held-out tasks are drawn.

A task is a float64 vector whose components have names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import UserError, check_one_of, did_you_mean

Split = Literal["train", "test"]
Tasks = NDArray[np.float64]  # [tasks, task_dim]


class TaskDistribution(ABC):
    """Base class for distributions of tasks with named components, a train and a test split."""

    names: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Number of components of a task vector."""
        return len(self.names)

    @abstractmethod
    def sample(self, rng: np.random.Generator, n: int, split: Split = "train") -> Tasks:
        """Draw n tasks of a split, [n, task_dim].

        Tasks are drawn independently. Only test tasks from a list (`Finite`) are drawn equally
        often.
        """

    def stratified(self, rng: np.random.Generator, n: int) -> Tasks:
        """Draw n training tasks that cover their distribution evenly, [n, task_dim].

        Each single task has the distribution of `sample`. By default tasks are drawn independently.
        """
        return self.sample(rng, n)

    @abstractmethod
    def grid(self, n: int, split: Split = "test") -> Tasks:
        """Return n fixed tasks that cover a split evenly, [n, task_dim]."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the components and their training values."""

    @abstractmethod
    def bounds(self, split: Split = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the smallest and the largest value of each component, [task_dim] both."""

    def extent(self, split: Split = "train") -> Mapping[str, NDArray[Any]]:
        """Return named arrays that identify the tasks of a split.

        By default these are the bounds of each component.
        """
        low, high = self.bounds(split)
        return dict(zip(self.names, np.stack([low, high], axis=1), strict=True))

    def validation(self, rng: np.random.Generator, n: int) -> Tasks:
        """Draw n tasks for the choice between policies, [n, task_dim].

        By default they are training tasks from a separate random stream.
        """
        return self.sample(rng, n)

    def contains(self, tasks: Tasks) -> NDArray[np.bool_]:
        """Return which tasks [n, task_dim] training may draw, [n].

        By default these are the tasks within the bounds of the training tasks.
        """
        low, high = self.bounds("train")
        return np.all((tasks >= low) & (tasks <= high), axis=1)

    def vector(self, components: Mapping[str, float]) -> NDArray[np.float64]:
        """Return the task vector of named components.

        Raises:
            UserError: a name is unknown or missing, or a value is not a finite number.
        """
        for name in components:
            if name not in self.names:
                raise UserError(
                    f"no task component {name!r}{did_you_mean(name, self.names)}"
                    f" (components: {', '.join(self.names)})"
                )
        missing = [name for name in self.names if name not in components]
        if missing:
            raise UserError(
                f"task component {missing[0]!r} is missing (components: {', '.join(self.names)})"
            )
        task = np.array([components[name] for name in self.names], np.float64)
        if not np.isfinite(task).all():
            raise UserError(f"a task must be finite numbers, got {dict(components)}")
        return task


class Uniform(TaskDistribution):
    """Tasks drawn uniformly from a box, such as `Uniform({"velocity": (0.0, 2.0)})`.

    Train and test tasks of one box come from different random streams.

    Args:
        bounds: smallest and largest value of each component, by name.
        test: another box for test tasks, for extrapolation.

    Raises:
        UserError: a lower bound is not below its upper bound, or `test` has other components.
    """

    def __init__(
        self,
        bounds: Mapping[str, tuple[float, float]],
        test: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.names = tuple(bounds)
        if not self.names:
            raise UserError("a box of tasks needs a component, such as velocity=(0.0, 2.0)")
        for name, pair in [*bounds.items(), *(test or {}).items()]:
            if np.shape(pair) != (2,) or not all(isinstance(x, Real) for x in pair):
                raise UserError(f"{name} takes two numbers, (low, high), got {pair!r}")
        if test is not None and tuple(test) != self.names:
            raise UserError(f"test must have the components {self.names}, got {tuple(test)}")
        self._boxes = {
            "train": np.array([bounds[name] for name in self.names], np.float64),
            "test": np.array([(test or bounds)[name] for name in self.names], np.float64),
        }
        for box in self._boxes.values():
            for name, (low, high) in zip(self.names, box, strict=True):
                if not (np.isfinite(low) and np.isfinite(high) and low < high):
                    raise UserError(f"{name} must have low < high, got [{low:g}, {high:g}]")

    def sample(self, rng: np.random.Generator, n: int, split: Split = "train") -> Tasks:
        low, high = self.bounds(split)
        return rng.uniform(low, high, (n, self.dim))

    def stratified(self, rng: np.random.Generator, n: int) -> Tasks:
        # A Latin hypercube (McKay et al. 1979): one task in each of n slices along every axis.
        low, high = self.bounds("train")
        slices = rng.permuted(np.tile(np.arange(n), (self.dim, 1)), axis=1).T
        return low + (slices + rng.uniform(size=(n, self.dim))) / n * (high - low)

    def grid(self, n: int, split: Split = "test") -> Tasks:
        low, high = self.bounds(split)
        if self.dim == 1:
            unit = (np.arange(n)[:, None] + 0.5) / n
        elif self.dim > 8:
            # A Latin hypercube is even along each axis; a lattice of few points is not.
            order = np.random.default_rng(0).permuted(np.tile(np.arange(n), (self.dim, 1)), axis=1)
            unit = (order.T + 0.5) / n
        else:
            # The Kronecker lattice of the generalized golden ratio covers any dimension evenly.
            ratio = 2.0
            for _ in range(64):
                ratio = (1.0 + ratio) ** (1.0 / (self.dim + 1))
            steps = ratio ** -np.arange(1, self.dim + 1)
            unit = (0.5 + np.arange(n)[:, None] * steps) % 1.0
        return low + unit * (high - low)

    def describe(self) -> str:
        box = zip(self.names, self._boxes["train"], strict=True)
        words = [f"{name} in [{low:g}, {high:g}]" for name, (low, high) in box]
        return ", ".join(words if self.dim <= 8 else [*words[:3], f"… ({self.dim} components)"])

    def bounds(self, split: Split = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if split not in self._boxes:
            check_one_of("split", split, get_args(Split))
        low, high = self._boxes[split].T.copy()
        return low, high


class Finite(TaskDistribution):
    """Tasks drawn from a list, such as `Finite(("direction",), [[-1.0], [1.0]])`.

    Args:
        names: names of the components.
        values: the training tasks, [n, task_dim].
        test: the test tasks, [m, task_dim]; by default the training tasks.
        balanced: draw each training task equally often, instead of independently.

    Raises:
        UserError: the list is empty, or the number of components differs from the names.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: Sequence[Sequence[float]],
        test: Sequence[Sequence[float]] | None = None,
        balanced: bool = False,
    ) -> None:
        if isinstance(names, str):
            raise UserError(f"names must be a sequence, such as ({names!r},), got {names!r}")
        if not isinstance(balanced, bool):
            raise UserError(f"balanced must be True or False, got {balanced!r}")
        self.names = tuple(names)
        self.balanced = balanced
        try:
            self._values = {
                "train": np.array(values, np.float64),
                "test": np.array(values if test is None else test, np.float64),
            }
        except (TypeError, ValueError) as error:
            raise UserError(f"tasks must be numbers, [n, {self.dim}]: {error}") from error
        for split, tasks in self._values.items():
            if tasks.ndim != 2 or tasks.shape[1] != self.dim or not len(tasks):
                raise UserError(f"{split} tasks must be [n, {self.dim}], got {tasks.shape}")

    def sample(self, rng: np.random.Generator, n: int, split: Split = "train") -> Tasks:
        values = self._of(split)
        if self.balanced or split == "test":
            return _rounds(values, rng, n)
        return values[rng.integers(len(values), size=n)]

    def stratified(self, rng: np.random.Generator, n: int) -> Tasks:
        return _rounds(self._values["train"], rng, n)

    def grid(self, n: int, split: Split = "test") -> Tasks:
        values = self._of(split)
        return values[np.arange(n) % len(values)]

    def describe(self) -> str:
        tasks = [", ".join(f"{x:g}" for x in task) for task in self._values["train"][:8]]
        more = ", …" if len(self._values["train"]) > 8 else ""
        return f"{', '.join(self.names)} one of {'; '.join(tasks)}{more}"

    def bounds(self, split: Split = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self._of(split).min(0), self._of(split).max(0)

    def contains(self, tasks: Tasks) -> NDArray[np.bool_]:
        return np.array([np.isclose(self._of("train"), task).all(axis=1).any() for task in tasks])

    def _of(self, split: Split) -> Tasks:
        check_one_of("split", split, get_args(Split))
        return self._values[split]

    def extent(self, split: Split = "train") -> Mapping[str, NDArray[Any]]:
        return {"values": self._of(split).copy()}


def _rounds(values: Tasks, rng: np.random.Generator, n: int) -> Tasks:
    """Return whole rounds of all values, then a random part of one more round."""
    whole = np.tile(np.arange(len(values)), n // len(values))
    rest = rng.permutation(len(values))[: n % len(values)]
    return values[np.concatenate([whole, rest])]
