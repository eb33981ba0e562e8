"""How much memory a run needs, estimated before it starts.

What rollouts take is exact, and so nearly is what the linear baseline takes: a run is refused if
they do not fit. What an update takes besides is an estimate: if it does not fit, there is a
warning. Copies of an environment are watched as they are made, see `metarl.envs.memory`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from metarl.envs.errors import UserError
from metarl.envs.memory import available
from metarl.learning.advantages import CHUNK
from metarl.learning.baselines import Baseline
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import RolloutBuffer

GRAPH = 4.0
"""Floats that two derivatives through an inner step hold for each float of the forward pass, as
measured: navigation-2d, 8 tasks of 100 and 200 episodes, two threads, rose by 0.60 and 1.12 GB."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """Bytes."""

    rollouts: int
    """Samples kept at once: exact."""
    update: int
    """What parameters of all tasks and the gradient's graph take besides: an estimate."""
    baseline: int = 0
    """What fitting the linear baseline takes besides, before the update."""
    tasks: int = 0
    episodes: int = 0
    """Of a task."""

    @property
    def least(self) -> int:
        """Bytes without the update."""
        return self.rollouts + self.baseline

    @property
    def total(self) -> int:
        return self.rollouts + max(self.update, self.baseline)


def need(
    policy: PolicyModel,
    *,
    tasks: int,
    episodes: int,
    horizon: int,
    rollouts: int,
    workers: int = 0,
    info_keys: int = 0,
    chunks: int = 1,
    fisher_fraction: float = 0.0,
    threads: int = 1,
    baseline: Baseline | None = None,
) -> Need:
    """Return what `rollouts` samples of all tasks' episodes take, and an update on them.

    Args:
        rollouts: kept at once, K + 1 in training.
        workers: processes; they share one more rollout's memory with this one.
        info_keys: how many entries of the environments' info that are kept.
        chunks: chunks of four tasks whose graphs are held at once, one a thread.
        fisher_fraction: part of the samples whose graphs are held for all tasks at once.
        threads: that fit the baseline.
        baseline: fitted to each rollout.
    """
    steps = tasks * episodes * horizon

    sizes: list[int] = []

    def measure(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        sizes.append(int(np.prod(shape)) * dtype.itemsize)
        return np.empty(0, dtype)

    RolloutBuffer(policy, tasks, episodes, horizon, [str(i) for i in range(info_keys)], measure)
    one = sum(sizes)
    batch = 3 * 4 * steps  # advantage, weight, log density
    beside = (4 * policy.network.output_dim + 4 * 8) * steps  # noise; returns, values … in float64
    kept = rollouts * (one + batch) + (one if workers else 0) + beside
    forward = 4 * policy.network.activations * episodes * horizon  # of one task
    graphs = min(4 * chunks, tasks) + fisher_fraction * tasks
    parameters = 4 * sum(math.prod(shape) for shape in policy.shapes().values())
    iterates = (rollouts + 1) * tasks * parameters  # one more for sampling
    return Need(
        kept,
        int(GRAPH * graphs * forward) + iterates,
        0
        if baseline is None
        else baseline.peak_bytes(
            episodes * horizon, policy.observation_shape, min(CHUNK * threads, tasks)
        ),
        tasks,
        episodes,
    )


def check_memory(needed: Need, name: str, processes: int = 1) -> None:
    """Refuse what cannot fit into memory; warn where an update may not.

    Args:
        needed: by one process.
        name: of the family.
        processes: that share the memory, and need as much each.

    Raises:
        UserError: the rollouts and the baseline alone are larger than the memory that is free.
    """
    free = available()
    least, total = processes * needed.least, processes * needed.total
    if free is None or total <= free:
        return
    now = [f", now {count}" if count else "" for count in (needed.episodes, needed.tasks)]
    said = f"this needs {{}} GB of memory, and {free / 1e9:.1f} GB are free: take fewer episodes"
    said += f" (--episodes{now[0]}) or tasks (--tasks{now[1]}), or a shorter horizon for {name}"
    if least > free:
        raise UserError(said.format(f"{total / 1e9:.1f}"))
    _log.warning(said.format(f"about {total / 1e9:.1f}"))
