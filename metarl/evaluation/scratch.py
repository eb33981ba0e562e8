"""Training from scratch on each held-out task: the cost of learning without meta-training.

Clipped policy gradients (Schulman et al. 2017, arXiv:1707.06347) on each task separately, with Adam
from a random initialization. A batch has the number of episodes of an inner step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.domains.reinforcement import PolicyOptions, make_policy, policy_spaces
from metarl.envs import TaskFamily
from metarl.envs.errors import NonFiniteError
from metarl.evaluation.curves import Curve
from metarl.evaluation.statistics import Floats
from metarl.learning.advantages import Advantages, to_batch
from metarl.learning.baselines import LinearFeatures
from metarl.learning.losses import Batch, clipped_ratio
from metarl.models.networks import Params, stack
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.seeding import stream
from metarl.sampling.workers import AnyCollector

TIMES = 10
"""Env steps of the longer training, as a multiple of the env steps of adaptation."""

LEARNING_RATE = 3e-3
EPOCHS = 10
CLIP = 0.2
_CHUNK = 4  # tasks


def scratch_policy(options: PolicyOptions, family: TaskFamily) -> PolicyModel:
    """Return the policy network for the training, without settings of meta-training."""
    options = dataclasses.replace(options, normalize=False)
    return make_policy(options, *policy_spaces(family, options.network))


class ScratchTrainer:
    """Trainer of one policy per task. All train at once, independently of each other."""

    def __init__(self, policy: PolicyModel, tasks: int, seed: int, learning_rate: float) -> None:
        self.policy = policy
        start = stack(policy.init(stream(seed, 0, "init")), tasks)
        self._slices = slices(tasks, _CHUNK)
        self._leaves = [
            {name: p[chunk].clone().requires_grad_() for name, p in start.items()}
            for chunk in self._slices
        ]
        self._adams = [torch.optim.Adam(leaves.values(), learning_rate) for leaves in self._leaves]

    @property
    def params(self) -> Params:
        """The policies' parameters, stacked."""
        return {
            name: torch.cat([leaves[name].detach() for leaves in self._leaves])
            for name in self._leaves[0]
        }

    def update(self, batch: Batch, pool: ChunkPool) -> None:
        """Take `EPOCHS` steps on a batch of each task's own episodes.

        Raises:
            NonFiniteError: a parameter is not finite.
        """
        loss = partial(clipped_ratio, clip=CLIP)

        def one(index: int) -> None:
            chunk, leaves = self._slices[index], self._leaves[index]
            part = batch.map(lambda x: x[chunk])
            for _ in range(EPOCHS):
                dist = self.policy.output(leaves, part)
                total = loss(self.policy, dist, part).sum()
                gradient = torch.autograd.grad(total, list(leaves.values()))
                for p, g in zip(leaves.values(), gradient, strict=True):
                    p.grad = g
                self._adams[index].step()

        pool.map(one, range(len(self._slices)))
        for name, p in self.params.items():
            if not torch.isfinite(p).all():
                raise NonFiniteError(f"parameter {name} is not finite in training from scratch")


def train_from_scratch(
    trainer: ScratchTrainer,
    collector: AnyCollector,
    tasks: Floats,
    advantage: Advantages,
    pool: ChunkPool,
    key: RandomKey,
    batches: int,
) -> tuple[Floats, Floats]:
    """Return the returns of policies after 0 ... `batches` batches.

    Returns after n batches come from the episodes of the next batch.

    Returns:
        mean returns [tasks, batches + 1], returns of episodes [tasks, batches + 1, episodes].
    """
    means, episodes = [], []
    for n in range(batches + 1):
        where = dataclasses.replace(key, iteration=key.iteration + 1 + n)
        rollout = collector.collect(trainer.params, tasks, where)
        means.append(rollout.mean_returns().numpy())
        episodes.append(rollout.returns().numpy())
        if n < batches:
            batch = to_batch(trainer.policy, rollout, advantage, LinearFeatures(), {}, pool)
            trainer.update(batch, pool)
    return np.stack(means, axis=1), np.stack(episodes, axis=1)


def curves(by: str, returns: Sequence[Floats], steps: int, seed: int) -> dict[str, Curve]:
    """Return curves with the env steps of 0 ... `steps` inner steps, and with ten times as many.

    Args:
        by: name of the trainer, "" for ours.
        returns: mean returns [tasks, TIMES * steps + 1], and returns of episodes [tasks, TIMES *
            steps + 1, episodes].
    """
    found = {}
    for times, more in ((1, ""), (TIMES, f", {TIMES} x steps")):
        means, episodes = (values[None, :, : times * steps + 1 : times] for values in returns)
        found[f"from scratch{by}{more}"] = Curve(
            [], means, "from-scratch", [seed], role="from-scratch", per_episode=episodes
        )
    return found
