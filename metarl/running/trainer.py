"""The outer loop: sample tasks, adapt on them, improve the initialization; save, resume."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metarl.envs.family import find_family
from metarl.learning.algorithms import find_algorithm
from metarl.learning.inner_loop import InnerLoop, NonFiniteError, Query
from metarl.learning.parallel import ChunkPool, one_intraop_thread
from metarl.learning.trajectories import Rollout
from metarl.running.building import make_adapter, model_for, row_for
from metarl.running.checkpoints import versions
from metarl.running.checks import check_combination, check_device
from metarl.running.config import Config
from metarl.running.iterations import (
    make_outer,
    make_problem,
    schedule,
    schedule_change,
)
from metarl.running.loading import checkpoints_of
from metarl.running.meta_policy import MetaPolicy
from metarl.running.metrics import MetricsLog
from metarl.running.runs import (
    RunError,
    State,
    check_free,
    create_run,
    differences,
    load_state,
    locked,
    run_config,
    save_checkpoint,
)
from metarl.running.sources import Episodes, make_source
from metarl.sampling.rollouts import Address
from metarl.sampling.seeding import stream

SKIPPED_LIMIT = 10
"""Updates skipped in a row after which a run stops."""

SAVE_SECONDS = 5.0
"""Between checkpoints of a run on a data set."""


class Trainer:
    """One run's environments, threads and state. Close it, or use it as a context manager."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.family = find_family(config.family, **config.family_options)
        self.algorithm = row_for(find_algorithm(config.algorithm), self.family)
        self.model = model_for(self.algorithm, config, self.family)
        check_combination(self.algorithm, config, self.family)
        check_device(config.device)
        adapter = make_adapter(self.algorithm, config, self.model)
        params = adapter.init(self.model.init(stream(config.seed, 0, "init")))
        self._outer = make_outer(self.algorithm, config)
        self.state = State(params, self._outer.init(params))
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(one_intraop_thread())
        self.pool = self._stack.enter_context(ChunkPool(config.threads))
        self.source = make_source(self.algorithm, config, self.family, adapter, self.pool)
        self._stack.callback(self.source.close)
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
            on_rollouts: is shown the iteration's rollouts, support first.
        """
        row, config, state = self.algorithm, self.config, self.state
        start, processor = time.perf_counter(), time.process_time()
        opened = self.source.open(Address(config.seed, state.iteration))
        seconds: dict[str, float] = {}
        stats: dict[str, Any] = {"finite": False}
        inner: dict[str, Any] = {"inner_kl": math.nan, "step_size": math.nan}
        before = params = state.params
        outer = state.outer
        query: Query = "none" if row.gradient == "displacement" else "batch"
        try:
            common: dict[str, Any] = {"steps": config.inner.steps, "query": query}
            if self.source.fixed:
                adapted = self.inner_loop.draw(opened.sample, params, config.tasks, **common)
            else:
                common["kl"] = config.inner.kl
                adapted = self.inner_loop.run(opened.sample, params, config.tasks, **common)
            params = adapted.meta
            if config.inner.steps:
                size = self.inner_loop.adapter.mean_step_sizes(params, 1)[0]
                inner = {"inner_kl": adapted.inner_kl, "step_size": size}
            seconds["adapt"] = time.perf_counter() - start - opened.seconds
            problem = make_problem(
                row, config, state.iteration, adapted, params, self.inner_loop.adapter, self.pool
            )
            rate = schedule(row, config, state.iteration).rate
            params, outer, stats = self._outer.step(problem, params, outer, rate)
        except NonFiniteError as error:
            stats["skipped"] = str(error)
        if stats.pop("finite"):
            if isinstance(opened, Episodes) and config.policy.normalize:
                seen = torch.cat([r.observation[r.valid] for r in opened.rollouts])
                params = opened.source.model.track_observations(params, seen)
            state.params, state.outer, state.skipped_in_a_row = params, outer, 0
        else:
            stats.setdefault("skipped", "the meta-gradient is not finite")
            state.skipped_updates += 1
            state.skipped_in_a_row += 1
        state.iteration += 1
        state.env_steps += opened.count
        if on_rollouts is not None and isinstance(opened, Episodes):
            on_rollouts(opened.rollouts)
        recorded = opened.metrics(before, state.params, stats)
        total = time.perf_counter() - start
        return {
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
            "env_steps_per_second": opened.count / total,
        }

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
    resume: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    start: int | None = None,
    notice: Callable[[str], object] = warnings.warn,
) -> MetaPolicy:
    """Train in a run folder and return the meta-policy.

    Args:
        config: what to train; `iterations` is the total, also of a resumed run.
        out: the run folder; a new one, or with `resume` the one to continue.
        resume: go on from a checkpoint.
        progress: is given each iteration's metrics.
        stop: asked after each iteration, which is saved by then.
        start: with `resume`, the checkpoint's iteration; by default the newest.
        notice: is given a line where a resumed run's new length changes its schedules.

    Raises:
        RunError: the folder exists, is in use, is not a run or was moved; or ten updates in a row
            were skipped.
        CheckpointError: the checkpoint to resume from cannot be used.
        UserError: the config or the family is at fault.
        OSError: a file cannot be written; what was saved before is whole.
    """
    folder = Path(out)
    if not resume:
        check_free(folder)
        # Faults of the config and the family show before the folder is made.
        with Trainer(config) as trainer:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with locked(folder) as check:
                    create_run(folder, config)
                    save_checkpoint(folder, config, trainer.state)
                    return _train(trainer, folder, progress, stop, check)
            except Exception as error:
                # Nothing was learned that could be continued; another process may have been first.
                if not trainer.state.iteration and not isinstance(error, RunError):
                    shutil.rmtree(folder, ignore_errors=True)
                raise
    stored = run_config(folder)
    if differences(stored, config):
        raise RunError(
            f"{folder} was trained with other options: {differences(stored, config)[0]};"
            " leave that option out, or start a new run"
        )
    with locked(folder) as check, Trainer(config) as trainer:
        trainer.state = load_state(folder, config, trainer.state, start)
        iteration = trainer.state.iteration
        if not iteration:  # it may have been killed before its first checkpoint
            save_checkpoint(folder, config, trainer.state)
        change = schedule_change(trainer.algorithm, config, stored.iterations, iteration)
        if change is not None:
            notice(change)
        return _train(trainer, folder, progress, stop, check)


def _train(
    trainer: Trainer,
    folder: Path,
    progress: Callable[[dict[str, Any]], None] | None,
    stop: Callable[[], bool],
    check: Callable[[], None],
) -> MetaPolicy:
    config, state = trainer.config, trainer.state
    rows: list[dict[str, Any]] = []  # that are not written yet
    saved = time.monotonic()
    # An iteration on a data set takes less time than to write it down.
    between = SAVE_SECONDS if trainer.source.fixed else 0.0
    try:
        with MetricsLog(folder, state.iteration, json.dumps(config.to_json(), indent=2)) as log:

            def save() -> None:
                log.write(*rows)
                # After the metrics: a crash in between repeats iterations, and their rows.
                save_checkpoint(folder, config, state)
                rows.clear()

            while state.iteration < config.iterations and not stop():
                row = trainer.iterate()
                check()
                if state.skipped_in_a_row >= SKIPPED_LIMIT:
                    raise RunError(
                        f"{SKIPPED_LIMIT} updates in a row were skipped; the last because"
                        f" {row['skipped']}. The last good checkpoint is in {folder}"
                    )
                rows.append(row)
                kept = state.iteration % config.checkpoint_every == 0
                if kept or time.monotonic() - saved >= between:
                    save()
                    saved = time.monotonic()
                if progress is not None:
                    progress(row)
            if rows:
                save()
    except OSError as error:
        if checkpoints_of(folder):
            error.add_note(f"then go on with: metarl train --resume {folder}")
        raise
    return trainer.meta_policy()
