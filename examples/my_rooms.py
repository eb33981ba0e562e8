"""A family over a package's environment, in a wrapper; needs minigrid."""

import gymnasium as gym
import minigrid  # noqa: F401, registers its environments
import numpy as np

from metarl.envs import Finite, GymnasiumFamily, check_task_family


def codes(observation):
    return observation["image"].astype(np.float32) / 10.0  # kinds, colours and states of the cells


def make_room(render_mode=None):
    env = gym.make("MiniGrid-Empty-8x8-v0", render_mode=render_mode)
    space = gym.spaces.Box(0.0, 1.0, (7, 7, 3), np.float32)
    return gym.wrappers.TransformObservation(env, codes, space)  # leaves out text and direction


def set_task(env, task):  # the unwrapped environment
    env.agent_start_pos = (1, int(task[0]))


rooms = GymnasiumFamily(
    name="rooms",
    env=make_room,
    set_task=set_task,
    tasks=Finite(("row",), [[1.0], [5.0]]),
    horizon=60,
)

if __name__ == "__main__":
    print(check_task_family(rooms) or "no faults found")
