"""Half-cheetah families: run in a direction, or at a goal velocity.

The literature has three variants, whose results are not comparable. All of them use Gymnasium's
model `half_cheetah.xml`.

=============  ==========  =======  ============  ==============================================
variant        frame skip  horizon  action scale  used by
=============  ==========  =======  ============  ==============================================
``icml2017``   1           200      1             Finn et al. 2017 (rllab)
``promp2019``  5           100      10            Rothfuss et al. 2019, pytorch-maml-rl, garage
``pearl2019``  5           200      10            Rakelly et al. 2019, VariBAD, MQL
``stock``      5           200      1             the stock Gymnasium body
=============  ==========  =======  ============  ==============================================

`icml2017` uses the velocity of the whole body's centre of mass. The centre of mass is also observed
(20 observations, including the absolute x), and the initial positions have less noise.
"""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mujoco
import numpy as np

from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.mujoco.bodies import observe_planar, rllab_pose
from metarl.envs.mujoco.family import STOCK, MujocoFamily
from metarl.envs.mujoco.rewards import (
    UNITS,
    centre_of_mass,
    centre_of_mass_velocity,
    direction_reward,
    direction_tasks,
    forward_velocity,
    velocity_reward,
)
from metarl.envs.mujoco.simulation import Sim, add_centre_of_mass
from metarl.envs.registry import register
from metarl.envs.tasks import TaskDistribution, Uniform
from metarl.envs.vector import Floats

CONTROL_COST = 0.05


@dataclass(frozen=True)
class Scale:
    """Parameters that differ between the half-cheetahs of the literature."""

    frame_skip: int = 5
    horizon: int = 200
    action_scale: float = 1.0
    centre_of_mass: bool = False
    """Use the velocity of the centre of mass instead of the root, three more observations, and
    normal noise on the initial pose, as in rllab."""
    highest_goal: float = 2.0
    balanced: bool = False
    """Use both directions equally often in a batch of tasks, instead of random directions."""


VARIANTS = {
    "stock": Scale(),
    "icml2017": Scale(frame_skip=1, centre_of_mass=True),
    "promp2019": Scale(horizon=100, action_scale=10.0, highest_goal=3.0),
    "pearl2019": Scale(action_scale=10.0, highest_goal=3.0, balanced=True),
}


def observe_with_centre_of_mass(sim: Sim) -> Floats:
    """Return rllab's observations [n, 20]: the stock observations and the centre of mass."""
    return np.concatenate([observe_planar(sim), centre_of_mass(sim)], axis=1)


def _half_cheetah(
    name: str, description: str, reward: Any, tasks: TaskDistribution, body: Scale
) -> MujocoFamily:
    com = body.centre_of_mass
    velocity = centre_of_mass_velocity if com else forward_velocity
    return MujocoFamily(
        name=name,
        description=description,
        tasks=tasks,
        horizon=body.horizon,
        achieved={tasks.names[0]: "x_velocity"},
        units=UNITS,
        env="HalfCheetah-v5",
        frame_skip=body.frame_skip,
        action_scale=body.action_scale,
        observe=observe_with_centre_of_mass if com else STOCK,
        reward=partial(reward, velocity=velocity, control=CONTROL_COST),
        initial_state=rllab_pose if com else STOCK,
        edit=add_centre_of_mass if com else None,
        fields=("sensordata",) if com else (),
        stage=int(mujoco.mjtStage.mjSTAGE_VEL if com else mujoco.mjtStage.mjSTAGE_NONE),
    )


def _variant(name: str, horizon: int | None) -> Scale:
    if name not in VARIANTS:
        raise UserError(
            f"no half-cheetah variant {name!r}{did_you_mean(name, VARIANTS)}"
            f" (variants: {', '.join(VARIANTS)})"
        )
    return replace(VARIANTS[name], horizon=VARIANTS[name].horizon if horizon is None else horizon)


@register(gymnasium_id="metarl/HalfCheetahDir-v0", max_episode_steps=200)
def half_cheetah_dir(
    variant: str = "stock", horizon: int | None = None, balanced: bool | None = None
) -> MujocoFamily:
    """Run forwards or backwards, depending on the task (Finn et al. 2017, arXiv:1703.03400).

    `balanced` draws both directions equally often; the default follows the variant's source.
    """
    body = _variant(variant, horizon)
    return _half_cheetah(
        "half-cheetah-dir",
        "half-cheetah runs forwards (direction 1) or backwards (-1); variants:"
        f" {', '.join(VARIANTS)}",
        direction_reward,
        direction_tasks(body.balanced if balanced is None else balanced),
        body,
    )


@register(gymnasium_id="metarl/HalfCheetahVel-v0", max_episode_steps=200)
def half_cheetah_vel(
    variant: str = "stock",
    low: float = 0.0,
    high: float | None = None,
    horizon: int | None = None,
) -> MujocoFamily:
    """Run at a goal velocity from [low, high] m/s: [0, 2] in Finn et al. 2017, [0, 3] in ProMP."""
    body = _variant(variant, horizon)
    goals = Uniform({"velocity": (low, body.highest_goal if high is None else high)})
    return _half_cheetah(
        "half-cheetah-vel",
        f"half-cheetah runs at a goal velocity (m/s); variants: {', '.join(VARIANTS)}",
        velocity_reward,
        goals,
        body,
    )
