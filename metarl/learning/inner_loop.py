"""The inner loop on live tasks: sample, estimate advantages, adapt, K times.

The trainer, evaluation and `MetaPolicy.adapt` all go through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from metarl.envs.errors import UserError
from metarl.learning.adaptation import Adapter, StepSizes
from metarl.learning.advantages import AdvantageConfig, estimate
from metarl.learning.objectives import Batch, make_batch
from metarl.learning.parallel import ChunkPool, slices
from metarl.learning.policies import Params, stack
from metarl.learning.trajectories import Rollout

_CHUNK = 4  # tasks

Sampler = Callable[[Params, int], Rollout]
"""(stacked parameters, inner step) -> episodes sampled with them"""


Query = Literal["none", "rollout", "batch"]


class NonFiniteError(UserError):
    """A sampled reward, observation or action, or an adapted parameter, is NaN or infinite."""


@dataclass
class Adapted:
    """What an inner loop leaves: iterate k sampled rollout k, and rollout k made iterate k + 1."""

    iterates: list[Params]
    """Fast parameters, stacked."""
    slow: Params
    rollouts: list[Rollout] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)


@dataclass(frozen=True)
class InnerLoop:
    """How tasks adapt, wherever their episodes come from."""

    adapter: Adapter
    advantage: AdvantageConfig
    pool: ChunkPool

    def run(
        self, sample: Sampler, meta: Params, tasks: int, *, steps: int, query: Query
    ) -> Adapted:
        """Adapt meta-parameters to `tasks` tasks by `steps` steps, each on episodes of its own.

        Args:
            sample: see `Sampler`.
            meta: not stacked.
            tasks: T.
            steps: K.
            query: after the last step, "none" samples nothing more, "rollout" samples episodes
                with theta_K, and "batch" estimates their advantages too.

        Raises:
            NonFiniteError: something sampled, or an adapted parameter, is not a finite number.
        """
        fast, slow, step_sizes = self.adapter.split(meta)
        adapted = Adapted([stack(fast, tasks)], slow)
        for k in range(steps + 1):
            if k == steps and query == "none":
                break
            rollout = sample(self.adapter.params(adapted.iterates[k], slow, tasks), k)
            _check_finite(rollout)
            adapted.rollouts.append(rollout)
            if k == steps and query == "rollout":
                break
            batch = self.prepare(rollout)
            adapted.batches.append(batch)
            if k < steps:
                adapted.iterates.append(self.step(adapted.iterates[k], slow, step_sizes, batch, k))
        return adapted

    def prepare(self, rollout: Rollout) -> Batch:
        """Return a rollout's samples with their advantages."""
        advantage = estimate(rollout, self.advantage, self.pool)
        return make_batch(self.adapter.policy, rollout, advantage)

    def step(
        self, fast: Params, slow: Params, step_sizes: StepSizes, batch: Batch, k: int
    ) -> Params:
        """Return the fast parameters after inner step k, stacked.

        Raises:
            NonFiniteError: one of them is not a finite number.
        """
        sizes = {name: s[min(k, len(s) - 1) :] for name, s in step_sizes.items()}

        def one(chunk: slice) -> Params:
            theta = {name: p[chunk] for name, p in fast.items()}
            part = batch.map(lambda x: x[chunk])
            return self.adapter.adapt(theta, slow, sizes, [part], order=0)[-1]

        parts = self.pool.map(one, slices(len(batch.weight), _CHUNK))
        new = {name: torch.cat([part[name] for part in parts]) for name in fast}
        for name, p in new.items():
            if not torch.isfinite(p).all():
                raise NonFiniteError(f"parameter {name} is not finite after inner step {k + 1}")
        return new


def _check_finite(rollout: Rollout) -> None:
    for name in ("reward", "observation", "last_observation", "action"):
        values = getattr(rollout, name)
        # A sum is finite only if its terms are, and needs no mask in memory.
        if not torch.isfinite(values.sum(dtype=torch.float64)):
            bad = ~torch.isfinite(values).flatten(1).all(dim=1)
            task = rollout.tasks[int(bad.nonzero()[0])].tolist()
            raise NonFiniteError(f"{name.replace('_', ' ')} is not finite in task {task}")
