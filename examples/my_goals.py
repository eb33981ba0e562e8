"""A family whose tasks differ by their reward alone; the environment stays as it is."""

import numpy as np

from metarl.envs import GymnasiumFamily, Uniform, check_task_family


def reward(observation, action, next_observation, info, task):
    position = next_observation[:, 0]
    return -np.abs(position - task[:, 0]) - 0.1 * np.square(action[:, 0])


goals = GymnasiumFamily(
    name="car-goals",
    env="MountainCarContinuous-v0",
    tasks=Uniform({"position": (-1.0, 0.4)}),
    reward=reward,
    horizon=100,
)

if __name__ == "__main__":
    print(check_task_family(goals) or "no faults found")
