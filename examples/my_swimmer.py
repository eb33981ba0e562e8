"""A MuJoCo body whose tasks change the reward: swim sideways at a goal velocity.

The reward sees all simulations at once; `step` is a `metarl.envs.mujoco.bodies.Step`.
"""

import numpy as np

from metarl.envs import MujocoFamily, Uniform, check_task_family


def y_position(sim):  # kept from before the step, as step.before
    return sim.qpos[:, 1].copy()


def reward(step):  # -> rewards [n], and arrays for info
    speed = (step.sim.qpos[:, 1] - step.before) / step.dt
    cost = 1e-4 * np.square(step.action).sum(axis=1)
    return -np.abs(speed - step.task[:, 0]) - cost, {"y_velocity": speed}


sideways_swimmer = MujocoFamily(
    name="sideways-swimmer",
    env="Swimmer-v5",
    tasks=Uniform({"velocity": (-0.1, 0.1)}),
    track=y_position,
    reward=reward,
    achieved={"velocity": "y_velocity"},
    units={"velocity": "m/s", "y_velocity": "m/s"},
    horizon=200,
)

if __name__ == "__main__":
    print(check_task_family(sideways_swimmer) or "no faults found")
