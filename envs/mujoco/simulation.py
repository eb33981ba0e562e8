"""Arguments of functions over all simulations (`Sim`, `Step`), and loading of models."""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import UserError
from metarl.envs.vector import Floats


@dataclass(frozen=True)
class Sim:
    """State of all simulations; arrays are live and read-only, [simulations, ...]."""

    qpos: Floats
    """Generalized positions, [simulations, nq]."""
    qvel: Floats
    """Generalized velocities, [simulations, nv]."""
    derived: Mapping[str, NDArray[Any]]
    """The family's `fields`, by name, [simulations, ...] each."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a derived field of MjData, such as sim["xpos"].

        Raises:
            UserError: the field is not among the family's fields.
        """
        if name not in self.derived:
            raise UserError(f"sim[{name!r}] is missing; add {name!r} to the family's fields")
        return self.derived[name]


class Step(NamedTuple):
    """One step of all simulations, the argument of a reward; arrays are [simulations, ...]."""

    sim: Sim
    """State after the step."""
    before: Floats
    """Result of the family's `track` before the step."""
    action: NDArray[np.float32]
    """Applied action: scaled and clipped to the actuators' bounds."""
    task: Floats
    """Tasks, [simulations, task_dim]."""
    dt: float
    """Simulated time of a step, in seconds."""
    numbers: bool = False
    """Whether there is one simulation, and the reward may be a number instead of an array."""

    def each(self, values: NDArray[Any]) -> Any:
        """Return values [n], or the number of the only simulation, which is faster."""
        return values.item() if self.numbers else values

    def column(self, values: NDArray[Any], i: int) -> Any:
        """Return values[:, i], or the number of the only simulation."""
        return values.item(0, i) if self.numbers else values[:, i]


Reward = tuple[Floats, dict[str, Any]]  # [simulations], and info arrays


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view of an array that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def control_bounds(model: mujoco.MjModel) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the smallest and the largest control of each actuator, [nu] both.

    For an actuator without `ctrlrange`, MuJoCo stores zeros, which it does not apply.
    """
    low, high = model.actuator_ctrlrange.astype(np.float32).T
    limited = model.actuator_ctrllimited.astype(bool)
    return np.where(limited, low, -np.inf), np.where(limited, high, np.inf)


def _ignore(message: str) -> None:
    """Ignore a warning."""


def load_model(xml: str, edit: Callable[[mujoco.MjSpec], None] | None = None) -> mujoco.MjModel:
    """Return the compiled model of a file: a path, or the name of one of Gymnasium's models.

    Raises:
        UserError: the file does not exist.
    """
    path = xml
    if not os.path.exists(path):
        assets = os.path.join(os.path.dirname(gym.__file__), "envs", "mujoco", "assets")
        path = os.path.join(assets, xml)
    if not os.path.exists(path):
        raise UserError(f"no model file {xml!r}, and Gymnasium has no model of that name")
    # MuJoCo prints its warnings and appends them to a log file in the current folder. `info`
    # reports divergences, and warnings about deprecated elements of stock models are irrelevant.
    mujoco.set_mju_user_warning(_ignore)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = mujoco.MjSpec.from_file(path)
        if edit is not None:
            edit(spec)
        return spec.compile()


def add_centre_of_mass(spec: mujoco.MjSpec) -> None:
    """Add sensors of the whole body's centre of mass and its velocity to the model."""
    for kind in (mujoco.mjtSensor.mjSENS_SUBTREECOM, mujoco.mjtSensor.mjSENS_SUBTREELINVEL):
        spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
