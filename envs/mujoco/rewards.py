"""Components of task rewards: velocities, costs, directions and goals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarl.envs.mujoco.simulation import Reward, Sim, Step
from metarl.envs.tasks import Finite
from metarl.envs.vector import Floats

UNITS = {
    "velocity": "m/s", "x_velocity": "m/s",
    "goal_x": "m", "goal_y": "m", "x_position": "m", "y_position": "m",
}  # fmt: skip


def root_x(sim: Sim) -> Floats:
    """Return the forward position of the root, m."""
    return sim.qpos[:, 0].copy()


def forward_velocity(step: Step) -> Floats:
    """Return the forward velocity of the root over the step, m/s; `track` must be `root_x`."""
    return (step.column(step.sim.qpos, 0) - step.each(step.before)) / step.dt


def centre_of_mass(sim: Sim) -> Floats:
    """Return the centre of mass, [simulations, 3]; needs `add_centre_of_mass` and a stage."""
    return sim["sensordata"][:, :3]


def centre_of_mass_velocity(step: Step) -> Floats:
    """Return the forward velocity of the centre of mass in the new state, m/s; needs the same."""
    return step.column(step.sim["sensordata"].copy(), 3)  # a view of the simulations' memory


def costs_and_bonus(
    step: Step, *, control: float, contact: float = 0.0, bonus: float | NDArray[Any] = 0.0
) -> Reward:
    """Return bonus - control |a|^2 - contact |clip(cfrc_ext, -1, 1)|^2; a is the applied action."""
    action = step.action.astype(np.float64)
    # np.add.reduce is what the method sum calls.
    cost = control * step.each(np.add.reduce(action * action, axis=1))
    info = {"reward_ctrl": -cost}
    if contact:
        clipped = np.minimum(np.maximum(step.sim["cfrc_ext"], -1.0), 1.0)
        forces = step.each(np.add.reduce(np.square(clipped), axis=(1, 2)))
        info["reward_contact"] = -contact * forces
        cost = cost + contact * forces
    return bonus - cost, info


def direction_reward(
    step: Step, velocity: Callable[[Step], Floats] = forward_velocity, **weights: float
) -> Reward:
    """Return d v - costs + bonus; d is the task's direction (Finn et al. 2017)."""
    speed = velocity(step)
    rest, info = costs_and_bonus(step, **weights)
    return step.column(step.task, 0) * speed + rest, {"x_velocity": speed, **info}


def velocity_reward(
    step: Step, velocity: Callable[[Step], Floats] = forward_velocity, **weights: float
) -> Reward:
    """Return -|v - g| - costs + bonus; g is the task's goal velocity (Finn et al. 2017)."""
    speed = velocity(step)
    rest, info = costs_and_bonus(step, **weights)
    return -abs(speed - step.column(step.task, 0)) + rest, {"x_velocity": speed, **info}


def direction_tasks(balanced: bool) -> Finite:
    """Return the tasks forwards (1) and backwards (-1), drawn independently or equally often.

    A batch of independent draws usually has more tasks of one direction, which pushes all policies
    that way. This is noise, but it can help a run over the plateau where no policy adapts yet.
    """
    return Finite(("direction",), [[-1.0], [1.0]], balanced=balanced)
