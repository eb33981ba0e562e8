"""Tasks that vary a body's masses, inertias, dampings and frictions."""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.tasks import Tasks, Uniform

# Field, name of its components, and base of the multiplier.
_SCALED = (
    ("body_mass", "mass", 1.5),
    ("body_inertia", "inertia", 1.5),
    ("dof_damping", "damping", 1.3),
    ("geom_friction", "friction", 1.5),
)


def parameter_tasks(model: mujoco.MjModel, limit: float) -> Uniform:
    """Return exponents in [-limit, limit], one for each nonzero parameter of the model.

    The parameters are the masses and inertias of bodies, dampings of joints and frictions of
    geoms (rand_param_envs of Rothfuss et al. 2019 and Rakelly et al. 2019).
    """
    names = []
    for field, word, _ in _SCALED:
        for index in np.argwhere(getattr(model, field)):
            owner = {
                "body": model.body,
                "dof": lambda i: model.joint(model.dof_jntid[i]),
                "geom": model.geom,
            }[field.partition("_")[0]](int(index[0])).name
            axes = ("slide", "spin", "roll") if word == "friction" else "xyz"
            names.append("_".join([word, owner] + [axes[i] for i in index[1:]]))
    return Uniform(dict.fromkeys(names, (-limit, limit)))


def scaled_parameters(model: mujoco.MjModel, tasks: Tasks) -> dict[str, NDArray[Any]]:
    """Return the model's fields under tasks of `parameter_tasks`, [tasks, ...] each.

    A damping is multiplied by 1.3^u and any other parameter by 1.5^u; u is its component.
    """
    fields, start = {}, 0
    for field, _, base in _SCALED:
        stock = getattr(model, field)
        varied = np.flatnonzero(stock)
        values = np.repeat(stock.reshape(1, -1), len(tasks), axis=0)
        # Contiguous, so that the last bit of a power does not depend on the number of tasks.
        exponent = np.ascontiguousarray(tasks[:, start : start + len(varied)])
        values[:, varied] *= np.power(base, exponent)
        fields[field] = values.reshape(len(tasks), *stock.shape)
        start += len(varied)
    return fields
