"""collect(): a policy in a `TaskVectorEnv` gives a `Rollout`.

Whole episodes of all tasks with stacked parameters: a step is one batched forward pass and one
step of the vector environment. Where environments may run side by side, `Collector` splits the
tasks over threads, each with a vector environment of its own, so that inference in one overlaps
with physics in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from metarl.envs import TaskFamily, TaskVectorEnv
from metarl.envs.errors import UserError
from metarl.learning.parallel import ChunkPool, slices
from metarl.learning.policies import CategoricalMLP, MLPPolicy, Params
from metarl.learning.trajectories import Rollout
from metarl.sampling.seeding import episode_seeds, stream

ActionMode = Literal["clip", "scale"]


@dataclass(frozen=True)
class Address:
    """Where in a run episodes are sampled; names their random streams."""

    seed: int
    iteration: int = 0
    split: Literal["train", "test", "validation"] = "train"
    inner_step: int = 0

    def _phase(self, kind: str) -> str:
        return kind if self.split == "train" else f"{self.split}-{kind}"

    def episode_seeds(self, task: int, episodes: int) -> list[int]:
        """Return the reset seeds of a task's episodes."""
        phase = self._phase("reset")
        where = (self.inner_step, task)
        return episode_seeds(self.seed, self.iteration, phase, *where, episodes=episodes)

    def noise(self, task: int) -> np.random.Generator:
        """Return the stream of a task's action noise."""
        return stream(self.seed, self.iteration, self._phase("noise"), self.inner_step, task)

    def tasks(self) -> np.random.Generator:
        """Return the stream that tasks are drawn from."""
        return stream(self.seed, self.iteration, self._phase("tasks"))


def env_action(action: NDArray, space: gym.Space, mode: ActionMode) -> NDArray:
    """Return a policy's action [..., action_size] as the environment takes it.

    For a Box, `clip` cuts it to the bounds, and `scale` maps [-1, 1] onto finite bounds first.
    Discrete spaces get whole numbers that count from their start.
    """
    if isinstance(space, gym.spaces.Discrete):
        return action[..., 0].astype(np.int64) + space.start
    if isinstance(space, gym.spaces.MultiDiscrete):
        return action.astype(space.dtype) + space.start
    if isinstance(space, gym.spaces.MultiBinary):
        return action.astype(space.dtype)
    assert isinstance(space, gym.spaces.Box)
    if mode == "scale":
        with np.errstate(invalid="ignore"):  # infinite bounds, whose actions stay as they are
            middle, half = 0.5 * (space.high + space.low), 0.5 * (space.high - space.low)
            action = np.where(np.isfinite(half), middle + half * action, action)
    return np.clip(action, space.low, space.high).astype(space.dtype, copy=False)


def policy_action(action: NDArray, space: gym.Space, mode: ActionMode) -> NDArray[np.float32]:
    """Return what a policy would have drawn for an action of the environment's, [action_size].

    The inverse of `env_action`, up to what that cuts.
    """
    if isinstance(space, gym.spaces.Box):
        taken = np.asarray(action, np.float64)
        if mode == "scale":
            with np.errstate(invalid="ignore"):
                middle, half = 0.5 * (space.high + space.low), 0.5 * (space.high - space.low)
                taken = np.where(np.isfinite(half), (taken - middle) / half, taken)
        return taken.astype(np.float32)
    start = getattr(space, "start", 0)
    return np.atleast_1d(np.asarray(action) - start).astype(np.float32)


def categories(space: gym.Space) -> tuple[int, ...] | None:
    """Return the number of categories of each component of an action, None for a flat Box.

    Raises:
        UserError: no policy acts in such a space.
    """
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
        return tuple(int(n) for n in space.nvec)
    if isinstance(space, gym.spaces.MultiBinary) and len(space.shape) == 1:
        return (2,) * space.shape[0]
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return None
    raise UserError(
        f"actions must be a flat Box, Discrete, a flat MultiDiscrete or MultiBinary, got {space}"
    )


Allocate = Callable[[tuple[int, ...], np.dtype], NDArray]


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.zeros(shape, dtype=kind).numpy()  # torch aligns; NumPy may not


class Memory:
    """NumPy views of a rollout in the making, laid out once."""

    def __init__(
        self,
        policy: MLPPolicy,
        tasks: int,
        episodes: int,
        horizon: int,
        record: Sequence[str] = (),
        allocate: Allocate = _zeros,
    ) -> None:
        def zeros(*shape: int, dtype: type[np.generic] = np.float32) -> NDArray:
            return allocate(shape, np.dtype(dtype))

        grid = (tasks, episodes, horizon)
        seen = policy.observation_shape, policy.observation_dtype
        self.observation = zeros(*grid, *seen[0], dtype=seen[1])
        self.last_observation = zeros(*grid[:2], *seen[0], dtype=seen[1])
        self.action = zeros(*grid, policy.action_size)
        self.output = zeros(*grid, policy.output_dim)
        self.reward = zeros(*grid)
        self.valid = zeros(*grid, dtype=np.bool_)
        self.terminated = zeros(*grid[:2], dtype=np.bool_)
        self.truncated = zeros(*grid[:2], dtype=np.bool_)
        self.diverged = zeros(*grid[:2], dtype=np.bool_)
        self.success = zeros(*grid[:2], dtype=np.bool_)
        self.info = {key: zeros(*grid, dtype=np.float64) for key in record}

    def arrays(self) -> dict[str, NDArray]:
        """Return all arrays by name."""
        own = {name: array for name, array in vars(self).items() if name != "info"}
        return {**own, **{f"info.{key}": array for key, array in self.info.items()}}

    def rollout(self, policy: MLPPolicy, params: Params, tasks: NDArray) -> Rollout:
        """Leave diverged episodes out and hand the memory over."""
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
            info={key: torch.from_numpy(values) for key, values in self.info.items()},
        )


def collect_into(
    memory: Memory,
    where: slice,
    env: TaskVectorEnv,
    policy: MLPPolicy,
    params: Params,
    tasks: NDArray,
    address: Address,
    mode: ActionMode,
    deterministic: bool,
) -> None:
    """Fill the memory with one episode of every sub-environment.

    Args:
        memory: of all tasks; `where` is filled.
        where: the tasks of the environment among all tasks.
        params: stacked, and `tasks`: those of the environment.
    """
    shape = (env.num_tasks, env.episodes)
    horizon = env.family.horizon
    ids = range(where.start, where.start + env.num_tasks)
    seeds = [s for task in ids for s in address.episode_seeds(task, env.episodes)]
    noise = torch.from_numpy(
        np.stack([policy.noise(address.noise(task), env.episodes, horizon) for task in ids])
    )
    space = env.single_action_space
    flat = (env.num_envs, policy.action_size)
    stacked = {name: p.clone() for name, p in params.items()}
    env.set_tasks(tasks)
    observation, _ = env.reset(seed=seeds)
    active = np.ones(shape, np.bool_)
    terminated = truncated = np.zeros(shape, np.bool_)
    with torch.inference_mode():
        for t in range(horizon):
            seen = memory.observation[where, :, t]
            np.copyto(seen, observation.reshape(seen.shape), casting="same_kind")
            dist = policy.distribution(stacked, torch.from_numpy(seen))
            action = policy.mode(dist) if deterministic else policy.sample(dist, noise[:, :, t])
            act = action.numpy()
            memory.action[where, :, t] = act
            memory.output[where, :, t] = dist[policy.output].numpy()
            observation, reward, terminated, truncated, info = env.step(
                env_action(act.reshape(flat), space, mode)
            )
            memory.reward[where, :, t] = reward.reshape(shape)
            memory.valid[where, :, t] = active
            for key, values in memory.info.items():
                values[where, :, t] = info[key].reshape(shape)
            if "diverged" in info:
                memory.diverged[where] |= info["diverged"].reshape(shape)
            if "success" in info:
                memory.success[where] |= active & (info["success"] > 0).reshape(shape)
            active = ~(terminated | truncated).reshape(shape)
            if not active.any():
                break
    last = memory.last_observation[where]
    np.copyto(last, observation.reshape(last.shape), casting="same_kind")
    memory.terminated[where] = terminated.reshape(shape)
    memory.truncated[where] = truncated.reshape(shape)


def clear_after_the_end(memory: Memory) -> None:
    """Zero what was written for sub-environments that stood still."""
    if not memory.valid.all():
        arrays = (memory.observation, memory.action, memory.output, memory.reward)
        for array in (*arrays, *memory.info.values()):
            array[~memory.valid] = 0


class Collector:
    """Samples rollouts of a fixed number of tasks and episodes of a family.

    Results do not depend on the number of threads. `record` names entries of the environments' info
    to keep.
    """

    def __init__(
        self,
        family: TaskFamily,
        policy: MLPPolicy,
        num_tasks: int,
        episodes: int,
        pool: ChunkPool,
        mode: ActionMode = "clip",
        record: Sequence[str] = (),
    ) -> None:
        self.family, self.policy, self.pool = family, policy, pool
        self.mode: ActionMode = mode
        self.record = tuple(record)
        self.num_tasks, self.episodes = num_tasks, episodes
        shards = min(pool.threads, num_tasks) if family.parallel else 1
        self._slices = slices(num_tasks, -(-num_tasks // shards))
        self._envs = [
            family.make_vec(s.stop - s.start, episodes, autoreset_mode=AutoresetMode.DISABLED)
            for s in self._slices
        ]
        check_spaces(self._envs[0], policy, family.name)

    def collect(
        self,
        params: Params,
        tasks: NDArray,
        address: Address,
        *,
        deterministic: bool = False,
    ) -> Rollout:
        """Sample every episode of every task once.

        Args:
            params: stacked, [tasks, ...] each.
            tasks: [tasks, task_dim].
            address: names the random streams.
            deterministic: take the distribution's mode instead of a sample.
        """
        memory = Memory(
            self.policy, self.num_tasks, self.episodes, self.family.horizon, self.record
        )
        detached = {name: p.detach() for name, p in params.items()}
        self.pool.map(
            lambda shard: collect_into(
                memory, shard[0], shard[1], self.policy,
                {name: p[shard[0]] for name, p in detached.items()}, tasks[shard[0]], address,
                self.mode, deterministic,
            ),
            zip(self._slices, self._envs, strict=True),
        )  # fmt: skip
        clear_after_the_end(memory)
        return memory.rollout(self.policy, detached, tasks)

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()


def check_spaces(env: TaskVectorEnv | gym.Env, policy: MLPPolicy, name: str) -> None:
    """Raise UserError if an environment's spaces are not those of the policy."""
    vector = isinstance(env, TaskVectorEnv)
    observation = env.single_observation_space if vector else env.observation_space
    action = env.single_action_space if vector else env.action_space
    box = isinstance(observation, gym.spaces.Box)
    if not box or observation.shape != policy.observation_shape:
        raise UserError(
            f"{name}: observations are {observation}, but the policy is made for a Box of shape"
            f" {policy.observation_shape}"
        )
    if isinstance(policy, CategoricalMLP):
        if categories(action) != policy.categories:
            raise UserError(
                f"{name}: actions are {action}, but the policy is made for components of"
                f" {policy.categories} categories"
            )
    elif categories(action) is not None or action.shape != (policy.action_size,):
        raise UserError(
            f"{name}: actions are {action}, but the policy is made for a Box of shape"
            f" ({policy.action_size},)"
        )


def collect_episodes(
    env: gym.Env,
    policy: MLPPolicy,
    params: Params,
    *,
    episodes: int,
    horizon: int,
    address: Address,
    mode: ActionMode = "clip",
    deterministic: bool = False,
    task: Sequence[float] | NDArray = (),
) -> Rollout:
    """Sample episodes of one ordinary Gymnasium environment, one after the other.

    Args:
        params: not stacked.
        horizon: episodes are cut here, whatever the environment's own limit.
        task: recorded in the rollout; the environment is taken as it is.

    Raises:
        UserError: the environment's spaces are not those of the policy.
    """
    check_spaces(env, policy, getattr(env.spec, "id", None) or type(env.unwrapped).__name__)
    memory = Memory(policy, 1, episodes, horizon)
    seeds = address.episode_seeds(0, episodes)
    noise = torch.from_numpy(policy.noise(address.noise(0), episodes, horizon))
    with torch.inference_mode():
        for e in range(episodes):
            observation, _ = env.reset(seed=seeds[e])
            terminated = False
            for t in range(horizon):
                memory.observation[0, e, t] = observation
                seen = torch.from_numpy(memory.observation[0, e, t : t + 1])
                dist = policy.distribution(params, seen)
                action = policy.mode(dist) if deterministic else policy.sample(dist, noise[e, t])
                memory.action[0, e, t] = action[0].numpy()
                memory.output[0, e, t] = dist[policy.output][0].numpy()
                observation, reward, terminated, truncated, info = env.step(
                    env_action(action[0].numpy(), env.action_space, mode)
                )
                memory.reward[0, e, t] = reward
                memory.valid[0, e, t] = True
                memory.diverged[0, e] |= bool(info.get("diverged", False))
                memory.success[0, e] |= bool(info.get("success", False))
                if terminated or truncated:
                    break
            memory.last_observation[0, e] = observation
            memory.terminated[0, e] = terminated
            memory.truncated[0, e] = not terminated
    stacked = {name: p.detach()[None] for name, p in params.items()}
    return memory.rollout(policy, stacked, np.asarray(task, np.float64)[None])
