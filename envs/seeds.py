"""The seeds of episodes, as environments are given them."""

from __future__ import annotations

import numpy as np

FOREIGN_SEEDS = 2**31
"""Seeds that an environment of another package gets are below this: many engines keep them in a
signed integer of 32 bits."""


def foreign_seed(seed: int | None) -> int | None:
    """Return a seed of an episode as an environment of another package is given it."""
    return None if seed is None else int(seed) % FOREIGN_SEEDS


def training_seeds(episodes: int, task: int = 0) -> list[int]:
    """Return the seeds of a task's first episodes in a training run of seed 0.

    They are those of `metarl.sampling.seeding`, whose addresses begin with run, iteration, phase
    and inner step; 2 is the phase "reset".
    """
    return np.random.SeedSequence((0, 0, 2, 0, task)).generate_state(episodes).tolist()
