"""Episodes of random actions, played and compared; what `check_task_family` stands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from metarl.envs.family import TaskFamily, Tasks

EPISODES = 2  # of each task


@dataclass(frozen=True)
class Trace:
    """One episode of one environment."""

    observation: list[Any]
    """At the reset and after every step."""
    reward: list[Any]
    terminated: bool
    truncated: bool

    def first_difference(self, other: Trace, tolerance: float = 0.0) -> tuple[str, int] | None:
        """Return what differs first and after how many steps, None where nothing does."""

        def differ(one: Any, two: Any) -> bool:
            if np.shape(one) != np.shape(two):
                return True
            return not np.allclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)

        for t in range(min(len(self.observation), len(other.observation))):
            if differ(self.observation[t], other.observation[t]):
                return "observations", t
            if t and differ(self.reward[t - 1], other.reward[t - 1]):
                return "rewards", t
        steps = min(len(self.reward), len(other.reward))
        if (len(self.reward), self.terminated) != (len(other.reward), other.terminated):
            return "ends of episodes", steps
        return None


def random_actions(space: gym.Space, steps: int, seed: int = 0) -> list[Any]:
    """Return actions drawn from a space, the same at every call."""
    space.seed(seed)
    return [space.sample() for _ in range(steps)]


def play(
    env: gym.Env, seed: int, actions: Sequence[Any], after_reset: Callable[[], None] = lambda: None
) -> Trace:
    """Play one episode of one environment, until it ends or the actions do."""
    observation, _ = env.reset(seed=seed)
    after_reset()
    observations, rewards = [np.array(observation)], []
    terminated = truncated = False
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(np.array(observation))
        rewards.append(reward)
        if terminated or truncated:
            break
    return Trace(observations, rewards, bool(terminated), bool(truncated))


def play_together(family: TaskFamily, tasks: Tasks) -> list[list[Trace]]:
    """Play the episodes of each task in one vector environment.

    Episode e of every task has seed e, and the actions of `random_actions` with seed e.
    """
    env = family.make_vec(len(tasks), EPISODES, autoreset_mode=AutoresetMode.DISABLED)
    env.set_tasks(tasks)
    seeds = list(range(EPISODES)) * len(tasks)
    columns = [random_actions(env.single_action_space, family.horizon, seed) for seed in seeds]
    observation, _ = env.reset(seed=seeds)
    observations = [[row.copy()] for row in observation]
    rewards: list[list[float]] = [[] for _ in seeds]
    terminated = truncated = np.zeros(env.num_envs, np.bool_)
    for t in range(family.horizon):
        active = np.flatnonzero(~(terminated | truncated))
        if not len(active):
            break
        actions = np.stack([column[t] for column in columns])
        observation, reward, terminated, truncated, _ = env.step(actions)
        for i in active:
            observations[i].append(observation[i].copy())
            rewards[i].append(reward[i])
    env.close()
    ends = zip(observations, rewards, terminated, truncated, strict=True)
    traces = [Trace(seen, paid, bool(end), bool(cut)) for seen, paid, end, cut in ends]
    return [traces[i : i + EPISODES] for i in range(0, len(traces), EPISODES)]


def first_difference(
    ours: Sequence[Sequence[Trace]], theirs: Sequence[Sequence[Trace]]
) -> tuple[int, str, int] | None:
    """Return the first task whose episodes differ, what differs, and after how many steps."""
    for i, (mine, others) in enumerate(zip(ours, theirs, strict=True)):
        for one, other in zip(mine, others, strict=True):
            if (difference := one.first_difference(other)) is not None:
                return i, *difference
    return None


def all_equal(traces: Sequence[Sequence[Trace]]) -> bool:
    """Whether every task's episodes equal those of the first task."""
    return first_difference([traces[0]] * len(traces), traces) is None
