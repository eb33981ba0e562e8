"""Hopper family: hop forwards as a body that varies.

The simulator is the stock Gymnasium body: 4 physics steps of 0.002 s per environment step, actions
in +-1. Episodes end if the hopper falls, as in Gymnasium.
"""

from __future__ import annotations

from metarl.envs.mujoco.bodies import BODIES
from metarl.envs.mujoco.family import MujocoFamily
from metarl.envs.mujoco.parameters import parameter_tasks, scaled_parameters
from metarl.envs.mujoco.simulation import load_model
from metarl.envs.registry import register


@register(gymnasium_id="metarl/HopperParams-v0", max_episode_steps=200)
def hopper_params(limit: float = 3.0, horizon: int = 200, frame_skip: int = 4) -> MujocoFamily:
    """Hop forwards with varying body parameters and the stock reward (rand_param_envs).

    Every mass, inertia and friction is multiplied by 1.5^u and every damping by 1.3^u. Each u is
    drawn from [-limit, limit]. Unlike in rand_param_envs, constants that MuJoCo derives from the
    parameters are updated.
    """
    return MujocoFamily(
        name="hopper-params",
        description="hopper of varying masses, inertias, dampings and frictions hops forwards",
        tasks=parameter_tasks(load_model(BODIES["Hopper-v5"].xml), limit),
        horizon=horizon,
        env="Hopper-v5",
        frame_skip=frame_skip,
        model_fields=scaled_parameters,
    )
