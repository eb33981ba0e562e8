"""The outer loop: sample tasks, adapt on them, improve the initialization; save, resume."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarl.envs import make_family
from metarl.learning.algorithms import find_algorithm
from metarl.learning.first_order import Adam, Still
from metarl.learning.inner_loop import Adapted, InnerLoop, NonFiniteError, Query
from metarl.learning.meta_gradients import (
    DisplacementProblem,
    ImplicitProblem,
    Objective,
    Problem,
    UnrolledProblem,
    annealed_weights,
    cosine,
)
from metarl.learning.objectives import clipped_ratio, likelihood_ratio
from metarl.learning.parallel import ChunkPool, one_intraop_thread
from metarl.learning.policies import GaussianMLP, Params
from metarl.learning.trajectories import Rollout
from metarl.learning.trust_region import TrustRegion
from metarl.running.checkpoints import versions
from metarl.running.config import Config
from metarl.running.memory import check_memory, need
from metarl.running.meta_policy import (
    MetaPolicy,
    make_adapter,
    policy_for,
    scaled_tasks,
)
from metarl.running.metrics import MetricsLog
from metarl.running.presets import check_combination, check_device
from metarl.running.runs import (
    RunError,
    State,
    create_run,
    differences,
    load_state,
    locked,
    run_config,
    save_checkpoint,
)
from metarl.sampling.rollouts import Address
from metarl.sampling.seeding import stream
from metarl.sampling.workers import make_collector

SKIPPED_LIMIT = 10
"""Updates skipped in a row after which a run stops."""


FISHER_SAMPLES = 200
"""Samples a task that Fisher products use at least."""


class Trainer:
    """One run's environments, threads and state. Close it, or use it as a context manager."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.algorithm = find_algorithm(config.algorithm)
        self.family = make_family(config.family, **config.family_options)
        self.policy = policy_for(config, self.family)
        check_combination(config)
        check_device(config.device)
        self._check_memory()
        adapter = make_adapter(config, self.policy)
        params = adapter.init(self.policy.init(stream(config.seed, 0, "init")))
        self._outer = make_outer(config)
        self.state = State(params, self._outer.init(params))
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(one_intraop_thread())
        self.pool = self._stack.enter_context(ChunkPool(config.threads))
        self._collector = make_collector(
            self.family, self.policy, config.tasks, config.episodes, self.pool,
            config.policy.action, workers=config.workers, timeout=config.worker_timeout,
        )  # fmt: skip
        self._stack.callback(self._collector.close)
        self.inner_loop = InnerLoop(adapter, config.advantage, self.pool)

    def _check_memory(self) -> None:
        config, second = self.config, self.algorithm.order == 2
        trust_region = self.algorithm.outer == "trust-region"
        needed = need(
            self.policy,
            tasks=config.tasks,
            episodes=config.episodes,
            horizon=self.family.horizon,
            rollouts=config.inner.steps + 1,
            workers=0 if self.family.parallel else config.workers,
            chunks=config.threads if second else 1,
            fisher_fraction=config.trust_region.fisher_fraction if trust_region else 0.0,
        )
        check_memory(needed, config.family)

    def close(self) -> None:
        """Close the environments; end threads and worker processes."""
        self._stack.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def iterate(self, watch: Callable[[list[Rollout]], None] | None = None) -> dict[str, Any]:
        """Run one meta-iteration and return its metrics.

        Where a sample or a gradient is not finite, the update is skipped and counted.

        Args:
            watch: is shown the iteration's rollouts, support first.
        """
        config, state = self.config, self.state
        start, processor = time.perf_counter(), time.process_time()
        address = Address(config.seed, state.iteration)
        tasks = self.family.tasks.sample(address.tasks(), config.tasks)
        rollouts: list[Rollout] = []
        seconds = {"rollout": 0.0}
        told = {"context": scaled_tasks(self.family, tasks)} if self.algorithm.told else {}

        def sample(params: Params, k: int) -> Rollout:
            begin = time.perf_counter()
            where = replace(address, inner_step=k)
            rollout = self._collector.collect({**params, **told}, tasks, where)
            seconds["rollout"] += time.perf_counter() - begin
            rollouts.append(rollout)
            return rollout

        stats: dict[str, Any] = {"finite": False}
        params, outer = state.params, state.outer
        query: Query = "none" if self.algorithm.gradient == "displacement" else "batch"
        try:
            adapted = self.inner_loop.run(
                sample, state.params, config.tasks, steps=config.inner.steps, query=query
            )
            seconds["adapt"] = time.perf_counter() - start - seconds["rollout"]
            problem = self._problem(adapted)
            decay = config.meta.decay
            rate = cosine(state.iteration / decay) if decay else 1.0
            params, outer, stats = self._outer.step(problem, params, outer, rate)
        except NonFiniteError as error:
            stats["skipped"] = str(error)
        if stats.pop("finite"):
            if config.policy.normalize:
                seen = torch.cat([r.observation[r.valid] for r in rollouts])
                params = self.policy.track_observations(params, seen)
            state.params, state.outer, state.skipped_in_a_row = params, outer, 0
        else:
            stats.setdefault("skipped", "the meta-gradient is not finite")
            state.skipped_updates += 1
            state.skipped_in_a_row += 1
        state.iteration += 1
        state.env_steps += sum(rollout.env_steps for rollout in rollouts)
        if watch is not None:
            watch(rollouts)
        total = time.perf_counter() - start
        returns = [float(rollout.mean_returns().nanmean()) for rollout in rollouts]
        # Reptile samples nothing with its last parameters: what counts are those before.
        planned = config.inner.steps + (query == "batch")
        adapted_all = len(returns) == planned and (query == "batch" or planned > 1)
        return {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            "return_pre": returns[0],
            "return_post": returns[-1] if adapted_all else math.nan,
            "gain": returns[-1] - returns[0] if adapted_all else math.nan,
            "returns": [r if math.isfinite(r) else None for r in returns],
            "episode_length": float(rollouts[-1].valid.sum(-1).double().mean()),
            "diverged_episodes": sum(int(rollout.diverged.sum()) for rollout in rollouts),
            "skipped_updates": state.skipped_updates,
            **self._spread(rollouts[-1]),
            **stats,
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "seconds_update": total - seconds["rollout"],
            "seconds_iteration": total,
            "seconds_processor": time.process_time() - processor,
            "env_steps_per_second": sum(rollout.env_steps for rollout in rollouts) / total,
        }

    def _spread(self, rollout: Rollout) -> dict[str, float]:
        entropy = self.policy.entropy(rollout.behaviour)[rollout.valid].mean()
        std = math.nan
        if isinstance(self.policy, GaussianMLP):
            floor = math.log(self.policy.min_std)
            std = float(self.state.params["log_std"].clamp(min=floor).exp().mean())
        return {"policy_std": std, "policy_entropy": float(entropy)}

    def _problem(self, adapted: Adapted) -> Problem:
        config, row, iteration = self.config, self.algorithm, self.state.iteration
        # A GPU takes all tasks at once; a processor's cache a few.
        chunk = 4 if config.device == "cpu" else config.tasks
        common: dict[str, Any] = {
            "chunk": chunk,
            "device": config.device,
            "sampled_with": self.state.params,
            "iterates": adapted.iterates[1:],
        }
        batches, adapter = adapted.batches, self.inner_loop.adapter
        if row.gradient == "displacement":
            return DisplacementProblem(adapter, batches, self.pool, **common)
        outer_loss = likelihood_ratio
        if row.outer == "clipped":
            outer_loss = partial(clipped_ratio, clip=config.adam.clip)
        if row.gradient == "implicit":
            objective = Objective(outer_loss)
            return ImplicitProblem(adapter, batches, self.pool, objective, **common)
        progress = iteration / config.meta.anneal if config.meta.anneal else 1.0
        objective = Objective(
            outer_loss,
            step_weights=annealed_weights(config.inner.steps, progress) if row.annealed else (),
            inner_kl=config.meta.inner_kl,
            credit=self._credit(adapted) if config.meta.credit else None,
        )
        count = batches[-1].weight.shape[1]
        used = max(round(config.trust_region.fisher_fraction * count), FISHER_SAMPLES)
        samples = None
        if used < count:
            rng = stream(config.seed, iteration, "fisher")
            if row.whole_episodes:
                whole = torch.arange(count).view(config.episodes, -1)
                few = math.ceil(used / whole.shape[1])
                samples = whole[torch.from_numpy(rng.permutation(config.episodes)[:few])]
            else:
                samples = torch.from_numpy(rng.permutation(count)[:used]).sort().values
        minibatches: list[Tensor] = []
        if row.outer != "trust-region" and config.adam.minibatches > 1:
            rng = stream(config.seed, iteration, "minibatches")
            shuffled = torch.from_numpy(rng.permutation(count))
            parts = shuffled.tensor_split(min(config.adam.minibatches, count))
            minibatches = [part.sort().values for part in parts]
        order = 1 if row.annealed and progress < 1.0 else row.order
        return UnrolledProblem(
            adapter,
            batches,
            self.pool,
            objective,
            order=order,
            fisher_samples=samples,
            minibatches=minibatches,
            **common,
        )

    def _credit(self, adapted: Adapted) -> Tensor:
        """Return what each task's support episodes earned afterwards, [T].

        The post-update return, scaled to mean 0 and standard deviation 1 over tasks, a sample of
        the support's.
        """
        earned = adapted.rollouts[-1].mean_returns().nan_to_num()
        scaled = (earned - earned.mean()) / (earned.std() + 1e-8)
        return (self.config.meta.credit * scaled * adapted.batches[0].weight.amax(1)).float()

    def meta_policy(self) -> MetaPolicy:
        """Return the present meta-parameters as a policy to evaluate, adapt or save."""
        state = self.state
        record = {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            "versions": versions(),
        }
        return MetaPolicy(dict(state.params), self.config, record)


def make_outer(config: Config) -> TrustRegion | Adam | Still:
    """Return a config's outer optimizer."""
    row = find_algorithm(config.algorithm)
    if row.outer == "none":
        return Still()
    return TrustRegion(config.trust_region) if row.outer == "trust-region" else Adam(config.adam)


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> MetaPolicy:
    """Train in a run folder and return the meta-policy.

    Args:
        config: what to train; `iterations` is the total, also of a resumed run.
        out: the run folder; a new one, or with `resume` the one to continue.
        resume: go on from the newest checkpoint.
        progress: is given each iteration's metrics.
        stop: asked after each iteration, which is saved by then.

    Raises:
        RunError: the folder exists, is in use or is not a run; or ten updates in a row were
            skipped.
        CheckpointError: the checkpoint to resume from cannot be used.
        UserError: the config or the family is at fault.
    """
    folder = Path(out)
    if not resume:
        # Faults of the config and the family show before the folder is made.
        with Trainer(config) as trainer:
            create_run(folder, config)
            try:
                with locked(folder):
                    save_checkpoint(folder, config, trainer.state)
                    return _train(trainer, folder, progress, stop)
            except Exception:
                if not trainer.state.iteration:  # nothing was learned that could be continued
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    stored = run_config(folder)
    if differences(stored, config):
        raise RunError(
            f"{folder} was trained with other options: {differences(stored, config)[0]};"
            " leave that option out, or start a new run"
        )
    with locked(folder), Trainer(config) as trainer:
        trainer.state = load_state(folder, config, trainer.state)
        return _train(trainer, folder, progress, stop)


def _train(
    trainer: Trainer,
    folder: Path,
    progress: Callable[[dict[str, Any]], None] | None,
    stop: Callable[[], bool],
) -> MetaPolicy:
    config, state = trainer.config, trainer.state
    with MetricsLog(folder, state.iteration, json.dumps(config.to_json(), indent=2)) as log:
        while state.iteration < config.iterations and not stop():
            row = trainer.iterate()
            if state.skipped_in_a_row >= SKIPPED_LIMIT:
                raise RunError(
                    f"{SKIPPED_LIMIT} updates in a row were skipped; the last because"
                    f" {row['skipped']}. The last good checkpoint is in {folder}"
                )
            log.write(row)
            # After the metrics: a crash in between repeats the iteration, and its row.
            save_checkpoint(folder, config, state)
            if progress is not None:
                progress(row)
    return trainer.meta_policy()
