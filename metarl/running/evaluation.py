"""How well a meta-policy adapts: returns after 0 ... K inner steps on held-out tasks.

Returns after k steps come from episodes of their own: K steps take K + 1 samples. The policy is
adapted afresh on each task, by the same inner loop as in training. References stand beside it on
the same tasks and episodes' seeds: a random initialization always, others as given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metarl.envs import TaskFamily
from metarl.envs.errors import UserError
from metarl.envs.few_shot import FewShotFamily
from metarl.envs.supervised import SupervisedFamily
from metarl.learning.inner_loop import NonFiniteError
from metarl.learning.networks import Params
from metarl.learning.parallel import ChunkPool, one_intraop_thread
from metarl.learning.policies import MLPPolicy
from metarl.learning.trajectories import Rollout
from metarl.running import stable_baselines
from metarl.running.config import Config, available_threads
from metarl.running.loading import load
from metarl.running.memory import check_memory, need
from metarl.running.meta_policy import MetaPolicy, random_meta_policy
from metarl.running.presets import reference_step_sizes
from metarl.running.results import RETURN, Curve, EvaluationResult, Measure
from metarl.running.runs import but_seed, group_name
from metarl.running.scratch import (
    LEARNING_RATE,
    TIMES,
    ScratchTrainer,
    curves,
    scratch_policy,
    train_from_scratch,
)
from metarl.running.statistics import Floats
from metarl.running.supervised_evaluation import SupervisedProtocol
from metarl.sampling.rollouts import Address
from metarl.sampling.spaces import ActionMode
from metarl.sampling.workers import AnyCollector, make_collector

What = MetaPolicy | str | Path
Sizes = Sequence[float] | Callable[[MetaPolicy], Sequence[float]] | None
"""Of the inner steps: given, or by policy; none takes the policy's own."""

EPISODES = 20
"""A task, unless others are asked for."""

PATHS = 6
"""Tasks whose paths are kept."""

FACTORS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Of a policy's own step in training: sizes among which `tune_step_sizes` chooses."""


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
        row = next(iter(group.values())).algorithm
        if row.reference and row.name not in named:
            name = row.name
        if not name or name in named:
            name = next(iter(group))
        named[name] = group

    def is_reference(item: tuple[str, dict[str, MetaPolicy]]) -> bool:
        return next(iter(item[1].values())).algorithm.reference

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

    @property
    def measure(self) -> Measure:
        """What is measured."""
        return RETURN

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
                info_keys=len(self.family.achieved), chunks=self.pool.threads,
            )  # fmt: skip
            check_memory(needed, self.family.name)
            self.collectors[key] = make_collector(
                self.family, policy, len(self.goals), self.episodes, self.pool, key[1],
                workers=self.workers, timeout=config.worker_timeout,
                info_keys=list(self.family.achieved.values()),
            )  # fmt: skip
        return self.collectors[key]

    def curve(self, members: Sequence[MetaPolicy], sizes: Sizes) -> Curve:
        """Return the curve of a policy's seeds; an oracle takes no step."""
        names = self.family.achieved
        adapts = not members[0].algorithm.observes_task
        scores, success, achieved, paths = [], [], [], {}
        used: list[float] = []
        for i, member in enumerate(members):
            given = sizes(member) if callable(sizes) else sizes
            sizes_of_one, rollouts = self._rollouts(member, given, adapts)
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

    def scratch(self, like: MetaPolicy, learning_rate: float) -> dict[str, Curve]:
        """Return what training from scratch earns, ours and, where it is installed, PPO of
        stable-baselines3, by name."""
        config = like.config
        policy = scratch_policy(config, self.family)
        seed, updates = self.address.seed, TIMES * self.steps
        trainer = ScratchTrainer(policy, len(self.goals), seed, learning_rate)
        returns = train_from_scratch(
            trainer, self._collector(policy, config), self.goals, config, self.pool, self.address,
            updates,
        )  # fmt: skip
        found = curves("", returns, self.steps, seed)
        if stable_baselines.installed():
            returns = stable_baselines.train_by_ppo(
                self.family, self.goals, config, episodes=self.episodes, updates=updates,
                measured={times * k for times in (1, TIMES) for k in range(self.steps + 1)},
                address=self.address,
            )  # fmt: skip
            found |= curves(", SB3 PPO", returns, self.steps, seed)
        return found

    def setting(self) -> dict[str, Any]:
        """Return what gives the returns their meaning, plain JSON values."""
        setting: dict[str, Any] = {
            "horizon": self.family.horizon,
            "achieved_by": dict(self.family.achieved),
            "episodes": self.episodes,
        }
        if (best := self.family.optimal_return(self.goals)) is not None:
            setting["optimal_returns"] = best.tolist()
        return setting

    def _rollouts(
        self, policy: MetaPolicy, sizes: Sequence[float] | None, adapts: bool
    ) -> tuple[list[float], list[Rollout]]:
        tasks = len(self.goals)
        loop, meta = policy.inner_loop(self.pool, sizes)
        context = policy.context(self.goals)
        collector = self._collector(policy.policy, policy.config)

        def sample(params: Params, k: int, *, deterministic: bool = False) -> Rollout:
            return collector.collect(
                {**params, **context},
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


_AnyProtocol = _Protocol | SupervisedProtocol


def _tuned(protocol: _AnyProtocol, members: Sequence[MetaPolicy]) -> dict[float, float]:
    """Return the measure after one step, mean of tasks and seeds, by the factor of its size.

    None are tried where the policy learned its sizes, or takes no step. A factor whose step is not
    finite has the worst, minus or plus infinity.
    """
    row = members[0].algorithm
    if row.learned_steps != "no" or row.observes_task:
        return {}
    returns = {}
    for factor in FACTORS:
        try:
            returns[factor] = protocol.curve(members, _scaled(factor)).returns[1]
        except NonFiniteError:
            returns[factor] = -math.inf * protocol.measure.sign
    return returns


def _scaled(factor: float) -> Callable[[MetaPolicy], Sequence[float]]:
    """Return the sizes of a policy's steps: a factor of its own in training, then half of that."""

    def sizes(policy: MetaPolicy) -> Sequence[float]:
        first = factor * policy.training_step_sizes[0]
        return (first, first / 2)

    return sizes


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
    episodes: int = EPISODES,
    steps: int = 3,
    seed: int = 0,
    step_sizes: Sequence[float] | None = None,
    references: Mapping[str, What | Sequence[What]] | None = None,
    random_step_sizes: Sequence[float] | None = None,
    pretrained_step_sizes: Sequence[float] | None = None,
    tune_step_sizes: bool = False,
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
        tune_step_sizes: choose the first step's size for each policy, references included, by the
            return after it on as many validation tasks; later steps take half of it. Sizes that are
            given, or that a policy learned, are kept.
        deterministic: act by the mean instead of a sample, in the returns only.
        drawn: draw the tasks at random, as the papers do, instead of covering the test split
            evenly, which tells the mean over the split with less chance.
        split: "validation" draws other tasks and episodes, for choosing between policies.
        threads: for physics and updates; results do not depend on it.
        workers: processes for environments without a native backend; 0 steps them in this one.
        from_scratch: show what training from scratch on each task earns with the same env steps,
            and with ten times as many; by PPO of stable-baselines3 too, where it is installed.
        scratch_learning_rate: of our own such training.
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
    family, config = first.source, first.config
    if isinstance(family, SupervisedFamily) and (deterministic or episodes != EPISODES):
        key = "deterministic" if deterministic else "episodes"
        raise UserError(f"{key} has no effect on the supervised tasks of {family.name}")
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

    def tasks_of(part: Literal["test", "validation"]) -> tuple[Address, Floats]:
        address = Address(seed, split=part)
        if part == "validation":
            if isinstance(family, FewShotFamily):
                return address, family.tasks.sample(address.tasks(), tasks, part)
            return address, family.tasks.sample(address.tasks(), tasks)
        if drawn:
            return address, family.tasks.sample(address.tasks(), tasks, "test")
        return address, family.tasks.grid(tasks)

    tried: dict[str, dict[float, float]] = {}

    def sizes_of(key: str, group: Sequence[MetaPolicy], given: Sizes, usual: Sizes) -> Sizes:
        if given or not tune_step_sizes or not steps:
            return given or usual or None
        tried[key] = _tuned(choosing, group)
        if not tried[key]:
            return None
        sign = choosing.measure.sign
        return _scaled(max(tried[key], key=lambda factor: sign * tried[key][factor]))

    address, goals = tasks_of(split)
    given = {"random": random_step_sizes, "pretrained": pretrained_step_sizes}
    with one_intraop_thread(), ChunkPool(threads or available_threads()) as pool:

        def made(address: Address, goals: Floats, steps: int, mode: bool) -> _AnyProtocol:
            if isinstance(family, SupervisedFamily):
                return SupervisedProtocol(family, goals, steps, address, pool)
            return _Protocol(first.family, goals, episodes, steps, address, mode, pool, workers)

        protocol = made(address, goals, steps, deterministic)
        choosing = made(*tasks_of("validation"), 1, False) if tune_step_sizes else protocol
        try:
            own = protocol.curve(members, sizes_of(name, members, step_sizes, None))
            results = {}
            for key, group in others.items():
                algorithm = group[0].config.algorithm
                usual = reference_step_sizes(group[0].config, algorithm)
                sizes = sizes_of(key, group, given.get(algorithm), usual)
                results[key] = protocol.curve(group, sizes)
            if start:
                usual = reference_step_sizes(config, "random") or step_sizes
                curve = protocol.curve(start, sizes_of("random", start, random_step_sizes, usual))
                results["random"] = dataclasses.replace(curve, algorithm="random")
            if from_scratch and steps:
                results |= protocol.scratch(first, scratch_learning_rate)
            if isinstance(protocol, SupervisedProtocol):
                results |= protocol.nearest_prototype()
        except NonFiniteError as error:
            raise UserError(f"{family.name}: {error}") from error
        finally:
            protocol.close()
            choosing.close()

    setting = {
        "family": config.family,
        "family_options": dict(config.family_options),
        "preset": config.preset,
        "components": list(family.tasks.names),
        "units": dict(family.units),
        "tasks": goals.tolist(),
        **protocol.setting(),
        "seed": seed,
        "split": split,
        "drawn": drawn,
        "deterministic": deterministic,
        "trained": dict(first.provenance),
        "tried_step_factors": {
            key: [[f, value if math.isfinite(value) else None] for f, value in returns.items()]
            for key, returns in tried.items()
        },
    }
    return EvaluationResult(own, results, setting, name)
