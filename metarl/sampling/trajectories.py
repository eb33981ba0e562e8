"""Rollouts: sampled task-major arrays [tasks, episodes, time, ...] and their masks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """Whole episodes of several tasks, in time order.

    T tasks, E episodes, at most H steps. Padded steps (`valid` False) are zero. An episode whose
    simulation diverged is excluded: all its steps are zero.
    """

    tasks: Tensor
    """[T, task_dim] float64"""
    observation: Tensor
    """[T, E, H, observation_dim]; the observation before each action."""
    last_observation: Tensor
    """[T, E, observation_dim]; the observation after the last action, before any reset."""
    action: Tensor
    """[T, E, H, action_size]; the policy's sample, before clipping."""
    behaviour: dict[str, Tensor]
    """Parameters of the distribution of each action, [T, E, H, ...] each."""
    reward: Tensor
    """[T, E, H]"""
    valid: Tensor
    """[T, E, H] bool; True for a real step."""
    terminated: Tensor
    """[T, E] bool; True if the task ended, not only its time."""
    truncated: Tensor
    """[T, E] bool; True if the horizon ended the episode."""
    diverged: Tensor
    """[T, E] bool; True if the simulation diverged."""
    context: Tensor | None = None
    """[T, context_dim]; the context input of the policy, or None without one."""
    success: Tensor | None = None
    """[T, E] bool; True if the environment reported success at any step."""
    tells_success: Tensor | None = None
    """[T, E] bool; True if the environment's info has `success`."""
    info: dict[str, Tensor] = field(default_factory=dict)
    """[T, E, H] float64 each; the requested entries of the environment's info."""
    state: dict[str, Tensor] | None = None
    """[T, E, ...] each; a recurrent network's state before the first step, NaN for the network's
    initial state. None: all start with the initial state."""

    @property
    def env_steps(self) -> int:
        """Number of environment steps that were simulated and kept."""
        return int(self.valid.sum())

    def returns(self) -> Tensor:
        """Undiscounted return of every episode, [T, E] float64; NaN if it diverged."""
        total = torch.where(self.valid, self.reward, 0.0).sum(dim=2, dtype=torch.float64)
        return total.masked_fill(self.diverged, torch.nan)

    def mean_returns(self) -> Tensor:
        """Mean return of each task, [T] float64; NaN if every episode diverged."""
        return self.returns().nanmean(dim=1)

    def successes(self) -> Tensor:
        """1 for an episode with success, else 0, [T, E] float64; NaN if it diverged."""
        assert self.success is not None
        return self.success.double().masked_fill(self.diverged, torch.nan)

    def success_rates(self) -> Tensor:
        """Success rate of each task, [T] float64; NaN if every episode diverged."""
        return self.successes().nanmean(dim=1)
