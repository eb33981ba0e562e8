"""Task families for meta-reinforcement learning, as Gymnasium environments.

Importing this package registers its families with Gymnasium:

    gym.make("metarl/HalfCheetahVel-v0", velocity=1.5)
    gym.make_vec("metarl/HalfCheetahDir-v0", num_envs=8, direction=-1.0)

A keyword names a component of the task (a sequence of them in `make_vec`, one for each
sub-environment) or an option of the family. A task outside the range that training draws from is
taken as it is. Without the task, every reset draws one.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from envs import half_cheetah, meta_world, navigation  # noqa: F401  (they register their families)
from envs.family import (
    Finite,
    TaskDistribution,
    TaskFamily,
    Uniform,
    family_names,
    make_family,
    register,
)
from envs.gymnasium_family import GymnasiumFamily
from envs.mujoco_vector import MujocoFamily
from envs.vector import TaskVectorEnv

__all__ = [
    "Finite",
    "GymnasiumFamily",
    "MujocoFamily",
    "TaskDistribution",
    "TaskFamily",
    "TaskVectorEnv",
    "Uniform",
    "family_names",
    "make_family",
    "register",
]

GYMNASIUM_IDS = {
    "metarl/HalfCheetahDir-v0": "half-cheetah-dir",
    "metarl/HalfCheetahVel-v0": "half-cheetah-vel",
    "metarl/Navigation2D-v0": "navigation-2d",
}


def make_env(family: str, render_mode: str | None = None, **keywords: Any) -> gym.Env:
    """Entry point of `gym.make`: one environment of a family."""
    made, tasks = _family_and_tasks(family, 1, keywords)
    return made.make(None if tasks is None else tasks[0], render_mode=render_mode)


def make_vec_env(
    family: str,
    num_envs: int = 1,
    autoreset_mode: str = "NextStep",
    threads: int = 1,
    render_mode: str | None = None,
    **keywords: Any,
) -> TaskVectorEnv:
    """Entry point of `gym.make_vec`: num_envs environments of a family, one episode a task."""
    made, tasks = _family_and_tasks(family, num_envs, keywords)
    vector = made.make_vec(
        num_envs, 1, autoreset_mode=autoreset_mode, threads=threads, render_mode=render_mode
    )
    vector.set_tasks(tasks)
    return vector


def _family_and_tasks(
    name: str, count: int, keywords: dict[str, Any]
) -> tuple[TaskFamily, np.ndarray | None]:
    components = make_family(name).tasks.names
    goal = {key: keywords.pop(key) for key in list(keywords) if key in components}
    # One keyword for a task of several components, such as goal=(0.3, -0.2).
    joint = components[0].rsplit("_", 1)[0]
    if joint not in components and joint in keywords:
        goal = dict(
            zip(components, np.moveaxis(np.asarray(keywords.pop(joint)), -1, 0), strict=True)
        )
    family = make_family(name, **keywords)
    if not goal:
        return family, None
    columns = {key: np.broadcast_to(value, count) for key, value in goal.items()}
    rows = [{key: float(column[i]) for key, column in columns.items()} for i in range(count)]
    return family, np.stack([family.tasks.vector(row) for row in rows])


for _id, _family in GYMNASIUM_IDS.items():
    if _id not in gym.registry:
        gym.register(
            id=_id,
            entry_point="envs:make_env",
            vector_entry_point="envs:make_vec_env",
            kwargs={"family": _family},
        )
