"""Rollouts of a policy in a `TaskVectorEnv`.

The policy has stacked parameters and plays whole episodes of all tasks. A step is one batched
forward pass and one step of the vector environment. If environments may run in parallel,
`Collector` splits the tasks over threads. Each thread has its own vector environment, so that
inference in one overlaps with physics in another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.envs import TaskFamily, TaskVectorEnv, guard
from metarl.envs.errors import check_one_of
from metarl.models.networks import Params
from metarl.models.policies import PolicyModel
from metarl.sampling.seeding import episode_seeds, stream
from metarl.sampling.spaces import ActionMode, check_spaces, env_action
from metarl.sampling.trajectories import Rollout

Split = Literal["train", "test", "validation"]


@dataclass(frozen=True)
class RandomKey:
    """Key of a sampling step in a run. It determines the random streams."""

    seed: int
    iteration: int = 0
    split: Split = "train"
    inner_step: int = 0
    first_task: int = 0
    """Index, among all tasks of the iteration, of the task that is task 0 here."""

    def __post_init__(self) -> None:
        check_one_of("split", self.split, get_args(Split))

    def _phase(self, kind: str) -> str:
        return kind if self.split == "train" else f"{self.split}-{kind}"

    def episode_seeds(self, task: int, episodes: int) -> list[int]:
        """Return the reset seeds of a task's episodes."""
        phase = self._phase("reset")
        where = (self.inner_step, self.first_task + task)
        return episode_seeds(self.seed, self.iteration, phase, *where, episodes=episodes)

    def noise(self, task: int) -> np.random.Generator:
        """Return the stream of a task's action noise."""
        where = (self.inner_step, self.first_task + task)
        return stream(self.seed, self.iteration, self._phase("noise"), *where)

    def examples(self) -> np.random.Generator:
        """Return the stream of all tasks' examples."""
        return stream(self.seed, self.iteration, self._phase("examples"), self.inner_step)

    def tasks(self) -> np.random.Generator:
        """Return the stream of the task distribution."""
        return stream(self.seed, self.iteration, self._phase("tasks"))


Allocate = Callable[[tuple[int, ...], np.dtype], NDArray]


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.zeros(shape, dtype=kind).numpy()  # torch aligns; NumPy may not


class RolloutBuffer:
    """NumPy views of a rollout during sampling, allocated once."""

    def __init__(
        self,
        policy: PolicyModel,
        tasks: int,
        episodes: int,
        horizon: int,
        info_keys: Sequence[str] = (),
        allocate: Allocate = _zeros,
    ) -> None:
        def zeros(*shape: int, dtype: type[np.generic] = np.float32) -> NDArray:
            return allocate(shape, np.dtype(dtype))

        grid = (tasks, episodes, horizon)
        seen = policy.observation_shape, policy.observation_dtype
        self.observation = zeros(*grid, *seen[0], dtype=seen[1])
        self.last_observation = zeros(*grid[:2], *seen[0], dtype=seen[1])
        self.action = zeros(*grid, policy.action_size)
        self.output = zeros(*grid, policy.network.output_dim)
        self.reward = zeros(*grid)
        self.valid = zeros(*grid, dtype=np.bool_)
        self.terminated = zeros(*grid[:2], dtype=np.bool_)
        self.truncated = zeros(*grid[:2], dtype=np.bool_)
        self.diverged = zeros(*grid[:2], dtype=np.bool_)
        self.success = zeros(*grid[:2], dtype=np.bool_)
        self.tells_success = zeros(*grid[:2], dtype=np.bool_)
        self.info = {key: zeros(*grid, dtype=np.float64) for key in info_keys}

    def arrays(self) -> dict[str, NDArray]:
        """Return all arrays by name."""
        own = {name: array for name, array in vars(self).items() if name != "info"}
        return {**own, **{f"info.{key}": array for key, array in self.info.items()}}

    def rollout(self, policy: PolicyModel, params: Params, tasks: NDArray) -> Rollout:
        """Zero diverged episodes and return the buffer as a rollout."""
        for name in ("observation", "last_observation", "action", "output", "reward", "valid"):
            if self.diverged.any():
                getattr(self, name)[self.diverged] = 0
        output = torch.from_numpy(self.output)
        behaviour = policy.head(params, output.flatten(1, 2))
        return Rollout(
            tasks=torch.from_numpy(np.array(tasks, np.float64)),
            observation=torch.from_numpy(self.observation),
            last_observation=torch.from_numpy(self.last_observation),
            action=torch.from_numpy(self.action),
            behaviour={n: x.unflatten(1, output.shape[1:3]) for n, x in behaviour.items()},
            reward=torch.from_numpy(self.reward),
            valid=torch.from_numpy(self.valid),
            terminated=torch.from_numpy(self.terminated),
            truncated=torch.from_numpy(self.truncated),
            diverged=torch.from_numpy(self.diverged),
            context=params.get("context"),
            success=torch.from_numpy(self.success),
            tells_success=torch.from_numpy(self.tells_success),
            info={key: torch.from_numpy(values) for key, values in self.info.items()},
        )


def collect_into(
    buffer: RolloutBuffer,
    rows: slice,
    env: TaskVectorEnv,
    policy: PolicyModel,
    params: Params,
    tasks: NDArray,
    key: RandomKey,
    mode: ActionMode,
    deterministic: bool,
) -> None:
    """Fill the buffer with one episode of every sub-environment.

    Args:
        buffer: buffer of all tasks; `rows` is filled.
        rows: slice of the environment's tasks among all tasks.
        params: stacked parameters of the environment's tasks.
        tasks: task vectors of the environment's tasks.
    """
    shape = (env.num_tasks, env.episodes)
    horizon = env.family.horizon
    ids = range(rows.start, rows.start + env.num_tasks)
    seeds = [s for task in ids for s in key.episode_seeds(task, env.episodes)]
    noise = torch.from_numpy(
        np.stack([policy.noise(key.noise(task), env.episodes, horizon) for task in ids])
    )
    space = env.single_action_space
    flat = (env.num_envs, policy.action_size)
    stacked = {name: p.clone() for name, p in params.items()}
    env.set_tasks(tasks)
    # With threads, process-wide settings have no single owner: `Collector.collect` restores them.
    guarded = not env.family.parallel
    with guard.user_code() if guarded else contextlib.nullcontext():
        observation, _ = env.reset(seed=seeds)
    active = np.ones(shape, np.bool_)
    terminated = truncated = np.zeros(shape, np.bool_)
    with torch.inference_mode():
        state = policy.initial_state(stacked, *shape)
        for t in range(horizon):
            seen = buffer.observation[rows, :, t]
            np.copyto(seen, observation.reshape(seen.shape), casting="same_kind")
            output, state = policy.step(stacked, torch.from_numpy(seen), state)
            dist = policy.head(stacked, output)
            action = policy.mode(dist) if deterministic else policy.sample(dist, noise[:, :, t])
            act = action.numpy()
            buffer.action[rows, :, t] = act
            buffer.output[rows, :, t] = output.numpy()
            given = env_action(act.reshape(flat), space, mode)
            with guard.user_step() if guarded else contextlib.nullcontext():
                observation, reward, terminated, truncated, info = env.step(given)
            buffer.reward[rows, :, t] = reward.reshape(shape)
            buffer.valid[rows, :, t] = active
            for name, values in buffer.info.items():
                values[rows, :, t] = info[name].reshape(shape)
            if "diverged" in info:
                buffer.diverged[rows] |= info["diverged"].reshape(shape)
            if "success" in info:
                buffer.tells_success[rows] = True
                buffer.success[rows] |= active & (info["success"] > 0).reshape(shape)
            active = ~(terminated | truncated).reshape(shape)
            if not active.any():
                break
    last = buffer.last_observation[rows]
    np.copyto(last, observation.reshape(last.shape), casting="same_kind")
    buffer.terminated[rows] = terminated.reshape(shape)
    buffer.truncated[rows] = truncated.reshape(shape)


def clear_after_the_end(buffer: RolloutBuffer) -> None:
    """Zero the entries of sub-environments after the end of their episodes."""
    if not buffer.valid.all():
        arrays = (buffer.observation, buffer.action, buffer.output, buffer.reward)
        for array in (*arrays, *buffer.info.values()):
            array[~buffer.valid] = 0


def shards(family: TaskFamily, tasks: int, threads: int) -> list[slice]:
    """Return the tasks of each thread; all in one if environments may not run in parallel."""
    count = min(threads, tasks) if family.parallel else 1
    return slices(tasks, -(-tasks // count))


class Collector:
    """Sampler of rollouts of a fixed number of tasks and episodes of a family.

    Results do not depend on the number of threads. `info_keys` names the entries to keep of the
    environments' info.
    """

    def __init__(
        self,
        family: TaskFamily,
        policy: PolicyModel,
        num_tasks: int,
        episodes: int,
        pool: ChunkPool,
        mode: ActionMode = "clip",
        info_keys: Sequence[str] = (),
    ) -> None:
        self.family, self.policy, self.pool = family, policy, pool
        self.mode: ActionMode = mode
        self.info_keys = tuple(info_keys)
        self.num_tasks, self.episodes = num_tasks, episodes
        self._slices = shards(family, num_tasks, pool.threads)
        with guard.user_code():
            self._envs = [
                family.make_vec(s.stop - s.start, episodes, autoreset_mode=AutoresetMode.DISABLED)
                for s in self._slices
            ]
        check_spaces(self._envs[0], policy, family.name)

    def collect(
        self,
        params: Params,
        tasks: NDArray,
        key: RandomKey,
        *,
        deterministic: bool = False,
    ) -> Rollout:
        """Sample every episode of every task once.

        Args:
            params: stacked, [tasks, ...] each.
            tasks: [tasks, task_dim].
            key: key of the random streams.
            deterministic: take the distribution's mode instead of a sample.
        """
        buffer = RolloutBuffer(
            self.policy, self.num_tasks, self.episodes, self.family.horizon, self.info_keys
        )
        detached = {name: p.detach() for name, p in params.items()}

        def fill(shard: tuple[slice, TaskVectorEnv]) -> None:
            where, env = shard
            own = {name: p[where] for name, p in detached.items()}
            collect_into(
                buffer, where, env, self.policy, own, tasks[where], key, self.mode,
                deterministic,
            )  # fmt: skip

        parts = zip(self._slices, self._envs, strict=True)
        with guard.restored():
            if self.family.parallel:
                self.pool.map(fill, parts)
            else:  # in the thread that created them: an OpenGL context belongs to its thread
                for part in parts:
                    fill(part)
        clear_after_the_end(buffer)
        return buffer.rollout(self.policy, detached, tasks)

    def close(self) -> None:
        """Close the environments. A failure is logged; sampled data are not lost."""
        for env in self._envs:
            guard.close(env)
