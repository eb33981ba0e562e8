"""Recurrent networks and environments for test_recurrent.py; importable in worker processes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from metarl.envs import GymnasiumFamily, Uniform


class Sum(nn.Module):
    """Outputs a weight times the sum of the observations since the start of the episode."""

    def __init__(self, space, outputs):
        super().__init__()
        self.head = nn.Parameter(0.1 * torch.randn(space.shape[0], outputs))

    def initial_state(self, samples):
        return torch.zeros(samples, len(self.head))

    def forward(self, x, state):
        state = state + x
        return state @ self.head, state


class Cell(nn.Module):
    """A GRU cell with a learned initial state, in a tuple of a tensor and a dict."""

    def __init__(self, space, outputs):
        super().__init__()
        self.cell = nn.GRUCell(space.shape[0], 6)
        self.start = nn.Parameter(0.1 * torch.randn(6))
        self.head = nn.Linear(6, outputs)

    def initial_state(self, samples):
        return self.start.expand(samples, -1), {"steps": torch.zeros(samples, 1)}

    def forward(self, x, state):
        hidden = self.cell(x, state[0])
        return self.head(hidden), (hidden, {"steps": state[1]["steps"] + 1.0})


class NoState(Cell):
    """Returns no state."""

    def forward(self, x, state):
        return super().forward(x, state)[0]


class Growing(Sum):
    """Returns a state of another shape."""

    def forward(self, x, state):
        output, state = super().forward(x, state)
        return output, state.repeat(1, 2)


class Marked(gym.Env):
    """Observes the task plus a number that an episode draws; an episode lasts 1 to 8 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    mark = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.time = int(self.np_random.integers(1, 9)), 0
        self.own = float(self.np_random.random())
        return self._observe(), {}

    def _observe(self):
        return np.array([self.mark + self.own], np.float32)

    def step(self, action):
        self.time += 1
        return self._observe(), float(action[0]), self.time >= self.length, False, {}


def set_mark(env, task):
    env.mark = float(task[0])


def marked():
    return GymnasiumFamily(
        name="marked", env=Marked, tasks=Uniform({"mark": (2.0, 9.0)}), set_task=set_mark, horizon=8
    )


class Recall(gym.Env):
    """Shows a sign at the start; only the last action counts, and should equal it."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(2)
    steps = 6
    flip = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign, self.time = int(self.np_random.integers(2)), 0
        return np.array([2.0 * self.sign - 1.0], np.float32), {}

    def step(self, action):
        self.time += 1
        last = self.time == self.steps
        reward = float(last and int(action) == self.sign)
        return np.zeros(1, np.float32), reward, False, last, {}


def set_flip(env, task):
    env.flip = float(task[0])


def recall():
    """Tasks do not differ: a policy that remembers earns 1, any other 0.5 on average."""
    return GymnasiumFamily(
        name="recall", env=Recall, tasks=Uniform({"nothing": (0.0, 1.0)}), set_task=set_flip,
        horizon=Recall.steps,
    )  # fmt: skip
