"""Environments of one task, and vector environments of many, stepped in this process."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError
from metarl.envs.gymnasium.observations import (
    check_fits,
    fits,
)
from metarl.envs.gymnasium.step_results import FLAGS, NUMBERS, plain_reset, success
from metarl.envs.memory import Copies
from metarl.envs.seeds import foreign_seed
from metarl.envs.single import task_vector
from metarl.envs.vector import (
    CLOSE,
    RESET,
    STEP,
    Advanced,
    Floats,
    TaskVectorEnv,
    describe_progress,
    detached,
    no_entry,
)

if TYPE_CHECKING:
    from metarl.envs.gymnasium.family import GymnasiumFamily

_log = logging.getLogger(__name__)


def stacked(values: Sequence[Any]) -> NDArray[Any]:
    """Return an array [n, ...] of n values, or an array of objects if their shapes differ."""
    try:
        return np.array(values)
    except ValueError:
        found = np.empty(len(values), object)
        for i, value in enumerate(values):
            found[i] = value
        return found


def close(env: gym.Env[Any, Any], name: str) -> None:
    """Close an environment. A failure is only a warning, because past episodes stay valid."""
    try:
        env.close()
    except (Exception, SystemExit) as error:  # the user's own
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        _warn_once(f"{name}: closing the environment failed, and the run continues: {text}")


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


class TaskEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Wrapper that sets a task before every reset and applies the family's reward."""

    def __init__(
        self, family: GymnasiumFamily, task: Floats | None, render_mode: str | None = None
    ) -> None:
        self._made_for = family.example_task() if task is None else task
        super().__init__(family.make_bare(render_mode, self._made_for))
        # A new task may replace the environment; what a user seeded stays.
        self.action_space, self.observation_space = (
            self.env.action_space,
            self.env.observation_space,
        )
        self.family, self._task = family, detached(task)
        self._in_force = self._made_for
        self._verified = False  # that tasks arrive in the environment
        self._rng: np.random.Generator | None = None
        self._observation: NDArray[Any] | None = None

    @property
    def task(self) -> Floats | None:
        """Task of every episode; None: each episode draws one."""
        return detached(self._task)

    @task.setter
    def task(self, task: ArrayLike | Mapping[str, float] | None) -> None:
        self._task = None if task is None else task_vector(self.family.tasks, task)

    def set_task(self, task: ArrayLike | Mapping[str, float] | None) -> None:
        """Set the task from the next reset on; None: every reset draws one.

        Args:
            task: numbers [task_dim], or components by name.

        Raises:
            UserError: the numbers or the names are not a task.
        """
        self.task = task

    def get_task(self) -> Floats | None:
        """Return the task that was set, or else the one that the last reset drew, [task_dim]."""
        if self._task is not None:
            return self.task
        return None if self._observation is None else self._in_force.copy()

    def begin(
        self, task: Floats, seed: int | None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Set a task and start an episode."""
        if self.family.keywords and not np.array_equal(task, self._made_for):
            self.env, old = self.family.make_bare(self.render_mode, task), self.env
            self.family.check_spaces(old, self.env)
            inner, before = self.env.unwrapped, old.unwrapped
            inner.np_random, inner.spec = before.np_random, before.spec
            with contextlib.suppress(AttributeError):  # a property
                inner.action_space = before.action_space
            close(old, self.family.name)
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
        if options is not None and "task" in options:
            options = dict(options)
            self.task = options.pop("task")
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
        given = np.array(action)  # the environment may write to it
        observation, *rest = self.env.step(action)
        check_fits(observation, self.observation_space, self.family.name)
        reward, terminated, truncated, info = self.family.plain(*rest)
        if self.family.reward is not None:
            assert self._observation is not None  # Gymnasium has refused a step before the reset
            after = np.array(observation)
            before, self._observation = self._observation, after
            rows = (before[None], given[None], after[None])
            reward = float(self.family.compute_reward(*rows, [info], self._in_force[None])[0])
        # Copy: an environment may keep using the arrays that it returned.
        return detached(observation), detached(reward), terminated, truncated, detached(info)

    def render(self) -> Any:
        return detached(self.env.render())

    def close(self) -> None:
        close(self.env, self.family.name)


class GymnasiumVectorEnv(TaskVectorEnv):
    """Vector environment of copies of any Gymnasium environment, stepped one after the other."""

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
        watch = None  # some allocate their memory at the first reset
        if not self._ready.any():
            watch = Copies(self.family.name, self.num_tasks, self.episodes)
        for i, seed in zip(ids.tolist(), seeds, strict=True):
            self.begun(RESET, i)
            self._keep(i, self._envs[i].begin(self._tasks[i], seed)[0])
            if watch is not None:
                watch.one_more()

    def advance(self, ids: NDArray[np.int64] | None, actions: Any) -> Advanced:
        reward = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, np.bool_)
        truncated = np.zeros(self.num_envs, np.bool_)
        moved = np.arange(self.num_envs) if ids is None else ids
        if np.issubdtype(self._observation.dtype, np.floating):
            # A policy that observes nan returns nan, which no environment should receive. The
            # episode ends here, and the sampler finds the nan in its observations.
            seen = np.isfinite(self._observation[moved]).all(axis=1)
            truncated[moved[~seen]] = True
            moved = moved[seen]
        before, infos = self._observation[moved], []
        tells = False  # any info has success
        # Copy: an environment may write to its action.
        given, actions = np.asarray(actions)[moved], np.array(actions)
        for i in moved.tolist():
            self.begun(STEP, i)
            env = self._envs[i].env  # without TaskEnv, which computes one reward at a time
            observation, paid, ended, cut, info = env.step(actions[i])
            # Avoid a call for the usual types.
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
            self.begun(STEP)
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
        """Add `success` of the infos, if at least one is a number."""
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

    def _observe(self) -> NDArray[Any]:
        return self._observation

    def render(self) -> Any:
        return tuple(env.render() for env in self._envs)

    def close_extras(self, **kwargs: Any) -> None:
        failed: Exception | None = None
        with self._named():
            for i, env in enumerate(self._envs):
                self.begun(CLOSE, i)
                try:
                    env.env.close()
                except Exception as error:
                    failed = failed or error
            if failed is not None:  # after all others are closed
                raise failed
