"""Every random stream, as a function of where it is used and never of what ran before.

A stream is addressed by (seed, iteration, phase, inner step, task): a resumed run needs only its
iteration counter, and any number of threads, workers or ranks draws the same numbers.
"""

from __future__ import annotations

import numpy as np

# Phases are numbers in the address; changing one changes every run.
PHASES = {
    "init": 0,
    "tasks": 1,
    "reset": 2,  # initial states, in training
    "noise": 3,  # action noise, in training
    "fisher": 4,  # which samples the Fisher products use
    "test-tasks": 5,
    "test-reset": 6,
    "test-noise": 7,
    "validation-tasks": 8,
    "validation-reset": 9,
    "validation-noise": 10,
    "examples": 12,  # of supervised tasks, in training
    "test-examples": 13,
    "validation-examples": 14,
    "baseline": 15,  # initial state of a baseline that learns
}


def stream(seed: int, iteration: int, phase: str, *where: int) -> np.random.Generator:
    """Return the generator of an address."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, iteration, phase, where)))


def episode_seeds(seed: int, iteration: int, phase: str, *where: int, episodes: int) -> list[int]:
    """Return the environment seeds (32 bits) of the episodes at an address.

    Episode e's seed does not depend on how many episodes there are.
    """
    words = _sequence(seed, iteration, phase, where).generate_state(episodes)
    return words.tolist()


def _sequence(
    seed: int, iteration: int, phase: str, where: tuple[int, ...]
) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, iteration, PHASES[phase], *where))
