"""Families of supervised tasks: a task vector defines a task, and examples are drawn from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import check_one_of, check_whole
from metarl.envs.family import Family
from metarl.envs.tasks import Tasks

Floats = NDArray[np.float64]

# Finn et al. 2017, section 5.1 and appendix A.1, and the authors' code, on sinusoids: 70,000
# iterations of 25 tasks, Adam at 0.001. The step sizes of ANIL and CAVIA are from Zintgraf et al.
# 2019 (section 5.1: 1.0) and from a search on validation tasks.
TRAINING: Mapping[str, Any] = {
    "iterations": 20000,
    "tasks": 25,
    "checkpoint_every": 1000,
    "policy.hidden": (40, 40),
    "policy.activation": "relu",
    "inner.step_sizes": (0.01,),
    "outer.learning_rate": 1e-3,
    "reptile": {"inner.steps": 5, "inner.step_sizes": (0.02,)},
    "imaml": {
        "inner.updates": 16,
        "inner.proximal": 10.0,
        "inner.step_sizes": (0.01,),
        "inner.backtrack": True,
    },
    "anil": {"inner.step_sizes": (0.01,)},
    "cavia": {"inner.step_sizes": (1.0,), "inner.context": 4},
}
"""Default config values of runs on functions."""


class Data(NamedTuple):
    """Batch of N examples of each of T tasks."""

    inputs: NDArray[np.float32]
    """[T, N, *input_shape]"""
    targets: NDArray[Any]
    """[T, N, size] float32 for regression, or [T, N] int64 class numbers."""
    valid: NDArray[np.bool_]
    """[T, N]; False for padding of tasks with fewer examples."""
    classes: NDArray[np.bool_] | None = None
    """[T, C]; the classes of each task. None: all classes."""


Kind = Literal["regression", "classification"]


@dataclass(frozen=True, kw_only=True)
class SupervisedFamily(Family, ABC):
    """Base class of supervised tasks that differ by a task vector."""

    domain: ClassVar[str] = "supervised"

    queries: int = 10
    """Query examples per task, or per class, in training."""
    test_queries: int = 100
    """Query examples per task, or per class, in evaluation."""

    kind: ClassVar[Kind] = "regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(f"{self.name}: kind", self.kind, get_args(Kind))

    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "inputs": list(self.input_shape),
            "outputs": self.outputs,
            "support": self.support_size,
            "queries": self.queries,
            "test queries": self.test_queries,
        }

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Size of a regression target, or largest number of classes of a task."""

    @property
    @abstractmethod
    def support_size(self) -> int:
        """Largest number of examples in a task's support."""

    @abstractmethod
    def draw(
        self, tasks: Tasks, rng: np.random.Generator, *, supports: int, queries: int
    ) -> list[Data]:
        """Draw `supports` supports of tasks [T, task_dim], then a query disjoint from them.

        Args:
            tasks: task vectors.
            rng: random generator.
            supports: number of supports.
            queries: examples of the query, per task or per class; 0: without a query.
        """


@dataclass(frozen=True, kw_only=True)
class FunctionFamily(SupervisedFamily):
    """Regression on y = function(x, task), for numbers x drawn uniformly from an interval.

    Raises:
        UserError: shots, queries or test_queries is not a whole number of at least 1.
    """

    function: Callable[[Floats, Tasks], Floats]
    """(x [T, N], tasks [T, task_dim]) -> y [T, N]"""
    interval: tuple[float, float]
    """Smallest and largest x."""
    shots: int = 10
    """Examples of the support."""

    training: ClassVar[Mapping[str, Any]] = TRAINING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "shots", "queries", "test_queries")

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "interval": list(self.interval)}

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def outputs(self) -> int:
        return 1

    @property
    def support_size(self) -> int:
        return self.shots

    def draw(
        self, tasks: Tasks, rng: np.random.Generator, *, supports: int, queries: int
    ) -> list[Data]:
        counts = [self.shots] * supports + [queries] * bool(queries)
        return [self.at(rng.uniform(*self.interval, (len(tasks), n)), tasks) for n in counts]

    def at(self, x: Floats, tasks: Tasks) -> Data:
        """Return the examples at x, [T, N]."""
        y = self.function(x.copy(), tasks.copy())  # the function may write to its arguments
        inputs, targets = (values[..., None].astype(np.float32) for values in (x, y))
        return Data(inputs, targets, np.ones(x.shape, bool))


def check_counts(family: SupervisedFamily, *names: str) -> None:
    """Raise UserError unless these are whole numbers of at least 1."""
    for name in names:
        check_whole(f"{family.name}: {name}", getattr(family, name), 1)
