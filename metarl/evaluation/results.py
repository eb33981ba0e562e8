"""What an evaluation finds: curves, what is said of them, JSON."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from metarl.algorithms.algorithm import Role
from metarl.evaluation.statistics import (
    FEWEST,
    Floats,
    bootstrap_interval,
    interquartile_mean,
    interquartile_mean_interval,
)
from metarl.evaluation.tables import as_text, tables, task_table
from metarl.plain_json import plain

RowRole = Literal[Role, "nearest-prototype", "from-scratch"]
"""Role of a row of an evaluation: that of its algorithm, or of a reference without one."""

ROLES: tuple[RowRole, ...] = (
    "meta-learner", "nearest-prototype", "pretrained", "untrained", "oracle", "from-scratch",
)  # fmt: skip
"""In the order of the rows of a table."""


@dataclass(frozen=True)
class Measure:
    """What curves are of."""

    key: str
    """Name in a data frame."""
    name: str
    """Name in tables and pictures."""
    sign: float
    """1 where more is better, -1 where less is."""
    digits: int
    """After the decimal point."""

    def number(self, value: float | np.floating, *, signed: bool = True) -> str:
        """Return a value as it is printed."""
        return f"{value:{'+' if signed else ''}.{self.digits}f}"


RETURN = Measure("return", "return", 1.0, 1)
ACCURACY = Measure("accuracy", "accuracy, %", 1.0, 1)
SQUARED_ERROR = Measure("loss", "mean squared error", -1.0, 3)


@dataclass(frozen=True)
class Curve:
    """Returns of one policy, or another measure, after 0 ... K inner steps."""

    step_sizes: list[float]
    """Of the K steps; none for an oracle, which is told its task and takes no step."""
    per_seed: Floats
    """[seeds, tasks, K + 1]; a seed is a training of its own."""
    algorithm: str = "maml-trpo"
    seeds: list[int] = field(default_factory=lambda: [0])
    achieved: Mapping[str, Floats] = field(default_factory=dict)
    """What came of a component of the task, [tasks, K + 1]: the mean over steps, episodes and
    seeds, or of a place, which has two components, the mean of where episodes end."""
    paths: Mapping[str, Floats] = field(default_factory=dict)
    """Of a place, one episode of the first tasks, [tasks, K + 1, time], NaN after its end."""
    success: Floats | None = None
    """Part of the episodes in which the task is done, [tasks, K + 1], where the family tells."""
    functions: Floats | None = None
    """What the first tasks' adapted predictors are, [tasks, K + 1, points], of functions of a
    number."""
    measure: Measure = RETURN
    role: RowRole = "meta-learner"
    per_episode: Floats | None = None
    """Return of each episode, [seeds, tasks, K + 1, episodes], NaN where it diverged; None on a
    data set."""
    episode_success: Floats | None = None
    """1 for an episode in which the task is done, else 0, [seeds, tasks, K + 1, episodes]."""

    @property
    def reference(self) -> bool:
        """Whether meta-learners are compared with it."""
        return self.role != "meta-learner"

    @property
    def per_task(self) -> Floats:
        """Mean over seeds, [tasks, K + 1]."""
        return self.per_seed.mean(axis=0)

    @property
    def returns(self) -> list[float]:
        """Mean over tasks after each number of steps; NaN where no task has a value."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over nothing
            return np.nanmean(self.per_task, axis=0).tolist()

    @property
    def ci95(self) -> list[tuple[float, float]]:
        """Bootstrap 95 % interval over tasks of each mean."""
        return [bootstrap_interval(_known(column)) for column in self.per_task.T]

    @property
    def iqm(self) -> list[float]:
        """Interquartile mean over seeds and tasks after each number of steps."""
        return interquartile_mean(self._flat()).tolist()

    @property
    def iqm_ci95(self) -> list[tuple[float, float]]:
        """Bootstrap 95 % interval over seeds and tasks of each; NaN for a single seed."""
        return [interquartile_mean_interval(scores) for scores in np.moveaxis(self.per_seed, 2, 0)]

    def gain(self, steps: int = 1) -> tuple[float, float, float]:
        """Return the mean gain of `steps` inner steps and its interval, paired by task.

        More is better, whatever the measure.
        """
        gains = _known(self.gains(steps))
        if not len(gains):
            return math.nan, math.nan, math.nan
        return (float(gains.mean()), *bootstrap_interval(gains))

    def gains(self, steps: int = 1) -> Floats:
        """Return each task's gain of `steps` inner steps, [tasks]; more is better."""
        return self.measure.sign * (self.per_task[:, steps] - self.per_task[:, 0])

    def lead(self, other: Curve, steps: int = 1) -> Difference:
        """Return how much better it is than another on the same tasks after `steps` inner steps.

        Paired by task, means over seeds; more is better, whatever the measure.
        """
        ours, theirs = (self.measure.sign * c.per_task[:, steps] for c in (self, other))
        return _difference(ours, theirs, self.measure)

    def verdict(self) -> str:
        """Say in one sentence whether adaptation gains anything."""
        if len(self.returns) < 2:
            return "No inner step was taken."
        if self.role == "oracle":
            return "An oracle is told its task and takes no inner step."
        mean, low, high = self.gain()
        said, gains = self.measure.number, _known(self.gains())
        if not len(gains):
            return "No task has a return before and after a step: every episode diverged."
        improved = f"{100.0 * float((gains > 0.0).mean()):.0f} % of tasks improve"
        if len(gains) < 2:
            return f"One step gains {said(mean)} on a single task; several give an interval."
        if len(gains) < FEWEST:
            return (
                f"One step gains {said(mean)} on {len(gains)} tasks ({improved});"
                f" whether that is chance takes at least {FEWEST} tasks to tell."
            )
        if low <= 0.0 <= high:
            return (
                f"The gain of one adaptation step cannot be told from zero:"
                f" {said(mean)}, 95 % interval [{said(low)}, {said(high)}]."
            )
        word = "gains" if mean > 0.0 else "LOSES"
        return (
            f"Adaptation {word} {said(abs(mean), signed=False)} ±"
            f" {said((high - low) / 2.0, signed=False)} after one step"
            f" ({improved})."
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite is null."""
        result = {
            "algorithm": self.algorithm,
            "role": self.role,
            "seeds": self.seeds,
            "step_sizes": self.step_sizes,
            "returns": self.returns,
            "ci95": [list(pair) for pair in self.ci95],
            "per_task": self.per_task.tolist(),
        }
        if len(self.returns) > 1:
            mean, low, high = self.gain()
            result["gain"] = {"mean": mean, "ci95": [low, high]}
            result["verdict"] = self.verdict()
        if len(self.seeds) > 1:
            result["per_seed"] = self.per_seed.tolist()
            result["iqm"] = self.iqm
            result["iqm_ci95"] = [list(pair) for pair in self.iqm_ci95]
        if self.success is not None:
            result["success"] = [_mean(rates) for rates in self.success.T]
            result["success_per_task"] = self.success.tolist()
        if self.achieved:
            result["achieved"] = {name: values.tolist() for name, values in self.achieved.items()}
        if self.functions is not None:
            result["functions"] = self.functions.tolist()
        return _finite(result)

    def _flat(self) -> Floats:
        return np.moveaxis(self.per_seed, 2, 0).reshape(self.per_seed.shape[2], -1)


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluated policy, others on the same tasks, and what they were measured on."""

    curve: Curve
    references: Mapping[str, Curve]
    """Random initialization, and what else stands beside the policy, by name."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """Family, tasks and all else that gives the returns their meaning."""
    name: str = "this policy"

    @property
    def rows(self) -> dict[str, Curve]:
        """All curves by name: the policy, others, then what they are measured by."""

        names = sorted(self.references, key=lambda name: ROLES.index(self.references[name].role))
        return {self.name: self.curve, **{name: self.references[name] for name in names}}

    def gap_closed(self, curve: Curve) -> list[tuple[float, float, float]] | None:
        """Return what share of the way from random to oracle a policy goes, and its interval.

        (adapted - random) / (oracle - random) after each number of steps, of means over tasks:
        random is the initialization before any step, the oracle is told its task. None without an
        oracle, or with one that earns no more than random.
        """
        oracle = next((c for c in self.rows.values() if c.role == "oracle"), None)
        random = next((c for c in self.rows.values() if c.role == "untrained"), None)
        if oracle is None or random is None:
            return None
        sign = curve.measure.sign
        floor, ceiling = sign * random.per_task[:, 0], sign * oracle.per_task.mean(axis=1)
        if not np.nanmean(ceiling) > np.nanmean(floor):
            return None

        def share(samples: Floats) -> Floats:
            adapted, low, high = np.moveaxis(samples.mean(axis=1), -1, 0)
            with np.errstate(divide="ignore"):
                return (adapted - low) / (high - low)

        result = []
        for adapted in sign * curve.per_task.T:
            scores = _known(np.stack([adapted, floor, ceiling], axis=1))
            interval = bootstrap_interval(scores, share)
            result.append((float(share(scores[None])[0]), *interval))
        return result

    def verdict(self) -> str:
        """Say whether the policy's adaptation gains anything, and what meta-training earned."""
        return " ".join([self.curve.verdict(), *self._worth(self.curve)])

    def _worth(self, curve: Curve) -> list[str]:
        """Say what of a gain meta-training earned, by gains and returns paired by task."""
        others = {name: c for name, c in self.rows.items() if c.reference}
        if len(curve.returns) < 2 or curve.reference:
            return []
        said = []
        measure, gains = curve.measure, curve.gains()
        for name, other in others.items():
            known = np.isfinite(gains).sum() >= FEWEST
            if not known or len(other.returns) < 2:
                continue
            if other.role == "untrained":
                own = other.gains()
                more = _difference(gains, own, measure)
                earned = (
                    f"what meta-training adds to that cannot be told from zero, {more}"
                    if more.low <= 0.0 <= more.high
                    else f"meta-training adds {more} to that"
                )
                said.append(
                    f"The random initialization gains {measure.number(np.nanmean(own))}; {earned}."
                )
                said.append(f"Before any step meta-training earns {curve.lead(other, 0)}.")
            if other.role == "from-scratch":
                said.append(
                    f"After one step it earns {curve.lead(other)} more than training {name}."
                )
        return said

    def verdicts(self) -> str:
        """Say it of each policy that is no reference, a line each."""
        said = {n: c for n, c in self.rows.items() if not c.reference}
        if len(said) < 2:
            return self.verdict()
        return "\n".join(
            " ".join([f"{name}: {curve.verdict()}", *self._worth(curve)])
            for name, curve in said.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`."""
        rows = {}
        for name, curve in self.rows.items():
            rows[name] = curve.to_json()
            gaps = self.gap_closed(curve)
            if gaps is not None:
                rows[name]["gap_closed"] = _finite([gap[0] for gap in gaps])
                rows[name]["gap_closed_ci95"] = _finite([list(gap[1:]) for gap in gaps])
        own = rows.pop(self.name)
        return {
            **plain(self.setting), "name": self.name, **own,
            "references": rows, "verdict": self.verdict(),
        }  # fmt: skip

    def table(self) -> str:
        """Return plain-text tables: a row a policy, a column a number of inner steps."""
        return as_text(tables(self.to_json()))

    def task_table(self) -> str:
        """Return a plain-text table of the policy: a row a task, a column a number of steps."""
        return as_text([task_table(self.to_json())])


@dataclass(frozen=True)
class Difference:
    """A mean difference over tasks and its interval."""

    mean: float
    low: float
    high: float
    measure: Measure

    def __str__(self) -> str:
        mean, low, high = map(self.measure.number, (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def _difference(ours: Floats, theirs: Floats, measure: Measure) -> Difference:
    """Return the mean of differences paired by task, with its 95 % interval."""
    paired = _known(ours - theirs)
    return Difference(float(paired.mean()), *bootstrap_interval(paired), measure)


def _known(values: Floats) -> Floats:
    """Leave out tasks whose every episode diverged."""
    return values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]


def _mean(values: Floats) -> float:
    """Return the mean of what is known; NaN of nothing."""
    known = _known(values)
    return float(known.mean()) if len(known) else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
