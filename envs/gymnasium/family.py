"""Families over any Gymnasium environment, stepped in this process.

How a task reaches the environment is one of four ways, or several together:

- `set_task(env, task)`, a callable;
- `keywords=True`: the task's components are keyword arguments of the id or function, and a change
  of the task makes a new environment, which goes on with the random numbers of the old one;
- `reward`, a vectorised function that pays by the task;
- the environment's own `set_task(task)`, or its attribute `task`, which are used with `reward` too
  (`task_arrival`).

Observations become flat vectors, but for an image alone (uint8, [height, width] or with channels),
which stays as it is. A pickled family brings the registration of its Gymnasium id along, which
another process may not know.
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

Reward = Callable[[NDArray, NDArray, NDArray, Mapping[str, NDArray], Floats], NDArray]


@dataclass(frozen=True, kw_only=True)
class GymnasiumFamily(TaskFamily):
    """A family over any Gymnasium environment.

    For example, pendulums under different gravity, which is a keyword argument of `Pendulum-v1`:

        GymnasiumFamily(
            name="pendulum-gravity",
            env="Pendulum-v1",
            keywords=True,
            tasks=Uniform({"g": (5.0, 15.0)}),
            horizon=200,
        )
    """

    env: str | Callable[..., gym.Env]
    """A Gymnasium id, or a function that returns an environment."""
    set_task: Callable[[gym.Env, Floats], None] | None = None
    """Puts a task vector into the unwrapped environment; called before every reset."""
    keywords: bool = False
    """The task's components are keyword arguments, floats, of the id or function."""
    reward: Reward | None = None
    """Rewards [n] of n steps at once, in place of the environment's own: a function of the
    observation before the step [n, *observation_shape], the action that the environment was given
    [n, *action_shape], the next observation, info (arrays [n, ...] by name) and the task
    [n, task_dim]. n is 1 for a single environment; of several, only those that moved count."""
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
            raise UserError(f"{self.name}: give set_task or keywords=True, not both")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_spec": self._spec()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        spec = state.pop("_spec")
        vars(self).update(state)
        if spec is not None and spec.id not in gym.registry:
            gym.registry[spec.id] = spec

    def _spec(self) -> EnvSpec | None:
        """Return the registration of the id, None where there is none that could be sent."""
        spec = gym.registry.get(self.env) if isinstance(self.env, str) else None
        try:
            pickle.dumps(spec)
        except Exception:  # an entry point made by hand; a process that needs it must import it
            return None
        return spec

    def example_task(self) -> Floats:
        """Return a training task, the same at every call."""
        return self.tasks.grid(1, "train")[0]

    def make_bare(self, render_mode: str | None = None, task: Floats | None = None) -> gym.Env:
        """Return the environment cut at the horizon, with flat observations or an image.

        The task matters only with `keywords`; otherwise `apply_task` puts it in.
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

        An empty list if the environment's observations are one array already.
        """
        env = self.make_raw()
        space = env.observation_space
        close(env, self.name)
        return columns(space) if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple) else []

    def _cannot_flatten(self, path: tuple[str, ...], leaf: gym.Space, space: gym.Space) -> str:
        """Say which component is no number, and write the wrapper that leaves it out."""
        kind = f"a {type(leaf).__name__}"
        if not path or not isinstance(space, gym.spaces.Dict):
            return (
                f"observations must be numbers (Box, Discrete, MultiDiscrete, MultiBinary, or a"
                f" Dict or Tuple of those), got {kind}: encode them in the environment, or by"
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
            f"the component {'.'.join(path)!r} of the observation is {kind}, which is no number:"
            " leave it out, or encode it, by a wrapper, and name the function as env:\n\n"
            "    def make_env(render_mode=None):\n"
            f"        env = {make}\n"
            f"        return gym.wrappers.FilterObservation(env, {kept})\n"
        )

    def make_raw(self, render_mode: str | None = None, task: Floats | None = None) -> gym.Env:
        """Return the environment cut at the horizon, with the observations that it gives."""
        options = detached(self.env_options)
        if self.keywords:
            task = self.example_task() if task is None else task
            options |= {name: float(x) for name, x in zip(self.tasks.names, task, strict=True)}
        if render_mode is not None:
            options["render_mode"] = render_mode
        try:
            if isinstance(self.env, str):
                # What Gymnasium checks at a first step, `metarl check` has told; here it is noise.
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
            if not isinstance(self.env, str):  # it is the function that needs another package
                raise UserError(f"{self.name}: env cannot make an environment: {error}") from error
            raise UserError(
                f"{self.name}: {str(error).removesuffix('.')}: import the package that registers"
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
                hint = "; to be filmed, it must take render_mode=None and hand it on"
            elif self.keywords and "unexpected keyword" not in said:
                hint = (
                    "; a task's components are floats: where another kind is wanted, let env be a"
                    f" function that takes them and hands on int({self.tasks.names[0]}), for"
                    " instance"
                )
            raise UserError(
                f"{self.name}: {self.env} cannot be made with {given}: {said}{hint}"
            ) from error
        if not (self.set_task or self.keywords or self.reward or task_arrival.has_own_way(env)):
            raise UserError(
                f"{self.name}: nothing says how a task gets into {env.unwrapped}: give the family"
                " set_task, keywords=True or reward, or the environment a method set_task(task)"
                " or an attribute task"
            )
        check_movable(self.name, env.action_space, getattr(env.unwrapped, "model", None))
        refuse_running_statistics(env, self.name)
        return env

    def apply_task(self, env: gym.Env, task: Floats, *, verify: bool = False) -> None:
        """Put a task into an environment made by `make_bare`; `verify` that it arrives."""
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
        """Return what an environment's step returned after the observation, as plain values.

        Raises:
            UserError: one of them is of another kind.
        """
        if self.reward is not None:
            reward = 0.0  # the environment's own is not used
        try:
            return plain_step(reward, terminated, truncated, info)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def compute_reward(
        self,
        before: NDArray,
        action: NDArray,
        after: NDArray,
        infos: Sequence[Mapping[str, Any]],
        tasks: Floats,
    ) -> Floats:
        """Return the rewards of n steps by the family's `reward`, [n]."""
        assert self.reward is not None
        # What only some steps report has no place in an array of all.
        names = [name for name in infos[0] if all(name in info for info in infos)]
        info = {name: stacked([info[name] for info in infos]) for name in names}
        reward = np.asarray(self.reward(before, action, after, info, tasks), np.float64)
        if reward.shape != (len(tasks),):
            raise UserError(
                f"{self.name}: reward must return one number a row, [{len(tasks)}] here,"
                f" got {list(reward.shape)}; its arguments are arrays of rows, such as task[:, 0]"
            )
        return reward

    def check_spaces(self, one: gym.Env, other: gym.Env) -> None:
        """Raise UserError unless two of the family's environments have the same spaces."""
        for kind in ("observation_space", "action_space"):
            if getattr(one, kind) != getattr(other, kind):
                raise UserError(
                    f"{self.name}: the {kind} must be the same for every task, got"
                    f" {getattr(one, kind)} and {getattr(other, kind)}"
                )

    def make(self, task: ArrayLike | None = None, *, render_mode: str | None = None) -> gym.Env:
        task = None if task is None else np.array(task, np.float64)
        return TaskEnv(self, task, render_mode)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> GymnasiumVectorEnv:
        options.pop("threads", None)  # Python environments share one interpreter
        return GymnasiumVectorEnv(self, num_tasks, episodes, **options)
