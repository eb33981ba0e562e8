"""Seeds of episodes as environments receive them."""

from __future__ import annotations

import numpy as np

FOREIGN_SEEDS = 2**31
"""Bound of the seeds for environments of other packages. Many engines store a seed as a signed
integer of 32 bits."""


def foreign_seed(seed: int | None) -> int | None:
    """Return the seed of an episode for an environment of another package."""
    return None if seed is None else int(seed) % FOREIGN_SEEDS


def training_seeds(episodes: int, task: int = 0) -> list[int]:
    """Return the seeds of a task's first episodes in a training run of seed 0.

    They equal the seeds of `metarl.sampling.seeding`, whose keys begin with run, iteration, phase
    and inner step; 2 is the phase "reset".
    """
    return np.random.SeedSequence((0, 0, 2, 0, task)).generate_state(episodes).tolist()
