"""Vector environments over tasks: `TaskVectorEnv`, with the same rules for all backends."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from metarl.envs.errors import UserError, add_note, check_one_of, did_you_mean
from metarl.envs.family import TaskFamily

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Advanced = tuple[Floats, Bools | None, Bools | None, Bools | None, dict[str, Any]]

PHASES = ("start", "reset", "step", "close")
RESET, STEP, CLOSE = 1, 2, 3


def describe_progress(progress: Sequence[int], tasks: Floats) -> str:
    """Return "in step of task [9.8]" for a `TaskVectorEnv.progress` and tasks [num_envs, dim]."""
    _, phase, i = progress
    return f"in {PHASES[phase]}" + (f" of task {tasks[i].tolist()}" if i >= 0 else "")


def detached(value: Any) -> Any:
    """Return a value with copies of its arrays, also inside containers."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: detached(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(detached(entry) for entry in value)
    return value


def check_movable(name: str, space: gym.Space, model: Any = None) -> None:
    """Raise UserError if the bounds of actions leave a policy nothing to choose.

    This is so if every component is locked, or if one is zero because its actuator has no range. A
    component that is locked on purpose is allowed.

    Args:
        name: name of the family.
        space: space of the environment's actions.
        model: MuJoCo model of the environment, if any. Gymnasium's MujocoEnv reads bounds from
            `actuator_ctrlrange`, which is zero for an actuator without a range.
    """
    if not isinstance(space, gym.spaces.Box) or not space.shape or not np.prod(space.shape):
        return
    locked = space.low == space.high
    limited = getattr(model, "actuator_ctrllimited", None)
    if limited is not None and np.shape(limited) == space.shape:
        for i in np.flatnonzero(locked & (space.low == 0) & ~np.asarray(limited, bool)):
            raise UserError(
                f"{name}: component {i} of the action can only be 0, because the actuator"
                f" {model.actuator(int(i)).name or int(i)!r} has no ctrlrange. Set it in the"
                ' model (ctrlrange="-1 1"), or set the action_space of the environment, with'
                " infinite bounds if it has none"
            )
    if locked.all():
        raise UserError(
            f"{name}: low and high are equal in every component of the action (component 0:"
            f" {space.low.flat[0]:g}), so a policy has nothing to choose. Give the action_space"
            " low < high (in a MuJoCo model, give the actuators a ctrlrange)"
        )


def check_options(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise UserError if `reset` does not know one of its options."""
    for key in options:
        if key not in known:
            raise UserError(
                f"reset has no option {key!r}{did_you_mean(key, known)}"
                f" (options: {', '.join(known)})"
            )


def no_entry(family: TaskFamily, key: str, info: Iterable[str]) -> UserError:
    """Return the error for an entry that `achieved` names and `info` does not have."""
    return UserError(
        f"{family.name}: achieved names {key!r}, but info has"
        f" {', '.join(map(repr, info)) or 'no entries'}"
    )


class TaskVectorEnv(VectorEnv[NDArray[Any], Any, NDArray[Any]]):
    """A `gymnasium.vector.VectorEnv` of `num_tasks x episodes` sub-environments, task-major.

    Sub-environment `t * episodes + e` is episode e of task t.

    - `set_tasks` takes effect at the next reset. Without it, every reset of a sub-environment draws
      a training task.
    - `reset(seed=...)` takes None, one int (sub-environment i gets seed + i) or a list of ints.
      `options={"reset_mask": ...}`, booleans [num_envs], resets only some, and
      `options={"task": ...}`, [num_tasks, task_dim], calls `set_tasks`. It returns observations
      [num_envs, *observation_shape] and info with "task" [num_envs, task_dim].
    - `step` takes actions [num_envs, *action_shape]. It returns observations, rewards (float64),
      terminated and truncated (bool), [num_envs] each, and info of arrays [num_envs, ...].
    - As in Gymnasium, the entry `key` of info has a mask `_key` [num_envs]: whether a
      sub-environment reports it. Other rows are zero.
    - Returned arrays are copies: later calls do not change them, and writing to them has no effect
      here. The current tasks, `tasks` [num_envs, task_dim], are a copy too.
    - With `autoreset_mode` DISABLED a finished sub-environment stays as it is, with reward 0, until
      it is reset. With NEXT_STEP the step after its end resets it, with reward 0. With SAME_STEP
      the last step resets it; the last observation and info are `info["final_obs"]` and
      `info["final_info"]`.
    - An episode whose simulation diverged is truncated and marked in `info["diverged"]`.
    - `progress` shows the current call and can be read from another process. An exception from an
      environment has it as a note.

    A backend implements `_begin`, `advance` and `_observe`.

    Args:
        family: the family.
        num_tasks: number of tasks.
        episodes: sub-environments of each task.
        observation_space, action_space: spaces of one sub-environment.
        autoreset_mode: NEXT_STEP or DISABLED.
        metadata: metadata of the environments, such as the render modes.

    Raises:
        UserError: num_tasks or episodes is below 1, or autoreset_mode does not exist.
    """

    numbers = False
    """Whether `advance` may return numbers instead of arrays of one element."""

    def __init__(
        self,
        family: TaskFamily,
        num_tasks: int,
        episodes: int,
        *,
        observation_space: gym.Space,
        action_space: gym.Space,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if num_tasks < 1 or episodes < 1:
            raise UserError(f"num_tasks and episodes must be >= 1, got {num_tasks}, {episodes}")
        check_movable(family.name, action_space)
        mode = getattr(autoreset_mode, "value", autoreset_mode)
        check_one_of("autoreset_mode", mode, [each.value for each in AutoresetMode])
        self.autoreset_mode = AutoresetMode(mode)
        self.family = family
        self.num_tasks, self.episodes = num_tasks, episodes
        self.num_envs = num_tasks * episodes
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, self.num_envs)
        self.action_space = batch_space(action_space, self.num_envs)
        self.metadata = {**(metadata or {}), "autoreset_mode": self.autoreset_mode}
        self._tasks = np.full((self.num_envs, family.tasks.dim), np.nan)
        self._next_tasks: Floats | None = None
        self._task_rngs: list[np.random.Generator | None] = [None] * self.num_envs
        self._elapsed = np.zeros(self.num_envs, np.int64)
        self._terminated = np.zeros(self.num_envs, np.bool_)
        self._truncated = np.zeros(self.num_envs, np.bool_)
        self._ready = np.zeros(self.num_envs, np.bool_)  # has been reset
        self.progress: MutableSequence[int] = [0, 0, -1]
        """Number of calls, phase (an index of PHASES), sub-environment (-1: all)."""

    def __del__(self) -> None:
        """Do nothing: older Gymnasium closes here, even if the constructor failed."""

    @property
    def tasks(self) -> Floats:
        """Current tasks, [num_envs, task_dim]; NaN before the first reset."""
        return self._tasks.copy()

    def set_render_mode(self, mode: str | None) -> None:
        """Set the render mode; raise UserError if the metadata does not list it."""
        if mode is not None:
            check_one_of("render_mode", mode, self.metadata.get("render_modes", []))
        self.render_mode = mode

    def begun(self, phase: int, i: int = -1) -> None:
        """Record the start of a call in `progress`; i is a sub-environment, -1: all."""
        progress = self.progress
        progress[0] += 1
        progress[1] = phase
        progress[2] = i

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Add the family and the task to an exception as a note."""
        try:
            yield
        except BaseException as error:
            self.name(error)
            raise

    def name(self, error: BaseException) -> None:
        """Add the family, the task and the current call to an exception as a note."""
        add_note(error, f"{self.family.name}: {describe_progress(self.progress, self.tasks)}")

    # Methods of a backend

    @abstractmethod
    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        """Start an episode of the task in `self.tasks` in each of the sub-environments."""

    @abstractmethod
    def advance(self, ids: NDArray[np.int64] | None, actions: Any) -> Advanced:
        """Step the sub-environments ids, or all.

        Returns:
            reward, terminated, truncated (before the horizon) and diverged, [num_envs] each, and
            info arrays. A flag may be None if no sub-environment has it. Values of sub-environments
            outside ids are ignored. The caller copies the arrays.
        """

    @abstractmethod
    def _observe(self) -> NDArray[Any]:
        """Return the observations of all sub-environments; the caller copies them."""

    def check_achieved(self, info: Iterable[str]) -> None:
        """Raise UserError unless info has the entries that the family's `achieved` names."""
        for key in self.family.achieved.values():
            if key not in info:
                raise no_entry(self.family, key, info)

    def observations(self) -> NDArray[Any]:
        """Return a copy of the observations of all sub-environments."""
        return np.array(self._observe())

    # gymnasium.vector.VectorEnv

    def set_tasks(self, tasks: Sequence[Sequence[float]] | Floats | None) -> None:
        """Set the tasks [num_tasks, task_dim] from the next reset on.

        With None, resets draw tasks again.

        Raises:
            UserError: the shape is wrong, or a task is not finite.
        """
        if tasks is None:
            self._next_tasks = None
            return
        array = np.asarray(tasks, np.float64)
        shape = (self.num_tasks, self.family.tasks.dim)
        if array.shape != shape or not np.isfinite(array).all():
            raise UserError(f"tasks must be finite and of shape {shape}, got {array.shape}")
        self._next_tasks = np.repeat(array, self.episodes, axis=0)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        options = options or {}
        check_options(options, ("reset_mask", "task"))
        ids = np.arange(self.num_envs)
        if "reset_mask" in options:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
                raise UserError(
                    f"reset_mask must be booleans of shape ({self.num_envs},) with a True"
                )
            ids = np.flatnonzero(mask)
        if seed is None:
            seeds: Sequence[int | None] = [None] * self.num_envs
        elif isinstance(seed, (int, np.integer)):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
            if len(seeds) != self.num_envs:
                raise UserError(f"seed must have {self.num_envs} entries, got {len(seeds)}")
        if "task" in options:
            self.set_tasks(options["task"])
        self._start(ids, [seeds[int(i)] for i in ids])
        return self.observations(), self._masked({"task": self._tasks}, ids)

    def step(self, actions: Any) -> tuple[NDArray[Any], Floats, Bools, Bools, dict[str, Any]]:
        if not self._ready.all():
            raise gym.error.ResetNeeded("reset every sub-environment before the first step")
        finished = self._terminated | self._truncated
        ids, stand = None, None
        info: dict[str, Any] = {}
        if finished.any():
            stand = np.flatnonzero(finished)
            ids = np.flatnonzero(~finished)
            if self.autoreset_mode is AutoresetMode.NEXT_STEP:
                self._start(stand, [None] * len(stand))
                info = self._masked({"task": self._tasks}, stand)
        if ids is not None and not len(ids):
            ends = self._terminated.copy(), self._truncated.copy()
            return self.observations(), np.zeros(self.num_envs), *ends, info
        self.begun(STEP)
        with self._named():
            reward, terminated, truncated, diverged, said = self.advance(ids, actions)
        self.check_achieved(said)
        # Copy: a backend may change these arrays later, and the caller may keep them.
        reward = np.array(reward, np.float64)
        info |= self._masked(said, ids)
        self._elapsed[slice(None) if ids is None else ids] += 1
        now_truncated = self._elapsed >= self.family.horizon
        if truncated is not None:
            now_truncated |= truncated
        if diverged is not None:
            diverged = np.array(diverged)
            if stand is not None:
                diverged[stand] = False
            now_truncated |= diverged
            info |= {"diverged": diverged, "_diverged": diverged.copy()}
            reward = np.where(diverged, 0.0, reward)
        if terminated is None:
            terminated = np.zeros(self.num_envs, np.bool_)
        else:
            terminated = np.array(terminated, np.bool_)
            if diverged is not None:
                terminated &= ~diverged
        if stand is not None:
            reward[stand] = 0.0
            terminated[stand] = self._terminated[stand]
            now_truncated[stand] = self._truncated[stand]
        self._terminated, self._truncated = terminated, now_truncated
        ends = terminated.copy(), now_truncated.copy()
        if self.autoreset_mode is AutoresetMode.SAME_STEP and (terminated | now_truncated).any():
            info = self._restart(np.flatnonzero(terminated | now_truncated), info)
        return self.observations(), reward, *ends, info

    def _restart(self, ids: NDArray[np.int64], info: dict[str, Any]) -> dict[str, Any]:
        """Reset sub-environments in the step that ended their episode, and return the new info."""
        last, seen = np.full(self.num_envs, None, object), self._observe()
        for i in ids.tolist():
            last[i] = np.array(seen[i])
        ended = np.zeros(self.num_envs, np.bool_)
        ended[ids] = True
        final: dict[str, Any] = {}
        for key in [key for key in info if f"_{key}" in info]:
            values, mask = info[key], info[f"_{key}"]
            if (mask & ended).any():
                final[key] = values.copy()
                final[key][~ended] = 0
                final[f"_{key}"] = mask & ended
            values[ended] = 0
            mask[ended] = False
            if not mask.any():
                del info[key], info[f"_{key}"]
        self._start(ids, [None] * len(ids))
        ends = {"final_obs": last, "_final_obs": ended, "final_info": final}
        task = self._masked({"task": self._tasks}, ids)
        return {**ends, "_final_info": ended.copy(), **info, **task}

    def _masked(
        self, info: Mapping[str, NDArray[Any]], ids: NDArray[np.int64] | None
    ) -> dict[str, Any]:
        """Return copies of arrays with their masks; rows outside ids become zero."""
        found: dict[str, Any] = {}
        for key, values in info.items():
            mask = np.ones(self.num_envs, np.bool_)
            found[key] = values = np.array(values)
            if ids is not None and len(ids) < self.num_envs:
                mask[:] = False
                mask[ids] = True
                values[~mask] = 0
            found[f"_{key}"] = mask
        return found

    def _start(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        if self._next_tasks is not None:
            self._tasks[ids] = self._next_tasks[ids]
        else:
            for i, seed in zip(ids, seeds, strict=True):
                self._tasks[i] = self._draw_task(i, seed)
        self.begun(RESET)
        with self._named():
            self._begin(ids, seeds)
        self._elapsed[ids] = 0
        self._terminated[ids] = self._truncated[ids] = False
        self._ready[ids] = True

    def _draw_task(self, i: int, seed: int | None) -> Floats:
        # A separate stream, so that drawing tasks does not change the initial states.
        rng = self._task_rngs[i]
        if seed is not None or rng is None:
            rng = self._task_rngs[i] = np.random.default_rng(None if seed is None else [seed, 1])
        return self.family.tasks.sample(rng, 1)[0]
