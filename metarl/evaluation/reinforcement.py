"""How well policies adapt: returns after 0 ... K inner steps, from episodes of their own.

K steps take K + 1 samples. The policy is adapted afresh on each task, by the same inner loop as in
training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import local_ranks
from metarl.domains.memory import check_memory, need
from metarl.envs import TaskFamily
from metarl.evaluation import stable_baselines
from metarl.evaluation.results import RETURN, Curve, Measure
from metarl.evaluation.scratch import (
    TIMES,
    ScratchTrainer,
    curves,
    scratch_policy,
    train_from_scratch,
)
from metarl.evaluation.statistics import Floats
from metarl.learning.inner_loop import check_finite
from metarl.learning.losses import Batch
from metarl.models.networks import Params
from metarl.models.policies import PolicyModel
from metarl.policies.meta_policy import MetaPolicy
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import ActionMode
from metarl.sampling.trajectories import Rollout
from metarl.sampling.workers import AnyCollector, make_collector

Sizes = Sequence[float] | Callable[[MetaPolicy], Sequence[float]] | None
"""Of the inner steps: given, or by policy; none takes the policy's own."""

PATHS = 6
"""Tasks whose paths are kept."""


@dataclass(frozen=True)
class PolicyProtocol:
    """What all policies are measured by. Each rank measures tasks of its own, and knows all."""

    family: TaskFamily
    all_goals: Floats
    episodes: int
    steps: int
    whole: RandomKey
    """Of all goals' episodes."""
    deterministic: bool
    pool: ChunkPool
    workers: int
    check: bool = True
    """Look at the environments first, once."""
    collectors: dict[tuple[PolicyModel, ActionMode], AnyCollector] = field(default_factory=dict)
    """By what they are made for: policies of one kind share the environments."""
    told: list[bool] = field(default_factory=list)
    """For each curve, whether the environments said anything about success."""

    @property
    def measure(self) -> Measure:
        """What is measured."""
        return RETURN

    @property
    def goals(self) -> Floats:
        """Those of this rank."""
        return self.all_goals[self.pool.process_group.block(len(self.all_goals))]

    @property
    def address(self) -> RandomKey:
        """Where this rank's episodes are sampled."""
        first = self.pool.process_group.block(len(self.all_goals)).start
        return dataclasses.replace(self.whole, first_task=first)

    def _of_all(self, values: Floats, axis: int = 0) -> Floats:
        """Return all ranks' values, along the axis of tasks."""
        own = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, axis, 0)))
        return np.moveaxis(self.pool.process_group.gather(own).numpy(), 0, axis)

    def close(self) -> None:
        """Close the environments."""
        for collector in self.collectors.values():
            collector.close()

    def _collector(self, policy: PolicyModel, config: Config) -> AnyCollector:
        key = policy, config.action_mode
        if key not in self.collectors:
            needed = need(
                policy, tasks=len(self.goals), episodes=self.episodes, horizon=self.family.horizon,
                rollouts=self.steps + 1, workers=0 if self.family.parallel else self.workers,
                info_keys=len(self.family.achieved), chunks=self.pool.threads,
                threads=self.pool.threads,
            )  # fmt: skip
            check_memory(needed, self.family.name, local_ranks())
            self.collectors[key] = make_collector(
                self.family, policy, len(self.goals), self.episodes, self.pool, key[1],
                workers=self.workers, timeout=config.worker_timeout,
                info_keys=list(self.family.achieved.values()),
                check=self.check and not self.collectors and self.pool.process_group.is_main,
            )  # fmt: skip
        return self.collectors[key]

    def curve(self, members: Sequence[MetaPolicy], sizes: Sizes) -> Curve:
        """Return the curve of a policy's seeds; an oracle takes no step."""
        names = self.family.achieved
        adapts = not members[0].algorithm.task_conditioned
        scores, success, achieved, paths = [], [], [], {}
        used: list[float] = []
        told = False
        with self.pool.process_group.errors_shared():
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
                told |= any(_tells_success(rollout) for rollout in rollouts)
                came = _last if len(names) == 2 else _mean
                achieved.append([[came(r, key) for r in rollouts] for key in names.values()])
        self.told.append(self.pool.process_group.any(told))
        means = self._of_all(np.mean(np.array(achieved), axis=0), axis=2) if names else []
        return Curve(
            used,
            self._of_all(np.stack(scores), axis=1),
            members[0].algorithm.name,
            [member.config.seed for member in members],
            {name: values.T for name, values in zip(names, means, strict=True)},
            {name: self._of_all(values)[:PATHS] for name, values in paths.items()},
            self._of_all(np.mean(success, axis=0)),
        )

    def told_of(self, curves: Mapping[str, Curve]) -> dict[str, Curve]:
        """Return curves without success rates if no environment has said anything about success.

        One that only tells of a success is told by another policy's: then a rate of 0 is known.
        """
        if any(self.told):
            return dict(curves)
        return {name: dataclasses.replace(curve, success=None) for name, curve in curves.items()}

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
        found = curves("", self._of_all(returns), self.steps, seed)
        if stable_baselines.installed():
            returns = stable_baselines.train_by_ppo(
                self.family, self.goals, config, episodes=self.episodes, updates=updates,
                measured={times * k for times in (1, TIMES) for k in range(self.steps + 1)},
                address=self.address,
            )  # fmt: skip
            found |= curves(", SB3 PPO", self._of_all(returns), self.steps, seed)
        return found

    def setting(self) -> dict[str, Any]:
        """Return what gives the returns their meaning, plain JSON values."""
        setting: dict[str, Any] = {
            "horizon": self.family.horizon,
            "achieved_by": dict(self.family.achieved),
            "episodes": self.episodes,
        }
        if (best := self.family.optimal_return(self.all_goals)) is not None:
            setting["optimal_returns"] = best.tolist()
        return setting

    def _rollouts(
        self, policy: MetaPolicy, sizes: Sequence[float] | None, adapts: bool
    ) -> tuple[list[float], list[Rollout]]:
        tasks = len(self.goals)
        loop, meta = policy.inner_loop(self.pool, sizes)
        context = policy.context(self.goals)
        collector = self._collector(policy.policy, policy.config)

        def collect(params: Params, k: int) -> Rollout:
            return collector.collect(
                {**params, **context},
                self.goals,
                dataclasses.replace(self.address, inner_step=k),
                deterministic=self.deterministic,
            )

        rollouts: list[Rollout] = []

        def sample(params: Params, k: int) -> Batch:
            rollout = collector.collect(
                {**params, **context}, self.goals, dataclasses.replace(self.address, inner_step=k)
            )
            rollouts.append(rollout)
            return policy.batch(rollout, self.pool)

        steps = self.steps if adapts else 0
        adapted = loop.run(sample, meta, tasks, steps=steps, query=False)
        iterates = adapted.iterates * (1 if adapts else self.steps + 1)
        measured = rollouts if adapts and not self.deterministic else []
        for k in range(len(measured), len(iterates)):
            rollout = collect(loop.adapter.params(iterates[k], adapted.slow, tasks), k)
            check_finite({"reward": rollout.reward}, rollout.tasks)
            measured.append(rollout)
        return loop.adapter.mean_step_sizes(meta, self.steps) if adapts else [], measured


def _tells_success(rollout: Rollout) -> bool:
    return rollout.tells_success is not None and bool(rollout.tells_success.any())


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
