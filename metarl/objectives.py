"""Losses of a batch of samples, one number a task; and the batch itself.

A loss is minimized. A task's loss is the weighted sum over its samples with weights that sum to 1
over the valid ones: a mean over valid steps, never over tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from metarl.policies import Dist, GaussianMLP, Params
from metarl.trajectories import Rollout


@dataclass(frozen=True)
class Batch:
    """Samples of T tasks as learning sees them: N = episodes x horizon samples, time order kept."""

    observation: Tensor
    """[T, N, observation_dim]"""
    action: Tensor
    """[T, N, action_dim]"""
    advantage: Tensor
    """[T, N]"""
    weight: Tensor
    """[T, N]; 1 / (valid samples of the task), 0 where not valid."""
    old_log_prob: Tensor
    """[T, N]; log-density of the action under the policy that drew it."""
    old: Dist
    """Parameters of the distribution it was drawn from, [T, N, ...] each."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with a function applied to every tensor."""
        new = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name != "old"}
        return replace(self, **new, old={name: function(x) for name, x in self.old.items()})

    def select(self, samples: Tensor) -> Batch:
        """Return some of the samples of every task [N'], weights summing to 1 again."""
        part = self.map(lambda x: x.index_select(1, samples))
        total = part.weight.sum(dim=1, keepdim=True)
        return replace(part, weight=part.weight / total.clamp(min=torch.finfo(total.dtype).tiny))


def make_batch(policy: GaussianMLP, rollout: Rollout, advantage: Tensor) -> Batch:
    """Return a rollout's samples flattened over episodes and time, [T, N, ...]."""
    valid = rollout.valid.flatten(1)
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    old = {name: x.flatten(1, 2) for name, x in rollout.behaviour.items()}
    action = rollout.action.flatten(1, 2)
    return Batch(
        observation=rollout.observation.flatten(1, 2),
        action=action,
        advantage=advantage.flatten(1),
        weight=valid.to(advantage.dtype) / count.to(advantage.dtype),
        old_log_prob=policy.log_prob(old, action),
        old=old,
    )


Loss = Callable[[GaussianMLP, Params, Batch], Tensor]
"""(policy, stacked parameters, batch) -> [T]"""


def log_likelihood(policy: GaussianMLP, params: Params, batch: Batch) -> Tensor:
    """REINFORCE (Williams 1992): -E[log pi(a | s) A], [T]; the inner loss of Finn et al. 2017."""
    log_prob = policy.log_prob(policy.distribution(params, batch.observation), batch.action)
    return -(batch.weight * batch.advantage * log_prob).sum(dim=1)


def likelihood_ratio(policy: GaussianMLP, params: Params, batch: Batch) -> Tensor:
    """Importance-weighted surrogate of TRPO: -E[pi(a | s) / pi_old(a | s) A], [T].

    Schulman et al. 2015, eq. 14 (arXiv:1502.05477).
    """
    return ratio_surrogate(policy, policy.distribution(params, batch.observation), batch)


def ratio_surrogate(policy: GaussianMLP, dist: Dist, batch: Batch) -> Tensor:
    """`likelihood_ratio` of a distribution that is at hand already, [T]."""
    ratio = (policy.log_prob(dist, batch.action) - batch.old_log_prob).exp()
    return -(batch.weight * batch.advantage * ratio).sum(dim=1)


def mean_kl(policy: GaussianMLP, dist: Dist, batch: Batch) -> Tensor:
    """KL from the policy that drew the samples, E[KL(old || new)], [T]."""
    return (batch.weight * policy.kl(batch.old, dist)).sum(dim=1)
