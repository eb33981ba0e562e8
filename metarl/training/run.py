"""Training of a run in its folder, and continuation of a run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import numpy as np
import torch

from metarl.algorithms import Algorithm
from metarl.config.options import Config
from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.envs import guard
from metarl.envs.errors import UserError, add_note, kind_of
from metarl.envs.registry import SUCH_AS
from metarl.envs.tasks import Tasks
from metarl.models.settings import own_settings
from metarl.policies.loading import load, run_config
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.checkpoints import checkpoints_of, in_shapes
from metarl.runs.files import as_path
from metarl.runs.folder import (
    RunError,
    check_family,
    check_free,
    create_run,
    differences,
    flat,
    is_free,
    load_state,
    locked,
    plan,
    read_record,
    save_checkpoint,
)
from metarl.runs.recorder import SAVE_SECONDS, Recorder
from metarl.runs.stopping import stop_by_ctrl_c
from metarl.sampling.trajectories import Rollout
from metarl.training.callbacks import Callback, CallbackList, Iteration, Run
from metarl.training.progress import ProgressBar
from metarl.training.trainer import Trainer
from metarl.training.transfer import origin, transferred

SKIPPED_LIMIT = 10
"""Number of consecutive skipped updates after which a run stops."""


@own_settings()
def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    init: MetaPolicy | str | Path | None = None,
    callbacks: Sequence[Callback | Callable[[Iteration], object]] = (),
    display: bool | Callable[[dict[str, Any]], object] = False,
    stop: Callable[[], bool] = lambda: False,
    start: int | None = None,
    notice: Callable[[str], object] = warnings.warn,
    started: Callable[[], object] = lambda: None,
    process_group: ProcessGroup = ALONE,
) -> MetaPolicy:
    """Train in a run folder and return the meta-policy.

    Args:
        config: config of the run; `iterations` is the total, also for a resumed run.
        out: the run folder; a new one, or with `resume` the one to continue.
        resume: continue from a checkpoint; "auto": continue if the run exists, else start it.
        init: policy to start from, or an argument of `metarl.load`. The state of its baseline is
            also used if both baselines are equal. A resumed run does not read it again.
        callbacks: `metarl.Callback` objects, or functions of an `Iteration`, called after it is
            saved.
        display: called on rank 0 with each iteration's metrics, before they are saved; True shows a
            progress bar.
        stop: called after each iteration; True ends the run after that iteration is saved. Ctrl-C
            does the same, and then raises KeyboardInterrupt; a second Ctrl-C raises it at once.
        start: with `resume`, the iteration of the checkpoint; by default the newest.
        notice: called with one line if a resumed run's new length changes its schedules, or if
            parameters of `init` are not used.
        started: called after the config, the family and the folder are checked.
        process_group: processes that share the tasks. Only rank 0 reads and writes the folder.

    Returns:
        the meta-policy; `provenance["stopped"]` is the reason if a callback ended the run.

    Raises:
        RunError: the folder exists, is in use, is not a run folder or was moved; a callback of the
            run is missing; or ten consecutive updates were skipped.
        CheckpointError: the checkpoint to resume from cannot be used.
        UserError: an error in the config, the family, a callback or the policy to start from.
        OSError: a file cannot be written; earlier files are intact.
        ProcessGroupError: another rank was lost.
        KeyboardInterrupt: Ctrl-C was pressed; the iteration is saved, and `resume` continues.
    """
    _check_arguments(config, resume, start, init)
    folder = as_path("out", out)
    watchers = CallbackList(callbacks)
    with contextlib.ExitStack() as stack:
        recorder = None
        with process_group.errors_shared():
            policy, started_from = None, {}
            if process_group.is_main:
                resume = not is_free(folder) if resume == "auto" else resume
                if resume:
                    started_from = _recorded_origin(folder, init)
                elif init is not None:
                    policy = init if isinstance(init, MetaPolicy) else load(init)
                    started_from = origin(
                        "" if policy is init else str(init), policy, config.setup.algorithm.baseline
                    )
                _check_folder(folder, config, bool(resume))
            started_from = process_group.from_main(started_from)
            # Errors of the config and the family are raised before the folder is created.
            trainer = stack.enter_context(new_trainer(config, process_group))
            if started_from:
                trainer.record["config"]["origin"] = started_from
            if process_group.is_main:
                if policy is not None:
                    _start_from(policy, trainer, notice)
                opened = _continued(folder, trainer, start, notice) if resume else None
                check = stack.enter_context(opened or _begun(folder, trainer))
                watchers.load(folder, trainer.state.callbacks)
                between = SAVE_SECONDS if trainer.source.independent_of_policy else 0.0
                # It writes while user code may have another current folder.
                there = folder.absolute()
                recorder = Recorder(there, trainer.record, trainer.state, check, between)
                stack.enter_context(recorder)
            trainer.state = process_group.from_main(trainer.state)
        started()
        loop = _Loop(trainer, folder, recorder, watchers)
        stack.push(loop.close)
        if display is True:
            display = bar = ProgressBar(config.setup.family, config.run.iterations)
            stack.callback(bar.close)
        try:
            with stop_by_ctrl_c(quiet=not process_group.is_main) as interrupted:
                loop.start()
                loop.run(display or None, lambda: interrupted() or stop())
        except OSError as error:
            if checkpoints_of(folder):
                add_note(error, f"then continue with: metarl train --resume {quote(str(folder))}")
            raise
        if process_group.any(interrupted()):
            raise KeyboardInterrupt(f"stopped after iteration {trainer.state.iteration}")
        meta, reason = trainer.meta_policy(), process_group.from_main(loop.seen.stopped)
        if reason:
            meta = dataclasses.replace(meta, provenance={**meta.provenance, "stopped": reason})
        return meta


def new_trainer(config: Config, process_group: ProcessGroup = ALONE) -> Trainer:
    """Return the trainer of a run at its start. Close it, or use it as a context manager."""
    return Trainer(config.setup, config.run, process_group)


class _Loop:
    """Iterations of a run, including callbacks and records.

    Args:
        trainer: trainer at the iteration to continue from.
        folder: run folder.
        recorder: recorder of the folder, on rank 0.
        callbacks: callbacks on rank 0.
    """

    def __init__(
        self, trainer: Trainer, folder: Path, recorder: Recorder | None, callbacks: CallbackList
    ) -> None:
        self.trainer, self.folder, self.recorder = trainer, folder, recorder
        self.callbacks = callbacks
        self.seen = Run(
            folder, flat(trainer.record["config"]), trainer.family, trainer.domain.measure,
            trainer.meta_policy,
        )  # fmt: skip

    def start(self) -> None:
        """Prepare callbacks."""
        with self.trainer.process_group.errors_shared():
            if self.recorder is not None:
                self.callbacks.start(self.seen)

    def close(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Let callbacks release resources."""
        if self.recorder is not None:
            self.callbacks.close(error)

    def run(
        self, display: Callable[[dict[str, Any]], object] | None, stop: Callable[[], bool]
    ) -> None:
        """Iterate to the end of the run, or until it is stopped."""
        process_group, state = self.trainer.process_group, self.trainer.state
        total = self.trainer.run.iterations
        watched, proposed = process_group.from_main((bool(self.callbacks), self.callbacks.proposes))
        ends = lambda: process_group.any(stop() or bool(self.seen.stopped))  # noqa: E731
        while state.iteration < total and not ends():
            with process_group.errors_shared():
                tasks = self._proposed_tasks() if proposed else None
                self._iterate(tasks, display, watched=watched)
        with process_group.errors_shared():
            if self.recorder is not None:
                self.recorder.wait()

    def _iterate(
        self,
        tasks: Tasks | None,
        display: Callable[[dict[str, Any]], object] | None,
        *,
        watched: bool,
    ) -> None:
        """Run an iteration, save it, and call the callbacks."""
        trainer, recorder, state = self.trainer, self.recorder, self.trainer.state
        rollouts: list[Rollout] = []
        with guard.restored():
            row = trainer.iterate(rollouts.extend if watched else None, tasks=tasks)
        if state.skipped_in_a_row >= SKIPPED_LIMIT:
            raise RunError(
                f"{SKIPPED_LIMIT} consecutive updates were skipped; the last because"
                f" {row['skipped']}. The last good checkpoint is in {self.folder}"
            )
        iteration = self._iteration(row, rollouts) if watched else None
        if recorder is None:
            return
        if iteration is not None:
            self.callbacks.update(iteration)
            state.callbacks = self.callbacks.states()
        recorder.record(row, state)
        if display is not None:
            display(copy.deepcopy(row))
        if iteration is not None and self.callbacks.wait:
            recorder.wait()
            self.callbacks.saved(iteration)

    def _proposed_tasks(self) -> Tasks | None:
        """Return the tasks that a callback of rank 0 proposes for the next iteration."""
        trainer, run, group = self.trainer, self.trainer.run, self.trainer.process_group
        found = None
        if group.is_main:
            iteration = trainer.state.iteration
            found = self.callbacks.tasks(run.seed, iteration, run.tasks, trainer.family)
        return group.from_main(found)

    def _iteration(self, row: dict[str, Any], rollouts: list[Rollout]) -> Iteration:
        """Return an iteration as callbacks see it, with the tasks and returns of all ranks."""
        group = self.trainer.process_group
        returns = [group.gather(r.mean_returns()).numpy() for r in rollouts]
        pre, post = (returns[0], returns[-1]) if returns else (None, None)
        if post is not None and math.isnan(row["return_post"]):  # no policy adapted
            post = np.full_like(post, np.nan)
        tasks = group.gather(torch.from_numpy(self.trainer.tasks)).numpy()
        return Iteration(self.seen, row["iteration"], row, tasks, pre, post, rollouts)


def schedule_change(algorithm: Algorithm, total: int, planned: int, iteration: int) -> str | None:
    """Return, in words, what changes in a run's schedules if its planned end changes.

    Args:
        algorithm: algorithm of the run.
        total: total number of iterations of the continued run.
        planned: originally planned number.
        iteration: number of completed iterations.

    Returns:
        None if nothing depends on the run's length.
    """
    parts = [part.change(planned, total, iteration) for part in (algorithm.outer, algorithm.meta)]
    found = "; ".join(filter(None, parts))
    return f"{total} iterations instead of {planned}: {found}" if found else None


def _check_arguments(config: Any, resume: Any, start: int | None, init: Any) -> None:
    if not isinstance(config, Config):
        raise UserError(
            f"train takes a Config, from metarl.resolve, got {kind_of(config)}; a family is"
            f" passed to resolve by its name, {SUCH_AS}"
        )
    if resume not in (True, False, "auto"):
        raise UserError(f"resume must be True, False or 'auto', got {resume!r}")
    if start is not None and not resume:
        raise UserError(f"start {start} applies to a run that is continued: set resume=True")
    if init is not None and resume is True:
        raise UserError("init starts a new run, but resume continues one: remove one of them")


def _recorded_origin(folder: Path, init: Any) -> dict[str, Any]:
    """Return the origin of a run to continue; RunError if it is not the given one."""
    found = read_record(folder)["config"].get("origin", {})
    if init is None:
        return found
    is_policy = isinstance(init, MetaPolicy)
    given, kept = (init.digest, "sha256") if is_policy else (str(init), "policy")
    if found.get(kept) != given:
        raise RunError(
            f"{folder} started from {found.get(kept, 'random parameters')}, not from init {given};"
            " start a new run"
        )
    return found


def _check_folder(folder: Path, config: Config, resume: bool) -> None:
    """Raise RunError if a run cannot start in a folder, or with `resume` continue there."""
    if not resume:
        check_free(folder)
    elif found := differences(run_config(folder, config.setup).to_json(), config.to_json()):
        raise RunError(
            f"{folder} was trained with other options: {found[0]}; remove that option, or start"
            " a new run"
        )


def _start_from(policy: MetaPolicy, trainer: Trainer, notice: Callable[[str], object]) -> None:
    """Copy the meta-parameters of a policy to a new run."""
    algorithm, state, start = trainer.algorithm, trainer.state, trainer.meta_policy()
    name = start.origin["policy"]
    state.params, left = transferred(policy, start, name)
    state.outer = algorithm.outer.init(state.params)
    if "baseline" in start.origin:
        shapes = {key: tuple(value.shape) for key, value in state.baseline.items()}
        state.baseline = in_shapes(f"the baseline of init {name}", policy.baseline, shapes)
    if left:
        notice(f"{algorithm.name} does not use these parameters of init: {', '.join(left)}")


@contextlib.contextmanager
def _begun(folder: Path, trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Hold a new run's folder; it is removed if the run fails before an iteration is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder) as check:
            create_run(folder, trainer.record)
            save_checkpoint(folder, trainer.record, trainer.state)
            yield check
    except Exception as error:
        # No iteration could be continued; another process may have created the folder first.
        if not trainer.state.iteration and not isinstance(error, RunError):
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _continued(
    folder: Path, trainer: Trainer, start: int | None, notice: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Hold the folder of a continued run, and load its state into the trainer."""
    total, record = trainer.run.iterations, trainer.record
    with locked(folder) as check:
        planned = read_record(folder)["config"]["options"]["iterations"]
        check_family(folder, record)
        trainer.state = load_state(folder, record, trainer.state, start)
        iteration = trainer.state.iteration
        if not iteration:  # it may have been killed before its first checkpoint
            save_checkpoint(folder, record, trainer.state)
        if iteration < total != planned:
            change = schedule_change(trainer.algorithm, total, planned, iteration)
            if change is not None:
                notice(change)
            plan(folder, total)
        yield check
