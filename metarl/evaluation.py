"""How well a meta-policy adapts: returns after 0 ... K inner steps on held-out tasks.

Returns after k steps come from episodes of their own: K steps take K + 1 samples. The policy is
adapted afresh on each task, by the same inner loop as in training. References stand beside it on
the same tasks and episodes' seeds: a random initialization always, others as given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from envs import TaskFamily
from envs.errors import UserError
from metarl.config import Config, available_threads
from metarl.inner_loop import NonFiniteError
from metarl.meta_policy import MetaPolicy, load, random_meta_policy
from metarl.parallel import ChunkPool, one_intraop_thread
from metarl.policies import Params
from metarl.presets import reference_step_sizes
from metarl.rollouts import Address, Collector
from metarl.statistics import (
    FEWEST,
    bootstrap_interval,
    interquartile_mean,
    interquartile_mean_interval,
)
from metarl.trajectories import Rollout

Floats = NDArray[np.float64]
What = MetaPolicy | str | Path

REFERENCES = ("pretrained", "random", "oracle")
"""Algorithms that others are measured by."""
PATHS = 6
"""Tasks whose paths are kept."""


@dataclass(frozen=True)
class Curve:
    """Returns of one policy after 0 ... K inner steps."""

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

    @property
    def per_task(self) -> Floats:
        """Mean over seeds, [tasks, K + 1]."""
        return self.per_seed.mean(axis=0)

    @property
    def returns(self) -> list[float]:
        """Mean over tasks after each number of steps."""
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
        """Return the mean gain of `steps` inner steps and its interval, paired by task."""
        gains = _known(self.per_task[:, steps] - self.per_task[:, 0])
        return (float(gains.mean()), *bootstrap_interval(gains))

    def verdict(self) -> str:
        """Say in one sentence whether adaptation gains anything."""
        if len(self.returns) < 2:
            return "No inner step was taken."
        if self.algorithm == "oracle":
            return "An oracle is told its task and takes no inner step."
        mean, low, high = self.gain()
        gains = _known(self.per_task[:, 1] - self.per_task[:, 0])
        improved = f"{100.0 * float((gains > 0.0).mean()):.0f} % of tasks improve"
        if len(gains) < 2:
            return f"One step gains {mean:+.1f} on a single task; several give an interval."
        if len(gains) < FEWEST:
            return (
                f"One step gains {mean:+.1f} on {len(gains)} tasks ({improved});"
                f" whether that is chance takes at least {FEWEST} tasks to tell."
            )
        if low <= 0.0 <= high:
            return (
                f"The gain of one adaptation step cannot be told from zero:"
                f" {mean:+.1f}, 95 % interval [{low:+.1f}, {high:+.1f}]."
            )
        word = "gains" if mean > 0.0 else "LOSES"
        return (
            f"Adaptation {word} {abs(mean):.1f} ± {(high - low) / 2.0:.1f} after one step"
            f" ({improved})."
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite is null."""
        result = {
            "algorithm": self.algorithm,
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
        if self.achieved:
            result["achieved"] = {name: values.tolist() for name, values in self.achieved.items()}
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

        def place(name: str) -> int:
            algorithm = self.references[name].algorithm
            return 1 + REFERENCES.index(algorithm) if algorithm in REFERENCES else 0

        names = sorted(self.references, key=place)
        return {self.name: self.curve, **{name: self.references[name] for name in names}}

    def gap_closed(self, curve: Curve) -> list[tuple[float, float, float]] | None:
        """Return what share of the way from random to oracle a policy goes, and its interval.

        (adapted - random) / (oracle - random) after each number of steps, of means over tasks:
        random is the initialization before any step, the oracle is told its task. None without an
        oracle, or with one that earns no more than random.
        """
        oracle = next((c for c in self.rows.values() if c.algorithm == "oracle"), None)
        random = next((c for c in self.rows.values() if c.algorithm == "random"), None)
        if oracle is None or random is None:
            return None
        floor, ceiling = random.per_task[:, 0], oracle.per_task.mean(axis=1)
        if not np.nanmean(ceiling) > np.nanmean(floor):
            return None

        def share(samples: Floats) -> Floats:
            adapted, low, high = np.moveaxis(samples.mean(axis=1), -1, 0)
            with np.errstate(divide="ignore"):
                return (adapted - low) / (high - low)

        result = []
        for adapted in curve.per_task.T:
            scores = _known(np.stack([adapted, floor, ceiling], axis=1))
            interval = bootstrap_interval(scores, share)
            result.append((float(share(scores[None])[0]), *interval))
        return result

    def verdict(self) -> str:
        """Say in one sentence whether the policy's adaptation gains anything."""
        return self.curve.verdict()

    def verdicts(self) -> str:
        """Say it of each policy that is no reference, a line each."""
        said = {n: c for n, c in self.rows.items() if c.algorithm not in REFERENCES}
        if len(said) < 2:
            return self.verdict()
        return "\n".join(f"{name}: {curve.verdict()}" for name, curve in said.items())

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
            **self.setting, "name": self.name, **own,
            "references": rows, "verdict": self.verdict(),
        }  # fmt: skip

    def table(self) -> str:
        """Return a plain-text table: a row a policy, a column a number of inner steps."""
        rows = self.rows
        steps = len(self.curve.returns)
        width = max(len(name) for name in [*rows, "gap closed", "interquartile mean"]) + 1
        counts = ["before", "1 step", *(f"{k} steps" for k in range(2, steps))][:steps]

        def line(name: str, cells: Sequence[str]) -> str:
            return f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells)

        lines = [f"{line('return', counts)}   step sizes"]
        for name, curve in rows.items():
            sizes = ", ".join(f"{size:g}" for size in curve.step_sizes) or "none"
            lines.append(f"{line(name, _cells(curve.returns, curve.ci95, 1))}   {sizes}")
        several = {n: c for n, c in rows.items() if len(c.seeds) > 1}
        if several:
            lines += ["", line("interquartile mean", counts)]
            for name, curve in several.items():
                lines.append(line(name, _cells(curve.iqm, curve.iqm_ci95, 1)))
        gaps = {name: self.gap_closed(curve) for name, curve in rows.items()}
        if any(gaps.values()):
            lines += ["", line("gap closed", counts)]
            for name, gap in gaps.items():
                if gap is not None and rows[name].algorithm != "oracle":
                    lines.append(line(name, _cells([g[0] for g in gap], [g[1:] for g in gap], 2)))
        return "\n".join(lines)

    def task_table(self) -> str:
        """Return a plain-text table of the policy: a row a task, a column a number of steps."""
        names = self.setting["components"]
        steps = range(len(self.curve.returns))
        heads = [*names, *(f"return {k}" for k in steps)]
        heads += [f"{name} achieved {k}" for name in self.curve.achieved for k in steps]
        widths = [max(len(head), 9) + 2 for head in heads]
        lines = ["".join(f"{head:>{w}}" for head, w in zip(heads, widths, strict=True))]
        for t, goal in enumerate(self.setting["tasks"]):
            cells = [f"{x:.2f}" for x in goal] + [f"{r:.1f}" for r in self.curve.per_task[t]]
            cells += [f"{x:.2f}" for a in self.curve.achieved.values() for x in a[t]]
            lines.append("".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
        return "\n".join(lines)


def _cells(
    means: Sequence[float], intervals: Sequence[Sequence[float]], digits: int
) -> list[str]:
    cells = []
    for mean, (low, high) in zip(means, intervals, strict=True):
        half = f" ± {(high - low) / 2.0:.{digits}f}" if math.isfinite(high - low) else ""
        cells.append(f"{mean:.{digits}f}{half}")
    return cells


def _known(values: Floats) -> Floats:
    """Leave out tasks whose every episode diverged."""
    return values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]


def grouped(what: Sequence[str | Path]) -> dict[str, list[MetaPolicy]]:
    """Load policies; those that were trained alike but for the seed make one group.

    A group has the common beginning of its members' names, or is called by the reference that it
    is. The first group is a policy to look at: references go after it, if there is any other.
    """
    groups: list[dict[str, MetaPolicy]] = []
    for name in map(str, what):
        meta = load(name)
        for group in groups:
            others = [other.config for other in group.values()]
            # The same seed once more is another checkpoint, or another file.
            seeds = {config.seed for config in others}
            if but_seed(others[0]) == but_seed(meta.config) and meta.config.seed not in seeds:
                group[name] = meta
                break
        else:
            groups.append({name: meta})
    named: dict[str, list[MetaPolicy]] = {}
    for group in groups:
        name = group_name(list(group))
        algorithm = next(iter(group.values())).config.algorithm
        if algorithm in REFERENCES and algorithm not in named:
            name = algorithm
        if not name or name in named:
            name = next(iter(group))
        named[name] = list(group.values())
    return dict(sorted(named.items(), key=lambda item: item[1][0].config.algorithm in REFERENCES))


def group_name(names: Sequence[str]) -> str:
    """Return the common beginning of run folders' or policies' names."""
    paths = [Path(os.path.abspath(name)) for name in names]
    short = [path.stem if path.suffix == ".safetensors" else path.name for path in paths]
    return os.path.commonprefix(short).rstrip("-_. ")


def but_seed(config: Config) -> Config:
    """Return a config without its seed and what results do not depend on."""
    return dataclasses.replace(config, seed=0, threads=1, device="cpu", checkpoint_every=1)


@dataclass(frozen=True)
class _Protocol:
    """What all policies are measured by."""

    family: TaskFamily
    goals: Floats
    episodes: int
    steps: int
    address: Address
    deterministic: bool
    pool: ChunkPool

    def curve(self, members: Sequence[MetaPolicy], sizes: Sequence[float] | None) -> Curve:
        """Return the curve of a policy's seeds; an oracle takes no step."""
        names = self.family.achieved
        adapts = members[0].config.algorithm != "oracle"
        scores, achieved, paths = [], [], {}
        used: list[float] = []
        for i, member in enumerate(members):
            sizes_of_one, rollouts = self._rollouts(member, sizes, adapts)
            if i == 0:
                used = sizes_of_one
                if len(names) == 2:
                    paths = {
                        name: np.stack([_path(rollout, key) for rollout in rollouts], axis=1)
                        for name, key in names.items()
                    }
            scores.append(np.stack([r.mean_returns().numpy() for r in rollouts], axis=1))
            came = _last if len(names) == 2 else _mean
            achieved.append([[came(r, key) for r in rollouts] for key in names.values()])
        means = np.mean(np.array(achieved), axis=0)
        return Curve(
            used,
            np.stack(scores),
            members[0].config.algorithm,
            [member.config.seed for member in members],
            {name: values.T for name, values in zip(names, means, strict=True)},
            paths,
        )

    def _rollouts(
        self, policy: MetaPolicy, sizes: Sequence[float] | None, adapts: bool
    ) -> tuple[list[float], list[Rollout]]:
        tasks = len(self.goals)
        loop, meta = policy.inner_loop(self.pool, sizes)
        told = policy.context(self.goals)
        collector = Collector(
            self.family, policy.policy, tasks, self.episodes, self.pool, policy.config.policy.action
        )

        def sample(params: Params, k: int, *, deterministic: bool = False) -> Rollout:
            return collector.collect(
                {**params, **told},
                self.goals,
                dataclasses.replace(self.address, inner_step=k),
                deterministic=deterministic,
                record=list(self.family.achieved.values()),
            )

        with contextlib.closing(collector):
            if adapts:
                adapted = loop.run(sample, meta, tasks, steps=self.steps, query="rollout")
                iterates, rollouts = adapted.iterates, adapted.rollouts
            else:
                adapted = loop.run(sample, meta, tasks, steps=0, query="none")
                iterates, rollouts = adapted.iterates * (self.steps + 1), []
            if self.deterministic or not rollouts:
                rollouts = [
                    sample(
                        loop.adapter.params(fast, adapted.slow, tasks),
                        k,
                        deterministic=self.deterministic,
                    )
                    for k, fast in enumerate(iterates)
                ]
        return loop.adapter.mean_step_sizes(meta, self.steps) if adapts else [], rollouts


def _mean(rollout: Rollout, key: str) -> Floats:
    """Mean of an info entry over the steps of each task's episodes, [tasks]."""
    total = torch.where(rollout.valid, rollout.info[key], 0.0).sum(dim=(1, 2))
    return (total / rollout.valid.sum(dim=(1, 2))).numpy()


def _last(rollout: Rollout, key: str) -> Floats:
    """Mean of an info entry at the end of each task's episodes, [tasks]."""
    last = (rollout.valid.sum(dim=2, keepdim=True) - 1).clamp(min=0)
    ends = rollout.info[key].gather(2, last)[..., 0].masked_fill(rollout.diverged, math.nan)
    return ends.nanmean(dim=1).numpy()


def _path(rollout: Rollout, key: str) -> Floats:
    """An info entry in the first episode of the first tasks, [tasks, time]."""
    values = rollout.info[key].masked_fill(~rollout.valid, math.nan)
    return values[:PATHS, 0].numpy()


def _members(what: What | Sequence[What], name: str) -> list[MetaPolicy]:
    several = [what] if isinstance(what, (MetaPolicy, str, Path)) else list(what)
    if not several:
        raise UserError(f"{name}: no policy given")
    members = [one if isinstance(one, MetaPolicy) else load(one) for one in several]
    alike = [but_seed(member.config) for member in members]
    if any(config != alike[0] for config in alike):
        raise UserError(f"{name}: policies that differ by more than the seed are no one's seeds")
    return members


def evaluate(
    meta_policy: What | Sequence[What],
    *,
    tasks: int = 40,
    episodes: int = 20,
    steps: int = 3,
    seed: int = 0,
    step_sizes: Sequence[float] | None = None,
    references: Mapping[str, What | Sequence[What]] | None = None,
    random_step_sizes: Sequence[float] | None = None,
    pretrained_step_sizes: Sequence[float] | None = None,
    deterministic: bool = False,
    drawn: bool = False,
    split: Literal["test", "validation"] = "test",
    threads: int | None = None,
    name: str = "this policy",
) -> EvaluationResult:
    """Return a meta-policy's returns after 0 ... `steps` inner steps on held-out tasks.

    Args:
        meta_policy: a meta-policy, or what `load` takes; or several seeds of one.
        tasks: held-out tasks; few possible ones are drawn equally often.
        episodes: episodes a task, for each update and for each return.
        seed: of episodes, and of drawn tasks; the same ones for every policy.
        step_sizes: one a step, the last repeated; by default the policy's own for evaluation.
        references: other policies of the family, evaluated on the same tasks. One of the algorithm
            random takes the place of the random initialization that is always there; with an
            oracle, which takes no steps, the gap closed is known.
        random_step_sizes: those of the random initialization; by default its preset's, or the
            policy's.
        pretrained_step_sizes: those of references of the algorithm pretrained; by default its
            preset's, or its own.
        deterministic: act by the mean instead of a sample, in the returns only.
        drawn: draw the tasks at random, as the papers do, instead of covering the test split
            evenly, which tells the mean over the split with less chance.
        split: "validation" draws other tasks and episodes, for choosing between policies.
        threads: for physics and updates; results do not depend on it.
        name: what the policy is called in tables and pictures.

    Raises:
        UserError: a number is out of range, the family cannot be made, or a reference is of
            another family.
    """
    members = _members(meta_policy, name)
    first = members[0]
    least_values = (("tasks", tasks, 1), ("episodes", episodes, 1), ("steps", steps, 0))
    for key, value, least in (*least_values, ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{key} must be at least {least}, got {value}")
    for size in (*(step_sizes or ()), *(random_step_sizes or ()), *(pretrained_step_sizes or ())):
        if not (math.isfinite(size) and size > 0.0):
            raise UserError(f"step sizes must be positive, got {size}")
    family, config = first.family, first.config
    others = {key: _members(other, key) for key, other in (references or {}).items()}
    for key, reference in others.items():
        same = (reference[0].config.family, dict(reference[0].config.family_options))
        if same != (config.family, dict(config.family_options)):
            raise UserError(
                f"{key} was trained on {same[0]} {same[1]}, not on"
                f" {config.family} {dict(config.family_options)}: their returns do not compare"
            )
        if key == name:
            raise UserError(f"a reference and the policy are both called {key!r}")
    start: list[MetaPolicy] = []
    if not any(m[0].config.algorithm == "random" for m in (members, *others.values())):
        start = [random_meta_policy(first, seed)]
    address = Address(seed, split=split)
    if split == "validation":
        goals = family.tasks.sample(address.tasks(), tasks)
    elif drawn:
        goals = family.tasks.sample(address.tasks(), tasks, "test")
    else:
        goals = family.tasks.grid(tasks)

    def sizes_of(reference: Config) -> Sequence[float] | None:
        given = {"random": random_step_sizes, "pretrained": pretrained_step_sizes}
        algorithm = reference.algorithm
        return given.get(algorithm) or reference_step_sizes(reference, algorithm) or None

    with one_intraop_thread(), ChunkPool(threads or available_threads()) as pool:
        protocol = _Protocol(family, goals, episodes, steps, address, deterministic, pool)
        try:
            own = protocol.curve(members, step_sizes)
            results = {
                key: protocol.curve(reference, sizes_of(reference[0].config))
                for key, reference in others.items()
            }
            if start:
                sizes = random_step_sizes or reference_step_sizes(config, "random") or step_sizes
                curve = protocol.curve(start, sizes)
                results["random"] = dataclasses.replace(curve, algorithm="random")
        except NonFiniteError as error:
            raise UserError(f"{family.name}: {error}") from error

    setting = {
        "family": config.family,
        "family_options": dict(config.family_options),
        "preset": config.preset,
        "horizon": family.horizon,
        "components": list(family.tasks.names),
        "achieved_by": dict(family.achieved),
        "units": dict(family.units),
        "tasks": goals.tolist(),
        "episodes": episodes,
        "seed": seed,
        "split": split,
        "drawn": drawn,
        "deterministic": deterministic,
        "trained": dict(first.record),
    }
    return EvaluationResult(own, results, setting, name)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
