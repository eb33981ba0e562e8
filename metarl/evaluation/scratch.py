"""Training from scratch on each held-out task: the cost of learning without meta-training.

Clipped policy gradients (Schulman et al. 2017, arXiv:1707.06347) on each task separately, with Adam
from a random initialization. A batch has the number of episodes of an inner step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.domains.reinforcement import PolicyOptions, make_policy, policy_spaces
from metarl.envs import TaskFamily
from metarl.envs.errors import NonFiniteError
from metarl.evaluation.curves import Curve, Experience
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


@dataclass(frozen=True)
class Trained:
    """Training from scratch on each task: returns after 0 ... N updates."""

    means: Floats
    """Mean returns, [tasks, N + 1]."""
    episodes: Floats
    """Returns of episodes, [tasks, N + 1, episodes]."""
    used_episodes: Floats
    """Number of episodes for training, [tasks, N + 1]."""
    used_steps: Floats
    """Number of environment steps for training, [tasks, N + 1]."""

    def map(self, change: Callable[[Floats], Floats]) -> Trained:
        """Change all arrays."""
        return Trained(**{name: change(array) for name, array in vars(self).items()})

    def curve(self, after: list[int] | slice, seed: int) -> Curve:
        """Return the curve after some numbers of updates."""
        part = self.map(lambda array: array[:, after])
        used = (part.used_episodes, part.used_steps)
        spent = Experience(*(counts.mean(axis=0).tolist() for counts in used))
        return Curve(
            [], part.means[None], "from-scratch", [seed], role="from-scratch",
            per_episode=part.episodes[None], experience=spent,
        )  # fmt: skip


def train_from_scratch(
    trainer: ScratchTrainer,
    collector: AnyCollector,
    tasks: Floats,
    advantage: Advantages,
    pool: ChunkPool,
    key: RandomKey,
    batches: int,
) -> Trained:
    """Train policies with `batches` batches, one for each update.

    Returns after n batches come from the episodes of the next batch.
    """
    means, episodes, lengths = [], [], [np.zeros(len(tasks))]
    for n in range(batches + 1):
        where = dataclasses.replace(key, iteration=key.iteration + 1 + n)
        rollout = collector.collect(trainer.params, tasks, where)
        means.append(rollout.mean_returns().numpy())
        episodes.append(rollout.returns().numpy())
        if n < batches:
            batch = to_batch(trainer.policy, rollout, advantage, LinearFeatures(), {}, pool)
            trainer.update(batch, pool)
            lengths.append(rollout.valid.sum(dim=(1, 2)).double().numpy())
    returns = np.stack(episodes, axis=1)
    count = returns.shape[2] * np.arange(batches + 1.0)
    return Trained(
        np.stack(means, axis=1), returns, np.tile(count, (len(tasks), 1)),
        np.stack(lengths, axis=1).cumsum(axis=1),
    )  # fmt: skip


def updates(steps: int, experience: int, episodes: int) -> tuple[int, int]:
    """Return the number of updates for the rows of a table, and for a curve against experience.

    Args:
        steps: number of inner steps of meta-learners.
        experience: number of episodes of experience of meta-learners.
        episodes: number of episodes of an inner step, and of an update.
    """
    return TIMES * steps, -(-TIMES * experience // episodes)


def curves(by: str, trained: Trained, steps: int, seed: int) -> dict[str, Curve]:
    """Return curves with the env steps of 0 ... `steps` inner steps, and with ten times as many.

    Args:
        by: name of the trainer, "" for ours.
    """
    return {
        f"from scratch{by}{more}": trained.curve(slice(0, times * steps + 1, times), seed)
        for times, more in ((1, ""), (TIMES, f", {TIMES} x steps"))
    }
