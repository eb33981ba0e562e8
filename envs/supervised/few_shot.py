"""Few-shot classification: a task has N classes of a data set, its support K examples of each.

Training, validation and test tasks have disjoint classes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_one_of
from metarl.envs.supervised.family import Data, Kind, SupervisedFamily, check_counts
from metarl.envs.tasks import TaskDistribution, Tasks

Part = Literal["train", "validation", "test"]

SHARES = {"validation": 0.16, "test": 0.2}
"""Default shares of the classes: 64, 16 and 20 of 100, as in miniImageNet."""

_GRIDS = {"train": 1, "validation": 2, "test": 3}

# Finn et al. 2017, appendix A.1: steps of 0.4 on 5-way Omniglot. Step sizes and learning rates of
# algorithms that adapt a part or a context were chosen on validation classes.
TRAINING: Mapping[str, Any] = {
    "iterations": 1000,
    "tasks": 8,
    "checkpoint_every": 100,
    "policy.hidden": (),
    "policy.activation": "relu",
    "inner.step_sizes": (0.4,),
    "outer.learning_rate": 3e-3,
    "maml-trpo": {"outer.learning_rate": 3e-3},
    "reptile": {"inner.steps": 5, "inner.step_sizes": (0.1,)},
    # With 2, as in the paper, a task moves no further than in one step of MAML.
    "imaml": {"inner.updates": 16, "inner.proximal": 0.1, "inner.step_sizes": (0.4,)},
    "anil": {"inner.step_sizes": (0.4,)},
    "cavia": {"inner.step_sizes": (1.0,), "inner.context": 100, "policy.hidden": (64,)},
    "protomaml": {"inner.step_sizes": (0.05,), "outer.learning_rate": 1e-3},
    "leopard": {"inner.step_sizes": (0.1,), "policy.hidden": (64,), "outer.learning_rate": 1e-3},
}
"""Default config values of runs on images."""


def _kept(images: ArrayLike) -> NDArray[Any]:
    """Return read-only images: a copy, unless they are already read-only."""
    array = np.asarray(images)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


class Episodes(TaskDistribution):
    """Distribution of tasks: classes drawn without replacement, padded with -1."""

    def __init__(self, parts: Mapping[Part, NDArray[np.int64]], ways: tuple[int, int]) -> None:
        self.parts = {part: _kept(classes) for part, classes in parts.items()}
        self.ways = ways
        self.names = tuple(f"class_{i}" for i in range(ways[1]))

    def sample(self, rng: np.random.Generator, n: int, split: str = "train") -> Tasks:
        check_one_of("split", split, get_args(Part))
        classes = self.parts[split]  # type: ignore[index]
        if len(classes) < self.ways[1]:
            raise UserError(f"{self.ways[1]} ways, but only {len(classes)} {split} classes")
        order = rng.random((n, len(classes))).argsort(axis=1)
        tasks = classes[order[:, : self.ways[1]]].astype(np.float64)
        low, high = self.ways
        if low < high:
            count = rng.integers(low, high + 1, size=(n, 1))
            tasks[np.arange(high) >= count] = -1.0
        return tasks

    def grid(self, n: int, split: str = "test") -> Tasks:
        """Return n tasks from a fixed random stream of the split."""
        check_one_of("split", split, get_args(Part))
        return self.sample(np.random.default_rng([0, _GRIDS[split]]), n, split)

    def validation(self, rng: np.random.Generator, n: int) -> Tasks:
        return self.sample(rng, n, "validation")

    def describe(self) -> str:
        low, high = self.ways
        ways = f"{low}" if low == high else f"{low} to {high}"
        counts = ", ".join(f"{len(c)} {part}" for part, c in self.parts.items())
        return f"{ways} classes of {counts}"

    def bounds(self, split: str = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        check_one_of("split", split, get_args(Part))
        last = max(int(classes.max()) for classes in self.parts.values() if len(classes))
        return np.full(self.dim, -1.0), np.full(self.dim, float(last))

    def extent(self, split: str = "train") -> dict[str, NDArray[Any]]:
        return {"ways": np.array(self.ways), "classes": self.parts[split].copy()}  # type: ignore[index]

    def vector(self, components: Mapping[str, float]) -> NDArray[np.float64]:
        """Return the task vector of named components; see `TaskDistribution.vector`.

        Raises:
            UserError: also if a value is not a class number or is repeated, or classes are missing.
        """
        task = super().vector(components)
        known = np.unique(np.concatenate([*self.parts.values()]))
        for name, value in zip(self.names, task, strict=True):
            if value != -1.0 and value not in known:
                raise UserError(
                    f"{name} must be the number of a class, {known[0]} to {known[-1]}, or -1 for"
                    f" none, got {value:g}"
                )
        present = task[task >= 0]
        if len(np.unique(present)) < max(len(present), self.ways[0]):
            raise UserError(
                f"a task has {self.ways[0]} or more classes, each once: got {present.tolist()}"
            )
        return task


@dataclass(frozen=True, eq=False)
class FewShotFamily(SupervisedFamily):
    """Family of N-way K-shot classification of any labelled images or vectors.

    Arrays are copied, so later changes do not affect tasks. Read-only images, such as
    `np.load(path, mmap_mode="r")`, are not copied.

    Args:
        images: [n, height, width], [n, height, width, channels], [n, channels, height, width] or
            vectors [n, size]; bytes are scaled to [0, 1], floats are not changed.
        labels: [n], numbers or names.
        ways: number of classes of a task, or its smallest and largest value.
        shots: examples of each class in the support.
        queries: examples of each class in the query, disjoint from the support, in training.
        test_queries: the same in evaluation.
        train, validation, test: labels of the classes of each part. Without `train`, the last 20 %
            of the sorted labels are for test tasks and the 16 % before them for validation, unless
            these are given. The rest is for training. With `train`, `test` is required, and
            validation tasks exist only if `validation` is given.

    Raises:
        UserError: Images and labels have wrong shapes, or a pixel is not finite. Ways is below 2,
            or shots, queries or test_queries is below 1. A named class has no image, is in two
            parts, or has too few examples. Training or test tasks have fewer classes than ways.
    """

    images: ArrayLike
    labels: Sequence[Hashable] | NDArray[Any]
    ways: int | tuple[int, int] = 5
    shots: int = 1
    _: KW_ONLY
    queries: int = 5
    test_queries: int = 15
    name: str = "few-shot"
    train: Sequence[Hashable] | None = None
    validation: Sequence[Hashable] | None = None
    test: Sequence[Hashable] | None = None
    tasks: Episodes = field(init=False)
    pixels: NDArray[Any] = field(init=False, repr=False)
    members: NDArray[np.int64] = field(init=False, repr=False)
    """[classes, most]; numbers of a class's images, padded with -1."""

    kind: ClassVar[Kind] = "classification"
    training: ClassVar[Mapping[str, Any]] = TRAINING

    def __post_init__(self) -> None:
        check_counts(self, "shots", "queries", "test_queries")
        ways = tuple(self.ways) if isinstance(self.ways, Sequence) else (self.ways, self.ways)
        if len(ways) != 2 or not 2 <= ways[0] <= ways[1]:
            raise UserError(
                f"{self.name}: ways must be at least 2, or (fewest, most), got {self.ways!r}"
            )
        images, labels = _kept(self.images), np.array(self.labels)
        if images.ndim not in (2, 3, 4) or labels.shape != images.shape[:1]:
            raise UserError(
                f"{self.name}: images must be [n, ...] with a label each, got images"
                f" {list(images.shape)} and labels {list(labels.shape)}"
            )
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            bad = int((~np.isfinite(images)).reshape(len(images), -1).any(axis=1).argmax())
            raise UserError(f"{self.name}: image {bad} has a pixel that is not finite")
        classes, which = np.unique(labels, return_inverse=True)
        parts = self._parts(classes)
        counts = np.bincount(which, minlength=len(classes))
        needed = self.shots + max(self.queries, self.test_queries)
        for part, chosen in parts.items():
            if len(chosen) < ways[1] and part != "validation":
                raise UserError(
                    f"{self.name}: {ways[1]} ways need at least that number of {part} classes, got"
                    f" {len(chosen)} of {len(classes)}; lower ways, or name more classes"
                )
            for c in chosen:
                if counts[c] < needed:
                    raise UserError(
                        f"{self.name}: class {classes[c]} has {counts[c]} examples, but"
                        f" {self.shots} shots with {needed - self.shots} queries need {needed};"
                        " lower shots, queries or test_queries"
                    )
        members = np.full((len(classes), int(counts.max())), -1)
        order = np.argsort(which, kind="stable")
        for c, own in enumerate(np.split(order, np.cumsum(counts)[:-1])):
            members[c, : len(own)] = own
        members.flags.writeable = False
        for key, value in (
            ("images", images),
            ("labels", labels),
            ("pixels", images),
            ("members", members),
            ("tasks", Episodes(parts, (ways[0], ways[1]))),
        ):
            object.__setattr__(self, key, value)

    def _parts(self, classes: NDArray[Any]) -> dict[Part, NDArray[np.int64]]:
        """Return the class numbers of each part."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        found: dict[str, NDArray[np.int64]] = {}
        for part, names in named.items():
            if names is None:
                continue
            unknown = [name for name in names if name not in classes]
            if unknown:
                raise UserError(
                    f"{self.name}: {part} names class {unknown[0]!r}, which has no image"
                )
            found[part] = np.flatnonzero(np.isin(classes, np.asarray(names)))
        free = np.arange(len(classes))
        for part in ("test", "validation"):
            if part not in found:
                count = max(round(SHARES[part] * len(classes)), 1) if named["train"] is None else 0
                left = np.setdiff1d(free, np.concatenate([*found.values(), free[:0]]))
                found[part] = left[len(left) - count :]
        if "train" not in found:
            found["train"] = np.setdiff1d(free, np.concatenate(list(found.values())))
        for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
            if len(both := np.intersect1d(found[one], found[other])):
                raise UserError(
                    f"{self.name}: class {classes[both[0]]} is in both {one} and {other}; parts"
                    " must have disjoint classes"
                )
        return {"train": found["train"], "validation": found["validation"], "test": found["test"]}

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.pixels.shape[1:]

    @property
    def outputs(self) -> int:
        return self.tasks.ways[1]

    @property
    def support_size(self) -> int:
        return self.outputs * self.shots

    def draw(
        self, tasks: Tasks, rng: np.random.Generator, *, supports: int, queries: int
    ) -> list[Data]:
        present = tasks >= 0
        own = self.members[np.where(present, tasks, 0).astype(np.int64)]  # [T, C, most]
        out = own < 0

        def shuffled(among: NDArray[Any]) -> NDArray[Any]:
            keys = np.where(out, 2.0, rng.random(own.shape))[..., : among.shape[2]]
            order = keys.argsort(axis=2)
            return np.take_along_axis(among, order, axis=2)

        first = shuffled(own)
        sets = [first[..., : self.shots]]
        query = first[..., self.shots : self.shots + queries]
        for _ in range(supports - 1):
            # Further supports are drawn again, from examples outside the query.
            keys = np.where(own < 0, 2.0, rng.random(own.shape))
            if queries:
                keys[(own[..., None] == query[:, :, None, :]).any(axis=3)] = 3.0
            order = keys.argsort(axis=2)[..., : self.shots]
            sets.append(np.take_along_axis(own, order, axis=2))
        chosen = [*sets[:supports], *([query] if queries else [])]
        return [self._data(which, present) for which in chosen]

    def _data(self, which: NDArray[Any], present: NDArray[np.bool_]) -> Data:
        tasks, classes, each = which.shape
        pixels = self.pixels[which.reshape(tasks, -1)]
        inputs = pixels.astype(np.float32)
        if self.pixels.dtype == np.uint8:
            inputs /= 255.0
        targets = np.tile(np.repeat(np.arange(classes), each), (tasks, 1))
        valid = np.repeat(present, each, axis=1)
        return Data(inputs, targets, valid, None if present.all() else present)
