"""The inner loop on live tasks: sample, estimate advantages, adapt, K times.

The trainer, evaluation and `MetaPolicy.adapt` all go through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import CHUNK
from metarl.envs.errors import UserError, check_one_of
from metarl.learning.advantages import AdvantageConfig, estimate
from metarl.learning.density import check_density
from metarl.learning.inner_update import FACTOR, Adapter, StepSizes
from metarl.learning.losses import Batch, make_batch, mean_kl
from metarl.learning.trajectories import Rollout
from metarl.models.networks import Params, stack
from metarl.models.policies import MLPPolicy
from metarl.models.samples import Examples, Samples

_FITS = 8  # rounds of fitting the factor of the step sizes to a KL
_NEAR = 0.05  # relative error of the factor that is left

Sampler = Callable[[Params, int], "Rollout | Examples"]
"""(stacked parameters, inner step) -> episodes sampled with them; or examples of a data set, which
do not depend on them: after the last step, those of the query"""


Query = Literal["none", "rollout", "batch"]


class NonFiniteError(UserError):
    """A sampled reward, observation or action, or an adapted parameter, is NaN or infinite."""


@dataclass
class Adapted:
    """What an inner loop leaves: iterate k sampled rollout k, and rollout k made iterate k + 1."""

    iterates: list[Params]
    """Fast parameters, stacked."""
    slow: Params
    meta: Params
    """Meta-parameters adapted from: those given, or with the fitted factor of the step sizes."""
    inner_kl: float = math.nan
    """Mean KL of the first step over tasks, on the samples that it was made from."""
    rollouts: list[Rollout] = field(default_factory=list)
    """None, where the samples are examples."""
    batches: list[Samples] = field(default_factory=list)
    advantage_scales: list[Tensor] = field(default_factory=list)
    """What each batch's advantages were divided by, [T] each."""


@dataclass(frozen=True)
class InnerLoop:
    """How tasks adapt, wherever their samples come from."""

    adapter: Adapter
    advantage: AdvantageConfig
    pool: ChunkPool

    def run(
        self,
        sample: Sampler,
        meta: Params,
        tasks: int,
        *,
        steps: int,
        query: Query,
        kl: float = 0.0,
        check: bool = False,
    ) -> Adapted:
        """Adapt meta-parameters to `tasks` tasks by `steps` steps, each on episodes of its own.

        Args:
            sample: see `Sampler`.
            meta: not stacked.
            tasks: T, of this rank.
            steps: K.
            query: after the last step, "none" samples nothing more, "rollout" samples episodes
                with theta_K, and "batch" estimates their advantages too.
            kl: fit the factor of the step sizes, 1 or more, so that the first step moves the
                policies by this mean KL at least; 0 leaves it.
            check: check the log-densities of the first samples, see `check_density`.

        Raises:
            UserError: by `check`.
            NonFiniteError: something sampled, or an adapted parameter, is not a finite number.
        """
        check_one_of("query", query, get_args(Query))
        fast, slow, step_sizes = self.adapter.split(meta)
        start = stack(fast, tasks)
        adapted = Adapted([start], slow, meta)
        for k in range(steps + 1):
            if k == steps and query == "none":
                break
            with self.pool.ranks.agreeing():  # what is not finite ends the loop for all, here
                drawn = sample(self.adapter.params(adapted.iterates[k], slow, tasks), k)
                _check_finite(drawn)
                if isinstance(drawn, Rollout):
                    adapted.rollouts.append(drawn)
                    if k == steps and query == "rollout":
                        break
                    batch, scale = self.prepare(drawn)
                    adapted.advantage_scales.append(scale)
                else:
                    batch = drawn
                adapted.batches.append(batch)
                if check and k == 0 and isinstance(batch, Batch) and isinstance(drawn, Rollout):
                    whole = not bool(drawn.diverged.any())
                    check_density(self.adapter, start, slow, batch, self.pool, whole=whole)
                if k < steps:
                    if k == 0:
                        start = self.start(start, slow, batch)
                        adapted.iterates[0] = start
                    new = self.step(adapted.iterates[k], slow, step_sizes, batch, k, start=start)
                    if k == 0 and query != "rollout" and isinstance(drawn, Rollout):
                        adapted.inner_kl = self._mean_kl(new, slow, batch)
                        if kl:
                            new = self._fit(adapted, new, batch, kl)
                            step_sizes = self.adapter.split(adapted.meta)[2]
                    adapted.iterates.append(new)
        return adapted

    def draw(
        self, sample: Sampler, meta: Params, tasks: int, *, steps: int, query: Query
    ) -> Adapted:
        """Return what `run` would sample, where that does not depend on the parameters.

        Nothing is adapted: what is to be optimized adapts by itself, with its graph.
        """
        check_one_of("query", query, get_args(Query))
        fast, slow, _ = self.adapter.split(meta)
        adapted = Adapted([stack(fast, tasks)], slow, meta)
        for k in range(steps + (query != "none")):
            drawn = sample({}, k)
            _check_finite(drawn)
            assert isinstance(drawn, Examples)
            adapted.batches.append(drawn)
        return adapted

    def start(self, fast: Params, slow: Params, support: Samples) -> Params:
        """Return theta_0, stacked, with what the model generates of the support."""
        if not self.adapter.model.generated:
            return fast

        def one(chunk: slice) -> Params:
            part = {name: p[chunk] for name, p in fast.items()}
            with torch.no_grad():
                return self.adapter.start(part, slow, support.map(lambda x: x[chunk]))

        parts = self.pool.map(one, slices(len(support.weight), CHUNK))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _fit(self, adapted: Adapted, new: Params, batch: Samples, kl: float) -> Params:
        """Fit the factor of the step sizes to a KL of the first step, and return where it leads."""
        start, slow = adapted.iterates[0], adapted.slow
        for _ in range(_FITS):
            before = adapted.meta[FACTOR]
            # Not below 1: a KL that were never to grow would hold adaptation back for good.
            factor = (_rescale(adapted.inner_kl, kl) * before).clamp(min=1.0)
            if torch.equal(factor, before):
                break
            adapted.meta = {**adapted.meta, FACTOR: factor}
            step_sizes = self.adapter.split(adapted.meta)[2]
            new = self.step(start, slow, step_sizes, batch, 0, start=start)
            adapted.inner_kl = self._mean_kl(new, slow, batch)
        return new

    def prepare(self, rollout: Rollout) -> tuple[Samples, Tensor]:
        """Return a rollout's samples with their advantages, and what these were divided by, [T]."""
        advantage, scale = estimate(rollout, self.advantage, self.pool)
        assert isinstance(self.adapter.model, MLPPolicy)
        return make_batch(self.adapter.model, rollout, advantage), scale

    def _mean_kl(self, fast: Params, slow: Params, batch: Samples) -> float:
        def one(chunk: slice) -> Tensor:
            part = batch.map(lambda x: x[chunk])
            theta = {name: p[chunk] for name, p in fast.items()}
            with torch.no_grad():
                output = self.adapter.output(theta, slow, part)
                return mean_kl(self.adapter.model, output, part)

        each = torch.cat(self.pool.map(one, slices(len(batch.weight), CHUNK)))
        return float(self.pool.ranks.gather(each).mean())

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
            fast: before it, stacked.
            slow: what does not adapt.
            step_sizes: of all steps.
            batch: the task's samples, [T, N, ...].
            k: counted from 0.
            start: the fast parameters before step 0, stacked, which a proximal term pulls to.

        Raises:
            NonFiniteError: one of them is not a finite number.
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


def _rescale(found: float, wanted: float) -> float:
    """Return the factor of a step that takes its KL to what is wanted; 1 where it is near.

    A KL grows with the square of the step, nearly: no more than a factor of 2 at a time is trusted.
    """
    if found <= 0.0:  # below zero by rounding
        return 1.0
    ratio = math.sqrt(wanted / found) if math.isfinite(found) else 0.5
    return 1.0 if abs(ratio - 1.0) < _NEAR else min(max(ratio, 0.5), 2.0)


def _check_finite(drawn: Rollout | Examples) -> None:
    names = ("inputs", "targets")
    if isinstance(drawn, Rollout):
        names = ("reward", "observation", "last_observation", "action")
    for name in names:
        values = getattr(drawn, name)
        # A sum is finite only if its terms are, and needs no mask in memory.
        if not torch.isfinite(values.sum(dtype=torch.float64)):
            bad = int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0])
            task = f" {drawn.tasks[bad].tolist()}" if isinstance(drawn, Rollout) else f" {bad}"
            raise NonFiniteError(f"{name.replace('_', ' ')} is not finite in task{task}")
