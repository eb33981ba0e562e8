"""A small world of pixels, importable by name in worker processes too."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from metarl.envs import Finite, GymnasiumFamily


class PixelCorridor(gym.Env):
    """A bright dot on a dark strip; task -1 pays for going left, task 1 for going right."""

    observation_space = gym.spaces.Box(0, 255, (8, 14, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)
    task = np.ones(1)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 6 + int(self.np_random.integers(2))
        return self._draw(), {}

    def step(self, action):
        before = self.place
        self.place = int(np.clip(self.place + 2 * int(action) - 1, 0, 13))
        return self._draw(), float(self.task[0] * (self.place - before)), False, False, {}

    def _draw(self):
        image = np.zeros((8, 14, 3), np.uint8)
        image[3:5, self.place] = (255, 200, 50)
        return image


def corridor() -> GymnasiumFamily:
    tasks = Finite(("side",), [[-1.0], [1.0]], balanced=True)
    return GymnasiumFamily(name="pixels", env=PixelCorridor, tasks=tasks, horizon=8)
