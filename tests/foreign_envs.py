"""Families whose code changes the process it runs in, importable by name.

The environment variable MEDDLE says where: one of PLACES, or "everywhere". OFFEND says where it
fails instead, and how.
"""

from __future__ import annotations

import gc
import io
import locale
import logging
import os
import signal
import sys
import threading
import warnings

import gymnasium as gym
import numpy as np
import torch

from metarl.envs import GymnasiumFamily, Uniform

PLACES = ("import", "make", "set_task", "reset", "step", "reward", "close")
FILTER = ("error", None, UserWarning, None, 0)
_SINK = io.StringIO()


def meddle(place: str) -> None:
    """Change everything about the process that can be changed."""
    if os.environ.get("MEDDLE") not in (place, "everywhere"):
        return
    os.chdir("/")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(3)
    np.seterr(all="raise")
    np.set_printoptions(precision=1, threshold=2)
    warnings.simplefilter(FILTER[0], FILTER[2])
    logging.disable(logging.CRITICAL)
    logging.getLogger("metarl.sampling.workers").disabled = True
    locale.setlocale(locale.LC_ALL, "C")
    sys.stdout = sys.stderr = _SINK
    sys.setrecursionlimit(900)
    gc.disable()


def offend(place: str) -> None:
    """Fail in one of many ways."""
    how, _, where = os.environ.get("OFFEND", "").partition(" ")
    if where != place:
        return
    match how:
        case "raise":
            raise ArithmeticError("mine")
        case "missing":
            open("no such file", encoding="utf-8")  # noqa: SIM115
        case "pipe":
            raise BrokenPipeError("mine")
        case "exit":
            sys.exit(0)
        case "interrupt":
            raise KeyboardInterrupt
        case "base":
            raise BaseException("mine")
        case "leave":
            os._exit(0)


def visit(place: str) -> None:
    meddle(place)
    offend(place)


visit("import")


class Slide(gym.Env):
    """Adds up its actions; paid for being near the goal."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    x = goal = 0.0

    def __init__(self, render_mode: str | None = None) -> None:
        visit("make")
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        visit("reset")
        self.x = float(self.np_random.uniform(-0.1, 0.1))
        return np.array([self.x], np.float32), {}

    def step(self, action):
        visit("step")
        self.x = float(np.clip(self.x + 0.2 * float(action[0]), -9.0, 9.0))
        return np.array([self.x], np.float32), -abs(self.x - self.goal), False, False, {}

    def render(self):
        visit("render")
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        visit("close")

    def __del__(self):
        offend("del")


def put(env: Slide, task: np.ndarray) -> None:
    visit("set_task")
    env.goal = float(task[0])


def near(before, action, after, info, task):
    visit("reward")
    return -np.abs(after[:, 0].astype(np.float64) - task[:, 0])


_TASKS = Uniform({"goal": (-1.0, 1.0)})
put_in = GymnasiumFamily(name="put_in", env=Slide, set_task=put, tasks=_TASKS, horizon=6)
paid = GymnasiumFamily(name="paid", env=Slide, reward=near, tasks=_TASKS, horizon=6)
