"""Families over any Gymnasium environment, stepped in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.errors import UserError
from envs.family import TaskFamily
from envs.vector import Bools, Floats, TaskVectorEnv


class TaskEnv(gym.Wrapper):
    """An environment that is given a task before every reset."""

    def __init__(self, env: gym.Env, family: GymnasiumFamily, task: Floats | None) -> None:
        super().__init__(env)
        self.family, self.task = family, task
        self._rng: np.random.Generator | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        task = self.task
        if task is None:
            if seed is not None or self._rng is None:
                self._rng = np.random.default_rng(None if seed is None else [seed, 1])
            task = self.family.tasks.sample(self._rng, 1)[0]
        self.family.set_task(self.env.unwrapped, task)
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "task": task}


class GymnasiumVectorEnv(TaskVectorEnv):
    """Any Gymnasium environment, one copy a sub-environment, stepped one after the other."""

    family: GymnasiumFamily

    def __init__(
        self,
        family: GymnasiumFamily,
        num_tasks: int,
        episodes: int,
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        count = max(num_tasks, 0) * max(episodes, 0)
        self._envs = [family.make_bare(render_mode) for _ in range(max(count, 1))]
        first = self._envs[0]
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=first.observation_space,
            action_space=first.action_space,
            metadata=dict(first.metadata),
            **options,
        )
        self.render_mode = render_mode
        shape = (self.num_envs, *first.observation_space.shape)  # type: ignore[misc]
        self._observation = np.zeros(shape, first.observation_space.dtype)

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        for i, seed in zip(ids, seeds, strict=True):
            self.family.set_task(self._envs[i].unwrapped, self.tasks[i].copy())
            self._observation[i], _ = self._envs[i].reset(seed=seed)

    def _advance(
        self, ids: NDArray[np.int64] | None, actions: Any
    ) -> tuple[Floats, Bools | None, Bools | None, Bools | None, dict[str, Any]]:
        reward = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, np.bool_)
        truncated = np.zeros(self.num_envs, np.bool_)
        achieved = {key: np.zeros(self.num_envs) for key in self.family.achieved.values()}
        for i in range(self.num_envs) if ids is None else ids:
            self._observation[i], reward[i], terminated[i], truncated[i], info = self._envs[i].step(
                actions[i]
            )
            for key, values in achieved.items():
                if key not in info:
                    raise UserError(
                        f"{self.family.name}: achieved names {key!r}, but info has"
                        f" {', '.join(map(repr, info)) or 'no entries'}"
                    )
                values[i] = info[key]
        return reward, terminated, truncated, None, achieved

    def _observe(self) -> NDArray:
        return self._observation.copy()

    def render(self) -> Any:
        return tuple(env.render() for env in self._envs)

    def close_extras(self, **kwargs: Any) -> None:
        for env in self._envs:
            env.close()


@dataclass(frozen=True, kw_only=True)
class GymnasiumFamily(TaskFamily):
    """A family over any Gymnasium environment.

    For example, pendulums in different gravity:

        GymnasiumFamily(
            name="pendulum-gravity",
            env="Pendulum-v1",
            tasks=Uniform({"gravity": (5.0, 15.0)}),
            set_task=lambda env, task: setattr(env, "g", task[0]),
            horizon=200,
        )
    """

    env: str | Callable[..., gym.Env]
    """A Gymnasium id, or a function that returns an environment."""
    set_task: Callable[[gym.Env, Floats], None]
    """Puts a task vector into the unwrapped environment; called before every reset."""
    env_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the id or function."""

    def make_bare(self, render_mode: str | None = None) -> gym.Env:
        """Return the environment cut at the horizon, with flat observations and no task yet."""
        options = dict(self.env_options)
        if render_mode is not None:
            options["render_mode"] = render_mode
        if isinstance(self.env, str):
            try:
                env = gym.make(self.env, max_episode_steps=self.horizon, **options)
            except (gym.error.UnregisteredEnv, gym.error.NamespaceNotFound) as error:
                raise UserError(f"{self.name}: {error}") from error
        else:
            env = gym.wrappers.TimeLimit(self.env(**options), self.horizon)
        if not isinstance(env.observation_space, gym.spaces.Box) or (
            len(env.observation_space.shape) != 1
        ):
            env = gym.wrappers.FlattenObservation(env)
        return env

    def make(self, task: Floats | None = None, *, render_mode: str | None = None) -> gym.Env:
        return TaskEnv(self.make_bare(render_mode), self, task)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> GymnasiumVectorEnv:
        options.pop("threads", None)  # Python environments share one interpreter
        return GymnasiumVectorEnv(self, num_tasks, episodes, **options)
