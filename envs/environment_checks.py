"""Checks of a family's tasks and of its environments, one at a time.

Each check yields the messages of what it finds.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily
from metarl.envs.gymnasium_family import GymnasiumFamily
from metarl.envs.observations import fits, is_image, misfit
from metarl.envs.traces import Doubt, Trace, close, example_tasks, named_task, play, random_actions

LARGEST_VECTOR = 10_000
"""Components of a flat observation beyond which a network of affine layers has a doubt."""

# What Gymnasium's checker warns of and is no fault here: infinite bounds of observations (MuJoCo's
# own), an action range other than +-1 (`--policy.action scale`), being made by hand or wrapped.
_NO_FAULT = re.compile(
    "value is -?infinity|symmetric and normalized|alternative render modes"
    "|different from the unwrapped version"
)


def check_tasks(family: TaskFamily) -> Iterator[str]:
    tasks = family.tasks
    if len(set(tasks.names)) != len(tasks.names):
        yield f"components must have different names, got {', '.join(tasks.names)}"
    for split in ("train", "test"):
        drawn, again = (tasks.sample(np.random.default_rng(0), 16, split) for _ in range(2))
        grid = tasks.grid(16, split)
        for kind, array in (("sample", drawn), ("grid", grid)):
            if np.shape(array) != (16, tasks.dim):
                yield (
                    f"tasks.{kind}(16) must have the shape (16, {tasks.dim}), a column for each of"
                    f" {', '.join(tasks.names)}, got {np.shape(array)}"
                )
                return
            if not np.isfinite(array).all():
                yield f"tasks.{kind} gives NaN or infinity in the {split} split"
        if not np.array_equal(drawn, again, equal_nan=True):
            yield "tasks.sample must draw from the generator that it is given, and nothing else"
            return
        if not np.array_equal(grid, tasks.grid(16, split), equal_nan=True):
            yield "tasks.grid must give the same tasks at every call"
            return
        if split == "train" and np.all(drawn == drawn[0]):
            yield "all training tasks are the same: there is nothing to adapt to"


def check_environment(family: TaskFamily) -> Iterator[str]:
    env = _outermost(family)
    parameters = inspect.signature(env.reset).parameters
    if not (
        {"seed", "options"} <= set(parameters)
        or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    ):
        yield (
            "reset must be declared reset(self, *, seed=None, options=None) and begin with"
            f" super().reset(seed=seed); it takes {', '.join(parameters) or 'nothing'}"
        )
        return
    result: Any = env.reset(seed=0)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        yield f"reset must return (observation, info), info a dictionary, got {_short(result)}"
        return
    result = env.step(random_actions(env.action_space, 1)[0])
    if not (isinstance(result, tuple) and len(result) == 5):
        yield (
            "step must return (observation, reward, terminated, truncated, info), got"
            f" {_short(result)}"
        )
    try:
        env.close()
    except Exception as error:  # the user's own
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        yield Doubt(f"close raises {text}: runs continue, but what it holds may stay open")


def check_spaces(family: TaskFamily) -> Iterator[str]:
    tasks = family.tasks.grid(2, "train")
    one, other = family.make(tasks[0]), family.make(tasks[1])
    observation, action = one.observation_space, one.action_space
    size = observation.shape[0] if observation.shape else 0
    flat = isinstance(observation, gym.spaces.Box) and len(observation.shape) == 1
    if not flat and not is_image(observation):
        yield f"observations must be a flat Box or one uint8 image, got {observation}"
    elif flat and size > LARGEST_VECTOR:
        yield Doubt(
            f"observations are {size:,} numbers for a network of affine layers; if"
            " an image is among them, let a wrapper give it alone, as uint8: a convolutional"
            " network then reads it"
        )
    several = (gym.spaces.Box, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
    flat = isinstance(action, several) and len(action.shape or ()) == 1
    if not flat and not isinstance(action, gym.spaces.Discrete):
        yield (
            "actions must be a flat Box, such as shape (1,), Discrete, a flat MultiDiscrete or"
            f" MultiBinary, got {action}: reshape actions in a wrapper"
            " (gym.wrappers.TransformAction)"
        )
        return
    vector = family.make_vec(2, 1, autoreset_mode=AutoresetMode.DISABLED)
    for kind, space in (("observation_space", observation), ("action_space", action)):
        if getattr(other, kind) != space:
            yield f"every task must have the same {kind}, got {space} and {getattr(other, kind)}"
        elif (together := getattr(vector, f"single_{kind}")) != space:
            yield f"make_vec must have the {kind} of make, which is {space}, got {together}"
    for env in (one, other, vector):
        close(env)


def check_episodes(family: TaskFamily) -> Iterator[str]:
    doubted = False
    for task in example_tasks(family):
        env = family.make(task)
        trace = play(env, 0, random_actions(env.action_space, family.horizon))
        close(env)
        doubts = []
        for fault in _faults(trace, env.observation_space, family.horizon):
            said = type(fault)(f"{fault} (task {named_task(family, task)})")
            if not isinstance(fault, Doubt):
                yield said
                return
            doubts.append(said)
        if not doubted:  # they are told once
            yield from doubts
        doubted |= bool(doubts)


def _faults(trace: Trace, space: gym.Space, horizon: int) -> Iterator[str]:
    """Give what is amiss with an episode, in order; each kind of doubt once."""
    assert isinstance(space, gym.spaces.Box)
    converted = outside = False
    for t, seen in enumerate(trace.observation):
        gives = "reset gives" if t == 0 else f"step {t} gives"
        if seen.shape != space.shape:
            yield f"{gives} an observation of shape {seen.shape}, the space says {space.shape}"
        if not fits(seen, space):
            yield f"{gives} {misfit(seen, space)}"
        if not converted and not np.can_cast(seen.dtype, space.dtype):
            converted = True
            yield Doubt(
                f"{gives} {seen.dtype} observations, and they become {space.dtype} as the space"
                f" says: return np.asarray(observation, np.{space.dtype}) if they should be that"
            )
        if not np.isfinite(seen).all():
            yield f"{gives} an observation with {seen[~np.isfinite(seen)][0]} in it"
        for i in np.flatnonzero((seen < space.low) | (seen > space.high)):
            if outside:
                break
            outside = True
            yield Doubt(
                f"{gives} {seen.flat[i]:g} as component {i} of the observation, outside the"
                f" space's [{space.low.flat[i]:g}, {space.high.flat[i]:g}]: nothing is cut to these"
                " bounds, so policies see it as it is; declare the space wider if it is yours"
            )
    for t, reward in enumerate(trace.reward):
        if np.shape(reward) != ():
            yield f"step {t + 1} gives a reward of shape {np.shape(reward)}: it must be a number"
        if not np.isfinite(reward):
            yield f"step {t + 1} gives a reward of {reward}"
    steps = len(trace.reward)
    if trace.truncated and steps < horizon:
        yield Doubt(
            f"the environment truncates an episode after {steps} steps, before the family's horizon"
            f" of {horizon}: if this is its limit of time, set horizon={steps}, or lift the limit;"
            " if it cuts for another reason, all is well"
        )
    if not (trace.terminated or trace.truncated):
        yield f"an episode goes on after the horizon of {horizon} steps"


def check_seeding(family: TaskFamily) -> Iterator[str]:
    task = family.tasks.grid(1, "train")[0]
    env, other = family.make(task), family.make(task)
    actions = random_actions(env.action_space, family.horizon)
    first, fresh, again = play(env, 7, actions), play(other, 7, actions), play(env, 7, actions)
    if (difference := first.first_difference(fresh)) is not None:
        kind, t = difference
        yield (
            f"the same seed and actions give other {kind} at {f'step {t}' if t else 'reset'}: draw"
            " all random numbers from self.np_random, which super().reset(seed=seed) seeds, and"
            " none from np.random or random"
        )
    elif (difference := first.first_difference(again)) is not None:
        kind, t = difference
        yield (
            f"an episode depends on the one before it: with the same seed and actions, {kind}"
            f" differ after {t} steps; reset must set back all that step changes (where the"
            " environment is not yours, let the reset of a wrapper do it, or make it anew)"
        )
    close(env)
    close(other)


def check_gymnasium(family: TaskFamily) -> Iterator[str]:
    env = _outermost(family)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=True, skip_close_check=True)
        except (AssertionError, gym.error.Error) as error:
            said = [str(error)]
    said += [re.sub(r"\x1b\[\d+m|WARN: ", "", str(warning.message)) for warning in caught]
    for text in dict.fromkeys(said):
        if not _NO_FAULT.search(text):
            yield Doubt(
                f"gymnasium.utils.env_checker.check_env says: {text.rstrip('.')}; nothing here"
                " depends on it, other libraries may"
            )
    close(env)


def _outermost(family: TaskFamily) -> gym.Env:
    """Return the environment as the user gives it, wrappers included, with a task put in."""
    task = family.tasks.grid(1, "train")[0]
    if not isinstance(family, GymnasiumFamily):
        env = family.make(task)
        if not isinstance(env, gym.Env):
            raise UserError(f"make must return a gymnasium.Env, got {type(env).__name__}")
        return env
    env = family.make_raw(None, task)
    while isinstance(env, _GYMNASIUMS_OWN):
        env = env.env
    family.apply_task(env, task)
    return env


_GYMNASIUMS_OWN = (
    gym.wrappers.TimeLimit,
    gym.wrappers.OrderEnforcing,
    gym.wrappers.PassiveEnvChecker,
)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
