"""Trials of several episodes (`metarl.envs.trials`): their option, and their episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarl.envs import TaskFamily
from metarl.envs.errors import UserError
from metarl.envs.trials import EPISODE, SUCCESS, TrialFamily
from metarl.parts import Part
from metarl.sampling.trajectories import Rollout


@dataclass(frozen=True, kw_only=True)
class Trials(Part):
    """Sampling of trials: several episodes of a task, one after the other. Options `trial.*`."""

    section: ClassVar[str] = "trial"

    episodes: int = 2
    """Episodes of a trial. The policy keeps its memory from one to the next."""

    def __post_init__(self) -> None:
        self.require_at_least(1, "episodes")

    def family(self, base: TaskFamily, episodes: int | None = None) -> TrialFamily:
        """Return the family of trials, by default of as many episodes as in training."""
        return TrialFamily.of(base, self.episodes if episodes is None else episodes)


def check_plays_trials(env: Any, shape: Sequence[int]) -> None:
    """Raise UserError unless an environment has the observations of trials, [*shape]."""
    found = env.observation_space
    if getattr(found, "shape", None) != tuple(shape):
        raise UserError(
            f"the policy plays trials, with observations {list(shape)}, got {found}: adapt to"
            " meta_policy.played.wrap(env), and act in that"
        )


def episodes_of(rollout: Rollout, count: int) -> list[Rollout]:
    """Return the episodes of trials: for each k, the rollout of episode k of every trial.

    Args:
        rollout: trials of `count` episodes, [T, E, count x H, ...].
    """
    number, steps = rollout.info[EPISODE], torch.arange(rollout.valid.shape[2] // count)
    succeeded = rollout.info[SUCCESS]
    found = []
    for k in range(count):
        inside = rollout.valid & (number == k)
        length = inside.sum(dim=2, keepdim=True)
        place = (inside.long().argmax(dim=2, keepdim=True) + steps).clamp(max=number.shape[2] - 1)
        valid = steps < length

        def part(x: Tensor, place: Tensor = place, valid: Tensor = valid) -> Tensor:
            more = [1] * (x.dim() - 3)
            index = place.view(*place.shape, *more).expand(*place.shape, *x.shape[3:])
            return torch.where(valid.view(*valid.shape, *more), x.gather(2, index), 0)

        success = torch.where(valid, part(succeeded), 0.0)
        ended = torch.zeros_like(rollout.terminated)
        found.append(
            dataclasses.replace(
                rollout,
                observation=part(rollout.observation),
                action=part(rollout.action),
                behaviour={name: part(x) for name, x in rollout.behaviour.items()},
                reward=part(rollout.reward),
                valid=valid,
                terminated=ended,
                truncated=ended,
                success=(success > 0.0).any(dim=2),
                tells_success=(inside & ~succeeded.isnan()).any(dim=2),
                info={name: part(x) for name, x in rollout.info.items()},
            )
        )
    return found


CLOCK = 2
"""Number of components that `baseline_input` adds to the observations of trials."""


def baseline_input(rollout: Rollout) -> Tensor:
    """Return what a baseline observes, [T, E, H, ...]: the observation.

    In trials, also the number of the episode, and the time in it in hundreds of steps.
    """
    number = rollout.info.get(EPISODE)
    if number is None:
        return rollout.observation
    time = torch.arange(number.shape[2]).expand_as(number)
    first = torch.nn.functional.pad(number.diff(dim=2) != 0, (1, 0), value=True)
    start = torch.where(first, time, 0).cummax(dim=2).values
    clock = torch.stack([number, (time - start) / 100.0], dim=-1)
    clock = torch.where(rollout.valid.unsqueeze(-1), clock, 0.0)
    return torch.cat([rollout.observation, clock.to(rollout.observation)], dim=-1)
