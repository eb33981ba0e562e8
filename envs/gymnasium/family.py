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

import functools
import logging
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
from metarl.envs.gymnasium.observations import (
    FLATTENABLE,
    FlatObservation,
    check_fits,
    columns,
    components,
    fits,
    is_image,
)
from metarl.envs.gymnasium.step_results import FLAGS, NUMBERS, plain_reset, plain_step, success
from metarl.envs.gymnasium.wrappers import refuse_running_statistics
from metarl.envs.memory import Copies
from metarl.envs.seeds import foreign_seed
from metarl.envs.vector import (
    CLOSE,
    RESET,
    STEP,
    Bools,
    Floats,
    TaskVectorEnv,
    check_movable,
    describe_progress,
    detached,
    no_entry,
)

_log = logging.getLogger(__name__)

Reward = Callable[[NDArray, NDArray, NDArray, Mapping[str, NDArray], Floats], NDArray]


def _stacked(values: Sequence[Any]) -> NDArray:
    """Return an array [n, ...] of n values, of objects where their shapes differ."""
    try:
        return np.array(values)
    except ValueError:
        found = np.empty(len(values), object)
        for i, value in enumerate(values):
            found[i] = value
        return found


def _close(env: gym.Env, name: str) -> None:
    """Close an environment. If that fails, say so: what was played before is as good as ever."""
    try:
        env.close()
    except (Exception, SystemExit) as error:  # the user's own
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        _warn_once(f"{name}: closing the environment failed, and the run continues: {text}")


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


class TaskEnv(gym.Wrapper):
    """An environment that is given a task before every reset, and pays the family's reward."""

    def __init__(
        self, family: GymnasiumFamily, task: Floats | None, render_mode: str | None = None
    ) -> None:
        self._made_for = family.example_task() if task is None else task
        super().__init__(family.make_bare(render_mode, self._made_for))
        self.family, self._task = family, detached(task)
        self._in_force = self._made_for
        self._verified = False  # that tasks arrive in the environment
        self._rng: np.random.Generator | None = None
        self._observation: NDArray | None = None

    @property
    def task(self) -> Floats | None:
        """The task of every episode; None: each draws its own."""
        return detached(self._task)

    @task.setter
    def task(self, task: Floats | None) -> None:
        self._task = detached(task)

    def begin(
        self, task: Floats, seed: int | None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Put a task in and start an episode of it."""
        if self.family.keywords and not np.array_equal(task, self._made_for):
            self.env, old = self.family.make_bare(self.render_mode, task), self.env
            self.family.check_spaces(old, self.env)
            self.env.unwrapped.np_random = old.unwrapped.np_random
            _close(old, self.family.name)
            self._made_for = task.copy()
            self._verified = False
        self.family.apply_task(self.env, task.copy(), verify=not self._verified)
        self._verified = True
        self._in_force = task.copy()
        try:
            return plain_reset(self.env.reset(seed=foreign_seed(seed), options=options))  # type: ignore[return-value]
        except UserError as error:
            raise UserError(f"{self.family.name}: {error}") from None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        task = self._task
        if task is None:
            if seed is not None or self._rng is None:
                self._rng = np.random.default_rng(None if seed is None else [seed, 1])
            task = self.family.tasks.sample(self._rng, 1)[0]
        observation, info = self.begin(task, seed, options)
        check_fits(observation, self.observation_space, self.family.name)
        self._observation = np.array(observation)
        return detached(observation), {**detached(info), "task": self._in_force.copy()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        given = np.array(action)  # which the environment may write to
        observation, *rest = self.env.step(action)
        check_fits(observation, self.observation_space, self.family.name)
        reward, terminated, truncated, info = self.family.plain(*rest)
        if self.family.reward is not None:
            assert self._observation is not None  # Gymnasium has refused a step before the reset
            after = np.array(observation)
            before, self._observation = self._observation, after
            rows = (before[None], given[None], after[None])
            reward = float(self.family.compute_reward(*rows, [info], self._in_force[None])[0])
        # Copies: an environment may go on with the arrays that it gave.
        return detached(observation), detached(reward), terminated, truncated, detached(info)

    def render(self) -> Any:
        return detached(self.env.render())

    def close(self) -> None:
        _close(self.env, self.family.name)


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
        watch = Copies(family.name, num_tasks, episodes)
        self._envs: list[TaskEnv] = []
        for _ in range(max(count, 1)):
            self._envs.append(TaskEnv(family, None, render_mode))
            watch.one_more()
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
        self._dtype = self._observation.dtype

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        watch = None  # some take their memory at the first reset
        if not self._ready.any():
            watch = Copies(self.family.name, self.num_tasks, self.episodes)
        for i, seed in zip(ids.tolist(), seeds, strict=True):
            self._begun(RESET, i)
            self._keep(i, self._envs[i].begin(self._tasks[i], seed)[0])
            if watch is not None:
                watch.one_more()

    def _advance(
        self, ids: NDArray[np.int64] | None, actions: Any
    ) -> tuple[Floats, Bools | None, Bools | None, Bools | None, dict[str, Any]]:
        reward = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, np.bool_)
        truncated = np.zeros(self.num_envs, np.bool_)
        moved = np.arange(self.num_envs) if ids is None else ids
        if np.issubdtype(self._observation.dtype, np.floating):
            # A policy that sees nan acts nan, which no environment should be given: that is the
            # end of the episode, and whoever sampled it finds the nan in its observations.
            seen = np.isfinite(self._observation[moved]).all(axis=1)
            truncated[moved[~seen]] = True
            moved = moved[seen]
        before, infos = self._observation[moved], []
        tells = False  # of success
        # Copies: an environment may write to the action that it is given.
        given, actions = np.asarray(actions)[moved], np.array(actions)
        for i in moved.tolist():
            self._begun(STEP, i)
            env = self._envs[i].env  # past the TaskEnv, which would pay one row at a time
            observation, paid, ended, cut, info = env.step(actions[i])
            # Types that need no look, which is most of them, cost no call.
            if (
                type(info) is not dict
                or type(paid) not in NUMBERS
                or type(ended) not in FLAGS
                or type(cut) not in FLAGS
            ):
                paid, ended, cut, info = self._plain(paid, ended, cut, info)
            reward[i], terminated[i], truncated[i] = paid, ended, cut
            self._keep(i, observation)
            infos.append(info)
            tells = tells or "success" in info
        if self.family.reward is not None and len(moved):
            self._begun(STEP)
            after = self._observation[moved]
            reward[moved] = self.family.compute_reward(
                before, given, after, infos, self._tasks[moved]
            )
        told = self._achieved(moved, infos)
        if tells:
            self._add_success(told, moved, infos)
        return reward, terminated, truncated, None, told

    def _plain(self, *result: Any) -> tuple[float, bool, bool, Any]:
        try:
            return self.family.plain(*result)
        except UserError as error:
            where = describe_progress(self.progress, self.tasks)
            raise UserError(f"{error} ({where})") from None

    def _add_success(
        self, told: dict[str, Floats], moved: NDArray[np.int64], infos: list[Any]
    ) -> None:
        """Add what infos tell of success, unless none of them tells it as a number."""
        values = [success(info) for info in infos]
        if any(value is not None for value in values):
            told["success"] = np.zeros(self.num_envs)
            told["success"][moved] = [value or 0.0 for value in values]

    def _achieved(self, moved: NDArray[np.int64], infos: list[dict[str, Any]]) -> dict[str, Floats]:
        achieved = {}
        for key in self.family.achieved.values():
            achieved[key] = np.zeros(self.num_envs)
            for i, info in zip(moved.tolist(), infos, strict=True):
                if key not in info:
                    raise no_entry(self.family, key, info)
                achieved[key][i] = info[key]
        return achieved

    def _keep(self, i: int, observation: Any) -> None:
        shape = self.single_observation_space.shape
        if getattr(observation, "shape", None) != shape and np.shape(observation) != shape:
            raise UserError(  # NumPy would broadcast some
                f"{self.family.name}: {describe_progress(self.progress, self.tasks)} the"
                f" environment returned an observation of shape {np.shape(observation)}, but its"
                f" observation_space has shape {shape}"
            )
        if getattr(observation, "dtype", None) is not self._dtype:
            space = self.single_observation_space
            if not fits(observation, space):
                where = f"{self.family.name}: {describe_progress(self.progress, self.tasks)}"
                check_fits(observation, space, where)
        self._observation[i] = observation

    def _observe(self) -> NDArray:
        return self._observation

    def render(self) -> Any:
        return tuple(env.render() for env in self._envs)

    def close_extras(self, **kwargs: Any) -> None:
        failed: Exception | None = None
        with self._named():
            for i, env in enumerate(self._envs):
                self._begun(CLOSE, i)
                try:
                    env.env.close()
                except Exception as error:
                    failed = failed or error
            if failed is not None:  # after all others are closed
                raise failed


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
        _close(env, self.name)
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
        info = {name: _stacked([info[name] for info in infos]) for name in names}
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
