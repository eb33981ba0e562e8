"""Trials: several episodes of one task as one long episode (Duan et al. 2016, arXiv:1611.02779).

A policy with memory can use the first episodes of a trial to learn about its task. After the end of
an episode, the environment is reset with the same task, and the trial continues.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_whole
from metarl.envs.family import TaskFamily
from metarl.envs.policy_spaces import categories
from metarl.envs.processes import Parcel, pack, unpack
from metarl.envs.single import SingleTaskEnv
from metarl.envs.tasks import Tasks
from metarl.envs.vector import Advanced, TaskVectorEnv

EPISODE, SUCCESS = "trial_episode", "trial_success"


@dataclass(frozen=True, kw_only=True)
class TrialFamily(TaskFamily):
    """Family whose episode is a trial of several episodes of another family, with one task.

    An observation has the environment's observation, the previous action (one-hot if discrete), the
    previous reward, and 1 if the previous step ended an episode, else 0. All of these are 0 at the
    start of a trial. The horizon is `count` times the horizon of an episode. A trial is truncated
    at the end of its last episode.

    The seed of the first episode is the seed of the trial. The seed of a later episode is a
    function of that seed and of the number of the episode. `info` has two more entries:
    `trial_episode`, the number of the episode, and `trial_success`, the environment's `success` or
    NaN without one.
    """

    base: TaskFamily
    """Family of the episodes."""
    count: int
    """Episodes of a trial."""

    @staticmethod
    def of(base: TaskFamily, count: int) -> TrialFamily:
        """Return the family of trials of `count` episodes.

        Raises:
            UserError: count is below 1.
        """
        check_whole("episodes of a trial", count, 1)
        return TrialFamily(
            name=base.name,
            tasks=base.tasks,
            description=f"trials of {count} episodes: {base.description}",
            units=base.units,
            horizon=count * base.horizon,
            achieved=base.achieved,
            source=base.source,
            base=base,
            count=count,
        )

    def __reduce__(self) -> Any:
        return _made_again, (pack(self.base), self.count)

    @property
    def parallel(self) -> bool:  # type: ignore[override]
        """Whether several vector environments of the family may run on threads of one process."""
        return self.base.parallel

    @property
    def kept(self) -> tuple[str, ...]:  # type: ignore[override]
        return EPISODE, SUCCESS

    def make(self, task: ArrayLike | None = None, *, render_mode: str | None = None) -> gym.Env:
        return SingleTaskEnv(self, task, render_mode)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> TrialVectorEnv:
        return TrialVectorEnv(self, num_tasks, episodes, **options)

    def wrap(self, env: gym.Env[Any, Any]) -> TrialEnv:
        """Return trials of your own environment, with the spaces of the base family."""
        return TrialEnv(env, self)

    def optimal_return(self, tasks: Tasks) -> NDArray[np.float64] | None:
        """Return the best mean return of a trial if the task is known, [n], or None."""
        best = self.base.optimal_return(tasks)
        return None if best is None else self.count * best


def _made_again(parcel: Parcel, count: int) -> TrialFamily:
    return TrialFamily.of(unpack(parcel), count)


def episode_seed(seed: int | None, episode: int) -> int | None:
    """Return the seed of an episode of a trial; None continues the environment's stream."""
    if seed is None or episode == 0:
        return seed
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


class TrialVectorEnv(TaskVectorEnv):
    """Vector environment of trials: a sub-environment is reset within a trial, not after it."""

    family: TrialFamily

    def __init__(
        self,
        family: TrialFamily,
        num_tasks: int,
        episodes: int,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **options: Any,
    ) -> None:
        disabled = AutoresetMode.DISABLED
        inner = family.base.make_vec(num_tasks, episodes, autoreset_mode=disabled, **options)
        self._inner = inner
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=_trial_space(
                family.name, inner.single_observation_space, inner.single_action_space
            ),
            action_space=inner.single_action_space,
            autoreset_mode=autoreset_mode,
            metadata={k: v for k, v in inner.metadata.items() if k != "autoreset_mode"},
        )
        self.render_mode = inner.render_mode
        shape = self.single_observation_space.shape
        assert shape is not None
        self._dtype = self.single_observation_space.dtype
        self._observation = np.zeros((self.num_envs, *shape), self._dtype)
        self._size = int(np.prod(inner.single_observation_space.shape or ()))
        self._number = np.zeros(self.num_envs, np.int64)  # of the current episode of the trial
        self._seeds: list[int | None] = [None] * self.num_envs
        self._due = np.zeros(self.num_envs, np.bool_)  # to be reset before the next observation

    @property
    def progress(self) -> MutableSequence[int]:  # type: ignore[override]
        """See `TaskVectorEnv`; the progress of the episodes."""
        return self._inner.progress

    @progress.setter
    def progress(self, value: MutableSequence[int]) -> None:  # type: ignore[override]
        self._inner.progress = value

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        # The reset waits for `_observe`: within a step, finished sub-environments must stand.
        self._number[ids] = 0
        for i, seed in zip(ids, seeds, strict=True):
            self._seeds[i] = seed
        self._due[ids] = True
        self._observation[ids] = 0

    def advance(self, ids: NDArray[np.int64] | None, actions: Any) -> Advanced:
        moved = np.arange(self.num_envs) if ids is None else ids
        seen, reward, terminated, truncated, info = self._inner.step(actions)
        diverged = info.pop("diverged", None)
        ended = np.zeros(self.num_envs, np.bool_)
        ended[moved] = (terminated | truncated)[moved]
        number = self._number.astype(np.float64)
        success = np.asarray(info.get("success", np.full(self.num_envs, np.nan)), np.float64)
        info |= {EPISODE: number, SUCCESS: success}
        over = ended & (self._number == self.family.count - 1)
        if diverged is not None:
            over |= diverged
        again = ended & ~over
        self._number[again] += 1
        self._due |= again
        size = self._size
        self._observation[moved, :size] = seen.reshape(self.num_envs, size)[moved]
        taken = _numbers(np.asarray(actions), self.single_action_space)
        self._observation[moved, size:-2] = taken[moved]
        self._observation[moved, -2] = reward[moved]
        self._observation[moved, -1] = ended[moved]
        return reward, None, over, diverged, info

    def _observe(self) -> NDArray:
        if self._due.any():
            # The task of each sub-environment, which differ within a task if resets draw them.
            self._inner._next_tasks = self.tasks
            pairs = zip(self._seeds, self._number.tolist(), strict=True)
            seeds = [episode_seed(*pair) for pair in pairs]
            seen, _ = self._inner.reset(seed=seeds, options={"reset_mask": self._due.copy()})
            seen = seen.reshape(self.num_envs, self._size)
            self._observation[self._due, : self._size] = seen[self._due]
            self._due[:] = False
        return self._observation

    def render(self) -> Any:
        return self._inner.render()

    def close_extras(self, **kwargs: Any) -> None:
        self._inner.close()


class TrialEnv(gym.Wrapper[NDArray[Any], Any, Any, Any]):
    """One environment whose episode is a trial of several episodes; see `TrialFamily`."""

    def __init__(self, env: gym.Env[Any, Any], family: TrialFamily) -> None:
        super().__init__(env)
        name = type(env.unwrapped).__name__
        self.observation_space = _trial_space(name, env.observation_space, env.action_space)
        self._family = family
        self._seed: int | None = None
        self._options: dict[str, Any] | None = None
        self._number = self._steps = 0  # episode of the trial, and steps of the episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start a trial. Every episode has the same `options`."""
        self._seed, self._options, self._number, self._steps = seed, options, 0, 0
        observation, info = self.env.reset(seed=seed, options=options)
        return self._joined(observation, ()), info

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        ended = bool(terminated or truncated or self._steps >= self._family.base.horizon)
        info = {**info, EPISODE: float(self._number)}
        over = ended and self._number == self._family.count - 1
        if ended and not over:
            self._number, self._steps = self._number + 1, 0
            seed = episode_seed(self._seed, self._number)
            observation, _ = self.env.reset(seed=seed, options=self._options)
        taken = _numbers(np.asarray(action)[None], self.action_space)[0]
        return self._joined(observation, (*taken, reward, ended)), float(reward), False, over, info

    def _joined(self, observation: Any, before: Sequence[Any]) -> NDArray[Any]:
        """Return an observation of the trial; what came before is 0 at its start."""
        shape, dtype = self.observation_space.shape, self.observation_space.dtype
        assert shape is not None
        seen = np.zeros(shape, dtype)
        start = len(observation)
        seen[:start] = observation
        seen[start : start + len(before)] = before
        return seen


def _trial_space(name: str, seen: gym.Space, action: gym.Space) -> gym.spaces.Box:
    """Return the space of a trial's observations."""
    if not isinstance(seen, gym.spaces.Box) or len(seen.shape) != 1:
        raise UserError(f"{name}: trials need observations that are a flat Box, got {seen}")
    counts = categories(action)
    if counts is None:
        assert isinstance(action, gym.spaces.Box)
        low, high = action.low.flatten(), action.high.flatten()
    else:
        low, high = np.zeros(sum(counts)), np.ones(sum(counts))
    dtype = np.result_type(seen.dtype, np.float32)
    return gym.spaces.Box(
        np.concatenate([seen.low, low, [-np.inf, 0.0]]).astype(dtype),
        np.concatenate([seen.high, high, [np.inf, 1.0]]).astype(dtype),
        dtype=dtype.type,
    )


def _numbers(actions: NDArray, space: gym.Space) -> NDArray:
    """Return actions [n, ...] as numbers [n, size], categories as one-hot vectors."""
    counts = categories(space)
    if counts is None:
        return actions.reshape(len(actions), -1)
    chosen = actions.reshape(len(actions), -1) - np.reshape(getattr(space, "start", 0), -1)
    return np.concatenate([np.eye(n)[chosen[:, i]] for i, n in enumerate(counts)], axis=1)
