"""Swimmer family: swim at a goal velocity.

The simulator is the stock Gymnasium body: 4 physics steps of 0.01 s per environment step, actions
in +-1. Episodes never end early.
"""

from __future__ import annotations

from functools import partial

from metarl.envs.mujoco.family import MujocoFamily
from metarl.envs.mujoco.rewards import UNITS, velocity_reward
from metarl.envs.registry import register
from metarl.envs.tasks import Uniform


@register(gymnasium_id="metarl/SwimmerVel-v0", max_episode_steps=200)
def swimmer_vel(low: float = 0.1, high: float = 0.2, horizon: int = 200) -> MujocoFamily:
    """Swim at a goal velocity from [low, high] m/s: -|v - g| - 1e-4 |a|^2 (Rothfuss et al. 2019).

    Their code has the reward +|v - g|, which favours a large distance from the goal. This family
    uses the sign that fits the task.
    """
    return MujocoFamily(
        name="swimmer-vel",
        description="swimmer swims at a goal velocity (m/s)",
        tasks=Uniform({"velocity": (low, high)}),
        achieved={"velocity": "x_velocity"},
        units=UNITS,
        horizon=horizon,
        env="Swimmer-v5",
        reward=partial(velocity_reward, control=1e-4),
    )
