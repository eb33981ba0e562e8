"""The outer loop: sample tasks, adapt on them, improve the initialization; save, resume."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from metarl.envs import make_family
from metarl.envs.errors import UserError
from metarl.learning.algorithms import find_algorithm
from metarl.learning.inner_loop import InnerLoop, NonFiniteError, Query
from metarl.learning.parallel import ChunkPool, one_intraop_thread, slices
from metarl.learning.policies import Params
from metarl.learning.ranks import ALONE, CHUNK, Ranks, local_ranks
from metarl.learning.signals import support_agreement
from metarl.learning.trajectories import Rollout
from metarl.running.building import make_adapter, policy_for, scaled_tasks, spaces_of
from metarl.running.checkpoints import versions
from metarl.running.checks import check_combination, check_device
from metarl.running.config import Config
from metarl.running.iterations import (
    make_outer,
    make_problem,
    rollout_metrics,
    schedule,
    schedule_change,
)
from metarl.running.loading import checkpoints_of
from metarl.running.memory import check_memory, need
from metarl.running.meta_policy import MetaPolicy
from metarl.running.recording import Recorder
from metarl.running.runs import (
    RunError,
    State,
    check_free,
    create_run,
    differences,
    is_free,
    load_state,
    locked,
    run_config,
    save_checkpoint,
)
from metarl.sampling.rollouts import Address
from metarl.sampling.seeding import stream
from metarl.sampling.workers import START_SECONDS, make_collector

SKIPPED_LIMIT = 10
"""Updates skipped in a row after which a run stops."""


class Trainer:
    """One run's environments, threads and state. Close it, or use it as a context manager.

    Args:
        config: of the run.
        ranks: that share its tasks.
    """

    def __init__(self, config: Config, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks = config, ranks
        self.block = ranks.block(config.tasks)
        self._tasks = self.block.stop - self.block.start
        self.algorithm = find_algorithm(config.algorithm)
        self.family = make_family(config.family, **config.family_options)
        self.policy = policy_for(self.algorithm, config, self.family)
        self.action_space = spaces_of(self.family)[1]
        check_combination(self.algorithm, config)
        check_device(config.device)
        if config.workers and not self.family.parallel and ranks.limit <= START_SECONDS:
            raise UserError(
                f"rank_timeout must be above {START_SECONDS:g}, the seconds that workers may take"
                f" to start, got {ranks.limit:g}"
            )
        self._check_memory()
        adapter = make_adapter(self.algorithm, config, self.policy)
        params = adapter.init(self.policy.init(stream(config.seed, 0, "init")))
        self._outer = make_outer(self.algorithm, config)
        self.state = State(params, self._outer.init(params))
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(one_intraop_thread())
        self.pool = self._stack.enter_context(ChunkPool(config.threads, ranks))
        self._collector = make_collector(
            self.family, self.policy, self._tasks, config.episodes, self.pool,
            config.policy.action, workers=config.workers, timeout=config.worker_timeout,
        )  # fmt: skip
        self._stack.callback(self._collector.close)
        self.inner_loop = InnerLoop(adapter, config.advantage, self.pool)

    def _check_memory(self) -> None:
        config, second = self.config, self.algorithm.order == 2
        trust_region = self.algorithm.outer == "trust-region"
        needed = need(
            self.policy,
            tasks=self._tasks,
            episodes=config.episodes,
            horizon=self.family.horizon,
            rollouts=config.inner.steps + 1,
            workers=0 if self.family.parallel else config.workers,
            chunks=config.threads if second else 1,
            fisher_fraction=config.trust_region.fisher_fraction if trust_region else 0.0,
        )
        check_memory(needed, config.family, local_ranks())

    def close(self) -> None:
        """Close the environments; end threads and worker processes."""
        self._stack.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def iterate(self, on_rollouts: Callable[[list[Rollout]], None] | None = None) -> dict[str, Any]:
        """Run one meta-iteration and return its metrics.

        Where a sample or a gradient is not finite, the update is skipped and counted.

        Args:
            on_rollouts: is shown the iteration's rollouts, support first, of this rank's tasks.
        """
        row, config, state, ranks = self.algorithm, self.config, self.state, self.ranks
        start, processor = time.perf_counter(), time.process_time()
        ranks.check_same(torch.cat([x.flatten() for x in self._carried()]))
        before = ranks.traffic.seconds
        address = Address(config.seed, state.iteration, first_task=self.block.start)
        distribution = self.family.tasks
        draw = distribution.stratified if config.stratified else distribution.sample
        tasks = draw(address.tasks(), config.tasks)[self.block]
        rollouts: list[Rollout] = []
        seconds = {"rollout": 0.0}
        context = {"context": scaled_tasks(self.family, tasks)} if row.observes_task else {}

        def sample(params: Params, k: int) -> Rollout:
            begin = time.perf_counter()
            where = replace(address, inner_step=k)
            rollout = self._collector.collect({**params, **context}, tasks, where)
            seconds["rollout"] += time.perf_counter() - begin
            rollouts.append(rollout)
            return rollout

        stats: dict[str, Any] = {"finite": False}
        inner = dict.fromkeys(("inner_kl", "step_size", "support_agreement"), math.nan)
        params, outer = state.params, state.outer
        query: Query = "none" if row.gradient == "displacement" else "batch"
        try:
            adapted = self.inner_loop.run(
                sample,
                state.params,
                self._tasks,
                steps=config.inner.steps,
                query=query,
                kl=config.inner.kl,
            )
            params = adapted.meta
            if config.inner.steps:
                size = self.inner_loop.adapter.mean_step_sizes(params, 1)[0]
                inner = {
                    "inner_kl": adapted.inner_kl,
                    "step_size": size,
                    "support_agreement": support_agreement(
                        self.inner_loop.adapter, params, adapted.batches[0]
                    ),
                }
            seconds["adapt"] = time.perf_counter() - start - seconds["rollout"]
            problem = make_problem(
                row, config, state.iteration, adapted, params, self.inner_loop.adapter, self.pool
            )
            rate = schedule(row, config, state.iteration).rate
            params, outer, stats = self._outer.step(problem, params, outer, rate)
        except NonFiniteError as error:
            stats["skipped"] = str(error)
        if stats.pop("finite"):
            if config.policy.normalize:
                chunks = slices(self._tasks, CHUNK)
                parts = [r.observation[c][r.valid[c]] for c in chunks for r in rollouts]
                params = self.policy.track_observations(params, parts, ranks)
            state.params, state.outer, state.skipped_in_a_row = params, outer, 0
        else:
            stats.setdefault("skipped", "the meta-gradient is not finite")
            state.skipped_updates += 1
            state.skipped_in_a_row += 1
        state.iteration += 1
        env_steps = ranks.total(sum(rollout.env_steps for rollout in rollouts))
        state.env_steps += env_steps
        if on_rollouts is not None:
            on_rollouts(rollouts)
        told = rollout_metrics(
            row, config, self.policy, state.params, self.action_space, rollouts, ranks
        )
        total = time.perf_counter() - start
        return {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            **told,
            "skipped_updates": state.skipped_updates,
            **inner,
            **stats,
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "seconds_update": total - seconds["rollout"],
            "seconds_iteration": total,
            "seconds_processor": time.process_time() - processor,
            "seconds_ranks": ranks.traffic.seconds - before,
            "env_steps_per_second": env_steps / total,
        }

    def _carried(self) -> list[torch.Tensor]:
        """Return what is carried from one iteration to the next."""
        return [*self.state.params.values(), *self.state.outer.values()]

    def meta_policy(self) -> MetaPolicy:
        """Return the present meta-parameters as a policy to evaluate, adapt or save."""
        state = self.state
        provenance = {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            "versions": versions(),
        }
        return MetaPolicy(dict(state.params), self.config, provenance)


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    start: int | None = None,
    notice: Callable[[str], object] = warnings.warn,
    ranks: Ranks = ALONE,
) -> MetaPolicy:
    """Train in a run folder and return the meta-policy.

    Args:
        config: what to train; `iterations` is the total, also of a resumed run.
        out: the run folder; a new one, or with `resume` the one to continue.
        resume: go on from a checkpoint; "auto": where there is a run, and else begin one.
        progress: is given each iteration's metrics, on rank 0.
        stop: asked after each iteration. The run ends once that is saved.
        start: with `resume`, the checkpoint's iteration; by default the newest.
        notice: is given a line where a resumed run's new length changes its schedules.
        ranks: that share the tasks. Rank 0 alone reads and writes the folder.

    Raises:
        RunError: the folder exists, is in use, is not a run or was moved; or ten updates in a row
            were skipped.
        CheckpointError: the checkpoint to resume from cannot be used.
        UserError: the config or the family is at fault.
        OSError: a file cannot be written; what was saved before is whole.
        RanksError: another rank was lost.
    """
    folder = Path(out)
    with contextlib.ExitStack() as stack:
        recorder = None
        with ranks.agreeing():
            if ranks.is_main:
                resume = not is_free(folder) if resume == "auto" else resume
                _check_folder(folder, config, bool(resume))
            # Faults of the config and the family show before the folder is made.
            trainer = stack.enter_context(Trainer(config, ranks))
            if ranks.is_main:
                opened = _continued(folder, trainer, start, notice) if resume else None
                check = stack.enter_context(opened or _begun(folder, trainer))
                recorder = Recorder(folder, config, trainer.state, check)
                stack.enter_context(recorder)
            trainer.state = ranks.from_main(trainer.state)
        try:
            _train(trainer, folder, recorder, progress, stop)
        except OSError as error:
            if checkpoints_of(folder):
                error.add_note(f"then go on with: metarl train --resume {folder}")
            raise
        return trainer.meta_policy()


def _check_folder(folder: Path, config: Config, resume: bool) -> None:
    """Raise RunError unless a run can begin there, or with `resume` go on."""
    if not resume:
        check_free(folder)
    elif found := differences(run_config(folder), config):
        raise RunError(
            f"{folder} was trained with other options: {found[0]}; leave that option out, or start"
            " a new run"
        )


@contextlib.contextmanager
def _begun(folder: Path, trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Hold a new run's folder; it goes again where the run fails before anything was learned."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder) as check:
            create_run(folder, trainer.config)
            save_checkpoint(folder, trainer.config, trainer.state)
            yield check
    except Exception as error:
        # Nothing was learned that could be continued; another process may have been first.
        if not trainer.state.iteration and not isinstance(error, RunError):
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _continued(
    folder: Path, trainer: Trainer, start: int | None, notice: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Hold the folder of a run that goes on, and give the trainer its state."""
    config = trainer.config
    with locked(folder) as check:
        planned = run_config(folder).iterations
        trainer.state = load_state(folder, config, trainer.state, start)
        iteration = trainer.state.iteration
        if not iteration:  # it may have been killed before its first checkpoint
            save_checkpoint(folder, config, trainer.state)
        change = schedule_change(trainer.algorithm, config, planned, iteration)
        if change is not None:
            notice(change)
        yield check


def _train(
    trainer: Trainer,
    folder: Path,
    recorder: Recorder | None,
    progress: Callable[[dict[str, Any]], None] | None,
    stop: Callable[[], bool],
) -> None:
    ranks, state = trainer.ranks, trainer.state
    while state.iteration < trainer.config.iterations and not ranks.any(stop()):
        with ranks.agreeing():
            row = trainer.iterate()
            if state.skipped_in_a_row >= SKIPPED_LIMIT:
                raise RunError(
                    f"{SKIPPED_LIMIT} updates in a row were skipped; the last because"
                    f" {row['skipped']}. The last good checkpoint is in {folder}"
                )
            if recorder is not None:
                recorder.record(row, state)
                if progress is not None:
                    progress(row)
    with ranks.agreeing():
        if recorder is not None:
            recorder.wait()
