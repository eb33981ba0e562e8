"""Curves of an evaluation: returns, or another measure, after 0 ... K inner steps, per row."""

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
    conditional_value_at_risk,
    interquartile_mean,
    interquartile_mean_interval,
)
from metarl.plain_json import finite

RowRole = Literal[Role, "nearest-prototype", "from-scratch"]
"""Role of a row of an evaluation: its algorithm's role, or a reference without an algorithm."""

ROLES: tuple[RowRole, ...] = (
    "meta-learner", "nearest-prototype", "pretrained", "untrained", "oracle", "from-scratch",
)  # fmt: skip
"""In the order of the rows of a table."""


@dataclass(frozen=True)
class Measure:
    """A measure of policies or predictors."""

    key: str
    """Name in a data frame."""
    name: str
    """Name in tables and figures."""
    sign: float
    """1 if more is better, -1 if less is."""
    digits: int
    """Number of digits after the decimal point."""

    def number(self, value: float | np.floating, *, signed: bool = True) -> str:
        """Return a value in its printed format."""
        return f"{value:{'+' if signed else ''}.{self.digits}f}"


RETURN = Measure("return", "return", 1.0, 1)
ACCURACY = Measure("accuracy", "accuracy, %", 1.0, 1)
SQUARED_ERROR = Measure("loss", "mean squared error", -1.0, 3)


@dataclass(frozen=True)
class Experience:
    """Experience on a new task before each return of a curve; means over tasks and seeds."""

    episodes: list[float]
    """Number of episodes, [K + 1]; the first is 0."""
    env_steps: list[float]
    """Number of environment steps, [K + 1]; the first is 0."""


@dataclass(frozen=True)
class Curve:
    """Returns of one policy, or another measure, after 0 ... K inner steps."""

    step_sizes: list[float]
    """Sizes of the K steps; empty for an oracle, which takes no step."""
    per_seed: Floats
    """Mean over episodes, [seeds, tasks, K + 1]; each seed is a separate training."""
    algorithm: str = "maml-trpo"
    """Name of the algorithm."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seed of each training."""
    achieved: Mapping[str, Floats] = field(default_factory=dict)
    """Achieved value of a component of the task, [tasks, K + 1]: the mean over steps, episodes and
    seeds. If the components are a position in the plane, the mean over the ends of episodes."""
    paths: Mapping[str, Floats] = field(default_factory=dict)
    """Positions in one episode of each of the first tasks, [tasks, K + 1, time]; NaN after its
    end."""
    success: Floats | None = None
    """Success rate, [tasks, K + 1], if the environments report success."""
    functions: Floats | None = None
    """Predictions for the first tasks, [tasks, K + 1, points], if inputs are scalars."""
    measure: Measure = RETURN
    """The measure, such as the return or the accuracy."""
    role: RowRole = "meta-learner"
    """Role in the evaluation: meta-learner, or a kind of reference."""
    per_episode: Floats | None = None
    """Return of each episode, [seeds, tasks, K + 1, episodes]; NaN if it diverged; None for a data
    set."""
    unit: str = "inner step"
    """Unit of adaptation: inner steps, or episodes of a trial."""
    episode_success: Floats | None = None
    """1 for an episode with success, else 0, [seeds, tasks, K + 1, episodes]."""
    experience: Experience | None = None
    """Experience before each return; None for an oracle, which needs none, and for a data set."""

    @property
    def reference(self) -> bool:
        """Whether it is a reference for meta-learners."""
        return self.role != "meta-learner"

    @property
    def per_task(self) -> Floats:
        """Mean over seeds, [tasks, K + 1]."""
        return self.per_seed.mean(axis=0)

    @property
    def returns(self) -> list[float]:
        """Mean over tasks after each number of steps; NaN if no task has a value."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from a mean over no values
            return np.nanmean(self.per_task, axis=0).tolist()

    @property
    def ci95(self) -> list[tuple[float, float]]:
        """Bootstrap 95 % interval over tasks for each mean."""
        return [bootstrap_interval(known(column)) for column in self.per_task.T]

    @property
    def worst(self) -> list[int]:
        """Index of the worst task after each number of steps; -1 if no task has a value."""
        return [
            -1 if np.isnan(column).all() else int(np.nanargmin(self.measure.sign * column))
            for column in self.per_task.T
        ]

    @property
    def worst_task(self) -> list[float]:
        """Value of the worst task after each number of steps; NaN if no task has a value."""
        return [float(self.per_task[t, k]) for k, t in enumerate(self.worst)]

    @property
    def cvar(self) -> list[float]:
        """Mean of the worst tenth of the tasks after each number of steps."""
        sign = self.measure.sign
        return [sign * conditional_value_at_risk(sign * column) for column in self.per_task.T]

    @property
    def iqm(self) -> list[float]:
        """Interquartile mean over seeds and tasks after each number of steps."""
        return interquartile_mean(self._flat()).tolist()

    @property
    def iqm_ci95(self) -> list[tuple[float, float]]:
        """Bootstrap 95 % interval over seeds and tasks for each; NaN for a single seed."""
        return [interquartile_mean_interval(scores) for scores in np.moveaxis(self.per_seed, 2, 0)]

    def gain(self, steps: int = 1) -> tuple[float, float, float]:
        """Return the mean gain of `steps` inner steps and its interval, paired by task.

        Positive is better for every measure.
        """
        gains = known(self.gains(steps))
        if not len(gains):
            return math.nan, math.nan, math.nan
        return (float(gains.mean()), *bootstrap_interval(gains))

    def gains(self, steps: int = 1) -> Floats:
        """Return each task's gain from `steps` inner steps, [tasks]; positive is better."""
        return self.measure.sign * (self.per_task[:, steps] - self.per_task[:, 0])

    def lead(self, other: Curve, steps: int = 1) -> Difference:
        """Return the advantage over another curve on the same tasks after `steps` inner steps.

        It is paired by task, with means over seeds. Positive is better for every measure.
        """
        ours, theirs = (self.measure.sign * c.per_task[:, steps] for c in (self, other))
        return difference(ours, theirs, self.measure)

    def verdict(self) -> str:
        """Return one sentence on whether adaptation improves the measure."""
        if len(self.returns) < 2:
            return "No inner step was taken."
        if self.role == "oracle":
            return "An oracle observes the task and takes no inner step."
        mean, low, high = self.gain()
        said, gains = self.measure.number, known(self.gains())
        if not len(gains):
            return "No task has a return pre- and post-adaptation: every episode diverged."
        improved = f"{100.0 * float((gains > 0.0).mean()):.0f} % of tasks improve"
        if len(gains) < 2:
            return f"One {self.unit} gains {said(mean)} on one task; an interval needs several."
        if len(gains) < FEWEST:
            return (
                f"One {self.unit} gains {said(mean)} on {len(gains)} tasks ({improved});"
                f" a 95 % interval needs at least {FEWEST} tasks."
            )
        if low <= 0.0 <= high:
            return (
                f"The gain of one {self.unit} is not significantly different from zero:"
                f" {said(mean)}, 95 % interval [{said(low)}, {said(high)}]."
            )
        word = "gains" if mean > 0.0 else "LOSES"
        return (
            f"Adaptation {word} {said(abs(mean), signed=False)} ±"
            f" {said((high - low) / 2.0, signed=False)} after one {self.unit}"
            f" ({improved})."
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a number that is not finite is null."""
        result = {
            "algorithm": self.algorithm,
            "role": self.role,
            "seeds": self.seeds,
            "step_sizes": self.step_sizes,
            **({} if self.unit == "inner step" else {"adapts_in": self.unit}),
            "returns": self.returns,
            "ci95": [list(pair) for pair in self.ci95],
            "per_task": self.per_task.tolist(),
            "worst": self.worst,
            "worst_task": self.worst_task,
            "cvar": self.cvar,
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
        return finite(result)

    def _flat(self) -> Floats:
        return np.moveaxis(self.per_seed, 2, 0).reshape(self.per_seed.shape[2], -1)


@dataclass(frozen=True)
class Difference:
    """Mean difference over tasks, with its interval."""

    mean: float
    """Mean over tasks."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    measure: Measure
    """Measure of both curves."""

    def __str__(self) -> str:
        mean, low, high = map(self.measure.number, (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def difference(ours: Floats, theirs: Floats, measure: Measure) -> Difference:
    """Return the mean of differences paired by task, with its 95 % interval."""
    paired = known(ours - theirs)
    return Difference(float(paired.mean()), *bootstrap_interval(paired), measure)


def known(values: Floats) -> Floats:
    """Return the values without tasks whose every episode diverged."""
    return values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]


def _mean(values: Floats) -> float:
    """Return the mean of the known values; NaN without any."""
    found = known(values)
    return float(found.mean()) if len(found) else math.nan
