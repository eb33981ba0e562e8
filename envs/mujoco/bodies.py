"""Vectorised versions of Gymnasium's locomotion bodies (v5), the defaults of a `MujocoFamily`.

Observations, initial states and terminations equal the stock environments bit for bit.
"""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.mujoco.rewards import costs_and_bonus, forward_velocity, root_x
from metarl.envs.mujoco.simulation import Reward, Sim, Step
from metarl.envs.vector import Bools, Floats


def stock_pose(
    rng: np.random.Generator, model: mujoco.MjModel, noise: float, normal_velocity: bool = False
) -> tuple[Floats, Floats]:
    """Draw qpos, then qvel, uniformly within the noise, or normal velocities."""
    qpos = model.qpos0 + rng.uniform(-noise, noise, model.nq)
    if normal_velocity:
        return qpos, noise * rng.standard_normal(model.nv)
    return qpos, rng.uniform(-noise, noise, model.nv)


def rllab_pose(rng: np.random.Generator, model: mujoco.MjModel) -> tuple[Floats, Floats]:
    """Draw qpos, then qvel: 0.01 N(0, 1) around `init_qpos` or qpos0, and 0.1 N(0, 1)."""
    named = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_NUMERIC, "init_qpos")
    pose = model.qpos0 if named < 0 else model.numeric(named).data
    return pose + 0.01 * rng.standard_normal(model.nq), 0.1 * rng.standard_normal(model.nv)


def observe_planar(sim: Sim, *, bound: float | None = None) -> Floats:
    """Return positions without the root's x, then velocities, clipped if there is a bound."""
    qvel = sim.qvel if bound is None else np.clip(sim.qvel, -bound, bound)
    return np.concatenate([sim.qpos[:, 1:], qvel], axis=1)


def observe_swimmer(sim: Sim) -> Floats:
    """Return positions without the root's x and y, then velocities."""
    return np.concatenate([sim.qpos[:, 2:], sim.qvel], axis=1)


def observe_ant(sim: Sim, *, position: bool = False, contact_forces: bool = True) -> Floats:
    """Return positions (x and y only with `position`), velocities and clipped contact forces."""
    parts = [sim.qpos[:, 0 if position else 2 :], sim.qvel]
    if contact_forces:
        parts.append(np.clip(_flat(sim["cfrc_ext"][:, 1:]), -1.0, 1.0))
    return np.concatenate(parts, axis=1)


def observe_humanoid(sim: Sim, *, contact_forces: bool = True) -> Floats:
    """Return positions without x and y, velocities; inertias, velocities and forces of parts."""
    parts = [sim.qpos[:, 2:], sim.qvel, _flat(sim["cinert"][:, 1:]), _flat(sim["cvel"][:, 1:])]
    parts.append(sim["qfrc_actuator"][:, 6:])
    if contact_forces:
        parts.append(_flat(sim["cfrc_ext"][:, 1:]))
    return np.concatenate(parts, axis=1)


def _flat(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(len(values), -1)


def hopper_falls(sim: Sim) -> Bools:
    """Return whether the hopper fell, is tilted by 0.2 rad, or has a coordinate beyond 100."""
    z, angle = sim.qpos[:, 1], sim.qpos[:, 2]
    rest = np.concatenate([sim.qpos[:, 2:], sim.qvel], axis=1)
    return ~((np.abs(rest) < 100.0).all(axis=1) & (z > 0.7) & (np.abs(angle) < 0.2))


def walker2d_falls(sim: Sim) -> Bools:
    """Return whether the walker is below 0.8 m, above 2 m, or tilted by 1 rad."""
    z, angle = sim.qpos[:, 1], sim.qpos[:, 2]
    return ~((z > 0.8) & (z < 2.0) & (np.abs(angle) < 1.0))


def ant_falls(sim: Sim) -> Bools:
    """Return whether the torso is outside 0.2 <= z <= 1, or the state is not finite."""
    z = sim.qpos[:, 2]
    finite = np.isfinite(sim.qpos).all(axis=1) & np.isfinite(sim.qvel).all(axis=1)
    return ~(finite & (z >= 0.2) & (z <= 1.0))


def humanoid_falls(sim: Sim) -> Bools:
    """Return whether the torso is outside 1 < z < 2."""
    z = sim.qpos[:, 2]
    return ~((z > 1.0) & (z < 2.0))


def torso_xy(sim: Sim) -> Floats:
    """Return the torso's position as in stock Ant, [simulations, 2]."""
    return sim["xpos"][:, 1, :2].copy()


def mass_centre_xy(sim: Sim) -> Floats:
    """Return the centre of mass as in stock Humanoid, [simulations, 2]."""
    return sim["subtree_com"][:, 1, :2].copy()


def stock_reward(
    step: Step,
    *,
    control: float,
    speed: float = 1.0,
    alive: float = 0.0,
    falls: Callable[[Sim], Bools] | None = None,
) -> Reward:
    """Return speed v + alive (if it has not fallen) - control |a|^2."""
    velocity = forward_velocity(step)
    bonus = alive if falls is None else alive * ~falls(step.sim)
    rest, info = costs_and_bonus(step, control=control, bonus=bonus)
    return speed * velocity + rest, {"x_velocity": velocity, **info}


def stock_ant_reward(step: Step) -> Reward:
    """Return v + 1 (if it has not fallen) - 0.5 |a|^2 - 5e-4 |clip(cfrc_ext, -1, 1)|^2."""
    velocity = (torso_xy(step.sim)[:, 0] - step.before[:, 0]) / step.dt
    rest, info = costs_and_bonus(step, control=0.5, contact=5e-4, bonus=1.0 * ~ant_falls(step.sim))
    return velocity + rest, {"x_velocity": velocity, **info}


def stock_humanoid_reward(step: Step) -> Reward:
    """Return 1.25 v + 5 (if it has not fallen) - 0.1 |a|^2 - min(5e-7 |cfrc_ext|^2, 10)."""
    velocity = (mass_centre_xy(step.sim)[:, 0] - step.before[:, 0]) / step.dt
    rest, info = costs_and_bonus(step, control=0.1, bonus=5.0 * ~humanoid_falls(step.sim))
    impact = np.minimum(5e-7 * np.square(step.sim["cfrc_ext"]).sum(axis=(1, 2)), 10.0)
    info |= {"x_velocity": velocity, "reward_contact": -impact}
    return 1.25 * velocity + rest - impact, info


@dataclass(frozen=True, kw_only=True)
class Body:
    """Stock body: defaults of a `MujocoFamily` with its id."""

    xml: str
    frame_skip: int
    observe: Callable[[Sim], Floats]
    initial_state: Callable[[np.random.Generator, mujoco.MjModel], tuple[Floats, Floats]]
    reward: Callable[[Step], Reward]
    terminated: Callable[[Sim], Bools] | None = None
    track: Callable[[Sim], Floats] = root_x
    observe_fields: tuple[str, ...] = ()
    """Derived fields that `observe` reads."""
    reward_fields: tuple[str, ...] = ()
    """Derived fields that `reward` and `track` read."""


BODIES: dict[str, Body] = {
    "HalfCheetah-v5": Body(
        xml="half_cheetah.xml",
        frame_skip=5,
        observe=observe_planar,
        initial_state=partial(stock_pose, noise=0.1, normal_velocity=True),
        reward=partial(stock_reward, control=0.1),
    ),
    "Hopper-v5": Body(
        xml="hopper.xml",
        frame_skip=4,
        observe=partial(observe_planar, bound=10.0),
        initial_state=partial(stock_pose, noise=5e-3),
        reward=partial(stock_reward, control=1e-3, alive=1.0, falls=hopper_falls),
        terminated=hopper_falls,
    ),
    "Walker2d-v5": Body(
        xml="walker2d_v5.xml",
        frame_skip=4,
        observe=partial(observe_planar, bound=10.0),
        initial_state=partial(stock_pose, noise=5e-3),
        reward=partial(stock_reward, control=1e-3, alive=1.0, falls=walker2d_falls),
        terminated=walker2d_falls,
    ),
    "Swimmer-v5": Body(
        xml="swimmer.xml",
        frame_skip=4,
        observe=observe_swimmer,
        initial_state=partial(stock_pose, noise=0.1),
        reward=partial(stock_reward, control=1e-4),
    ),
    "Ant-v5": Body(
        xml="ant.xml",
        frame_skip=5,
        observe=observe_ant,
        initial_state=partial(stock_pose, noise=0.1, normal_velocity=True),
        reward=stock_ant_reward,
        terminated=ant_falls,
        track=torso_xy,
        observe_fields=("cfrc_ext",),
        reward_fields=("cfrc_ext", "xpos"),
    ),
    "Humanoid-v5": Body(
        xml="humanoid.xml",
        frame_skip=5,
        observe=observe_humanoid,
        initial_state=partial(stock_pose, noise=1e-2),
        reward=stock_humanoid_reward,
        terminated=humanoid_falls,
        track=mass_centre_xy,
        observe_fields=("cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
        reward_fields=("cfrc_ext", "subtree_com"),
    ),
}


def find_body(env: str) -> Body:
    """Return the stock body of a Gymnasium id.

    Raises:
        UserError: the id has no stock body.
    """
    if env not in BODIES:
        raise UserError(
            f"no native body {env!r}{did_you_mean(env, BODIES)} (bodies: {', '.join(BODIES)};"
            " give an xml, or use a GymnasiumFamily for any other environment)"
        )
    return BODIES[env]
