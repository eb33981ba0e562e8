"""Losses of samples, one number per task; and `Batch`, the samples of policies.

A loss is minimized. The loss of a task is a weighted sum over its samples. The weights sum to 1
over the valid samples: a mean over valid steps, never over tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarl.envs.errors import UserError
from metarl.models.networks import Dist, State
from metarl.models.policies import PolicyModel
from metarl.models.samples import Samples
from metarl.parts import called
from metarl.sampling.trajectories import Rollout


@dataclass(frozen=True)
class Batch(Samples):
    """Samples of policies: N = episodes x horizon samples, in time order."""

    observation: Tensor
    """[T, N, observation_dim]"""
    action: Tensor
    """[T, N, action_size]"""
    advantage: Tensor
    """[T, N]"""
    weight: Tensor
    """[T, N]; 1 / (valid samples of the task), 0 where not valid."""
    old_log_prob: Tensor
    """[T, N]; log-density of the action under the policy that drew it."""
    old: Dist
    """Parameters of the distribution that drew the action, [T, N, ...] each."""
    episodes: int
    """Episodes per task. A task's samples are ordered by episode, then by time.
    0 if that order is lost."""
    context: Tensor | None = None
    """[T, context_dim]; the task as a task-conditioned policy observes it."""
    advantage_scale: Tensor | None = None
    """[T]; divisor of each task's advantages."""
    rollout: Rollout | None = None
    """Rollout of the samples, all tasks."""
    state: State | None = None
    """[T, episodes, ...] each; see `Rollout.state`."""

    of_tasks: ClassVar[tuple[str, ...]] = ("context", "advantage_scale")
    drawn: ClassVar[bool] = True

    def kl(self, model: Any, output: Dist) -> Tensor:
        return (self.weight * model.kl(self.old, output)).sum(dim=1)

    def select(self, samples: Tensor) -> Batch:
        episodes = samples.shape[1] if samples.ndim == 3 else 0
        part = Samples.select(replace(self, state=None), samples)
        assert isinstance(part, Batch)
        part = replace(part, episodes=episodes)
        if not (self.state and episodes):
            return part
        each = samples[..., 0] * self.episodes // self.weight.shape[1]
        task = torch.arange(len(each), device=each.device).unsqueeze(1)
        return replace(part, state={name: x[task, each] for name, x in self.state.items()})


def make_batch(
    policy: PolicyModel, rollout: Rollout, advantage: Tensor, scale: Tensor | None = None
) -> Batch:
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
        episodes=rollout.valid.shape[1],
        context=rollout.context,
        advantage_scale=scale,
        rollout=rollout,
        state=rollout.state,
    )


Loss = Callable[[Any, Dist, Any], Tensor]
"""(model, its output for the samples, samples) -> [T]"""


def name_of(function: Any) -> str:
    """Return the name of a function, also with arguments bound."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def task_losses(loss: Loss, model: Any, output: Dist, samples: Samples) -> Tensor:
    """Return a loss of each task, [T].

    Raises:
        UserError: a user's function raises an error, or returns another shape, such as a mean over
            tasks.
    """
    found = called(f"the loss {name_of(loss)}", loss, model, output, samples)
    tasks = len(samples.weight)
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [tasks]:
        raise UserError(
            f"the loss {name_of(loss)} must return one number for each task, [{tasks}], got {shape}"
        )
    return found


def log_likelihood(policy: PolicyModel, dist: Dist, batch: Batch) -> Tensor:
    """REINFORCE (Williams 1992): -E[log pi(a | s) A], [T]; the inner loss of Finn et al. 2017.

    Args:
        policy: policy model.
        dist: parameters of its distribution at the samples, [T, samples, ...] each.
        batch: samples of T tasks.
    """
    log_prob = policy.log_prob(dist, batch.action)
    return -(batch.weight * batch.advantage * log_prob).sum(dim=1)


def likelihood_ratio(policy: PolicyModel, dist: Dist, batch: Batch) -> Tensor:
    """Importance-weighted surrogate of TRPO: -E[pi(a | s) / pi_old(a | s) A], [T].

    Schulman et al. 2015, eq. 14 (arXiv:1502.05477). As an inner loss, it has the low-variance
    curvature of Rothfuss et al. 2019, eq. 14 (arXiv:1810.06784). Its Hessian at the old parameters
    is the Hessian of the mean of (grad^2 log pi + grad log pi grad log pi') A.

    Args:
        policy: policy model.
        dist: parameters of its distribution at the samples, [T, samples, ...] each.
        batch: samples of T tasks.
    """
    ratio = (policy.log_prob(dist, batch.action) - batch.old_log_prob).exp()
    return -(batch.weight * batch.advantage * ratio).sum(dim=1)


def clipped_ratio(policy: PolicyModel, dist: Dist, batch: Batch, *, clip: float) -> Tensor:
    """PPO's pessimistic surrogate, -E[min(r A, clip(r, 1 - c, 1 + c) A)], [T].

    Schulman et al. 2017, eq. 7 (arXiv:1707.06347).

    Args:
        policy: policy model.
        dist: parameters of its distribution at the samples, [T, samples, ...] each.
        batch: samples of T tasks.
        clip: clip range c.
    """
    ratio = (policy.log_prob(dist, batch.action) - batch.old_log_prob).exp()
    cut = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -(batch.weight * torch.minimum(ratio * batch.advantage, cut * batch.advantage)).sum(1)


def dice(policy: PolicyModel, dist: Dist, batch: Batch, *, decay: float = 1.0) -> Tensor:
    """Loaded DiCE: -E[(box(w[t]) - box(d w[t - 1])) A[t]], w[t] = d w[t - 1] + log pi(a_t | s_t).

    box(w) = exp(w - stop(w)) is 1, and its derivatives of all orders contain the score. Foerster et
    al. 2018 (arXiv:1802.05098). The difference allows advantages. The decay d discounts the
    dependence of later steps on earlier actions, Farquhar et al. 2019 (arXiv:1909.10549). The
    gradient is the policy gradient at any d. At d = 1, higher derivatives are unbiased, and their
    variance grows with the horizon. At d = 0, they equal the derivatives of the likelihood ratio.
    The value is 0.

    Args:
        policy: policy model.
        dist: parameters of its distribution at the samples, [T, samples, ...] each.
        batch: samples of T tasks.
        decay: d, in [0, 1].

    Raises:
        ValueError: the samples are not whole episodes.
    """
    if not batch.episodes:
        raise ValueError("DiCE needs whole episodes")
    shape = (len(batch.weight), batch.episodes, -1)
    # Steps after the end of an episode come last. They are in no sum of a step with weight.
    log_prob = policy.log_prob(dist, batch.action).view(shape)
    if decay == 1.0:
        through = log_prob.cumsum(dim=2)
    else:
        time = torch.arange(log_prob.shape[2], device=log_prob.device)
        age = time.unsqueeze(1) - time
        factor = torch.where(age < 0, 0.0, decay ** age.clamp(min=0).to(log_prob.dtype))
        through = log_prob @ factor.T
    before = through - log_prob
    box = (through - through.detach()).exp() - (before - before.detach()).exp()
    return -(batch.weight * batch.advantage * box.flatten(1)).sum(dim=1)


def log_ratio(policy: Any, dist: Dist, batch: Any) -> Tensor:
    """Log-likelihood ratio of all valid actions of a task to the sampling policy, [T].

    It is 0 at the sampling parameters. Its gradient is the score of the task's samples.
    """
    ratio = policy.log_prob(dist, batch.action) - batch.old_log_prob
    return torch.where(batch.weight > 0, ratio, 0.0).sum(dim=1)


def trait(loss: Loss, name: str) -> bool:
    """Return whether a loss has a trait, also with arguments bound.

    `of_policies`: it supports only samples of policies. `reusable`: several steps on one batch are
    allowed. `whole_episodes`: it needs the samples of an episode together, in order.
    """
    return bool(getattr(loss, name, getattr(getattr(loss, "func", None), name, False)))


for _loss in (log_likelihood, likelihood_ratio, clipped_ratio, dice):
    _loss.of_policies = True  # type: ignore[attr-defined]
likelihood_ratio.reusable = clipped_ratio.reusable = True  # type: ignore[attr-defined]
dice.whole_episodes = True  # type: ignore[attr-defined]
