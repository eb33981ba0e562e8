"""One meta-iteration: sample tasks, adapt to them, improve the initialization."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarl.config.options import RunOptions
from metarl.config.setup import Setup
from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ALONE, ProcessGroup, device_of
from metarl.domains.domain import TaskSamples
from metarl.domains.lookup import domain_of
from metarl.envs.errors import NonFiniteError, UserError
from metarl.envs.registry import find_family
from metarl.envs.tasks import Tasks
from metarl.learning.adapter import Adapter
from metarl.learning.inner_loop import Adapted, InnerLoop
from metarl.learning.meta_gradients.problem import Objective, Problem, Sampled
from metarl.learning.outer import OuterState
from metarl.learning.signals import inner_gradient_cosine
from metarl.models.networks import Params, copied
from metarl.models.policies import PolicyModel
from metarl.models.settings import own_settings
from metarl.parts import called
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.checkpoints import versions
from metarl.runs.fingerprint import fingerprint
from metarl.runs.folder import State
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.seeding import stream
from metarl.sampling.trajectories import Rollout

_NO_INNER_STEP: dict[str, float] = {
    "inner_kl": math.nan, "step_size": math.nan, "inner_gradient_cosine": math.nan,
}  # fmt: skip


@dataclass
class Update:
    """Result of an outer step. It is applied only if it is finite."""

    params: Params
    outer: OuterState
    stats: dict[str, Any] = field(default_factory=dict)
    finite: bool = False

    def skip(self, reason: str) -> None:
        """Do not apply it."""
        self.finite, self.stats["skipped"] = False, reason


class Trainer:
    """Environments, threads and state of a run. Close it, or use it as a context manager.

    Args:
        setup: family, algorithm and model.
        run: options of the run.
        process_group: processes that share its tasks.
    """

    def __init__(self, setup: Setup, run: RunOptions, process_group: ProcessGroup = ALONE) -> None:
        self.setup, self.run, self.process_group = setup, run, process_group
        check_device(run.device)
        self.family = find_family(setup.family, **setup.family_options)
        self.domain = domain_of(self.family)
        self.algorithm = setup.algorithm
        self.model = self.domain.model(self.algorithm, setup.policy, self.family)
        adapter = self.domain.adapter(self.algorithm, self.model)
        self.state = self._initial_state(adapter)
        self.tasks: Tasks = np.empty((0, self.family.tasks.dim))
        """Tasks of the last iteration on this process."""
        self._first = True
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(own_settings())
        self.pool = self._stack.enter_context(ChunkPool(run.threads, process_group))
        self.source = self.domain.source(
            self.family, self.algorithm, adapter, self.pool, **self._source_options()
        )
        self._stack.callback(self.source.close)
        self.record = {
            "config": setup.to_json(run.options()),
            "family": fingerprint(self.family, self.source.spaces),
        }
        """Config and family as the files of a run contain them."""
        self.inner_loop = InnerLoop(adapter, self.pool)

    def _initial_state(self, adapter: Adapter) -> State:
        algorithm, seed = self.algorithm, self.run.seed
        params = adapter.init(self.model.init(stream(seed, 0, "init")))
        baseline: Params = {}
        if algorithm.baseline is not None:
            assert isinstance(self.model, PolicyModel)
            shape = algorithm.baseline_shape(self.model.observation_shape)
            baseline = algorithm.baseline.init(shape, stream(seed, 0, "baseline"))
        return State(params, algorithm.outer.init(params), baseline)

    def _source_options(self) -> dict[str, Any]:
        run = self.run
        options: dict[str, Any] = {"tasks": run.tasks, "stratified": run.stratified}
        if run.policies:
            options |= {
                "episodes": run.episodes,
                "options": self.setup.policy,
                "workers": run.workers,
                "timeout": run.worker_timeout,
            }
        return options

    def close(self) -> None:
        """Close the environments; end threads and worker processes."""
        self._stack.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def iterate(
        self,
        on_rollouts: Callable[[list[Rollout]], None] | None = None,
        *,
        tasks: Tasks | None = None,
    ) -> dict[str, Any]:
        """Run one meta-iteration and return its metrics.

            tasks           T of them, drawn or given
            inner loop      theta_i' = theta - alpha grad L_i(theta), K times; then the query
            meta-objective  J(theta) = mean_i L_query,i(theta_i'(theta)), on these samples
            outer step      a step along the gradient of J, which goes through the inner steps
            record

        If a sample or a gradient is not finite, the update is skipped and counted.

        Args:
            on_rollouts: called with the iteration's rollouts of this process's tasks, support
                first.
            tasks: all tasks of the iteration, [T, task_dim]; by default they are sampled.
        """
        clock, state = IterationClock(self.process_group), self.state
        self._check_same_on_all_ranks()
        theta, inner = state.params, dict(_NO_INNER_STEP)

        samples = self.source.open(self._key(), state.baseline, tasks)  # draws tasks only
        try:
            adapted = self._adapt(samples)  # samples support and query episodes on the way
            inner = self._inner_metrics(adapted)
            clock.adapted(samples.seconds)
            problem = self._problem(adapted, samples)
            update = self._outer_step(problem, adapted.meta)  # takes the meta-gradient
        except NonFiniteError as error:
            update = Update(theta, state.outer)
            update.skip(str(error))
        count = self.process_group.total(samples.count)
        if not count:
            update.skip("every episode diverged")

        self._take_over(update, samples)
        state.iteration += 1
        state.env_steps += count
        self.tasks = samples.tasks
        metrics = {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            **samples.metrics(theta, state.params, update.stats),
            "skipped_updates": state.skipped_updates,
            **inner,
            **update.stats,
            **clock.metrics(samples.seconds, count),
        }
        if on_rollouts is not None:
            # Copies of the parameters, at the end: a callback cannot change the run.
            on_rollouts([replace(r, behaviour=copied(r.behaviour)) for r in samples.rollouts])
        return metrics

    @property
    def progress(self) -> float:
        """Progress of the run, from 0 to 1."""
        return self.state.iteration / self.run.iterations

    def _key(self) -> RandomKey:
        first = self.source.block.start
        return RandomKey(self.run.seed, self.state.iteration, first_task=first)

    def _adapt(self, samples: TaskSamples) -> Adapted:
        """Adapt to each task. On a data set, only sample: the meta-gradient adapts by itself."""
        inner, query = self.algorithm.inner, self.algorithm.meta.needs_query
        options: dict[str, Any] = {"steps": inner.steps, "query": query}
        params, tasks = self.state.params, self.source.tasks
        if self.source.independent_of_policy:
            return self.inner_loop.draw(samples.sample, params, tasks, **options)
        if self._first:  # once per process: the code may have changed before a resume
            options["check"] = partial(self.domain.check, self.inner_loop.adapter, self.pool)
            self._first = False
        min_kl = getattr(inner, "min_kl", 0.0)
        return self.inner_loop.run(samples.sample, params, tasks, min_kl=min_kl, **options)

    def _problem(self, adapted: Adapted, samples: TaskSamples) -> Problem:
        """Return the meta-objective on the samples; the outer optimizer differentiates it."""
        return self.algorithm.meta.problem(self._inputs(adapted, samples))

    def _outer_step(self, problem: Problem, theta: Params) -> Update:
        """Step from theta, the meta-parameters with the step size factor of the inner loop."""
        optimizer = self.algorithm.outer
        rate = optimizer.rate(self.progress)
        new, outer, stats = optimizer.step(problem, theta, self.state.outer, rate)
        # The factor and the observation statistics have no gradient, but weight decay changes them.
        new = {**new, **self.inner_loop.adapter.without_gradient(theta)}
        finite = stats.pop("finite") and all(bool(p.isfinite().all()) for p in new.values())
        return Update(new, outer, stats, finite)

    def _inputs(self, adapted: Adapted, samples: TaskSamples) -> Sampled:
        run, algorithm = self.run, self.algorithm
        loss = algorithm.outer_loss or self.domain.outer_loss(self.model)
        objective = Objective(
            algorithm.outer.loss(loss),
            task_weights=self._task_weights(samples),
            regularizer=algorithm.regularizer,
        )
        iteration = self.state.iteration

        def permutation(n: int) -> Tensor:
            return torch.from_numpy(stream(run.seed, iteration, "fisher").permutation(n))

        return Sampled(
            self.inner_loop.adapter,
            adapted,
            self.pool,
            objective,
            progress=self.progress,
            chunk=self.source.chunk(adapted.batches, run.device),
            device=device_of(run.device),
            permutation=permutation,
        )

    def _task_weights(self, samples: TaskSamples) -> Tensor | None:
        """Return the weights of this process's tasks, with mean 1 over all tasks."""
        function, returns = self.algorithm.task_weights, samples.mean_returns()
        if function is None or returns is None:
            return None
        everywhere = self.process_group.gather(returns)
        weights = called("task_weights", function, everywhere)
        if not isinstance(weights, Tensor) or weights.shape != everywhere.shape:
            shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise UserError(
                f"task_weights must return one weight per task, [{len(everywhere)}], got {shape}"
            )
        total = float(weights.sum())
        if not (bool((weights >= 0).all()) and 0.0 < total < math.inf):
            raise UserError("task_weights must be finite, not negative, and not all zero")
        return (weights * (len(weights) / total))[self.source.block]

    def _inner_metrics(self, adapted: Adapted) -> dict[str, float]:
        """Return the size of the first inner step, and its share of signal."""
        if not self.algorithm.inner.steps:
            return dict(_NO_INNER_STEP)
        adapter = self.inner_loop.adapter
        return {
            "inner_kl": adapted.inner_kl,
            "step_size": adapter.mean_step_sizes(adapted.meta, 1)[0],
            "inner_gradient_cosine": inner_gradient_cosine(
                adapter, adapted.meta, adapted.batches[0]
            ),
        }

    def _take_over(self, update: Update, samples: TaskSamples) -> None:
        """Apply a finite update, or count a skipped one."""
        state = self.state
        if not update.finite:
            update.stats.setdefault("skipped", "the meta-gradient is not finite")
            state.skipped_updates += 1
            state.skipped_in_a_row += 1
            return
        if self.algorithm.outer.learns:  # an untrained reference does not update statistics either
            state.params = self.model.confined(samples.observed(update.params))
            state.outer = update.outer
        state.baseline = samples.updated_baseline()
        state.skipped_in_a_row = 0

    def _check_same_on_all_ranks(self) -> None:
        state = self.state
        carried = (x for part in (state.params, state.outer, state.baseline) for x in part.values())
        self.process_group.check_same(torch.cat([x.flatten() for x in carried]))

    def meta_policy(self) -> MetaPolicy:
        """Return the current meta-parameters as a policy to evaluate, adapt or save."""
        state = self.state
        provenance = {
            "iteration": state.iteration,
            "env_steps": state.env_steps,
            "versions": versions(),
        }
        return MetaPolicy(state.params, self.setup, provenance, self.record, state.baseline)


class IterationClock:
    """Seconds of the phases of one iteration."""

    def __init__(self, process_group: ProcessGroup) -> None:
        self.start, self.processor = time.perf_counter(), time.process_time()
        self.traffic, self.waited = process_group.traffic, process_group.traffic.seconds
        self.seconds: dict[str, float] = {}

    def adapted(self, sampling: float) -> None:
        """Record the end of the inner loop, of which `sampling` seconds were spent on sampling."""
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
    """Raise UserError if torch does not have the device."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"device must be cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} does not exist: torch finds no GPU; use cpu")
    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"device {device!r} does not exist: torch finds {count} GPU(s)")
