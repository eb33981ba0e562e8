"""Seconds of the parts of sampling, each alone, and rates of arithmetic and of memory.

They show what limits the speed on a machine. The parts replay a rollout. The rest of the
seconds of sampling goes to copies, cold caches and threads that wait for each other.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch.utils.flop_counter import FlopCounterMode

from metarl.domains.reinforcement import Environments
from metarl.envs import MujocoFamily, TaskVectorEnv
from metarl.envs.trials import episode_seed
from metarl.models.networks import stack
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import RandomKey, shards
from metarl.sampling.spaces import env_action
from metarl.sampling.trajectories import Rollout
from metarl.sampling.trials import episodes_of
from metarl.training.trainer import Trainer

_REPEATS = 50
_BLOCK = (4, 256, 64)  # activations of a block of samples: a quarter of a megabyte
_MEMORY = 2**24  # numbers of an array that no cache holds


def _source(trainer: Trainer) -> Environments:
    assert isinstance(trainer.source, Environments)
    return trainer.source


def physics_seconds(trainer: Trainer, rollout: Rollout, key: RandomKey) -> float:
    """Return the seconds of physics alone for a rollout's actions; 0 if not native.

    A trial is replayed episode by episode. Contact forces are excluded, because they are fetched
    one simulation at a time.
    """
    trial = trainer.algorithm.trial
    parts = [rollout] if trial is None else episodes_of(rollout, trial.episodes)
    return sum(_replay(trainer, part, key, k) for k, part in enumerate(parts))


def _replay(trainer: Trainer, rollout: Rollout, key: RandomKey, episode: int) -> float:
    """Return the seconds of physics for one episode of every trial."""
    family, run = trainer.family, trainer.run
    if not isinstance(family, MujocoFamily):
        return 0.0
    tasks = rollout.tasks.numpy()
    env = family.make_vec(
        len(tasks), run.episodes, autoreset_mode=AutoresetMode.DISABLED, threads=run.threads
    )
    env.set_tasks(tasks)
    seeds = [s for t in range(len(tasks)) for s in key.episode_seeds(t, env.episodes)]
    env.reset(seed=[episode_seed(s, episode) for s in seeds])
    action = env_action(rollout.action.numpy(), env.single_action_space, trainer.setup.action_mode)
    control = (action / np.float32(family.action_scale)).astype(np.float64)
    control = np.ascontiguousarray(
        control.reshape(env.num_envs, -1, control.shape[-1]).swapaxes(0, 1)
    )
    length = rollout.valid.sum(-1).flatten()
    ctrl, steps = env.batch.bind("ctrl"), int(length.max())
    ragged = None if bool(rollout.valid.all()) else [
        torch.nonzero(length > t).flatten().int().numpy() for t in range(steps)
    ]  # fmt: skip
    start = time.perf_counter()
    for t in range(steps):
        ctrl[...] = control[t]
        env.batch.step(
            None if ragged is None else ragged[t], nstep=family.frame_skip, stage=family.stage
        )
    return time.perf_counter() - start


def inference_seconds(trainer: Trainer, rollout: Rollout, key: RandomKey) -> float:
    """Return the seconds of the network and the sampling of actions at a rollout's observations."""
    policy, mode = trainer.model, trainer.setup.action_mode
    assert isinstance(policy, PolicyModel)
    space = _source(trainer).action_space
    tasks, episodes, horizon = rollout.valid.shape
    adapter = trainer.inner_loop.adapter
    fast, slow, _ = adapter.split(trainer.state.params)
    params = adapter.params(stack(fast, tasks), slow, tasks)
    if rollout.context is not None:
        params["context"] = rollout.context

    def one(shard: slice) -> None:
        own = {name: p[shard].detach().clone() for name, p in params.items()}
        rng = key.noise(shard.start)
        noise = torch.from_numpy(policy.noise(rng, shard.stop - shard.start, episodes, horizon))
        with torch.inference_mode():
            state = policy.initial_state(own, shard.stop - shard.start, episodes)
            for t in range(horizon):
                output, state = policy.step(own, rollout.observation[shard, :, t], state)
                action = policy.sample(policy.head(own, output), noise[:, :, t])
                env_action(action.numpy(), space, mode)

    start = time.perf_counter()
    trainer.pool.map(one, shards(_source(trainer).played, tasks, trainer.pool.threads))
    return time.perf_counter() - start


def environment_seconds(trainer: Trainer, rollout: Rollout, key: RandomKey) -> float:
    """Return the seconds of `reset` and `step` for a rollout's actions, physics included."""
    source, disabled = _source(trainer), AutoresetMode.DISABLED
    family, tasks = source.played, rollout.tasks.numpy()
    episodes, horizon = rollout.valid.shape[1:]
    actions = env_action(rollout.action.numpy(), source.action_space, trainer.setup.action_mode)
    parts = shards(family, len(tasks), trainer.pool.threads)
    envs = [family.make_vec(s.stop - s.start, episodes, autoreset_mode=disabled) for s in parts]

    def one(shard: tuple[slice, TaskVectorEnv]) -> None:
        where, env = shard
        ids = range(where.start, where.stop)
        env.set_tasks(tasks[where])
        env.reset(seed=[s for task in ids for s in key.episode_seeds(task, episodes)])
        for t in range(horizon):
            action = actions[where, :, t].reshape(env.num_envs, *actions.shape[3:])
            _, _, terminated, truncated, _ = env.step(action)
            if (terminated | truncated).all():
                break

    start = time.perf_counter()
    if family.parallel:
        trainer.pool.map(one, zip(parts, envs, strict=True))
    else:
        one((parts[0], envs[0]))
    seconds = time.perf_counter() - start
    for env in envs:
        env.close()
    return seconds


def network_flops(trainer: Trainer) -> int:
    """Return the floating-point operations of the networks' products in an iteration.

    They are counted on one thread. Sampling is included.
    """
    alone = dataclasses.replace(trainer.run, threads=1)
    with Trainer(trainer.setup, alone) as counted:
        counted.iterate()  # the first iteration also checks densities
        with FlopCounterMode(display=False) as counter:
            counted.iterate()
        return counter.get_total_flops()


def machine_rates() -> dict[str, float]:
    """Return rates of one thread: of a matrix product in its cache, and of a copy in memory.

    They are floating-point operations per second, and bytes per second, read and written.
    """
    a, b = torch.ones(_BLOCK), torch.ones(_BLOCK[0], _BLOCK[2], _BLOCK[2])
    product, copied = torch.empty(_BLOCK), np.empty(_MEMORY, np.float32)
    memory = np.ones(_MEMORY, np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        multiply = _fastest(lambda: torch.bmm(a, b, out=product))
        copy = _fastest(lambda: np.copyto(copied, memory), repeats=5)
    finally:
        torch.set_num_threads(threads)
    return {
        "product_flops_per_second": 2.0 * a.numel() * _BLOCK[2] / multiply,
        "copy_bytes_per_second": 2.0 * memory.nbytes / copy,
    }


def _fastest(function: Callable[[], object], repeats: int = _REPEATS) -> float:
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
