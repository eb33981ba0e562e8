"""Humanoid family: run in a direction of the plane.

The simulator is the stock Gymnasium body: 5 physics steps of 0.003 s per environment step, actions
in +-0.4, 348 observations. `contact_forces=False` gives 270 observations and does not compute
contact forces. Episodes end if the humanoid falls, as in Gymnasium.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from metarl.envs.mujoco.bodies import mass_centre_xy, observe_humanoid
from metarl.envs.mujoco.family import MujocoFamily
from metarl.envs.mujoco.rewards import costs_and_bonus
from metarl.envs.mujoco.simulation import Reward, Step
from metarl.envs.registry import register
from metarl.envs.tasks import Uniform


def heading_reward(step: Step) -> Reward:
    """Return 1.25 v . (cos angle, sin angle) + 5 - 0.1 |a|^2; v is the mass centre's velocity."""
    velocity = (mass_centre_xy(step.sim) - step.before) / step.dt
    angle = step.task[:, 0]
    speed = velocity[:, 0] * np.cos(angle) + velocity[:, 1] * np.sin(angle)
    rest, info = costs_and_bonus(step, control=0.1, bonus=5.0)
    return 1.25 * speed + rest, {"speed": speed, **info}


@register(gymnasium_id="metarl/HumanoidDir-v0", max_episode_steps=200)
def humanoid_dir(horizon: int = 200, contact_forces: bool = True) -> MujocoFamily:
    """Run in a direction at an angle from [0, 2 pi) (Rakelly et al. 2019, arXiv:1903.08254).

    The velocity has the weight 1.25, as in the paper and the stock reward. The paper's impact cost
    is left out.
    """
    forces = ("cfrc_ext",) if contact_forces else ()
    return MujocoFamily(
        name="humanoid-dir",
        description="humanoid runs in a direction of the plane (radians)",
        tasks=Uniform({"angle": (0.0, 2.0 * np.pi)}),
        horizon=horizon,
        env="Humanoid-v5",
        observe=partial(observe_humanoid, contact_forces=contact_forces),
        reward=heading_reward,
        track=mass_centre_xy,
        fields=("cinert", "cvel", "qfrc_actuator", "subtree_com", *forces),
    )
