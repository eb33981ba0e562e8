"""Families over any Gymnasium environment, stepped in this process.

A task reaches the environment in one or several of four ways:

- `set_task(env, task)`, a callable.
- `keywords=True`: the task's components are keyword arguments of the id or function. A new task
  makes a new environment, which continues the random stream of the old one.
- `reward`, a vectorised function of the task.
- The environment's own `set_task(task)` or its attribute `task`. They are also used if there is a
  `reward` (see `task_arrival`).

Observations become flat vectors. A single image (uint8, [height, width] or with channels) is not
changed. A pickled family includes the registration of its Gymnasium id, because another process may
not have it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily
from metarl.envs.gymnasium import task_arrival
from metarl.envs.gymnasium.environments import GymnasiumVectorEnv, TaskEnv, close, stacked
from metarl.envs.gymnasium.observations import (
    FLATTENABLE,
    FlatObservation,
    columns,
    components,
    is_image,
)
from metarl.envs.gymnasium.step_results import plain_step
from metarl.envs.gymnasium.wrappers import refuse_running_statistics
from metarl.envs.vector import (
    Floats,
    check_movable,
    detached,
)

Reward = Callable[
    [NDArray[Any], NDArray[Any], NDArray[Any], Mapping[str, NDArray[Any]], Floats], NDArray[Any]
]


@dataclass(frozen=True, kw_only=True)
class GymnasiumFamily(TaskFamily):
    """Family over any Gymnasium environment.

    For example, gravity is a keyword argument of `Pendulum-v1`:

        GymnasiumFamily(
            name="pendulum-gravity",
            env="Pendulum-v1",
            keywords=True,
            tasks=Uniform({"g": (5.0, 15.0)}),
            horizon=200,
        )
    """

    env: str | Callable[..., gym.Env[Any, Any]]
    """Gymnasium id, or a function that returns an environment."""
    set_task: Callable[[gym.Env[Any, Any], Floats], None] | None = None
    """Sets a task vector in the unwrapped environment; called before every reset."""
    keywords: bool = False
    """The task's components are keyword arguments (floats) of the id or function."""
    reward: Reward | None = None
    """Returns rewards [n] of n steps, which replace the environment's own rewards.

    Its arguments are the observation before the step [n, *observation_shape], the received action
    [n, *action_shape], the next observation, info (arrays [n, ...] by name) and the task
    [n, task_dim]. n is 1 for a single environment. In a vector environment it is the number of
    sub-environments that were stepped."""
    env_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the id or function."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "env_options", detached(dict(self.env_options)))
        if not isinstance(self.env, str) and not callable(self.env):
            raise UserError(
                f"{self.name}: env must be a Gymnasium id or a function that returns a new"
                f" environment, got {self.env}"
            )
        for role, function in (("set_task", self.set_task), ("reward", self.reward)):
            if function is not None and not callable(function):
                raise UserError(f"{self.name}: {role} must be a function, got {function!r}")
        if self.keywords and self.set_task is not None:
            raise UserError(f"{self.name}: use either set_task or keywords=True, not both")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_spec": self._spec()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        spec = state.pop("_spec")
        vars(self).update(state)
        if spec is not None and spec.id not in gym.registry:
            gym.registry[spec.id] = spec

    def _spec(self) -> EnvSpec | None:
        """Return the registration of the id, or None if it does not exist or cannot be sent."""
        spec = gym.registry.get(self.env) if isinstance(self.env, str) else None
        try:
            pickle.dumps(spec)
        except Exception:  # an entry point made by hand; a process that needs it must import it
            return None
        return spec

    def example_task(self) -> Floats:
        """Return a fixed training task."""
        return self.tasks.grid(1, "train")[0]

    def make_bare(
        self, render_mode: str | None = None, task: Floats | None = None
    ) -> gym.Env[Any, Any]:
        """Return the environment truncated at the horizon, with flat observations or an image.

        The task only matters with `keywords`; otherwise `apply_task` sets it.
        """
        env = self.make_raw(render_mode, task)
        space = env.observation_space
        if is_image(space) or (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            return env
        for path, leaf in components(space):
            if not isinstance(leaf, FLATTENABLE):
                raise UserError(f"{self.name}: {self._cannot_flatten(path, leaf, space)}")
        return FlatObservation(env, self.name)

    def columns(self) -> list[tuple[str, int, int]]:
        """Return name, first column and end of each component of the flat observation.

        The list is empty if the environment's observations are already one array.
        """
        env = self.make_raw()
        space = env.observation_space
        close(env, self.name)
        return columns(space) if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple) else []

    def _cannot_flatten(self, path: tuple[str, ...], leaf: gym.Space, space: gym.Space) -> str:
        """Describe the component that is not numeric, and the wrapper that removes it."""
        kind = f"a {type(leaf).__name__}"
        if not path or not isinstance(space, gym.spaces.Dict):
            return (
                f"observations must be numbers (Box, Discrete, MultiDiscrete, MultiBinary, or a"
                f" Dict or Tuple of these), got {kind}; encode them in the environment, or with"
                " gym.wrappers.TransformObservation(env, function, space)"
            )
        kept = [
            name
            for name, inner in space.items()
            if all(isinstance(other, FLATTENABLE) for _, other in components(inner))
        ]
        make = f'gym.make("{self.env}", render_mode=render_mode)'
        if not isinstance(self.env, str):
            make = f"{getattr(self.env, '__name__', 'make')}(render_mode=render_mode)"
        return (
            f"the component {'.'.join(path)!r} of the observation is {kind}, not a number;"
            " remove or encode it with a wrapper, and use this function as env:\n\n"
            "    def make_env(render_mode=None):\n"
            f"        env = {make}\n"
            f"        return gym.wrappers.FilterObservation(env, {kept})\n"
        )

    def make_raw(
        self, render_mode: str | None = None, task: Floats | None = None
    ) -> gym.Env[Any, Any]:
        """Return the environment truncated at the horizon, with unchanged observations."""
        options = detached(self.env_options)
        if self.keywords:
            task = self.example_task() if task is None else task
            options |= {name: float(x) for name, x in zip(self.tasks.names, task, strict=True)}
        if render_mode is not None:
            options["render_mode"] = render_mode
        try:
            if isinstance(self.env, str):
                # `metarl check` reports what Gymnasium checks at the first step.
                options.setdefault("disable_env_checker", True)
                env = gym.make(self.env, max_episode_steps=self.horizon, **options)
            else:
                env = self.env(**options)
                if not isinstance(env, gym.Env):
                    raise UserError(
                        f"{self.name}: env must return a gymnasium.Env, got {type(env).__name__}"
                    )
                env = gym.wrappers.TimeLimit(env, self.horizon)
        except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
            if not isinstance(self.env, str):  # the function needs another package
                raise UserError(f"{self.name}: env cannot make an environment: {error}") from error
            raise UserError(
                f"{self.name}: {str(error).removesuffix('.')}; import the package that registers"
                f" {self.env} in the file that makes the family, or write env='package:Name-v0'"
            ) from error
        except gym.error.Error as error:
            raise UserError(f"{self.name}: {error}") from error
        except TypeError as error:
            if not options or not re.search("argument|float|integer", str(error)):
                raise
            options.pop("disable_env_checker", None)
            given = ", ".join(f"{name}={value!r}" for name, value in options.items())
            said = " ".join(str(error).split(" was raised from the env")[0].split())
            hint = ""
            if "render_mode" in options and "render_mode" in said:
                hint = "; for videos it must accept render_mode=None and pass it on"
            elif self.keywords and "unexpected keyword" not in said:
                hint = (
                    "; a task's components are floats; for another type, let env be a function that"
                    f" takes them and passes on int({self.tasks.names[0]}), for instance"
                )
            raise UserError(
                f"{self.name}: {self.env} cannot be made with {given}: {said}{hint}"
            ) from error
        if not (self.set_task or self.keywords or self.reward or task_arrival.has_own_way(env)):
            raise UserError(
                f"{self.name}: a task cannot be set in {env.unwrapped}. Give the family"
                " set_task, keywords=True or reward, or the environment a method set_task(task)"
                " or an attribute task"
            )
        check_movable(self.name, env.action_space, getattr(env.unwrapped, "model", None))
        refuse_running_statistics(env, self.name)
        return env

    def apply_task(self, env: gym.Env[Any, Any], task: Floats, *, verify: bool = False) -> None:
        """Set a task in an environment made by `make_bare`; `verify` that it arrives."""
        name = self.name
        if self.set_task is not None:
            self.set_task(env.unwrapped, task)
        elif not self.keywords:
            only_way = self.reward is None
            if not verify:
                task_arrival.give(env, task, name, only_way=only_way)
                return
            other = next((x for x in self.tasks.grid(2, "train") if (x != task).any()), task)
            task_arrival.give_and_verify(env, task, other, name, only_way=only_way)
            return
        if verify:
            way = "keywords" if self.keywords else "set_task"
            task_arrival.verify_given(env, task, name, way)

    def plain(
        self, reward: Any, terminated: Any, truncated: Any, info: Any
    ) -> tuple[float, bool, bool, Any]:
        """Return reward, flags and info of an environment's step as plain values.

        Raises:
            UserError: one of them has a wrong type.
        """
        if self.reward is not None:
            reward = 0.0  # the environment's own is not used
        try:
            return plain_step(reward, terminated, truncated, info)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def compute_reward(
        self,
        before: NDArray[Any],
        action: NDArray[Any],
        after: NDArray[Any],
        infos: Sequence[Mapping[str, Any]],
        tasks: Floats,
    ) -> Floats:
        """Return the rewards of n steps, computed by the family's `reward`, [n]."""
        assert self.reward is not None
        # Entries that only some steps report are left out.
        names = [name for name in infos[0] if all(name in info for info in infos)]
        info = {name: stacked([info[name] for info in infos]) for name in names}
        reward = np.asarray(self.reward(before, action, after, info, tasks), np.float64)
        if reward.shape != (len(tasks),):
            raise UserError(
                f"{self.name}: reward must return one number per row, [{len(tasks)}] here,"
                f" got {list(reward.shape)}; its arguments are arrays of rows, such as task[:, 0]"
            )
        return reward

    def check_spaces(self, one: gym.Env[Any, Any], other: gym.Env[Any, Any]) -> None:
        """Raise UserError unless two of the family's environments have the same spaces."""
        for kind in ("observation_space", "action_space"):
            if getattr(one, kind) != getattr(other, kind):
                raise UserError(
                    f"{self.name}: the {kind} must be the same for every task, got"
                    f" {getattr(one, kind)} and {getattr(other, kind)}"
                )

    def make(
        self, task: ArrayLike | None = None, *, render_mode: str | None = None
    ) -> gym.Env[Any, Any]:
        task = None if task is None else np.array(task, np.float64)
        return TaskEnv(self, task, render_mode)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> GymnasiumVectorEnv:
        options.pop("threads", None)  # Python environments share one interpreter
        return GymnasiumVectorEnv(self, num_tasks, episodes, **options)
