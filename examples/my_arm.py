"""A MuJoCo model of your own: an arm of two links whose tip is to reach a point."""

from pathlib import Path

import mujoco
import numpy as np

from metarl.envs import MujocoFamily, Uniform, check_task_family


def observe(sim):  # -> observations [n, observation_dim]
    tip = sim["site_xpos"][:, 0, :2]
    return np.concatenate([np.cos(sim.qpos), np.sin(sim.qpos), sim.qvel, tip], axis=1)


def reward(step):  # -> rewards [n], and arrays for info
    tip = step.sim["site_xpos"][:, 0, :2]
    return -np.linalg.norm(tip - step.task, axis=1), {"x": tip[:, 0].copy(), "y": tip[:, 1].copy()}


def initial_state(rng, model):  # -> qpos and qvel of one episode
    return rng.uniform(-0.1, 0.1, model.nq), np.zeros(model.nv)


arm = MujocoFamily(
    name="arm",
    xml=str(Path(__file__).with_name("arm.xml")),
    frame_skip=5,
    tasks=Uniform({"goal_x": (0.1, 0.3), "goal_y": (-0.3, 0.3)}),
    observe=observe,
    reward=reward,
    initial_state=initial_state,
    fields=("site_xpos",),
    stage=int(mujoco.mjtStage.mjSTAGE_POS),  # where the tip is after the step, not before it
    achieved={"goal_x": "x", "goal_y": "y"},
    units={"goal_x": "m", "goal_y": "m", "x": "m", "y": "m"},
    camera="top",
    horizon=40,
)

if __name__ == "__main__":
    print(check_task_family(arm) or "no faults found")
