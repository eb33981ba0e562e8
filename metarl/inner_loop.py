"""The inner loop on live tasks: sample, estimate advantages, adapt, K times.

The trainer, evaluation and `MetaPolicy.adapt` all go through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from envs.errors import UserError
from metarl.adaptation import StepSizes, adapt
from metarl.advantages import AdvantageConfig, estimate
from metarl.objectives import Batch, Loss, make_batch
from metarl.parallel import ChunkPool, slices
from metarl.policies import GaussianMLP, Params
from metarl.trajectories import Rollout

_CHUNK = 4  # tasks

Sampler = Callable[[Params, int], Rollout]
"""(stacked parameters, inner step) -> episodes sampled with them"""


class NonFiniteError(UserError):
    """A sampled reward, observation or action, or an adapted parameter, is NaN or infinite."""


@dataclass
class Adapted:
    """What an inner loop leaves: iterate k sampled rollout k, and rollout k made iterate k + 1."""

    iterates: list[Params]
    rollouts: list[Rollout] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)


@dataclass(frozen=True)
class InnerLoop:
    """How tasks adapt, wherever their episodes come from."""

    policy: GaussianMLP
    loss: Loss
    advantage: AdvantageConfig
    step_sizes: StepSizes
    pool: ChunkPool

    def run(self, sample: Sampler, params: Params, *, steps: int, query: str) -> Adapted:
        """Adapt stacked parameters [T, ...] by `steps` steps, each on episodes of its own.

        Args:
            sample: see `Sampler`.
            params: theta_0, stacked.
            steps: K.
            query: after the last step, "none" samples nothing more, "rollout" samples episodes
                with theta_K, and "batch" estimates their advantages too.

        Raises:
            NonFiniteError: something sampled, or an adapted parameter, is not a finite number.
        """
        adapted = Adapted([params])
        for k in range(steps + 1):
            if k == steps and query == "none":
                break
            rollout = sample(adapted.iterates[k], k)
            _check_finite(rollout)
            adapted.rollouts.append(rollout)
            if k == steps and query == "rollout":
                break
            batch = self.prepare(rollout)
            adapted.batches.append(batch)
            if k < steps:
                adapted.iterates.append(self.adapt(adapted.iterates[k], batch, k))
        return adapted

    def prepare(self, rollout: Rollout) -> Batch:
        """Return a rollout's samples with their advantages."""
        return make_batch(self.policy, rollout, estimate(rollout, self.advantage, self.pool))

    def adapt(self, params: Params, batch: Batch, k: int) -> Params:
        """Return the stacked parameters after inner step k on a batch."""
        sizes = {name: s[min(k, len(s) - 1) :] for name, s in self.step_sizes.items()}

        def one(chunk: slice) -> Params:
            theta = {name: p[chunk] for name, p in params.items()}
            part = batch.map(lambda x: x[chunk])
            return adapt(partial(self.loss, self.policy), theta, sizes, [part], order=0)[-1]

        parts = self.pool.map(one, slices(len(batch.weight), _CHUNK))
        new = {name: torch.cat([part[name] for part in parts]) for name in params}
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
