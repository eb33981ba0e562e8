"""Random streams. Each is a function of its key, independent of earlier draws.

The key of a stream is (seed, iteration, phase, inner step, task). A resumed run needs only its
iteration counter. Any number of threads, workers or ranks draws the same numbers.
"""

from __future__ import annotations

import numpy as np

# Phases are numbers in the key; changing one changes every run.
PHASES = {
    "init": 0,
    "tasks": 1,
    "reset": 2,  # initial states, in training
    "noise": 3,  # action noise, in training
    "fisher": 4,  # samples that the Fisher products use
    "test-tasks": 5,
    "test-reset": 6,
    "test-noise": 7,
    "validation-tasks": 8,
    "validation-reset": 9,
    "validation-noise": 10,
    "examples": 12,  # of supervised tasks, in training
    "test-examples": 13,
    "validation-examples": 14,
    "baseline": 15,  # initial state of a learned baseline
}


def stream(seed: int, iteration: int, phase: str, *where: int) -> np.random.Generator:
    """Return the generator of a key."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, iteration, phase, where)))


def episode_seeds(seed: int, iteration: int, phase: str, *where: int, episodes: int) -> list[int]:
    """Return the environment seeds (32 bits) of the episodes of a key.

    The seed of episode e does not depend on the number of episodes.
    """
    words = _sequence(seed, iteration, phase, where).generate_state(episodes)
    return words.tolist()


def _sequence(
    seed: int, iteration: int, phase: str, where: tuple[int, ...]
) -> np.random.SeedSequence:
    return np.random.SeedSequence((seed, iteration, PHASES[phase], *where))
