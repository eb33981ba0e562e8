"""Families for the tests of workers, importable there by name; a file tells when to fail."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

from metarl.envs import Finite, GymnasiumFamily, Uniform

FAULTY = 0.8
"""The task (drift) that fails."""


class Walk(gym.Env):
    """Adds up drift, action and noise; ends where it crosses 2."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    drift = position = count = 0.0

    def __init__(self, faults: str = "") -> None:
        self.faults = faults

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.count = 0.0, 0
        return self._checked("reset"), {}

    def step(self, action):
        self.count += 1
        self.position += self.drift + 0.3 * float(action[0]) + 0.2 * self.np_random.normal()
        observation = self._checked("step")
        return observation, -self.position, abs(self.position) > 2.0, False, {}

    def close(self):
        self._checked("close")

    def _checked(self, phase: str) -> np.ndarray:
        """Observe; but fail in the faulty task as the file says: [always] FAULT PHASE."""
        seen = np.array([self.position, self.count], np.float32)
        if not self.faults or self.drift != FAULTY or not os.path.exists(self.faults):
            return seen
        *always, fault, where = Path(self.faults).read_text().split()
        if where != phase:
            return seen
        if not always:
            os.unlink(self.faults)
        match fault:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "leave":
                sys.exit("left")
            case "hang":
                time.sleep(1000.0)
            case "hold":  # the interpreter's lock
                ctypes.PyDLL(None).sleep(1000)
            case "raise":
                raise ArithmeticError("the fault")
            case "shape":
                return seen[:1]  # NumPy would broadcast it
            case "nan":
                return np.full(2, np.nan, np.float32)
        return seen


def set_drift(env: gym.Env, task: np.ndarray) -> None:
    env.drift = task[0]  # type: ignore[attr-defined]


def walk(faults: str = "", horizon: int = 12) -> GymnasiumFamily:
    """Ragged episodes: the task is the drift."""
    return GymnasiumFamily(
        name="walk",
        env=Walk,
        tasks=Uniform({"drift": (0.0, 1.0)}),
        set_task=set_drift,
        horizon=horizon,
        env_options={"faults": faults},
    )


def walk_by_lambda() -> GymnasiumFamily:
    """The same with a function that cannot be pickled."""
    return GymnasiumFamily(
        name="walk",
        env=Walk,
        tasks=Uniform({"drift": (0.0, 1.0)}),
        set_task=lambda env, task: setattr(env, "drift", task[0]),
        horizon=12,
    )


def always_faulty(faults: str) -> GymnasiumFamily:
    """Every task is the one that fails."""
    tasks = Finite(("drift",), [[FAULTY]])
    return dataclasses.replace(walk(faults), tasks=tasks)
