"""How much memory a run needs, estimated before it starts.

What rollouts take is exact: a run whose rollouts do not fit is refused. What an update takes
besides is an estimate: where it does not fit, there is a warning.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metarl.envs.errors import UserError
from metarl.learning.policies import MLPPolicy
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
    """What the gradient's graph holds besides: an estimate."""

    @property
    def total(self) -> int:
        return self.rollouts + self.update


def need(
    policy: MLPPolicy,
    *,
    tasks: int,
    episodes: int,
    horizon: int,
    rollouts: int,
    workers: int = 0,
    info_keys: int = 0,
    chunks: int = 1,
    fisher_fraction: float = 0.0,
) -> Need:
    """Return what `rollouts` samples of all tasks' episodes take, and an update on them.

    Args:
        rollouts: kept at once, K + 1 in training.
        workers: processes; they share one more rollout's memory with this one.
        info_keys: how many entries of the environments' info that are kept.
        chunks: chunks of four tasks whose graphs are held at once, one a thread.
        fisher_fraction: part of the samples whose graphs are held for all tasks at once.
    """
    steps = tasks * episodes * horizon

    sizes: list[int] = []

    def measure(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        sizes.append(int(np.prod(shape)) * dtype.itemsize)
        return np.empty(0, dtype)

    RolloutBuffer(policy, tasks, episodes, horizon, [str(i) for i in range(info_keys)], measure)
    one = sum(sizes)
    batch = 3 * 4 * steps  # advantage, weight, log density
    beside = (4 * policy.output_dim + 4 * 8) * steps  # noise; returns, values … in float64
    kept = rollouts * (one + batch) + (one if workers else 0) + beside
    forward = 4 * policy.activations * episodes * horizon  # of one task
    graphs = min(4 * chunks, tasks) + fisher_fraction * tasks
    return Need(kept, int(GRAPH * graphs * forward))


def available() -> int | None:
    """Return the bytes that this process may still take, container limits included."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text("utf-8").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text("utf-8"))
            for line in (group / "memory.stat").read_text("utf-8").splitlines():
                if line.startswith("inactive_file "):  # a cache of files, which gives way
                    used -= int(line.split()[1])
            free.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(free, default=None)


def check_memory(needed: Need, name: str, processes: int = 1) -> None:
    """Refuse what cannot fit into memory; warn where an update may not.

    Args:
        needed: by one process.
        name: of the family.
        processes: that share the memory, and need as much each.

    Raises:
        UserError: the rollouts alone are larger than the memory that is free.
    """
    free = available()
    needed = Need(processes * needed.rollouts, processes * needed.update)
    if free is None or needed.total <= free:
        return
    said = f"this needs {{}} GB of memory, and {free / 1e9:.1f} GB are free: take fewer episodes"
    said += f" (--episodes) or tasks (--tasks), or a shorter horizon for {name}"
    if needed.rollouts > free:
        raise UserError(said.format(f"{needed.total / 1e9:.1f}"))
    _log.warning(said.format(f"about {needed.total / 1e9:.1f}"))
