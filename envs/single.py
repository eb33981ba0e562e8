"""One environment of a native family, as an ordinary Gymnasium environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily
from metarl.envs.tasks import TaskDistribution
from metarl.envs.vector import STEP, Floats, check_options


def task_vector(tasks: TaskDistribution, task: ArrayLike | Mapping[str, float]) -> Floats:
    """Return the task vector of numbers [task_dim], or of components by name.

    Raises:
        UserError: the numbers or the names do not fit the distribution.
    """
    if isinstance(task, Mapping):
        return tasks.vector(task)
    try:
        vector = np.array(task, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"a task must be {tasks.dim} numbers, got {task!r}") from error
    if vector.shape != (tasks.dim,) or not np.isfinite(vector).all():
        names = ", ".join(tasks.names)
        raise UserError(f"a task must be {tasks.dim} finite numbers ({names}), got {task!r}")
    return vector


class SingleTaskEnv(gym.Env[NDArray[Any], Any]):
    """The only sub-environment of a `TaskVectorEnv`, by the same rules and with the same bits."""

    def __init__(
        self,
        family: TaskFamily,
        task: ArrayLike | None = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.family = family
        self.vector = family.make_vec(
            1, 1, autoreset_mode=AutoresetMode.DISABLED, render_mode=render_mode, **options
        )
        self.vector.numbers = True
        self._task: Floats | None = None
        if task is not None:
            self.set_task(task)
        self.metadata = {k: v for k, v in self.vector.metadata.items() if k != "autoreset_mode"}
        modes = self.metadata.get("render_modes", [])
        if render_mode is not None and render_mode not in modes:
            raise UserError(f"render_mode must be one of {modes}, got {render_mode!r}")
        self.render_mode = render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self._spec: EnvSpec | None = None
        self._steps = -1
        """Steps of the episode; -1 before the first reset."""
        self._end: tuple[bool, bool] | None = None
        """Terminated and truncated, if the episode is over."""

    @property
    def spec(self) -> EnvSpec | None:
        """Specification that `gym.make` sets, with the horizon as `max_episode_steps`."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:  # type: ignore[override]
        if spec is not None:
            spec = dataclasses.replace(spec, max_episode_steps=self.family.horizon)
        self._spec = spec

    def set_task(self, task: ArrayLike | Mapping[str, float] | None) -> None:
        """Set the task from the next reset on; None: every reset draws one.

        Args:
            task: numbers [task_dim], or components by name.

        Raises:
            UserError: the numbers or the names are not a task.
        """
        self._task = None if task is None else task_vector(self.family.tasks, task)
        self.vector.set_tasks(None if self._task is None else self._task[None])

    def get_task(self) -> Floats | None:
        """Return the task that was set, or else the one that the last reset drew, [task_dim]."""
        if self._task is not None:
            return self._task.copy()
        return None if self._steps < 0 else self.vector.tasks[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start an episode; `options={"task": ...}` calls `set_task` first."""
        super().reset(seed=seed)
        check_options(options or {}, ("task",))
        if options:
            self.set_task(options["task"])
        observation, info = self.vector.reset(seed=[seed])
        self._steps, self._end = 0, None
        return observation[0], {"task": info["task"][0]}

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        vector = self.vector
        if self._steps < 0:
            raise gym.error.ResetNeeded("reset the environment first")
        if self._end is not None:
            return vector.observations()[0], 0.0, *self._end, {}
        # As TaskVectorEnv.step, whose arrays of one element take almost as long as the physics.
        try:
            paid, ended, cut, diverged, told = vector.advance(None, np.asarray(action)[None])
        except BaseException as error:
            vector.begun(STEP)
            vector.name(error)
            raise
        self._steps += 1
        if self._steps == 1:
            vector.check_achieved(told)
        info = {k: v if type(v) is float else _first(v) for k, v in told.items()}
        reward = paid if type(paid) is float else float(paid[0])
        terminated = ended is not None and bool(ended[0])
        truncated = self._steps >= self.family.horizon or (cut is not None and bool(cut[0]))
        if diverged is not None and diverged[0]:
            reward, terminated, truncated, info["diverged"] = 0.0, False, True, True
        if terminated or truncated:
            self._end = terminated, truncated
        return vector.observations()[0], reward, terminated, truncated, info

    def render(self) -> Any:
        if self._steps < 0:
            raise gym.error.ResetNeeded("reset the environment first")
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        self.vector.close()


def _first(values: Any) -> Any:
    """Return the value of the only sub-environment, from an array [1, ...] or a number."""
    value = values[0]
    return value.copy() if isinstance(value, np.ndarray) else value
