"""Task families for meta-reinforcement learning, as Gymnasium environments.

Importing this package registers its families with Gymnasium:

    gym.make("metarl/HalfCheetahVel-v0", velocity=1.5)
    gym.make_vec("metarl/HalfCheetahDir-v0", num_envs=8, direction=-1.0)

A keyword names a component of the task or an option of the family. In `make_vec` a component may be
a sequence with one value for each sub-environment. A task outside the training range is accepted.
Without a task, every reset draws one. `max_episode_steps` sets the horizon.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs import registration

from metarl.envs import families, supervised
from metarl.envs.checks.checker import Finding, check_task_family
from metarl.envs.errors import UnexpectedKeyword, UserError, check_whole
from metarl.envs.family import TaskFamily
from metarl.envs.gymnasium.family import GymnasiumFamily
from metarl.envs.mujoco.family import MujocoFamily
from metarl.envs.registry import family_names, keywords_of, make_family, register
from metarl.envs.supervised.family import FunctionFamily, SupervisedFamily
from metarl.envs.supervised.few_shot import FewShotFamily
from metarl.envs.tasks import Finite, TaskDistribution, Uniform
from metarl.envs.trials import TrialFamily
from metarl.envs.vector import TaskVectorEnv

__all__ = [
    "FewShotFamily",
    "Finding",
    "Finite",
    "FunctionFamily",
    "GymnasiumFamily",
    "MujocoFamily",
    "SupervisedFamily",
    "TaskDistribution",
    "TaskFamily",
    "TaskVectorEnv",
    "TrialFamily",
    "Uniform",
    "UserError",
    "check_task_family",
    "family_names",
    "make_family",
    "register",
]


_SIZE = ("width", "height")


def make_env(family: str, render_mode: str | None = None, **keywords: Any) -> gym.Env[Any, Any]:
    """Entry point of `gym.make`: one environment of a family."""
    asked, limit = _limits()
    made, tasks = _family_and_tasks(family, 1, keywords, asked)
    if limit is not None and made.horizon > max(limit, asked or 0):
        raise UserError(
            f"{family}: episodes of {made.horizon} steps, but gym.make ends them after {limit};"
            f" give max_episode_steps={made.horizon}"
        )
    mode = None if render_mode is None else render_mode.removesuffix("_list")
    env = made.make(None if tasks is None else tasks[0], render_mode=mode)
    # gym.make adds this wrapper by itself only to classes, which list their modes.
    return env if mode == render_mode else gym.wrappers.RenderCollection(env)


def make_vec_env(
    family: str,
    num_envs: int = 1,
    autoreset_mode: str = "NextStep",
    threads: int = 1,
    render_mode: str | None = None,
    max_episode_steps: int | None = None,
    **keywords: Any,
) -> TaskVectorEnv:
    """Entry point of `gym.make_vec`: num_envs environments of a family, one for each task."""
    asked, limit = _limits()
    if max_episode_steps != limit:
        asked = max_episode_steps
    made, tasks = _family_and_tasks(family, num_envs, keywords, asked)
    vector = made.make_vec(
        num_envs, 1, autoreset_mode=autoreset_mode, threads=threads, render_mode=render_mode
    )
    vector.set_tasks(tasks)
    return vector


def _limits() -> tuple[int | None, int | None]:
    """Return the `max_episode_steps` of the call of `gym.make` or `make_vec`, and the default.

    `gym.make` does not pass it on, and `make_vec` passes on the default too.
    """
    caller = sys._getframe(2)
    spec = caller.f_locals.get("env_spec")
    if caller.f_globals.get("__name__") != registration.__name__ or spec is None:
        return None, None
    registered = gym.registry.get(spec.id)
    limit = None if registered is None else registered.max_episode_steps
    given = {**caller.f_locals.get("kwargs", {}), **caller.f_locals}
    asked = given.get("max_episode_steps")
    if asked is None and spec.max_episode_steps != limit:  # a changed or loaded specification
        asked = spec.max_episode_steps
    return asked, limit


def _family_and_tasks(
    name: str, count: int, keywords: dict[str, Any], horizon: int | None
) -> tuple[TaskFamily, np.ndarray | None]:
    """Return a family and the tasks that the keywords give, [count, task_dim], or None.

    Raises:
        UserError: a value is wrong.
        UnexpectedKeyword: a keyword is unknown.
    """
    components = make_family(name).tasks.names
    goal = {key: keywords.pop(key) for key in list(keywords) if key in components}
    # One keyword for a task of several components, such as goal=(0.3, -0.2).
    joint = components[0].rsplit("_", 1)[0]
    if joint not in components and joint in keywords:
        whole = _numbers(joint, keywords.pop(joint))
        if whole.shape[-1:] != (len(components),):
            raise UserError(
                f"{joint} must have {len(components)} numbers"
                f" ({', '.join(components)}), got {whole.tolist()}"
            )
        goal = dict(zip(components, np.moveaxis(whole, -1, 0), strict=True))
    options = keywords_of(name)
    changes = {key: keywords.pop(key) for key in _SIZE if key in keywords}
    for key in keywords:
        if options is not None and key not in options:
            raise UnexpectedKeyword.of(name, key, [*components, *options, *_SIZE])
    if horizon is not None:
        check_whole("max_episode_steps", horizon, 1)
        if keywords.get("horizon") not in (None, horizon):
            raise UserError(
                f"horizon={keywords['horizon']} and max_episode_steps={horizon} differ; give one"
            )
        changes["horizon"] = horizon
    family = make_family(name, **keywords)
    for key in changes:
        if not hasattr(family, key):
            raise UnexpectedKeyword.of(name, key, [*components, *(options or ())])
    family = dataclasses.replace(family, **changes)
    if not goal:
        return family, None
    columns = {key: _column(key, value, count) for key, value in goal.items()}
    rows = [{key: float(column[i]) for key, column in columns.items()} for i in range(count)]
    return family, np.stack([family.tasks.vector(row) for row in rows])


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be a number, got {value!r}") from error


def _column(name: str, value: Any, count: int) -> np.ndarray:
    column = _numbers(name, value)
    if column.shape not in ((), (count,)):
        each = "a number" if count == 1 else f"a number or {count} of them"
        raise UserError(f"{name} must be {each}, got {value!r}")
    return np.broadcast_to(column, count)


for _package in (families, supervised):  # importing a module registers its families
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")
