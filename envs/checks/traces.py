"""Functions to play and compare episodes, and to describe them, for `check_task_family`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from metarl.envs.errors import UserError
from metarl.envs.errors import raised as raised  # for the checks
from metarl.envs.family import TaskFamily
from metarl.envs.gymnasium.family import GymnasiumFamily
from metarl.envs.seeds import training_seeds
from metarl.envs.tasks import Tasks

EPISODES = 2  # of each task
LONGEST = 500  # steps of an episode that is compared


class Doubt(str):
    """Message about a problem that a few episodes cannot prove."""


@dataclass(frozen=True)
class Trace:
    """One episode of one environment."""

    observation: list[Any]
    """Observations at the reset and after every step."""
    reward: list[Any]
    terminated: bool
    truncated: bool
    flags: list[tuple[Any, Any]] = field(default_factory=list)
    """Values of terminated and truncated of each step, if one environment was played."""
    info: list[Any] = field(default_factory=list)
    """Info of the reset and every step, if one environment was played."""

    def first_difference(self, other: Trace, tolerance: float = 0.0) -> tuple[str, int] | None:
        """Return what differs first and after how many steps, or None if nothing differs."""

        def differ(one: Any, two: Any) -> bool:
            if np.shape(one) != np.shape(two):
                return True
            try:
                return not np.allclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)
            except TypeError:  # not numbers
                return one != two

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
    """Return actions drawn from a space with a fixed seed."""
    space.seed(seed)
    return [space.sample() for _ in range(steps)]


def held_actions(space: gym.Space, steps: int, seed: int = 0) -> list[Any]:
    """Return actions drawn from a space, each held for ten steps."""
    drawn = random_actions(space, -(-steps // 10), seed)
    return [drawn[t // 10] for t in range(steps)]


def lowest_actions(space: gym.Space, steps: int, seed: int = 0) -> list[Any]:
    """Return the lowest action of a space for every step."""
    return [_corner(space, random_actions(space, 1)[0], 0.0)] * steps


def highest_actions(space: gym.Space, steps: int, seed: int = 0) -> list[Any]:
    """Return the highest action of a space for every step."""
    return [_corner(space, random_actions(space, 1)[0], 1.0)] * steps


def extreme_actions(space: gym.Space, steps: int, seed: int = 0) -> list[Any]:
    """Return corners of a space drawn at random, each held for five steps."""
    rng = np.random.default_rng(seed)
    like = random_actions(space, 1)[0]
    corners = [_corner(space, like, rng.integers(2, size=np.shape(like))) for _ in range(steps)]
    return [corners[t // 5] for t in range(steps)]


def _corner(space: gym.Space, like: Any, high: Any) -> Any:
    """Return the action that is highest where `high` is 1, else lowest; +-1 if unbounded."""
    if isinstance(space, gym.spaces.Box):
        least = np.where(np.isfinite(space.low), space.low, -1.0)
        most = np.where(np.isfinite(space.high), space.high, 1.0)
        return np.where(high, most, least).astype(space.dtype)
    start = getattr(space, "start", 0)
    count = space.nvec if isinstance(space, gym.spaces.MultiDiscrete) else getattr(space, "n", 2)
    if isinstance(space, gym.spaces.MultiBinary):
        start, count = 0, 2
    action = np.where(high, start + np.asarray(count) - 1, start)
    return action.astype(np.asarray(like).dtype) if np.ndim(like) else type(like)(action)


Behaviour = Callable[[gym.Space, int, int], list[Any]]
"""(action space, steps, seed) -> actions"""

BEHAVIOURS: dict[str, Behaviour] = {
    "random": random_actions,
    "random held": held_actions,
    "constantly lowest": lowest_actions,
    "constantly highest": highest_actions,
    "extreme": extreme_actions,
}
"""Ways of acting by name."""


def close(env: gym.Env[Any, Any] | VectorEnv) -> None:
    """Close an environment; a separate check reports errors of close."""
    with contextlib.suppress(Exception, SystemExit):
        env.close()


def play(
    env: gym.Env[Any, Any],
    seed: int,
    actions: Iterable[Any],
    after_reset: Callable[[], object] = lambda: None,
) -> Trace:
    """Play one episode of one environment until the episode or the actions end."""
    observation, info = env.reset(seed=seed)
    after_reset()
    observations, rewards, flags, infos = [np.array(observation)], [], [], [info]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(np.array(observation))
        rewards.append(reward)
        flags.append((terminated, truncated))
        infos.append(info)
        if terminated or truncated:
            break
    terminated, truncated = flags[-1] if flags else (False, False)
    return Trace(observations, rewards, bool(terminated), bool(truncated), flags, infos)


def play_beside(
    env: gym.Env[Any, Any],
    other: gym.Env[Any, Any],
    seeds: tuple[int, int],
    actions: Iterable[tuple[Any, Any]],
) -> Trace:
    """Play one episode of `env` while another copy is stepped in turn, as in a vector environment.

    Args:
        env: first copy.
        other: second copy.
        seeds: seeds of `env` and `other`.
        actions: pairs of actions of `env` and `other`.

    Returns:
        Episode of `env`.
    """
    over = False

    def first_actions() -> Iterator[Any]:
        nonlocal over
        for mine, theirs in actions:
            yield mine
            if not over:  # after the step of `env`
                *_, terminated, truncated, _ = other.step(theirs)
                over = bool(terminated or truncated)

    return play(env, seeds[0], first_actions(), after_reset=lambda: other.reset(seed=seeds[1]))


def play_together(
    family: TaskFamily, tasks: Tasks, behaviour: Behaviour = random_actions
) -> list[list[Trace]]:
    """Play the episodes of each task in one vector environment, at most `LONGEST` steps each.

    Episode e of every task has the seed that episode e of the first task has in training, and the
    actions of `behaviour` with seed e.
    """
    env = family.make_vec(len(tasks), EPISODES, autoreset_mode=AutoresetMode.DISABLED)
    env.set_tasks(tasks)
    steps = min(family.horizon, LONGEST)
    each = [behaviour(env.single_action_space, steps, e) for e in range(EPISODES)]
    columns = each * len(tasks)
    observation, _ = env.reset(seed=training_seeds(EPISODES) * len(tasks))
    observations = [[row.copy()] for row in observation]
    rewards: list[list[float]] = [[] for _ in columns]
    terminated = truncated = np.zeros(env.num_envs, np.bool_)
    for t in range(steps):
        active = np.flatnonzero(~(terminated | truncated))
        if not len(active):
            break
        actions = np.stack([column[t] for column in columns])
        observation, reward, terminated, truncated, _ = env.step(actions)
        for i in active:
            observations[i].append(observation[i].copy())
            rewards[i].append(reward[i])
    close(env)
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
    """Return whether every task has the same episodes as the first task."""
    return first_difference([traces[0]] * len(traces), traces) is None


def outermost(family: TaskFamily) -> gym.Env[Any, Any]:
    """Return the user's environment with its wrappers and a task."""
    task = family.tasks.grid(1, "train")[0]
    if not isinstance(family, GymnasiumFamily):
        env = family.make(task)
        if not isinstance(env, gym.Env):
            raise UserError(f"make must return a gymnasium.Env, got {type(env).__name__}")
        return env
    env = family.make_raw(None, task)
    while isinstance(env, _GYMNASIUMS_OWN):
        env = env.env
    family.apply_task(env, task)
    return env


_GYMNASIUMS_OWN = (
    gym.wrappers.TimeLimit,
    gym.wrappers.OrderEnforcing,
    gym.wrappers.PassiveEnvChecker,
)


def short(value: Any) -> str:
    """Return the number of values of a tuple, or a repr, shortened to a hundred characters."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def example_tasks(family: TaskFamily) -> Tasks:
    """Return four fixed training tasks."""
    drawn = family.tasks.sample(np.random.default_rng(0), 2)
    return np.concatenate([family.tasks.grid(2, "train"), drawn])


def named_task(family: TaskFamily, task: NDArray[Any]) -> str:
    """Return "velocity=1.5" for a task."""
    pairs = [f"{n}={x:g}" for n, x in zip(family.tasks.names, task, strict=True)]
    return ", ".join(pairs[:4]) + (", …" if len(pairs) > 4 else "")
