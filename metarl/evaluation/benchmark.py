"""`metarl benchmark`: sampling and training speed relative to the physics ceiling, in one run.

The ceiling is the batched physics engine alone. It replays the policy's actions from the same
initial states. The measurement alternates with training iterations, so that a drift of the
machine's speed affects both.

Families without a native backend are stepped in turn in one process, in worker processes and in
Gymnasium's `AsyncVectorEnv`. A plain loop replays the actions of the one process, without policy or
records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from metarl.config.options import available_threads
from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs import GymnasiumFamily, MujocoFamily, TaskFamily
from metarl.envs.errors import UserError
from metarl.envs.seeds import foreign_seed
from metarl.evaluation.breakdown import (
    environment_seconds,
    inference_seconds,
    machine_rates,
    network_flops,
    physics_seconds,
)
from metarl.models.networks import Params, stack
from metarl.models.policies import PolicyModel
from metarl.models.settings import own_settings
from metarl.runs.checkpoints import machine, versions
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import ActionMode, env_action
from metarl.sampling.trajectories import Rollout
from metarl.sampling.workers import make_collector
from metarl.training.trainer import Trainer


def benchmark(trainer: Trainer, repeats: int = 3) -> dict[str, Any]:
    """Run one warm-up iteration and `repeats` measured ones; return rates, seconds and memory.

    It closes the trainer.

    Rates are env steps per second over all ranks. Seconds and memory are for this rank. All values
    are medians over the iterations. The ceiling is missing (None) without native physics.
    """
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    setup, run, algorithm = trainer.setup, trainer.run, trainer.algorithm
    process_group = trainer.process_group
    rows: list[dict[str, Any]] = []
    peak: int | None = None
    with trainer:
        family = trainer.domain.environments(trainer.family)
        trainer.iterate()
        for _ in range(repeats):
            seen: list[Rollout] = []
            before = dataclasses.replace(process_group.traffic)
            row = trainer.iterate(on_rollouts=seen.extend)
            row["calls"] = process_group.traffic.calls - before.calls
            row["bytes"] = process_group.traffic.bytes - before.bytes
            row["steps"] = process_group.total(sum(rollout.env_steps for rollout in seen))
            key = RandomKey(run.seed, row["iteration"] - 1, first_task=trainer.source.block.start)
            peak = peak or _peak_memory()  # of training, before the first replay
            keys = [dataclasses.replace(key, inner_step=k) for k in range(len(seen))]
            pairs = list(zip(seen, keys, strict=True))
            row["seconds_ceiling"] = sum(physics_seconds(trainer, *pair) for pair in pairs)
            if not run.workers or family.parallel:
                row |= _parts_of_sampling(trainer, pairs, row)
            rows.append(row)
    flops = network_flops(trainer) if process_group.size == 1 else None
    native = isinstance(family, MujocoFamily)

    def median(values: list[float]) -> float:
        return statistics.median(values)

    def rate(name: str) -> float:
        return median([row["steps"] / row[name] for row in rows])

    ceiling = rate("seconds_ceiling") if native else None
    collect, train = rate("seconds_rollout"), rate("seconds_iteration")
    phases = sorted({key for row in rows for key in row if key.startswith("seconds_")})
    # After the end of the trainer's own workers.
    alone = process_group.size == 1 and not family.parallel and algorithm.trial is None
    processes = _compare_processes(trainer, repeats) if alone else None
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "ranks": process_group.size,
        "threads": run.threads,
        "family": setup.family,
        "preset": setup.preset,
        "algorithm": algorithm.name,
        "tasks": run.tasks,
        "episodes": run.episodes,
        "horizon": algorithm.played(family).horizon,
        "network": setup.options()["policy.network"],
        "hidden": list(setup.options().get("policy.hidden", ())),
        "fisher_fraction": getattr(algorithm.outer, "fisher_fraction", None),
        "repeats": repeats,
        "ceiling_env_steps_per_second": ceiling,
        "collect_env_steps_per_second": collect,
        "train_env_steps_per_second": train,
        "seconds": {
            key.removeprefix("seconds_"): median([row.get(key, 0.0) for row in rows])
            for key in phases
        },
        "peak_memory_bytes": peak,
        "network_flops": flops,
        "rates": machine_rates(),
        "collectives": {key: median([row[key] for row in rows]) for key in ("calls", "bytes")},
    }
    if processes is not None:
        result["processes"] = processes
    if native:
        # Ratios of pairs, so that drift between iterations cancels.
        result["collect_to_ceiling"] = median(
            [row["seconds_ceiling"] / row["seconds_rollout"] for row in rows]
        )
        result["train_to_ceiling"] = median(
            [row["seconds_ceiling"] / row["seconds_iteration"] for row in rows]
        )
    return result


def _parts_of_sampling(
    trainer: Trainer, rollouts: Sequence[tuple[Rollout, RandomKey]], row: Mapping[str, Any]
) -> dict[str, float]:
    """Return the seconds of the parts of sampling, each alone, and the rest."""
    inference = sum(inference_seconds(trainer, *pair) for pair in rollouts)
    environment = sum(environment_seconds(trainer, *pair) for pair in rollouts)
    return {
        "seconds_rollout_inference": inference,
        "seconds_rollout_environment": environment - row["seconds_ceiling"],
        "seconds_rollout_rest": row["seconds_rollout"] - inference - environment,
    }


def _peak_memory() -> int | None:
    """Return the largest memory of this process so far in bytes, or None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _compare_processes(trainer: Trainer, repeats: int) -> dict[str, Any]:
    """Return rates at 40 environments, policy included, and their ratios; medians."""
    run, domain, mode = trainer.run, trainer.domain, trainer.setup.action_mode
    family, policy = domain.environments(trainer.family), domain.policy(trainer.model)
    count, episodes = 8, 5
    tasks, key = family.tasks.grid(count), RandomKey(run.seed)
    adapter = trainer.inner_loop.adapter
    fast, slow, _ = adapter.split(trainer.state.params)
    params = adapter.params(stack(fast, count), slow, count)
    params = {**params, **trainer.meta_policy().context(tasks)}
    workers = min(run.workers or available_threads(), count)
    make = [partial(family.make, task) for task in tasks for _ in range(episodes)]
    names = ("plain_loop", "async_vector_env", "one_process", "workers")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as closing:
        closing.enter_context(own_settings())
        vector = gym.vector.AsyncVectorEnv(make)  # it may fork, so the workers start later
        closing.callback(vector.close)
        collectors = {
            name: make_collector(
                family, policy, count, episodes, ChunkPool(1), mode,
                workers=number, timeout=run.worker_timeout,
            )
            for name, number in (("one_process", 0), ("workers", workers))
        }  # fmt: skip
        for collector in collectors.values():
            closing.callback(collector.close)
        plain = [raw_environment(family, task) for task in tasks]
        for env in plain:
            closing.callback(env.close)
        for _ in range(1 + repeats):  # the first one is a warm-up
            start = time.perf_counter()
            steps = _step_all(vector, family.horizon, policy, params, count, key, mode)
            seconds["async_vector_env"].append((time.perf_counter() - start) / steps)
            for name, collector in collectors.items():
                start = time.perf_counter()
                rollout = collector.collect(params, tasks, key)
                seconds[name].append((time.perf_counter() - start) / rollout.env_steps)
                if name == "one_process":
                    seconds["plain_loop"].append(loop_seconds(family, plain, rollout, key, mode))
    each = {name: np.array(values[1:]) for name, values in seconds.items()}
    return {
        "environments": count * episodes,
        "workers": workers,
        **{f"{n}_env_steps_per_second": float(1.0 / np.median(s)) for n, s in each.items()},
        "one_process_to_plain_loop": float(np.median(each["plain_loop"] / each["one_process"])),
        "workers_to_plain_loop": float(np.median(each["plain_loop"] / each["workers"])),
        "workers_to_one_process": float(np.median(each["one_process"] / each["workers"])),
        "workers_to_async_vector_env": float(np.median(each["async_vector_env"] / each["workers"])),
    }


def raw_environment(family: TaskFamily, task: NDArray) -> gym.Env:
    """Return a task's environment as its package creates it, without the family's wrappers."""
    return family.make_raw(task=task) if isinstance(family, GymnasiumFamily) else family.make(task)


def loop_seconds(
    family: TaskFamily,
    envs: Sequence[gym.Env],
    rollout: Rollout,
    key: RandomKey,
    mode: ActionMode,
) -> float:
    """Return the seconds per env step of a plain loop that replays a rollout's actions."""
    episodes = rollout.valid.shape[1]
    actions = [
        env_action(action.numpy(), env.action_space, mode)
        for env, action in zip(envs, rollout.action, strict=True)
    ]
    lengths = rollout.valid.sum(-1).tolist()
    tasks = rollout.tasks.numpy()
    # Environments of a GymnasiumFamily are used here without the family's wrappers.
    seed_of = foreign_seed if isinstance(family, GymnasiumFamily) else int
    start = time.perf_counter()
    for i, env in enumerate(envs):
        for episode, seed in enumerate(key.episode_seeds(i, episodes)):
            if isinstance(family, GymnasiumFamily):  # a reset may have undone the task
                family.apply_task(env, tasks[i])
            env.reset(seed=seed_of(seed))
            for action in actions[i][episode, : lengths[i][episode]]:
                env.step(action)
    return (time.perf_counter() - start) / rollout.env_steps


def _step_all(
    env: gym.vector.VectorEnv,
    steps: int,
    policy: PolicyModel,
    params: Params,
    tasks: int,
    key: RandomKey,
    mode: ActionMode,
) -> int:
    """Step a vector environment with the policy, record everything, and return the env steps."""
    episodes = env.num_envs // tasks
    rng = key.noise(0)
    noise = torch.from_numpy(policy.noise(rng, tasks, episodes * steps)).chunk(steps, dim=1)
    seen: list[Any] = []
    observation, _ = env.reset(seed=key.seed)
    with torch.inference_mode():
        state = policy.initial_state(params, tasks, episodes)
        for t in range(steps):
            batch = torch.from_numpy(np.asarray(observation, np.float32)).unflatten(0, (tasks, -1))
            output, state = policy.step(params, batch, state)
            dist = policy.head(params, output)
            action = policy.sample(dist, noise[t])
            act = env_action(action.flatten(0, 1).numpy(), env.single_action_space, mode)
            observation, reward, terminated, truncated, _ = env.step(act)
            seen.append((batch, dist, action, reward, terminated, truncated))
    return env.num_envs * steps


_PHASES = {
    "iteration": "iteration",
    "rollout": "  sampling",
    "ceiling": "    physics",
    "rollout_environment": "    environment",
    "rollout_inference": "    inference",
    "rollout_rest": "    copies and waiting",
    "adapt": "  adaptation",
    "baseline": "    baseline and advantages",
    "gradient": "  gradient",
    "conjugate_gradient": "  Fisher products",
    "line_search": "  line search",
    "evaluate": "  evaluation of the step",
    "ranks": "waiting for ranks",
    "update": "all but sampling",
    "processor": "processor time",
}


def _phases(result: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the phases with their seconds, nested."""
    seconds, shown = result["seconds"], dict(_PHASES)
    if result["ceiling_env_steps_per_second"] is None:
        del shown["ceiling"]
    else:
        shown["rollout_environment"] = "    rest of the environment"
    if result["ranks"] == 1:
        del shown["ranks"]
    return [(label, seconds[key]) for key, label in shown.items() if key in seconds]


def table(result: dict[str, Any]) -> str:
    """Return a benchmark as text."""
    ceiling = result["ceiling_env_steps_per_second"]
    on_ranks = f" on each of {result['ranks']} ranks" if result["ranks"] > 1 else ""
    preset = f" ({result['preset']})" if result["preset"] else ""
    lines = [
        f"{result['family']}{preset}, {result['tasks']} tasks x"
        f" {result['episodes']} episodes x {result['horizon']} steps,"
        f" network {'-'.join(map(str, result['hidden'])) or result['network']},"
        f" {result['threads']} threads"
        f"{on_ranks}",
        f"{result['machine']['processor']}, torch {result['versions']['torch']},"
        f" mujoco {result['versions']['mujoco']}",
        "",
        f"{'':<28}{'env steps/s':>12}" + ("" if ceiling is None else f"{'of ceiling':>12}"),
    ]
    if ceiling is not None:
        lines.append(f"{'physics alone (ceiling)':<28}{ceiling:>12,.0f}{1:>12.2f}")
    for name, key in (("sampling", "collect"), ("training, end to end", "train")):
        ratio = result.get(f"{key}_to_ceiling")
        cell = f"{ratio:>12.2f}" if ratio is not None else ""
        lines.append(f"{name:<28}{result[f'{key}_env_steps_per_second']:>12,.0f}{cell}")
    processes = result.get("processes")
    if processes is not None:
        lines += ["", f"{processes['environments']} environments, policy included"]
        names = {
            "plain_loop": "plain loop, no policy",
            "one_process": "one process",
            "workers": f"{processes['workers']} workers",
            "async_vector_env": "AsyncVectorEnv",
        }
        for key, name in names.items():
            lines.append(f"{name:<28}{processes[f'{key}_env_steps_per_second']:>12,.0f}")
        for key in ("plain_loop", "one_process", "async_vector_env"):
            name = f"workers to {names[key].partition(',')[0]}"
            lines.append(f"{name:<28}{processes[f'workers_to_{key}']:>12.2f}")
    lines += ["", f"{'phase':<28}{'seconds':>12}"]
    lines += [f"{name:<28}{value:>12.3f}" for name, value in _phases(result)]
    lines.append("")
    if result["peak_memory_bytes"] is not None:
        lines.append(f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB")
    if result["network_flops"] is not None:
        flops, seconds = result["network_flops"] / 1e9, result["seconds"]
        other = seconds["iteration"] - seconds["ceiling"]
        lines.append(f"networks: {flops:.1f} GFlop an iteration, {flops / other:.0f} GFlop/s")
    rates = result["rates"]
    product, copy = rates["product_flops_per_second"] / 1e9, rates["copy_bytes_per_second"] / 1e9
    lines.append(f"one thread: {product:.0f} GFlop/s in the cache, {copy:.1f} GB/s of memory")
    if result["ranks"] > 1:
        calls, sent = (result["collectives"][key] for key in ("calls", "bytes"))
        lines.append(f"rank 0 sent {sent / 1e6:.2f} MB in {calls:.0f} collectives an iteration")
    return "\n".join(lines)
