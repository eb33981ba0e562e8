"""How well a meta-policy adapts: returns after 0 ... K inner steps on held-out tasks.

Returns after k steps come from episodes of their own: K steps take K + 1 samples. The policy is
adapted afresh on each task, by the same inner loop as in training. References stand beside it on
the same tasks and episodes' seeds: a random initialization always, others as given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from metarl.envs import TaskFamily
from metarl.envs.errors import UserError
from metarl.learning.inner_loop import NonFiniteError
from metarl.learning.parallel import ChunkPool, one_intraop_thread
from metarl.learning.policies import MLPPolicy, Params
from metarl.learning.trajectories import Rollout
from metarl.running.config import Config, available_threads
from metarl.running.memory import check_memory, need
from metarl.running.meta_policy import MetaPolicy, load, random_meta_policy
from metarl.running.presets import reference_step_sizes
from metarl.running.results import REFERENCES, Curve, EvaluationResult
from metarl.running.runs import but_seed, group_name
from metarl.running.scratch import (
    LEARNING_RATE,
    ScratchTrainer,
    scratch_policy,
    train_from_scratch,
)
from metarl.running.statistics import Floats
from metarl.sampling.rollouts import ActionMode, Address
from metarl.sampling.workers import AnyCollector, make_collector

What = MetaPolicy | str | Path

TIMES = 10
"""Env steps of the longer training from scratch, as a multiple of those of adaptation."""

PATHS = 6
"""Tasks whose paths are kept."""


def grouped(what: Sequence[str | Path]) -> dict[str, dict[str, MetaPolicy]]:
    """Load policies; those that were trained alike but for the seed make one group.

    A group has the common beginning of its members' names, or is called by the reference that it
    is. The first group is a policy to look at: references go after it, if there is any other.

    Returns:
        by the group's name, its members by what they were loaded from.
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
    named: dict[str, dict[str, MetaPolicy]] = {}
    for group in groups:
        name = group_name(list(group))
        algorithm = next(iter(group.values())).config.algorithm
        if algorithm in REFERENCES and algorithm not in named:
            name = algorithm
        if not name or name in named:
            name = next(iter(group))
        named[name] = group

    def is_reference(item: tuple[str, dict[str, MetaPolicy]]) -> bool:
        return next(iter(item[1].values())).config.algorithm in REFERENCES

    return dict(sorted(named.items(), key=is_reference))


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
    workers: int
    collectors: dict[tuple[MLPPolicy, ActionMode], AnyCollector] = field(default_factory=dict)
    """By what they are made for: policies of one kind share the environments."""

    def close(self) -> None:
        """Close the environments."""
        for collector in self.collectors.values():
            collector.close()

    def _collector(self, policy: MLPPolicy, config: Config) -> AnyCollector:
        key = policy, config.policy.action
        if key not in self.collectors:
            needed = need(
                policy, tasks=len(self.goals), episodes=self.episodes, horizon=self.family.horizon,
                rollouts=self.steps + 1, workers=0 if self.family.parallel else self.workers,
                record=len(self.family.achieved), chunks=self.pool.threads,
            )  # fmt: skip
            check_memory(needed, self.family.name)
            self.collectors[key] = make_collector(
                self.family, policy, len(self.goals), self.episodes, self.pool, key[1],
                workers=self.workers, timeout=config.worker_timeout,
                record=list(self.family.achieved.values()),
            )  # fmt: skip
        return self.collectors[key]

    def curve(self, members: Sequence[MetaPolicy], sizes: Sequence[float] | None) -> Curve:
        """Return the curve of a policy's seeds; an oracle takes no step."""
        names = self.family.achieved
        adapts = members[0].config.algorithm != "oracle"
        scores, success, achieved, paths = [], [], [], {}
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
            success.append(np.stack([r.success_rates().numpy() for r in rollouts], axis=1))
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
            np.mean(success, axis=0) if self.family.tells_success else None,
        )

    def scratch(self, config: Config, learning_rate: float) -> dict[str, Curve]:
        """Return what training from scratch earns with the env steps of k inner steps, and with
        ten times as many, by name."""
        policy = scratch_policy(config, self.family)
        trainer = ScratchTrainer(policy, len(self.goals), self.address.seed, learning_rate)
        returns = train_from_scratch(
            trainer, self._collector(policy, config), self.goals, config, self.pool, self.address,
            TIMES * self.steps,
        )  # fmt: skip
        curves = {}
        for name, times in (("from scratch", 1), (f"from scratch, {TIMES} x steps", TIMES)):
            column = returns[None, :, : times * self.steps + 1 : times]
            curves[name] = Curve([], column, "from-scratch", [self.address.seed])
        return curves

    def _rollouts(
        self, policy: MetaPolicy, sizes: Sequence[float] | None, adapts: bool
    ) -> tuple[list[float], list[Rollout]]:
        tasks = len(self.goals)
        loop, meta = policy.inner_loop(self.pool, sizes)
        told = policy.context(self.goals)
        collector = self._collector(policy.policy, policy.config)

        def sample(params: Params, k: int, *, deterministic: bool = False) -> Rollout:
            return collector.collect(
                {**params, **told},
                self.goals,
                dataclasses.replace(self.address, inner_step=k),
                deterministic=deterministic,
            )

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
    workers: int = 0,
    from_scratch: bool = False,
    scratch_learning_rate: float = LEARNING_RATE,
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
        workers: processes for environments without a native backend; 0 steps them in this one.
        from_scratch: show what training from scratch on each task earns with the same env steps,
            and with ten times as many.
        scratch_learning_rate: of that training.
        name: what the policy is called in tables and pictures.

    Raises:
        UserError: a number is out of range, the family cannot be made, or a reference is of
            another family.
    """
    members = _members(meta_policy, name)
    first = members[0]
    least_values = (("tasks", tasks, 1), ("episodes", episodes, 1), ("steps", steps, 0))
    for key, value, least in (*least_values, ("seed", seed, 0), ("workers", workers, 0)):
        if value < least:
            raise UserError(f"{key} must be at least {least}, got {value}")
    if not (math.isfinite(scratch_learning_rate) and scratch_learning_rate > 0.0):
        raise UserError(f"scratch_learning_rate must be positive, got {scratch_learning_rate}")
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
        protocol = _Protocol(family, goals, episodes, steps, address, deterministic, pool, workers)
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
            if from_scratch and steps:
                results |= protocol.scratch(config, scratch_learning_rate)
        except NonFiniteError as error:
            raise UserError(f"{family.name}: {error}") from error
        finally:
            protocol.close()

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
    if (best := family.optimal_return(goals)) is not None:
        setting["optimal_returns"] = best.tolist()
    return EvaluationResult(own, results, setting, name)
