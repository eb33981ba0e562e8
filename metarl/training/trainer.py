"""The outer loop: sample tasks, adapt on them, improve the initialization; save, resume."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch

from metarl.algorithms.table import find_algorithm
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ALONE, Ranks
from metarl.envs import TaskFamily, guard
from metarl.envs.errors import UserError, kind_of
from metarl.envs.family import Family
from metarl.envs.registry import SUCH_AS, find_family
from metarl.learning.inner_loop import InnerLoop, NonFiniteError, Query
from metarl.learning.losses import Batch
from metarl.learning.settings import own_settings
from metarl.learning.signals import support_agreement
from metarl.learning.trajectories import Rollout
from metarl.models.networks import copied
from metarl.policies.building import make_adapter, model_for, row_for
from metarl.policies.loading import checkpoints_of
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.checkpoints import versions
from metarl.runs.files import as_path
from metarl.runs.fingerprint import fingerprint
from metarl.runs.folder import (
    RunError,
    State,
    check_family,
    check_free,
    create_run,
    differences,
    is_free,
    load_state,
    locked,
    plan,
    run_config,
    save_checkpoint,
)
from metarl.runs.recorder import SAVE_SECONDS, Recorder
from metarl.runs.stopping import stop_by_ctrl_c
from metarl.sampling.rollouts import Address
from metarl.sampling.seeding import stream
from metarl.sampling.workers import START_SECONDS
from metarl.training.checks import check_combination, check_device
from metarl.training.iterations import (
    make_outer,
    make_problem,
    schedule,
    schedule_change,
)
from metarl.training.sources import Episodes, make_source

Callback = Callable[[dict[str, Any]], None]
"""Takes an iteration's metrics; they are a copy."""

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
        self.family = find_family(config.family, **config.family_options)
        self.algorithm = row_for(find_algorithm(config.algorithm), self.family)
        self.model = model_for(self.algorithm, config, self.family)
        check_combination(self.algorithm, config, self.family)
        check_device(config.device)
        _check_ranks(config, self.family, ranks)
        adapter = make_adapter(self.algorithm, config, self.model)
        params = adapter.init(self.model.init(stream(config.seed, 0, "init")))
        self.outer = make_outer(self.algorithm, config)
        self.state = State(params, self.outer.init(params))
        self._first = True
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(own_settings())
        self.pool = self._stack.enter_context(ChunkPool(config.threads, ranks))
        self.source = make_source(
            self.algorithm, config, self.family, adapter, self.pool, self.block
        )
        self._stack.callback(self.source.close)
        self.fingerprint = fingerprint(self.family, getattr(self.source, "spaces", None))
        self.inner_loop = InnerLoop(adapter, config.advantage, self.pool)

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
        waited = ranks.traffic.seconds
        address = Address(config.seed, state.iteration, first_task=self.block.start)
        opened = self.source.open(address)
        tasks = self.block.stop - self.block.start
        seconds: dict[str, float] = {}
        stats: dict[str, Any] = {"finite": False}
        inner = dict.fromkeys(("inner_kl", "step_size", "support_agreement"), math.nan)
        before = params = state.params
        outer = state.outer
        query: Query = "none" if row.gradient == "displacement" else "batch"
        try:
            common: dict[str, Any] = {"steps": config.inner.steps, "query": query}
            if self.source.fixed:
                adapted = self.inner_loop.draw(opened.sample, params, tasks, **common)
            else:
                # Once in a process: the code may be another after a resume.
                common |= {"kl": config.inner.kl, "check": self._first}
                self._first = False
                adapted = self.inner_loop.run(opened.sample, params, tasks, **common)
            params = adapted.meta
            if config.inner.steps:
                adapter = self.inner_loop.adapter
                inner["inner_kl"] = adapted.inner_kl
                inner["step_size"] = adapter.mean_step_sizes(params, 1)[0]
                support = adapted.batches[0]
                if isinstance(support, Batch):
                    inner["support_agreement"] = support_agreement(adapter, params, support)
            seconds["adapt"] = time.perf_counter() - start - opened.seconds
            problem = make_problem(
                row, config, state.iteration, adapted, params, self.inner_loop.adapter, self.pool
            )
            rate = schedule(row, config, state.iteration).rate
            params, outer, stats = self.outer.step(problem, params, outer, rate)
        except NonFiniteError as error:
            stats["skipped"] = str(error)
        count = ranks.total(opened.count)
        if not count:
            stats |= {"finite": False, "skipped": "every episode diverged"}
        if stats.pop("finite"):
            if row.outer != "none":  # else what was fitted or observed would change the initial one
                state.params = self.model.confined(opened.observed(params))
                state.outer = outer
            state.skipped_in_a_row = 0
        else:
            stats.setdefault("skipped", "the meta-gradient is not finite")
            state.skipped_updates += 1
            state.skipped_in_a_row += 1
        state.iteration += 1
        state.env_steps += count
        recorded = opened.metrics(before, state.params, stats)
        total = time.perf_counter() - start
        metrics = {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            **recorded,
            "skipped_updates": state.skipped_updates,
            **inner,
            **stats,
            "seconds_rollout": opened.seconds,
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "seconds_update": total - opened.seconds,
            "seconds_iteration": total,
            "seconds_processor": time.process_time() - processor,
            "seconds_ranks": ranks.traffic.seconds - waited,
            "env_steps_per_second": count / total,
        }
        if on_rollouts is not None and isinstance(opened, Episodes):
            # Last, and without views of parameters: what is done to them changes nothing here.
            on_rollouts([replace(r, behaviour=copied(r.behaviour)) for r in opened.rollouts])
        return metrics

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
        return MetaPolicy(state.params, self.config, provenance, self.fingerprint)


def _check_ranks(config: Config, family: Family, ranks: Ranks) -> None:
    """Raise UserError unless a family's tasks can be dealt out to ranks."""
    if ranks.size == 1:
        return
    if not isinstance(family, TaskFamily):
        raise UserError(f"{family.name}: supervised tasks train on one rank, got {ranks.size}")
    if config.workers and not family.parallel and ranks.limit <= START_SECONDS:
        raise UserError(
            f"rank_timeout must be above {START_SECONDS:g}, the seconds that workers may take"
            f" to start, got {ranks.limit:g}"
        )


@own_settings()
def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    progress: Callback | None = None,
    display: Callback | None = None,
    stop: Callable[[], bool] = lambda: False,
    start: int | None = None,
    notice: Callable[[str], object] = warnings.warn,
    started: Callable[[], object] = lambda: None,
    ranks: Ranks = ALONE,
) -> MetaPolicy:
    """Train in a run folder and return the meta-policy.

    Args:
        config: what to train; `iterations` is the total, also of a resumed run.
        out: the run folder; a new one, or with `resume` the one to continue.
        resume: go on from a checkpoint; "auto": where there is a run, and else begin one.
        progress: is given each iteration's metrics, on rank 0, once they and the checkpoint are
            saved. The next iteration waits for that.
        display: is given the same before they are saved, while the run goes on: for a progress bar.
        stop: asked after each iteration. The run ends once that is saved. Ctrl-C does the same, and
            then raises KeyboardInterrupt; a second Ctrl-C raises it at once.
        start: with `resume`, the checkpoint's iteration; by default the newest.
        notice: is given a line where a resumed run's new length changes its schedules.
        started: is called once nothing is wrong with the config, the family and the folder.
        ranks: that share the tasks. Rank 0 alone reads and writes the folder.

    Raises:
        RunError: the folder exists, is in use, is not a run or was moved; or ten updates in a row
            were skipped.
        CheckpointError: the checkpoint to resume from cannot be used.
        UserError: the config or the family is at fault.
        OSError: a file cannot be written; what was saved before is whole.
        RanksError: another rank was lost.
        KeyboardInterrupt: Ctrl-C was pressed; the iteration is saved, and `resume` continues.
    """
    if not isinstance(config, Config):
        raise UserError(
            f"train takes a Config, which metarl.resolve makes, got {kind_of(config)}; a family is"
            f" given to resolve by its name, {SUCH_AS}"
        )
    if resume not in (True, False, "auto"):
        raise UserError(f"resume must be True, False or 'auto', got {resume!r}")
    if start is not None and not resume:
        raise UserError(f"start {start} is of a run that goes on: give resume=True")
    folder = as_path("out", out)
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
                between = SAVE_SECONDS if trainer.source.fixed else 0.0
                # It writes while user code has a current folder of its own.
                there = folder.absolute()
                recorder = Recorder(
                    there, config, trainer.state, check, between, trainer.fingerprint
                )
                stack.enter_context(recorder)
            trainer.state = ranks.from_main(trainer.state)
        started()
        try:
            with stop_by_ctrl_c(quiet=not ranks.is_main) as interrupted:
                ends = lambda: interrupted() or stop()  # noqa: E731
                _train(trainer, folder, recorder, progress, display, ends)
        except OSError as error:
            if checkpoints_of(folder):
                error.add_note(f"then go on with: metarl train --resume {quote(str(folder))}")
            raise
        if ranks.any(interrupted()):
            raise KeyboardInterrupt(f"stopped after iteration {trainer.state.iteration}")
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
            create_run(folder, trainer.config, trainer.fingerprint)
            save_checkpoint(folder, trainer.config, trainer.state, trainer.fingerprint)
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
        check_family(folder, config, trainer.fingerprint)
        trainer.state = load_state(folder, config, trainer.state, start, trainer.fingerprint)
        iteration = trainer.state.iteration
        if not iteration:  # it may have been killed before its first checkpoint
            save_checkpoint(folder, config, trainer.state, trainer.fingerprint)
        if iteration < config.iterations != planned:
            change = schedule_change(trainer.algorithm, config, planned, iteration)
            if change is not None:
                notice(change)
            plan(folder, config)
        yield check


def _train(
    trainer: Trainer,
    folder: Path,
    recorder: Recorder | None,
    progress: Callback | None,
    display: Callback | None,
    stop: Callable[[], bool],
) -> None:
    ranks, state = trainer.ranks, trainer.state
    while state.iteration < trainer.config.iterations and not ranks.any(stop()):
        with ranks.agreeing():
            with guard.restored():
                row = trainer.iterate()
            if state.skipped_in_a_row >= SKIPPED_LIMIT:
                raise RunError(
                    f"{SKIPPED_LIMIT} updates in a row were skipped; the last because"
                    f" {row['skipped']}. The last good checkpoint is in {folder}"
                )
            if recorder is not None:
                recorder.record(row, state)
                if display is not None:
                    display(copy.deepcopy(row))
                if progress is not None:
                    recorder.wait()
                    progress(copy.deepcopy(row))
    with ranks.agreeing():
        if recorder is not None:
            recorder.wait()
