"""Ant families: run in a direction, at a goal velocity, or to a goal, as in Finn et al. 2017.

All variants have the rewards of its code (rllab):

    r + 0.05 - 0.005 |a|^2 - 5e-4 |clip(cfrc_ext, -1, 1)|^2

The task gives r, and a is the action relative to full strength. Episodes end if the torso leaves
0.2 <= z <= 1. Results of different variants are not comparable:

=============  ============  ==========  =======  ============  ==================================
variant        physics step  frame skip  horizon  action scale  used by
=============  ============  ==========  =======  ============  ==================================
``icml2017``   0.02 s        1           200      1             Finn et al. 2017 (rllab)
``promp2019``  0.01 s        5           100      10            simulator of Rothfuss et al. 2019
``pearl2019``  0.01 s        5           200      10            simulator of Rakelly et al. 2019
``stock``      0.01 s        5           200      1             the stock Gymnasium body
=============  ============  ==========  =======  ============  ==================================

The papers of 2019 have other rewards (0.5 |a|^2 and a bonus of 1), so these variants only take
their simulators.

`icml2017` has rllab's model: Gymnasium's with another time step and contact impedance. Its velocity
is the velocity of the whole body's centre of mass. Its 125 observations include absolute positions,
the torso's orientation and the centre of mass.

The other variants have the root's velocity and the stock observations. `ant-goal` also observes the
root's x and y, because a policy needs its position. `contact_forces=False` removes contact forces
from the observations; the reward keeps its contact cost.
"""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mujoco
import numpy as np

from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.mujoco.bodies import observe_ant, rllab_pose
from metarl.envs.mujoco.family import STOCK, MujocoFamily
from metarl.envs.mujoco.rewards import (
    UNITS,
    centre_of_mass,
    centre_of_mass_velocity,
    costs_and_bonus,
    direction_reward,
    direction_tasks,
    forward_velocity,
    velocity_reward,
)
from metarl.envs.mujoco.simulation import Reward, Sim, Step, add_centre_of_mass
from metarl.envs.registry import register
from metarl.envs.tasks import TaskDistribution, Uniform
from metarl.envs.vector import Floats

COSTS = {"control": 0.005, "contact": 5e-4}
ALIVE = 0.05


@dataclass(frozen=True)
class Scale:
    """Parameters that differ between the ants of the literature."""

    horizon: int = 200
    action_scale: float = 1.0
    rllab: bool = False
    """Use rllab's model, observations, velocity and initial states, with a frame skip of 1."""
    balanced: bool = False
    """Use both directions equally often in a batch of tasks, instead of random directions."""


VARIANTS = {
    "stock": Scale(),
    "icml2017": Scale(rllab=True),
    "promp2019": Scale(horizon=100, action_scale=10.0),
    "pearl2019": Scale(action_scale=10.0, balanced=True),
}


def rllab_model(spec: mujoco.MjSpec) -> None:
    """Turn Gymnasium's model into rllab's, with sensors of the centre of mass."""
    spec.option.timestep = 0.02
    for geom in spec.geoms:
        geom.solimp[:3] = 0.8, 0.8, 0.01
    add_centre_of_mass(spec)


def observe_rllab(sim: Sim, *, contact_forces: bool = True) -> Floats:
    """Return rllab's observations [n, 125], or [n, 41] without the clipped contact forces."""
    parts = [sim.qpos, sim.qvel]
    if contact_forces:
        parts.append(np.clip(sim["cfrc_ext"], -1.0, 1.0).reshape(len(sim.qpos), -1))
    return np.concatenate([*parts, sim["xmat"][:, 1], centre_of_mass(sim)], axis=1)


def root_xy(sim: Sim) -> Floats:
    """Return the position of the root in the plane, [n, 2]."""
    return sim.qpos[:, :2]


def goal_reward(step: Step, position: Callable[[Sim], Floats], **weights: float) -> Reward:
    """Return 4 - |xy - goal|_1 - costs + bonus (Finn et al. 2017)."""
    x, y = position(step.sim)[:, :2].T.copy()
    distance = np.abs(x - step.task[:, 0]) + np.abs(y - step.task[:, 1])
    rest, info = costs_and_bonus(step, **weights)
    info |= {"x_position": x, "y_position": y}
    return 4.0 - distance + rest, {"distance": distance, **info}


def _ant(
    name: str,
    description: str,
    reward: Callable[..., Reward],
    tasks: TaskDistribution,
    variant: str,
    horizon: int | None,
    contact_forces: bool,
    position: bool = False,
) -> MujocoFamily:
    body = VARIANTS[variant]
    if body.rllab:
        observe = partial(observe_rllab, contact_forces=contact_forces)
    else:
        observe = partial(observe_ant, position=position, contact_forces=contact_forces)
    stage = mujoco.mjtStage.mjSTAGE_ACC if body.rllab else mujoco.mjtStage.mjSTAGE_NONE
    if position:
        achieved = {"goal_x": "x_position", "goal_y": "y_position"}
    else:
        achieved = {tasks.names[0]: "x_velocity"}
    return MujocoFamily(
        name=name,
        description=f"{description}; variants: {', '.join(VARIANTS)}",
        tasks=tasks,
        achieved=achieved,
        units=UNITS,
        horizon=body.horizon if horizon is None else horizon,
        env="Ant-v5",
        frame_skip=1 if body.rllab else STOCK,
        action_scale=body.action_scale,
        observe=observe,
        reward=partial(reward, **COSTS),
        initial_state=rllab_pose if body.rllab else STOCK,
        edit=rllab_model if body.rllab else None,
        fields=("cfrc_ext", "xmat", "sensordata") if body.rllab else ("cfrc_ext",),
        stage=int(stage),
    )


def _variant(name: str) -> Scale:
    if name not in VARIANTS:
        raise UserError(
            f"no ant variant {name!r}{did_you_mean(name, VARIANTS)}"
            f" (variants: {', '.join(VARIANTS)})"
        )
    return VARIANTS[name]


@register(gymnasium_id="metarl/AntDir-v0", max_episode_steps=200)
def ant_dir(
    variant: str = "stock",
    horizon: int | None = None,
    contact_forces: bool = True,
    balanced: bool | None = None,
) -> MujocoFamily:
    """Run forwards or backwards: d v + 0.05 - costs (Finn et al. 2017, arXiv:1703.03400).

    `balanced` draws both directions equally often; the default follows the variant's source.
    """
    body = _variant(variant)
    velocity = centre_of_mass_velocity if body.rllab else forward_velocity
    return _ant(
        "ant-dir",
        "ant runs forwards (direction 1) or backwards (-1)",
        partial(direction_reward, velocity=velocity, bonus=ALIVE),
        direction_tasks(body.balanced if balanced is None else balanced),
        variant,
        horizon,
        contact_forces,
    )


@register(gymnasium_id="metarl/AntVel-v0", max_episode_steps=200)
def ant_vel(
    variant: str = "stock",
    low: float = 0.0,
    high: float = 3.0,
    horizon: int | None = None,
    contact_forces: bool = True,
) -> MujocoFamily:
    """Run at a goal velocity from [low, high] m/s: 1 - |v - g| + 0.05 - costs (ibidem)."""
    velocity = centre_of_mass_velocity if _variant(variant).rllab else forward_velocity
    return _ant(
        "ant-vel",
        "ant runs at a goal velocity (m/s)",
        partial(velocity_reward, velocity=velocity, bonus=1.0 + ALIVE),
        Uniform({"velocity": (low, high)}),
        variant,
        horizon,
        contact_forces,
    )


@register(gymnasium_id="metarl/AntGoal-v0", max_episode_steps=200)
def ant_goal(
    variant: str = "stock",
    reach: float = 3.0,
    horizon: int | None = None,
    contact_forces: bool = True,
) -> MujocoFamily:
    """Go to a goal from [-reach, reach]^2 m: 4 - |xy - goal|_1 + 0.05 - costs (ibidem)."""
    position = centre_of_mass if _variant(variant).rllab else root_xy
    return _ant(
        "ant-goal",
        "ant goes to a hidden goal in the plane (m)",
        partial(goal_reward, position=position, bonus=ALIVE),
        Uniform({"goal_x": (-reach, reach), "goal_y": (-reach, reach)}),
        variant,
        horizon,
        contact_forces,
        position=True,
    )
