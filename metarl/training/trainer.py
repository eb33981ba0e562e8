"""The outer loop: sample tasks, adapt on them, improve the initialization; save, resume."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor

from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ALONE, ProcessGroup, device_of
from metarl.domains.domain import TaskSamples
from metarl.domains.lookup import domain_of
from metarl.envs import guard
from metarl.envs.errors import NonFiniteError, UserError, kind_of
from metarl.envs.registry import SUCH_AS, find_family
from metarl.learning.inner_loop import Adapted, InnerLoop
from metarl.learning.inner_update import Adapter
from metarl.learning.meta_gradients.problem import Objective, Sampled
from metarl.learning.outer import OuterState
from metarl.learning.signals import inner_gradient_cosine
from metarl.models.networks import Params, copied
from metarl.models.policies import PolicyModel
from metarl.models.settings import own_settings
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.checkpoints import checkpoints_of, versions
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
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.seeding import stream
from metarl.sampling.trajectories import Rollout

Callback = Callable[[dict[str, Any]], None]
"""Takes an iteration's metrics; they are a copy."""

_NO_INNER_STEP: dict[str, float] = {
    "inner_kl": math.nan, "step_size": math.nan, "inner_gradient_cosine": math.nan,
}  # fmt: skip

SKIPPED_LIMIT = 10
"""Updates skipped in a row after which a run stops."""


class Trainer:
    """One run's environments, threads and state. Close it, or use it as a context manager.

    Args:
        config: of the run.
        process_group: processes that share its tasks.
    """

    def __init__(self, config: Config, process_group: ProcessGroup = ALONE) -> None:
        self.config, self.process_group = config, process_group
        check_device(config.device)
        self.family = find_family(config.family, **config.family_options)
        self.domain = domain_of(self.family)
        self.algorithm = config.algorithm
        self.model = self.domain.model(self.algorithm, config.policy, self.family)
        adapter = self.domain.adapter(self.algorithm, self.model)
        self.state = self._initial_state(adapter)
        self._first = True
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(own_settings())
        self.pool = self._stack.enter_context(ChunkPool(config.threads, process_group))
        self.source = self.domain.source(
            self.family, self.algorithm, adapter, self.pool, **self._sampling()
        )
        self._stack.callback(self.source.close)
        self.fingerprint = fingerprint(self.family, self.source.spaces)
        self.inner_loop = InnerLoop(adapter, self.pool)

    def _initial_state(self, adapter: Adapter) -> State:
        config = self.config
        params = adapter.init(self.model.init(stream(config.seed, 0, "init")))
        baseline: Params = {}
        if config.baseline is not None:
            assert isinstance(self.model, PolicyModel)
            rng = stream(config.seed, 0, "baseline")
            baseline = config.baseline.init(self.model.observation_shape, rng)
        return State(params, config.outer.init(params), baseline)

    def _sampling(self) -> dict[str, Any]:
        config = self.config
        options: dict[str, Any] = {"tasks": config.tasks, "stratified": config.stratified}
        if config.policy.policies:
            options |= {
                "episodes": config.episodes,
                "options": config.policy,
                "workers": config.workers,
                "timeout": config.worker_timeout,
            }
        return options

    def close(self) -> None:
        """Close the environments; end threads and worker processes."""
        self._stack.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def iterate(self, on_rollouts: Callable[[list[Rollout]], None] | None = None) -> dict[str, Any]:
        """Run one meta-iteration and return its metrics.

        If a sample or a gradient is not finite, the update is skipped and counted.

        Args:
            on_rollouts: is given the iteration's rollouts of this process's tasks, support first.
        """
        clock = IterationClock(self.process_group)
        state, algorithm = self.state, self.algorithm
        self.process_group.check_same(torch.cat([x.flatten() for x in self._carried()]))
        samples = self.source.open(self._key(), state.baseline)
        before = state.params
        stats: dict[str, Any] = {"finite": False}
        inner = dict(_NO_INNER_STEP)
        params, outer = before, state.outer
        try:
            adapted = self._adapt(samples)
            params = adapted.meta
            inner = self._inner_metrics(adapted)
            clock.adapted(samples.seconds)
            problem = algorithm.meta.problem(self._sampled(adapted, samples))
            rate = algorithm.outer.rate(self.progress)
            params, outer, stats = algorithm.outer.step(problem, params, outer, rate)
            # Weight decay would move them, too.
            params = {**params, **self.inner_loop.adapter.without_gradient(adapted.meta)}
        except NonFiniteError as error:
            stats["skipped"] = str(error)
        count = self.process_group.total(samples.count)
        if not count:
            stats |= {"finite": False, "skipped": "every episode diverged"}
        self._accept(stats, samples, params, outer)
        state.iteration += 1
        state.env_steps += count
        metrics = {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            **samples.metrics(before, state.params, stats),
            "skipped_updates": state.skipped_updates,
            **inner,
            **stats,
            **clock.metrics(samples.seconds, count),
        }
        if on_rollouts is not None:
            # Last, and without views of parameters: what is done to them changes nothing here.
            on_rollouts([replace(r, behaviour=copied(r.behaviour)) for r in samples.rollouts])
        return metrics

    @property
    def progress(self) -> float:
        """Progress of the run, from 0 to 1."""
        return self.state.iteration / self.config.iterations

    def _key(self) -> RandomKey:
        first = self.source.block.start
        return RandomKey(self.config.seed, self.state.iteration, first_task=first)

    def _adapt(self, samples: TaskSamples) -> Adapted:
        """Adapt to each task; on a data set only draw, since the meta-gradient adapts by itself."""
        inner, query = self.config.inner, self.algorithm.meta.needs_query
        options: dict[str, Any] = {"steps": inner.steps, "query": query}
        params, tasks = self.state.params, self.source.tasks
        if self.source.fixed:
            return self.inner_loop.draw(samples.sample, params, tasks, **options)
        if self._first:  # once in a process: the code may have changed before a resume
            options["check"] = partial(self.domain.check, self.inner_loop.adapter, self.pool)
            self._first = False
        min_kl = getattr(inner, "min_kl", 0.0)
        return self.inner_loop.run(samples.sample, params, tasks, min_kl=min_kl, **options)

    def _sampled(self, adapted: Adapted, samples: TaskSamples) -> Sampled:
        config, algorithm = self.config, self.algorithm
        loss = algorithm.outer_loss or self.domain.outer_loss(self.model)
        objective = Objective(
            algorithm.outer.loss(loss),
            task_weights=self._task_weights(samples),
            regularizer=algorithm.regularizer,
        )
        iteration = self.state.iteration

        def permutation(n: int) -> Tensor:
            return torch.from_numpy(stream(config.seed, iteration, "fisher").permutation(n))

        return Sampled(
            self.inner_loop.adapter,
            adapted,
            self.pool,
            objective,
            progress=self.progress,
            chunk=self.source.chunk(adapted.batches, config.device),
            device=device_of(config.device),
            permutation=permutation,
        )

    def _task_weights(self, samples: TaskSamples) -> Tensor | None:
        """Return the weights of this process's tasks, of mean 1 over all tasks."""
        function, returns = self.algorithm.task_weights, samples.mean_returns()
        if function is None or returns is None:
            return None
        everywhere = self.process_group.gather(returns)
        weights = function(everywhere)
        if not isinstance(weights, Tensor) or weights.shape != everywhere.shape:
            shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise UserError(
                f"task_weights must return one weight a task, [{len(everywhere)}], got {shape}"
            )
        total = float(weights.sum())
        if not (bool((weights >= 0).all()) and 0.0 < total < math.inf):
            raise UserError("task_weights must be finite, not negative, and not all zero")
        return (weights * (len(weights) / total))[self.source.block]

    def _inner_metrics(self, adapted: Adapted) -> dict[str, float]:
        """Return how far the first inner step went, and how much of it is signal."""
        if not self.config.inner.steps:
            return dict(_NO_INNER_STEP)
        adapter = self.inner_loop.adapter
        return {
            "inner_kl": adapted.inner_kl,
            "step_size": adapter.mean_step_sizes(adapted.meta, 1)[0],
            "inner_gradient_cosine": inner_gradient_cosine(
                adapter, adapted.meta, adapted.batches[0]
            ),
        }

    def _accept(
        self, stats: dict[str, Any], samples: TaskSamples, params: Params, outer: OuterState
    ) -> None:
        """Take over a finite update, or count one that was skipped."""
        state, algorithm = self.state, self.algorithm
        if not stats.pop("finite"):
            stats.setdefault("skipped", "the meta-gradient is not finite")
            state.skipped_updates += 1
            state.skipped_in_a_row += 1
            return
        if algorithm.outer.updates:  # else statistics would change the initial parameters
            state.params = self.model.confined(samples.observed(params))
            state.outer = outer
        state.baseline = samples.updated_baseline()
        state.skipped_in_a_row = 0

    def _carried(self) -> list[Tensor]:
        """Return what is carried from one iteration to the next."""
        state = self.state
        return [*state.params.values(), *state.outer.values(), *state.baseline.values()]

    def meta_policy(self) -> MetaPolicy:
        """Return the present meta-parameters as a policy to evaluate, adapt or save."""
        state = self.state
        provenance = {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            "versions": versions(),
        }
        return MetaPolicy(state.params, self.config, provenance, self.fingerprint, state.baseline)


class IterationClock:
    """Seconds of the phases of one iteration."""

    def __init__(self, process_group: ProcessGroup) -> None:
        self.start, self.processor = time.perf_counter(), time.process_time()
        self.traffic, self.waited = process_group.traffic, process_group.traffic.seconds
        self.seconds: dict[str, float] = {}

    def adapted(self, sampling: float) -> None:
        """Note the end of the inner loop, which sampled for so many seconds."""
        self.seconds["seconds_adapt"] = time.perf_counter() - self.start - sampling

    def metrics(self, sampling: float, count: int) -> dict[str, float]:
        """Return the seconds of each phase, and the rate of `count` samples."""
        total = time.perf_counter() - self.start
        return {
            "seconds_rollout": sampling,
            **self.seconds,
            "seconds_update": total - sampling,
            "seconds_iteration": total,
            "seconds_processor": time.process_time() - self.processor,
            "seconds_ranks": self.traffic.seconds - self.waited,
            "env_steps_per_second": count / total,
        }


def check_device(device: str) -> None:
    """Raise UserError unless torch has the device."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"device must be cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch finds no GPU; use cpu")
    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"device {device!r} is not there: torch finds {count} GPU(s)")


def schedule_change(config: Config, planned: int, iteration: int) -> str | None:
    """Return what changes in a run's schedules if its end is another than was planned, in words.

    Args:
        config: as the run continues.
        planned: iterations that it was to have in all.
        iteration: how many it has had.

    Returns:
        None if nothing depends on the run's length.
    """
    total = config.iterations
    parts = [part.change(planned, total, iteration) for part in (config.outer, config.meta)]
    found = "; ".join(filter(None, parts))
    return f"{total} iterations instead of {planned}: {found}" if found else None


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
    process_group: ProcessGroup = ALONE,
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
        process_group: processes that share the tasks. Only rank 0 reads and writes the folder.

    Raises:
        RunError: the folder exists, is in use, is not a run or was moved; or ten updates in a row
            were skipped.
        CheckpointError: the checkpoint to resume from cannot be used.
        UserError: the config or the family is at fault.
        OSError: a file cannot be written; what was saved before is whole.
        ProcessGroupError: another rank was lost.
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
        with process_group.errors_shared():
            if process_group.is_main:
                resume = not is_free(folder) if resume == "auto" else resume
                _check_folder(folder, config, bool(resume))
            # Faults of the config and the family show before the folder is made.
            trainer = stack.enter_context(Trainer(config, process_group))
            if process_group.is_main:
                opened = _continued(folder, trainer, start, notice) if resume else None
                check = stack.enter_context(opened or _begun(folder, trainer))
                between = SAVE_SECONDS if trainer.source.fixed else 0.0
                # It writes while user code has a current folder of its own.
                there = folder.absolute()
                recorder = Recorder(
                    there, config, trainer.state, check, between, trainer.fingerprint
                )
                stack.enter_context(recorder)
            trainer.state = process_group.from_main(trainer.state)
        started()
        try:
            with stop_by_ctrl_c(quiet=not process_group.is_main) as interrupted:
                ends = lambda: interrupted() or stop()  # noqa: E731
                _train(trainer, folder, recorder, progress, display, ends)
        except OSError as error:
            if checkpoints_of(folder):
                error.add_note(f"then go on with: metarl train --resume {quote(str(folder))}")
            raise
        if process_group.any(interrupted()):
            raise KeyboardInterrupt(f"stopped after iteration {trainer.state.iteration}")
        return trainer.meta_policy()


def _check_folder(folder: Path, config: Config, resume: bool) -> None:
    """Raise RunError unless a run can begin there, or with `resume` go on."""
    if not resume:
        check_free(folder)
    elif found := differences(run_config(folder, config), config):
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
        planned = run_config(folder, config).iterations
        check_family(folder, config, trainer.fingerprint)
        trainer.state = load_state(folder, config, trainer.state, start, trainer.fingerprint)
        iteration = trainer.state.iteration
        if not iteration:  # it may have been killed before its first checkpoint
            save_checkpoint(folder, config, trainer.state, trainer.fingerprint)
        if iteration < config.iterations != planned:
            change = schedule_change(config, planned, iteration)
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
    process_group, state = trainer.process_group, trainer.state
    while state.iteration < trainer.config.iterations and not process_group.any(stop()):
        with process_group.errors_shared():
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
    with process_group.errors_shared():
        if recorder is not None:
            recorder.wait()
