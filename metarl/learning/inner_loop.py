"""Inner loop: sample and adapt, K times.

Training, evaluation and `MetaPolicy.adapt` all use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import CHUNK
from metarl.envs.errors import NonFiniteError
from metarl.learning.adapter import FACTOR, Adapter, StepSizes
from metarl.models.networks import Params, stack
from metarl.models.samples import Samples

_FITS = 8  # iterations of the fit of the step size factor to a KL
_NEAR = 0.05  # relative tolerance of the factor

Sampler = Callable[[Params, int], Samples]
"""(stacked parameters, inner step) -> samples drawn with them; the query samples after the last
step. Examples of a data set do not depend on the parameters."""

Check = Callable[[Params, Params, Samples], None]
"""(fast parameters, stacked; slow parameters; samples) -> None, or raises UserError."""


@dataclass
class Adapted:
    """Result of an inner loop: iterate k drew batch k, and batch k produced iterate k + 1."""

    iterates: list[Params]
    """Fast parameters, stacked."""
    slow: Params
    meta: Params
    """Meta-parameters before adaptation: the given ones, or with the fitted step size factor."""
    inner_kl: float = math.nan
    """Mean KL of the first step over tasks, on the samples of that step."""
    batches: list[Samples] = field(default_factory=list)


@dataclass(frozen=True)
class InnerLoop:
    """Adaptation of tasks, independent of the source of their samples."""

    adapter: Adapter
    pool: ChunkPool

    def run(
        self,
        sample: Sampler,
        meta: Params,
        tasks: int,
        *,
        steps: int,
        query: bool,
        min_kl: float | None = None,
        check: Check | None = None,
    ) -> Adapted:
        """Adapt meta-parameters to `tasks` tasks in `steps` steps, each on new samples.

        Args:
            sample: see `Sampler`.
            meta: meta-parameters, not stacked.
            tasks: number of tasks T of this process.
            steps: number of inner steps K.
            query: sample once more after the last step, with theta_K.
            min_kl: measure the mean KL of the first step, and fit the step size factor, 1 or more,
                so that the KL is at least this. 0 only measures. None does neither.
            check: called with theta_0 and the first samples.

        Raises:
            UserError: raised by `check`.
            NonFiniteError: a sampled value or an adapted parameter is not a finite number.
        """
        fast, slow, step_sizes = self.adapter.split(meta)
        start = stack(fast, tasks)
        adapted = Adapted([start], slow, meta)
        for k in range(steps + query):
            with self.pool.process_group.errors_shared():
                batch = sample(self.adapter.params(adapted.iterates[k], slow, tasks), k)
                adapted.batches.append(batch)
                if check is not None and k == 0:
                    check(start, slow, batch)
                if k == steps:
                    break
                if k == 0:
                    start = self.start(start, slow, batch)
                    adapted.iterates[0] = start
                new = self.step(adapted.iterates[k], slow, step_sizes, batch, k, start=start)
                if k == 0 and min_kl is not None:
                    adapted.inner_kl = self._mean_kl(new, slow, batch)
                    if min_kl:
                        new = self._fit(adapted, new, batch, min_kl)
                        step_sizes = self.adapter.split(adapted.meta)[2]
                adapted.iterates.append(new)
        return adapted

    def draw(
        self, sample: Sampler, meta: Params, tasks: int, *, steps: int, query: bool
    ) -> Adapted:
        """Return the samples of `run`, if they do not depend on the parameters.

        Nothing is adapted here: the meta-gradient computes the adaptation with its graph.
        """
        fast, slow, _ = self.adapter.split(meta)
        adapted = Adapted([stack(fast, tasks)], slow, meta)
        adapted.batches += [sample({}, k) for k in range(steps + query)]
        return adapted

    def start(self, fast: Params, slow: Params, support: Samples) -> Params:
        """Return theta_0, stacked, including the parameters generated from the support."""
        if not self.adapter.model.generated:
            return fast

        def one(chunk: slice) -> Params:
            part = {name: p[chunk] for name, p in fast.items()}
            with torch.no_grad():
                return self.adapter.start(part, slow, support.map(lambda x: x[chunk]))

        parts = self.pool.map(one, slices(len(support.weight), CHUNK))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit(self, adapted: Adapted, new: Params, batch: Samples, kl: float) -> Params:
        """Fit the step size factor to a KL of the first step; return the parameters after it."""
        start, slow = adapted.iterates[0], adapted.slow
        for _ in range(_FITS):
            before = adapted.meta[FACTOR]
            # At least 1: a KL that never grows would block adaptation forever.
            factor = (rescaled(adapted.inner_kl, kl) * before).clamp(min=1.0)
            if torch.equal(factor, before):
                break
            adapted.meta = {**adapted.meta, FACTOR: factor}
            step_sizes = self.adapter.split(adapted.meta)[2]
            new = self.step(start, slow, step_sizes, batch, 0, start=start)
            adapted.inner_kl = self._mean_kl(new, slow, batch)
        return new

    def _mean_kl(self, fast: Params, slow: Params, batch: Samples) -> float:
        def one(chunk: slice) -> Tensor:
            part = batch.map(lambda x: x[chunk])
            theta = {name: p[chunk] for name, p in fast.items()}
            with torch.no_grad():
                return part.kl(self.adapter.model, self.adapter.output(theta, slow, part))

        each = torch.cat(self.pool.map(one, slices(len(batch.weight), CHUNK)))
        return float(self.pool.process_group.gather(each).mean())

    def step(
        self,
        fast: Params,
        slow: Params,
        step_sizes: StepSizes,
        batch: Samples,
        k: int,
        *,
        start: Params,
    ) -> Params:
        """Return the fast parameters after inner step k, stacked.

        Args:
            fast: parameters before the step, stacked.
            slow: parameters that do not adapt.
            step_sizes: sizes of all steps.
            batch: samples of the tasks, [T, N, ...].
            k: step index from 0.
            start: fast parameters before step 0, stacked; target of a proximal term.

        Raises:
            NonFiniteError: a parameter is not a finite number.
        """

        def one(chunk: slice) -> Params:
            first, theta = ({n: p[chunk] for n, p in params.items()} for params in (start, fast))
            part = batch.map(lambda x: x[chunk])
            return self.adapter.step(theta, slow, step_sizes, part, k, start=first)

        parts = self.pool.map(one, slices(len(batch.weight), CHUNK))
        new = {name: torch.cat([part[name] for part in parts]) for name in fast}
        for name, p in new.items():
            if not torch.isfinite(p).all():
                raise NonFiniteError(f"parameter {name} is not finite after inner step {k + 1}")
        return new


def rescaled(found: float, wanted: float) -> float:
    """Return the factor of a step that changes its KL to the wanted value; 1 if it is close.

    A KL grows about with the square of the step. The factor is limited to 2 at a time.
    """
    if found <= 0.0:  # negative due to rounding
        return 1.0
    ratio = math.sqrt(wanted / found) if math.isfinite(found) else 0.5
    return 1.0 if abs(ratio - 1.0) < _NEAR else min(max(ratio, 0.5), 2.0)


def check_finite(values: Mapping[str, Tensor], tasks: Tensor | None = None) -> None:
    """Raise NonFiniteError if a value is not finite. The message names the first task.

    Args:
        values: [T, ...] by name.
        tasks: [T, task_dim], for the message.
    """
    for name, value in values.items():
        # A sum is finite only if its terms are finite, and needs no mask in memory.
        if not torch.isfinite(value.sum(dtype=torch.float64)):
            bad = int((~torch.isfinite(value)).flatten(1).any(dim=1).nonzero()[0])
            task = bad if tasks is None else tasks[bad].tolist()
            raise NonFiniteError(f"{name.replace('_', ' ')} is not finite in task {task}")
