"""Rollouts: what was sampled, task-major arrays [tasks, episodes, time, ...] and their masks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """Whole episodes of several tasks, time order kept.

    T tasks, E episodes, H steps at most. Steps that were not taken (`valid` False) hold zeros, as
    do those of an episode whose simulation diverged: it is left out whole.
    """

    tasks: Tensor
    """[T, task_dim] float64"""
    observation: Tensor
    """[T, E, H, observation_dim]; before each action."""
    last_observation: Tensor
    """[T, E, observation_dim]; after the last action, before any reset."""
    action: Tensor
    """[T, E, H, action_size]; as the policy drew it, before any clipping."""
    behaviour: dict[str, Tensor]
    """Parameters of the distribution each action was drawn from, [T, E, H, ...] each."""
    reward: Tensor
    """[T, E, H]"""
    valid: Tensor
    """[T, E, H] bool; True for a real step."""
    terminated: Tensor
    """[T, E] bool; the task ended (not merely its time)."""
    truncated: Tensor
    """[T, E] bool; cut by the horizon."""
    diverged: Tensor
    """[T, E] bool; the simulation broke down."""
    context: Tensor | None = None
    """[T, context_dim]; the context input of the policy, where it has one."""
    success: Tensor | None = None
    """[T, E] bool; the environment said at some step that the task is done."""
    tells_success: Tensor | None = None
    """[T, E] bool; the environment said anything about success."""
    info: dict[str, Tensor] = field(default_factory=dict)
    """[T, E, H] float64 each; the entries of the environment's info that were asked for."""

    @property
    def env_steps(self) -> int:
        """Environment steps that were simulated and kept."""
        return int(self.valid.sum())

    def returns(self) -> Tensor:
        """Undiscounted return of every episode, [T, E] float64, NaN where it diverged."""
        total = torch.where(self.valid, self.reward, 0.0).sum(dim=2, dtype=torch.float64)
        return total.masked_fill(self.diverged, torch.nan)

    def mean_returns(self) -> Tensor:
        """Mean return of each task, [T] float64, NaN where every episode diverged."""
        return self.returns().nanmean(dim=1)

    def successes(self) -> Tensor:
        """1 for an episode with success, else 0, [T, E] float64, NaN where it diverged."""
        assert self.success is not None
        return self.success.double().masked_fill(self.diverged, torch.nan)

    def success_rates(self) -> Tensor:
        """Part of each task's episodes with success, [T] float64, NaN where every one diverged."""
        return self.successes().nanmean(dim=1)
