"""Walker2d families: walk in a direction, at a goal velocity, or as a body that varies.

The simulator is the stock Gymnasium body: 4 physics steps of 0.002 s per environment step, actions
in +-1. Rothfuss et al. 2019 (arXiv:1810.06784) use 8 physics steps (`frame_skip=8`); an episode of
200 steps then takes 3.2 s instead of 1.6 s. Episodes end if the walker falls, as in Gymnasium.
"""

from __future__ import annotations

from functools import partial

from metarl.envs.mujoco.bodies import BODIES
from metarl.envs.mujoco.family import MujocoFamily
from metarl.envs.mujoco.parameters import parameter_tasks, scaled_parameters
from metarl.envs.mujoco.rewards import UNITS, direction_reward, direction_tasks, velocity_reward
from metarl.envs.mujoco.simulation import load_model
from metarl.envs.registry import register
from metarl.envs.tasks import Uniform

CONTROL_COST = 1e-3


@register(gymnasium_id="metarl/Walker2dDir-v0", max_episode_steps=200)
def walker2d_dir(horizon: int = 200, frame_skip: int = 4, balanced: bool = False) -> MujocoFamily:
    """Walk forwards or backwards: d v + 1 - 0.001 |a|^2 (Rothfuss et al. 2019).

    `balanced` draws both directions equally often.
    """
    return MujocoFamily(
        name="walker2d-dir",
        description="walker walks forwards (direction 1) or backwards (-1)",
        tasks=direction_tasks(balanced),
        achieved={"direction": "x_velocity"},
        units=UNITS,
        horizon=horizon,
        env="Walker2d-v5",
        frame_skip=frame_skip,
        reward=partial(direction_reward, control=CONTROL_COST, bonus=1.0),
    )


@register(gymnasium_id="metarl/Walker2dVel-v0", max_episode_steps=200)
def walker2d_vel(
    low: float = 0.0, high: float = 10.0, horizon: int = 200, frame_skip: int = 4
) -> MujocoFamily:
    """Walk at a goal velocity from [low, high] m/s: 15 - |v - g| - 0.001 |a|^2 (ibidem)."""
    return MujocoFamily(
        name="walker2d-vel",
        description="walker walks at a goal velocity (m/s)",
        tasks=Uniform({"velocity": (low, high)}),
        achieved={"velocity": "x_velocity"},
        units=UNITS,
        horizon=horizon,
        env="Walker2d-v5",
        frame_skip=frame_skip,
        reward=partial(velocity_reward, control=CONTROL_COST, bonus=15.0),
    )


@register(gymnasium_id="metarl/Walker2dParams-v0", max_episode_steps=200)
def walker2d_params(limit: float = 3.0, horizon: int = 200, frame_skip: int = 4) -> MujocoFamily:
    """Walk forwards with varying body parameters and the stock reward (rand_param_envs).

    Every mass, inertia and friction is multiplied by 1.5^u and every damping by 1.3^u. Each u is
    drawn from [-limit, limit]. Unlike in rand_param_envs, constants that MuJoCo derives from the
    parameters are updated.
    """
    return MujocoFamily(
        name="walker2d-params",
        description="walker of varying masses, inertias, dampings and frictions walks forwards",
        tasks=parameter_tasks(load_model(BODIES["Walker2d-v5"].xml), limit),
        horizon=horizon,
        env="Walker2d-v5",
        frame_skip=frame_skip,
        model_fields=scaled_parameters,
    )
