"""Evaluation of policies: returns after 0 ... K inner steps, from separate episodes.

K steps take K + 1 samples. The policy adapts to each task with the same inner loop as in training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ProcessGroup
from metarl.domains.memory import check_memory, need
from metarl.domains.reinforcement import PolicyOptions, spaces_of
from metarl.envs import TaskFamily, guard
from metarl.envs.family import Family
from metarl.evaluation import stable_baselines
from metarl.evaluation.curves import RETURN, Curve, Experience, Measure
from metarl.evaluation.evaluator import EPISODES, Evaluator, OneTask, Options, Sizes
from metarl.evaluation.scratch import (
    TIMES,
    ScratchTrainer,
    Trained,
    curves,
    scratch_policy,
    train_from_scratch,
    updates,
)
from metarl.evaluation.statistics import Floats
from metarl.learning.inner_loop import check_finite
from metarl.learning.losses import Batch
from metarl.models.network_parts import MLPPart
from metarl.models.networks import Params, stack
from metarl.models.policies import PolicyModel
from metarl.policies.meta_policy import MetaPolicy
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import ActionMode
from metarl.sampling.trajectories import Rollout
from metarl.sampling.trials import episodes_of
from metarl.sampling.workers import AnyCollector, make_collector

PATHS = 6
"""Number of tasks whose paths are kept."""


class PolicyEvaluator(Evaluator):
    """Evaluator of policies by their returns. The ranks share the tasks and all results."""

    family: TaskFamily

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        block = self.pool.process_group.block(len(self.all_tasks))
        self.tasks = self.all_tasks[block]
        self.key = dataclasses.replace(self.key, first_task=block.start)
        # Policies of the same kind share the environments.
        self._collectors: dict[tuple[PolicyModel, ActionMode, int], AnyCollector] = {}
        self._told: list[bool] = []  # per curve: whether success was reported

    @property
    def measure(self) -> Measure:
        return RETURN

    @staticmethod
    def require(family: Family, options: Options, process_group: ProcessGroup) -> None:
        """Accept all options: all have an effect."""

    @staticmethod
    def spaces(family: Family) -> tuple[gym.Space, gym.Space]:
        assert isinstance(family, TaskFamily)
        return spaces_of(family)

    @staticmethod
    def on_one_task(
        meta: MetaPolicy,
        task: NDArray,
        *,
        steps: int = 1,
        episodes: int = EPISODES,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> OneTask:
        if not meta.algorithm.takes_inner_steps and meta.algorithm.trial is not None:
            return PolicyEvaluator._in_one_trial(meta, task, episodes, seed)
        before, after = (
            meta.adapt(task, steps=k, episodes=episodes, seed=seed, step_sizes=step_sizes)
            for k in (0, steps)
        )
        seeds = range(seed, seed + episodes)
        with guard.opened(lambda: meta.family.make(task)) as env:
            returns = [np.mean([p.play(env, seed=s) for s in seeds]) for p in (before, after)]
        taken, samples = after.provenance["steps"], f"of {episodes} episodes each"
        return OneTask((float(returns[0]), float(returns[1])), RETURN, taken, samples, after)

    @staticmethod
    def _in_one_trial(meta: MetaPolicy, task: NDArray, episodes: int, seed: int) -> OneTask:
        """Return the returns of the first and last episode of trials on a task."""
        assert meta.algorithm.trial is not None
        steps = meta.algorithm.trial.episodes - 1
        options, key = (
            Options(episodes=episodes, steps=steps, seed=seed),
            RandomKey(seed, split="test"),
        )
        with ChunkPool(1) as pool, contextlib.ExitStack() as stack:
            evaluator = PolicyEvaluator(meta.family, task[None], key, options, pool)
            stack.callback(evaluator.close)
            returns = evaluator.curve([meta], None).returns
        policy = meta.adapt(task, seed=seed)
        values = returns[0], returns[-1]
        return OneTask(values, RETURN, steps, f"in {episodes} trials", policy, "episode")

    def _of_all(self, values: Floats, axis: int = 0) -> Floats:
        """Return all ranks' values, along the axis of tasks."""
        own = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, axis, 0)))
        return np.moveaxis(self.pool.process_group.gather(own).numpy(), 0, axis)

    def close(self) -> None:
        """Close the environments."""
        for collector in self._collectors.values():
            collector.close()

    def _collector(
        self,
        policy: PolicyModel,
        mode: ActionMode,
        timeout: float,
        played: TaskFamily | None = None,
    ) -> AnyCollector:
        family, options, workers = played or self.family, self.options, self.options.workers
        kept = [*family.achieved.values(), *family.kept]
        kind = policy, mode, family.horizon
        if kind not in self._collectors:
            needed = need(
                policy, tasks=len(self.tasks), episodes=options.episodes, horizon=family.horizon,
                rollouts=options.steps + 1, workers=0 if family.parallel else workers,
                info_keys=len(kept), chunks=self.pool.threads,
            )  # fmt: skip
            check_memory(needed, family.name)
            self._collectors[kind] = make_collector(
                family, policy, len(self.tasks), options.episodes, self.pool, mode,
                workers=workers, timeout=timeout, info_keys=kept,
                check=self.check and not self._collectors and self.pool.process_group.is_main,
            )  # fmt: skip
        return self._collectors[kind]

    def curve(self, members: Sequence[MetaPolicy], sizes: Sizes) -> Curve:
        names = self.family.achieved
        algorithm = members[0].algorithm
        adapts = algorithm.takes_inner_steps
        scores, success, achieved, paths = [], [], [], {}
        episodes, done, lengths = [], [], []
        used: list[float] = []
        told = False
        with self.pool.process_group.errors_shared():
            for i, member in enumerate(members):
                given = sizes(member) if callable(sizes) else sizes
                sizes_of_one, rollouts, used_steps = self._rollouts(member, given, adapts)
                if i == 0:
                    used = sizes_of_one
                    if len(names) == 2:
                        paths = {
                            name: np.stack([_path(rollout, key) for rollout in rollouts], axis=1)
                            for name, key in names.items()
                        }
                scores.append(np.stack([r.mean_returns().numpy() for r in rollouts], axis=1))
                success.append(np.stack([r.success_rates().numpy() for r in rollouts], axis=1))
                episodes.append(np.stack([r.returns().numpy() for r in rollouts], axis=1))
                done.append(np.stack([r.successes().numpy() for r in rollouts], axis=1))
                lengths.append(used_steps)
                told |= any(_tells_success(rollout) for rollout in rollouts)
                came = _last if len(names) == 2 else _mean
                achieved.append([[came(r, key) for r in rollouts] for key in names.values()])
        self._told.append(self.pool.process_group.any(told))
        means = self._of_all(np.mean(np.array(achieved), axis=0), axis=2) if names else []
        return Curve(
            used,
            self._of_all(np.stack(scores), axis=1),
            algorithm.name,
            [member.run_options.seed for member in members],
            {name: values.T for name, values in zip(names, means, strict=True)},
            {name: self._of_all(values)[:PATHS] for name, values in paths.items()},
            self._of_all(np.mean(success, axis=0)),
            role=algorithm.role,
            unit="inner step" if algorithm.trial is None else "episode",
            per_episode=self._of_all(np.stack(episodes), axis=1),
            episode_success=self._of_all(np.stack(done), axis=1),
            experience=None
            if algorithm.task_conditioned
            else self._experience(
                self.options.episodes if algorithm.trial is None else 1, np.stack(lengths)
            ),
        )

    def _experience(self, episodes_per_step: int, env_steps: Floats) -> Experience:
        """Return the experience before each return.

        Args:
            env_steps: number of steps, [seeds, tasks, K + 1].
        """
        episodes = episodes_per_step * np.arange(float(env_steps.shape[2]))
        means = self._of_all(env_steps, axis=1).mean(axis=(0, 1))
        return Experience(episodes.tolist(), means.tolist())

    def settled(self, curves: Mapping[str, Curve]) -> dict[str, Curve]:
        """Return the curves, without success rates if no environment reported success or failure.

        Some environments report success only when it happens. If they did for one policy, the rate
        of another policy without success is 0.
        """
        if any(self._told):
            return dict(curves)
        unknown = {"success": None, "episode_success": None}
        return {name: dataclasses.replace(curve, **unknown) for name, curve in curves.items()}

    def scratch(
        self, like: MetaPolicy, learning_rate: float
    ) -> tuple[dict[str, Curve], dict[str, Curve]]:
        """Return the curves of our training, and of stable-baselines3's PPO if it is installed."""
        options, advantage = like.setup.policy, like.algorithm.advantage
        assert isinstance(options, PolicyOptions)
        assert advantage is not None
        policy = scratch_policy(options, self.family)
        steps, seed, episodes = self.options.steps, self.key.seed, self.options.episodes
        in_rows, against = updates(steps, self.options.experience, episodes)
        rows, experienced = {}, {}

        def add(name: str, method: str, found: Trained, after: list[int]) -> None:
            found = found.map(self._of_all)
            rows.update(curves(name, found, steps, seed))
            if against:
                experienced[method] = found.curve(after, seed)

        trainer = ScratchTrainer(policy, len(self.tasks), seed, learning_rate)
        collector = self._collector(policy, options.action, like.run_options.worker_timeout)
        found = train_from_scratch(
            trainer, collector, self.tasks, advantage, self.pool, self.key, max(in_rows, against)
        )
        add("", "training from scratch", found, list(range(against + 1)))
        if stable_baselines.installed() and isinstance(options.network, MLPPart):
            after = [0, *(2**i for i in range(against.bit_length()) if 2**i < against), against]
            needed = {times * k for times in (1, TIMES) for k in range(steps + 1)}
            found = stable_baselines.train_by_ppo(
                self.family, self.tasks, hidden=options.network.hidden, mode=options.action,
                advantage=advantage, episodes=episodes, updates=max(in_rows, against),
                measured=needed.union(after), key=self.key,
            )  # fmt: skip
            add(", SB3 PPO", "PPO of stable-baselines3 from scratch", found, after)
        return rows, experienced

    def setting(self) -> dict[str, Any]:
        setting: dict[str, Any] = {
            "horizon": self.family.horizon,
            "achieved_by": dict(self.family.achieved),
            "episodes": self.options.episodes,
            "samples": f"{self.options.episodes} episodes of {self.family.horizon} steps",
        }
        if (best := self.family.optimal_return(self.all_tasks)) is not None:
            setting["optimal_returns"] = best.tolist()
        return setting

    def _rollouts(
        self, policy: MetaPolicy, sizes: Sequence[float] | None, adapts: bool
    ) -> tuple[list[float], list[Rollout], Floats]:
        """Return the step sizes, the measured rollouts after 0 ... K inner steps, and the steps.

        The last array counts the steps before each return, [tasks, K + 1]: of all episodes of the
        inner steps, or of the episodes of one trial.
        """
        tasks, options = len(self.tasks), self.options
        loop, meta = policy.inner_loop(self.pool, sizes)
        context = policy.context(self.tasks)
        trial, episodes = policy.algorithm.trial, options.steps + 1
        family = self.family if trial is None else trial.family(self.family, episodes)
        collector = self._collector(
            policy.policy, policy.setup.action_mode, policy.run_options.worker_timeout, family
        )

        def collect(params: Params, k: int, deterministic: bool = False) -> Rollout:
            return collector.collect(
                {**params, **context},
                self.tasks,
                dataclasses.replace(self.key, inner_step=k),
                deterministic=deterministic,
            )

        if trial is not None:
            fast, slow, _ = loop.adapter.split(meta)
            rollout = collect(
                loop.adapter.params(stack(fast, tasks), slow, tasks), 0, options.deterministic
            )
            check_finite({"reward": rollout.reward}, rollout.tasks)
            found = episodes_of(rollout, episodes)
            return [], found, _steps_before(found[:-1], tasks) / options.episodes  # of one trial
        rollouts: list[Rollout] = []

        def sample(params: Params, k: int) -> Batch:
            rollouts.append(collect(params, k))
            return policy.batch(rollouts[-1], self.pool)

        steps = options.steps if adapts else 0
        adapted = loop.run(sample, meta, tasks, steps=steps, query=False)
        iterates = adapted.iterates * (1 if adapts else options.steps + 1)
        used_steps = _steps_before(rollouts, tasks)
        measured = rollouts if adapts and not options.deterministic else []
        for k in range(len(measured), len(iterates)):
            params = loop.adapter.params(iterates[k], adapted.slow, tasks)
            rollout = collect(params, k, options.deterministic)
            check_finite({"reward": rollout.reward}, rollout.tasks)
            measured.append(rollout)
        used_sizes = loop.adapter.mean_step_sizes(meta, options.steps) if adapts else []
        return used_sizes, measured, used_steps


def _steps_before(rollouts: Sequence[Rollout], tasks: int) -> Floats:
    """Return the number of steps before each of n rollouts and after the last, [tasks, n + 1]."""
    counts = [rollout.valid.sum(dim=(1, 2)).double().numpy() for rollout in rollouts]
    return np.stack([np.zeros(tasks), *counts], axis=1).cumsum(axis=1)


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
    """Info entry in the first episode of the first tasks, [tasks, time]."""
    values = rollout.info[key].masked_fill(~rollout.valid, math.nan)
    return values[:PATHS, 0].numpy()
