"""Few-shot classification: N classes of a data set make a task, K examples of each its support.

Classes of training, validation and test tasks are apart.
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
"""Of the classes, where they are not named: 64, 16 and 20 of 100, as of miniImageNet."""

_GRIDS = {"train": 1, "validation": 2, "test": 3}

# Finn et al. 2017, appendix A.1: steps of 0.4 on 5-way Omniglot. Where a part adapts or a context,
# sizes and learning rates were chosen on validation classes.
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
    # A pull of 2, as in the paper, lets a task go no further than one step of MAML's.
    "imaml": {"inner.updates": 16, "inner.proximal": 0.1, "inner.step_sizes": (0.4,)},
    "anil": {"inner.step_sizes": (0.4,)},
    "cavia": {"inner.step_sizes": (1.0,), "inner.context": 100, "policy.hidden": (64,)},
    "protomaml": {"inner.step_sizes": (0.05,), "outer.learning_rate": 1e-3},
    "leopard": {"inner.step_sizes": (0.1,), "policy.hidden": (64,), "outer.learning_rate": 1e-3},
}
"""Values of the config that a run on images starts from."""


def _kept(images: ArrayLike) -> NDArray:
    """Return images that nobody writes to: a copy, unless they are read-only."""
    array = np.asarray(images)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


class Episodes(TaskDistribution):
    """Tasks of some classes, drawn without replacement: class numbers, -1 where there are fewer."""

    def __init__(self, parts: Mapping[Part, NDArray[np.int64]], ways: tuple[int, int]) -> None:
        self.parts = {part: _kept(classes) for part, classes in parts.items()}
        self.ways = ways
        self.names = tuple(f"class_{i}" for i in range(ways[1]))

    def sample(self, rng: np.random.Generator, n: int, split: str = "train") -> Tasks:
        check_one_of("split", split, get_args(Part))
        classes = self.parts[split]  # type: ignore[index]
        if len(classes) < self.ways[1]:
            raise UserError(f"{self.ways[1]} ways need as many {split} classes: {len(classes)}")
        order = rng.random((n, len(classes))).argsort(axis=1)
        tasks = classes[order[:, : self.ways[1]]].astype(np.float64)
        low, high = self.ways
        if low < high:
            count = rng.integers(low, high + 1, size=(n, 1))
            tasks[np.arange(high) >= count] = -1.0
        return tasks

    def grid(self, n: int, split: str = "test") -> Tasks:
        """Return n tasks drawn from a stream of the split's own."""
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

    def extent(self, split: str = "train") -> dict[str, NDArray]:
        return {"ways": np.array(self.ways), "classes": self.parts[split].copy()}  # type: ignore[index]

    def vector(self, components: Mapping[str, float]) -> NDArray[np.float64]:
        """Return the task vector of named components; see `TaskDistribution.vector`.

        Raises:
            UserError: also if a value is no class number, or given twice, or they are too few.
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
    """N-way K-shot classification of any labelled images or vectors.

    Arrays are copied, so that later changes of them change no task. Images that are read-only, as
    of `np.load(path, mmap_mode="r")`, are taken as they are.

    Args:
        images: [n, height, width], [n, height, width, channels], [n, channels, height, width] or
            vectors [n, size]; bytes are scaled to [0, 1], floats are taken as they are.
        labels: [n], numbers or names.
        ways: classes of a task, or the fewest and the most of them.
        shots: examples of each class in the support.
        queries: examples of each class in the query, disjoint from the support, in training.
        test_queries: the same in evaluation.
        train, validation, test: labels of the classes of each kind of tasks. Without `train`, the
            last 20 % of the sorted labels are for test tasks and the 16 % before them for
            validation, unless named, and all that are left are for training. With `train`, `test`
            must be given too, and there are validation tasks only if `validation` is given.

    Raises:
        UserError: images and labels have other shapes; a pixel is not finite; ways is below 2, or
            shots, queries or test_queries below 1; a named class has no image, is in two parts, or
            has too few examples; training or test tasks have fewer classes than ways.
    """

    images: ArrayLike
    labels: Sequence[Hashable] | NDArray
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
    pixels: NDArray = field(init=False, repr=False)
    members: NDArray[np.int64] = field(init=False, repr=False)
    """[classes, most]; numbers of a class's images, -1 beyond its last."""

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
                    f"{self.name}: {ways[1]} ways need as many {part} classes, there are"
                    f" {len(chosen)} of {len(classes)}: lower ways, or name more classes"
                )
            for c in chosen:
                if counts[c] < needed:
                    raise UserError(
                        f"{self.name}: class {classes[c]} has {counts[c]} examples, and"
                        f" {self.shots} shots with {needed - self.shots} queries need {needed}:"
                        " lower shots,"
                        " queries or test_queries"
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

    def _parts(self, classes: NDArray) -> dict[Part, NDArray[np.int64]]:
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
                    f"{self.name}: class {classes[both[0]]} is in both {one} and {other}: tasks to"
                    " test on must be of other classes"
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

        def shuffled(among: NDArray) -> NDArray:
            keys = np.where(out, 2.0, rng.random(own.shape))[..., : among.shape[2]]
            order = keys.argsort(axis=2)
            return np.take_along_axis(among, order, axis=2)

        first = shuffled(own)
        sets = [first[..., : self.shots]]
        query = first[..., self.shots : self.shots + queries]
        for _ in range(supports - 1):
            # Further supports are drawn anew, of what is no query.
            keys = np.where(own < 0, 2.0, rng.random(own.shape))
            if queries:
                keys[(own[..., None] == query[:, :, None, :]).any(axis=3)] = 3.0
            order = keys.argsort(axis=2)[..., : self.shots]
            sets.append(np.take_along_axis(own, order, axis=2))
        chosen = [*sets[:supports], *([query] if queries else [])]
        return [self._data(which, present) for which in chosen]

    def _data(self, which: NDArray, present: NDArray[np.bool_]) -> Data:
        tasks, classes, each = which.shape
        pixels = self.pixels[which.reshape(tasks, -1)]
        inputs = pixels.astype(np.float32)
        if self.pixels.dtype == np.uint8:
            inputs /= 255.0
        targets = np.tile(np.repeat(np.arange(classes), each), (tasks, 1))
        valid = np.repeat(present, each, axis=1)
        return Data(inputs, targets, valid, None if present.all() else present)
