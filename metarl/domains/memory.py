"""Estimate of the memory that a run needs, before it starts.

The size of rollouts is exact, and the size of the linear baseline is almost exact. A run is refused
if they do not fit. The size of an update is an estimate; if it does not fit, a warning is given.
Memory of environments is checked as they are created, see `metarl.envs.memory`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np

from metarl.distributed.process_group import local_ranks
from metarl.envs.errors import UserError
from metarl.envs.memory import available
from metarl.learning.advantages import TASKS_AT_ONCE
from metarl.learning.baselines import Baseline
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import RolloutBuffer

GRAPH = 4.0
"""Floats for two derivatives through an inner step, for each float of the forward pass. Measured:
navigation-2d, 8 tasks of 100 and 200 episodes, two threads, increase of 0.60 and 1.12 GB."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """Memory need in bytes."""

    rollouts: int
    """Samples kept at once: exact."""
    update: int
    """Parameters of all tasks and the gradient's graph, in addition: an estimate."""
    baseline: int = 0
    """Fit of the linear baseline before the update, in addition."""
    tasks: int = 0
    episodes: int = 0
    """Number of episodes per task."""

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
    """Return the memory for `rollouts` samples of all tasks' episodes, and for an update on them.

    Args:
        rollouts: number of rollouts kept at once, K + 1 in training.
        workers: number of processes; they share one additional rollout with this process.
        info_keys: number of kept entries of the environments' info.
        chunks: number of chunks of four tasks with graphs in memory at once, one per thread.
        fisher_fraction: fraction of the samples with graphs in memory for all tasks at once.
        threads: number of threads that fit the baseline.
        baseline: baseline that is fitted to each rollout.
    """
    steps = tasks * episodes * horizon

    sizes: list[int] = []

    def measure(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        sizes.append(int(np.prod(shape)) * dtype.itemsize)
        return np.empty(0, dtype)

    RolloutBuffer(policy, tasks, episodes, horizon, [str(i) for i in range(info_keys)], measure)
    one = sum(sizes)
    batch = 3 * 4 * steps  # advantage, weight, log density
    beside = (4 * policy.network.output_dim + 4 * 8) * steps  # noise; float64 returns, values ...
    kept = rollouts * (one + batch) + (one if workers else 0) + beside
    forward = 4 * policy.network.activations * episodes * horizon  # one task
    graphs = min(4 * chunks, tasks) + fisher_fraction * tasks
    parameters = 4 * sum(math.prod(shape) for shape in policy.shapes().values())
    iterates = (rollouts + 1) * tasks * parameters  # one more for sampling
    return Need(
        kept,
        int(GRAPH * graphs * forward) + iterates,
        0
        if baseline is None
        else baseline.peak_bytes(
            episodes * horizon, policy.observation_shape, min(TASKS_AT_ONCE * threads, tasks)
        ),
        tasks,
        episodes,
    )


def check_memory(needed: Need, name: str) -> None:
    """Refuse a run that cannot fit into memory; warn if an update may not fit.

    Args:
        needed: memory need of one process; ranks on this machine have the same need each.
        name: name of the family.

    Raises:
        UserError: the rollouts and the baseline alone exceed the free memory.
    """
    free, processes = available(), local_ranks()
    least, total = processes * needed.least, processes * needed.total
    if free is None or total <= free:
        return
    now = [f", now {count}" if count else "" for count in (needed.episodes, needed.tasks)]
    said = f"this needs {{}} GB of memory, and {free / 1e9:.1f} GB are free: use fewer episodes"
    said += f" (--episodes{now[0]}) or tasks (--tasks{now[1]}), or a shorter horizon for {name}"
    if least > free:
        raise UserError(said.format(f"{total / 1e9:.1f}"))
    _log.warning(said.format(f"about {total / 1e9:.1f}"))
