"""Global random generators of a process, and which of them an environment uses."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def _generators() -> dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]:
    """Return functions that read and set the state of each global generator, by its usual name."""
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
        "numpy.random": (np.random.get_state, np.random.set_state),
        "random": (random.getstate, random.setstate),
    }
    torch = sys.modules.get("torch")  # only if an environment already imported it
    if torch is not None:
        found["torch"] = (torch.random.get_rng_state, torch.random.set_rng_state)
    return found


def _states() -> dict[str, bytes]:
    return {name: pickle.dumps(read()) for name, (read, _) in _generators().items()}


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """Yield a set that at the end contains the names of the global generators that were used."""
    used: set[str] = set()
    before = _states()
    try:
        yield used
    finally:
        used |= {name for name, state in _states().items() if before.get(name, state) != state}


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore the states of the global generators at the end."""
    before = {name: read() for name, (read, _) in _generators().items()}
    try:
        yield
    finally:
        for name, (_, write) in _generators().items():
            if name in before:
                write(before[name])
