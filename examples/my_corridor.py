"""A family over an environment of your own, which reads its task from an attribute."""

import gymnasium as gym
import numpy as np

from metarl.envs import Finite, GymnasiumFamily, check_task_family


class Corridor(gym.Env):
    """Walk to the end that pays: the left end in task -1, the right end in task 1."""

    observation_space = gym.spaces.Discrete(7)
    action_space = gym.spaces.Discrete(2)
    task = np.ones(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 3
        return self.place, {}

    def step(self, action):
        self.place = int(np.clip(self.place + 2 * action - 1, 0, 6))
        return self.place, float(self.task[0] * (self.place - 3)), False, False, {}


sides = Finite(("side",), [[-1.0], [1.0]])
corridor = GymnasiumFamily(name="corridor", env=Corridor, tasks=sides, horizon=10)

if __name__ == "__main__":
    print(check_task_family(corridor) or "no faults found")
