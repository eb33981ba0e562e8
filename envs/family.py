"""Task families: what varies between tasks, and how a task becomes an environment.

A task is a float64 vector whose components have names. A `TaskDistribution` draws such vectors;
a `TaskFamily` turns one into a Gymnasium environment, and many into one vector environment.
Families are found by name, among those registered here (`register`) and those that installed
packages offer by an entry point of the group `metarl.families`, or as `module:attribute`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import UserError

if TYPE_CHECKING:
    from metarl.envs.vector import TaskVectorEnv

Split = Literal["train", "test"]
Tasks = NDArray[np.float64]  # [tasks, task_dim]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class TaskDistribution(ABC):
    """Where tasks are drawn from: named components, a train and a test split."""

    names: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Number of components of a task vector."""
        return len(self.names)

    @abstractmethod
    def sample(self, rng: np.random.Generator, n: int, split: Split = "train") -> Tasks:
        """Draw n tasks, [n, task_dim]. The test split of few tasks is drawn balanced."""

    def stratified(self, rng: np.random.Generator, n: int) -> Tasks:
        """Draw n training tasks that cover their distribution evenly, [n, task_dim].

        Each alone is distributed as `sample` draws it. A distribution that has no such draw of its
        own samples independently.
        """
        return self.sample(rng, n)

    @abstractmethod
    def grid(self, n: int, split: Split = "test") -> Tasks:
        """Return n tasks that cover a split evenly, [n, task_dim], the same at every call."""

    @abstractmethod
    def describe(self) -> str:
        """Return the components and their training values in words."""

    @abstractmethod
    def bounds(self, split: Split = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the smallest and the largest value of each component, [task_dim] both."""

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
            raise UserError(f"task component {missing[0]!r} is missing")
        task = np.array([components[name] for name in self.names], np.float64)
        if not np.isfinite(task).all():
            raise UserError(f"a task must be finite numbers, got {dict(components)}")
        return task


class Uniform(TaskDistribution):
    """Tasks drawn uniformly from a box, such as `Uniform({"velocity": (0.0, 2.0)})`.

    Train and test tasks of one box are kept apart by their random streams; `test` names another
    box to test on, for extrapolation.

    Raises:
        UserError: a lower bound is not below its upper bound, or `test` has other components.
    """

    def __init__(
        self,
        bounds: Mapping[str, tuple[float, float]],
        test: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.names = tuple(bounds)
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
            # A Latin hypercube: even along each axis, where no lattice of few points is.
            order = np.random.default_rng(0).permuted(np.tile(np.arange(n), (self.dim, 1)), axis=1)
            unit = (order.T + 0.5) / n
        else:
            # Kronecker lattice of the generalized golden ratio: even cover in any dimension.
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
        box = self._boxes[split]
        return box[:, 0], box[:, 1]


class Finite(TaskDistribution):
    """Tasks drawn from a list, such as `Finite(("direction",), [[-1.0], [1.0]])`.

    Args:
        names: names of the components.
        values: the training tasks, [n, task_dim].
        test: the test tasks; by default the training tasks, where a family has no others.
        balanced: draw each training task equally often, instead of independently.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: Sequence[Sequence[float]],
        test: Sequence[Sequence[float]] | None = None,
        balanced: bool = False,
    ) -> None:
        self.names = tuple(names)
        self.balanced = balanced
        self._values = {
            "train": np.array(values, np.float64),
            "test": np.array(values if test is None else test, np.float64),
        }
        for split, tasks in self._values.items():
            if tasks.ndim != 2 or tasks.shape[1] != self.dim or not len(tasks):
                raise UserError(f"{split} tasks must be [n, {self.dim}], got {tasks.shape}")

    def sample(self, rng: np.random.Generator, n: int, split: Split = "train") -> Tasks:
        values = self._values[split]
        if self.balanced or split == "test":
            return _rounds(values, rng, n)
        return values[rng.integers(len(values), size=n)]

    def stratified(self, rng: np.random.Generator, n: int) -> Tasks:
        return _rounds(self._values["train"], rng, n)

    def grid(self, n: int, split: Split = "test") -> Tasks:
        values = self._values[split]
        return values[np.arange(n) % len(values)]

    def describe(self) -> str:
        tasks = [", ".join(f"{x:g}" for x in task) for task in self._values["train"][:8]]
        more = ", …" if len(self._values["train"]) > 8 else ""
        return f"{', '.join(self.names)} one of {'; '.join(tasks)}{more}"

    def bounds(self, split: Split = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self._values[split].min(0), self._values[split].max(0)


def _rounds(values: Tasks, rng: np.random.Generator, n: int) -> Tasks:
    """Return whole rounds of all values, then a random part of one more round."""
    whole = np.tile(np.arange(len(values)), n // len(values))
    rest = rng.permutation(len(values))[: n % len(values)]
    return values[np.concatenate([whole, rest])]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks that differ by a task vector, and the distribution of that vector."""

    name: str
    tasks: TaskDistribution
    description: str = ""
    units: Mapping[str, str] = field(default_factory=dict)
    """Units of task components and info entries, for the axes of pictures."""
    source: tuple[str, Mapping[str, Any]] | None = field(default=None, compare=False)
    """Name and options that `find_family` rebuilds this family from; None if made by hand."""


@dataclass(frozen=True, kw_only=True)
class TaskFamily(Family, ABC):
    """Environments that differ by a task vector, and the distribution of that vector."""

    horizon: int
    """Steps after which an episode is truncated."""
    achieved: Mapping[str, str] = field(default_factory=dict)
    """Entry of `info`, a number each step, that a component of the task asks for: velocity asked,
    x_velocity achieved. Two of them are a place in the plane."""

    parallel: ClassVar[bool] = False
    """Whether several vector environments of the family run at once on threads of one process."""
    tells_success: ClassVar[bool] = False
    """Whether `info["success"]` of a step says where the task is done; evaluation reports it."""

    def __post_init__(self) -> None:
        if not isinstance(self.horizon, int) or self.horizon < 1:
            raise UserError(
                f"{self.name}: horizon must be a whole number of at least 1, got {self.horizon!r}"
            )

    @abstractmethod
    def make(
        self, task: NDArray[np.float64] | None = None, *, render_mode: str | None = None
    ) -> gym.Env:
        """Return one environment, fixed to a task, or drawing a new one at every reset."""

    @abstractmethod
    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> TaskVectorEnv:
        """Return num_tasks x episodes environments in one, task-major.

        Options are those of `TaskVectorEnv`; native ones also take `threads`.
        """

    def optimal_return(self, tasks: Tasks) -> NDArray[np.float64] | None:
        """Return the best mean return of each task [n], where the family knows it exactly."""
        return None


# The registry ------------------------------------------------------------------------------------

Factory = Callable[..., Family]
ENTRY_POINTS = "metarl.families"
_factories: dict[str, Factory] = {}
_data_sets: dict[str, Factory] = {}


def register(factory: Factory) -> Factory:
    """Offer a function that returns a family under its own name, '_' read as '-' (decorator)."""
    _factories[factory.__name__.replace("_", "-")] = factory
    return factory


def register_data(training: Mapping[str, Any]) -> Callable[[Factory], Factory]:
    """Offer a function that returns a family of supervised tasks, as `register` does (decorator).

    Args:
        training: values of the config that a run on it starts from, see `training_values`.
    """

    def add(factory: Factory) -> Factory:
        _data_sets[factory.__name__.replace("_", "-")] = factory
        factory.training = training  # type: ignore[attr-defined]
        return factory

    return add


def family_names() -> list[str]:
    """Return the names of families of environments, registered here or by a package, sorted."""
    return sorted({*_factories, *_offered()})


def data_names() -> list[str]:
    """Return the names of families of supervised tasks, sorted."""
    return sorted(_data_sets)


def description(name: str) -> str:
    """Return the first line of what documents a registered family."""
    return (inspect.getdoc(_find(name)) or "").partition("\n")[0]


def training_values(name: str) -> Mapping[str, Any]:
    """Return the values of the config that a run on a family starts from, by dotted key.

    An entry that is a mapping holds those of the algorithm that is its key. None, where the family
    cannot be loaded, which is told where it is made.
    """
    try:
        return getattr(_find(name), "training", {})
    except UserError:
        return {}


def make_family(name: str, **options: Any) -> TaskFamily:
    """Return a family of environments by its name, or by `module:attribute`; see `find_family`.

    Raises:
        UserError: besides, its tasks are supervised ones.
    """
    family = find_family(name, **options)
    if not isinstance(family, TaskFamily):
        raise UserError(f"{name} has supervised tasks, and this needs environments")
    return family


def find_family(name: str, **options: Any) -> Family:
    """Return a family by its name, or by `module:attribute`.

    What is named is a family, or a function that returns one and takes the options. The current
    folder is searched last, so that a user's own files never shadow an installed package.

    Raises:
        UserError: the name or an option is unknown, or the options do not make a family.
    """
    factory = _find(name)
    if factory is None:
        hint = did_you_mean(name, [*family_names(), *data_names()])
        raise UserError(f"no task family {name!r}{hint} (metarl families lists them)")
    if not isinstance(factory, Family) and not callable(factory):
        raise UserError(
            f"{name} must be a TaskFamily or a function that returns one,"
            f" got {type(factory).__name__}"
        )
    if isinstance(factory, Family):
        if options:
            raise UserError(f"{name} is a family, not a function: it takes no options")
        family = factory
    else:
        for option in options:
            known = _parameters(factory)
            if option not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise UserError(
                    f"{name} has no option {option!r}{did_you_mean(option, known)} ({takes})"
                )
        try:
            family = factory(**options)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError) or not options:
                raise
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise UserError(f"{name} cannot be made with {given}: {error}") from error
        if not isinstance(family, Family):
            raise UserError(f"{name} must return a TaskFamily, got {type(family).__name__}")
    return dataclasses.replace(family, source=(name, dict(options)))


def import_source(name: str) -> None:
    """Import what a family's name stands for, as `make_family` does, and make nothing of it.

    Raises:
        UserError: it cannot be imported.
    """
    _find(name)


def option_defaults(name: str) -> dict[str, Any]:
    """Return the options that a family's name takes and their defaults, {} if it is not known."""
    factory = _find(name)
    return _parameters(factory) if callable(factory) else {}


def _parameters(factory: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(factory).parameters.items()}


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return {"low": 0.5} for ("low=0.5",); a value that is no Python literal is a string.

    true and false are taken as True and False.

    Raises:
        UserError: a text has no '='.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"a family option is written name=value, got {text!r}")
        try:
            options[key.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.replace("-", "_")] = {"true": True, "false": False}.get(value, value)
    return options


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    """Families of installed packages; a name of ours is ours."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _find(name: str) -> Any:
    """Return the family or factory of a name, None if there is none."""
    if ":" in name:
        return _import_attribute(name)
    ours = _data_sets.get(name) or _factories.get(name)
    if ours is not None or (point := _offered().get(name)) is None:
        return ours
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        package = point.dist.name if point.dist is not None else "an installed package"
        raise UserError(f"{name} of {package} cannot be loaded: {error}") from error


def _import_attribute(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"a family is named module:attribute, got {name!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # a module that the user's module needs, not the one asked for
        raise UserError(f"no module {module_name!r} here or among the installed ones") from error
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, vars(module))
        raise UserError(f"module {module_name!r} has no {attribute!r}{hint}")
    return getattr(module, attribute)
