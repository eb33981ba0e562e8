"""What is wrong with a task family, in words that say what to do.

`check_task_family` plays a few episodes and returns what it found, nothing where all is well. The
checks stand in `CHECKS`, in order; each builds on those before it, so the first that finds
something is the last that runs.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily, Tasks, Uniform, did_you_mean, make_family
from metarl.envs.gymnasium_family import GymnasiumFamily
from metarl.envs.traces import (
    EPISODES,
    Trace,
    all_equal,
    first_difference,
    play,
    play_together,
    random_actions,
)

MOST_COMPONENTS = 8  # of a task that are varied one by one

# What Gymnasium's checker warns of and is no fault here: infinite bounds of observations (MuJoCo's
# own), an action range other than +-1 (`--policy.action scale`), and being made by hand.
_NO_FAULT = re.compile("value is -?infinity|symmetric and normalized|alternative render modes")


@dataclass(frozen=True)
class Finding:
    """One fault of a family, and how to mend it."""

    check: str
    """A name in `CHECKS`."""
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def check_task_family(family: TaskFamily) -> list[Finding]:
    """Return what is wrong with a family; an empty list where all is well.

    Takes a second or a few: episodes of random actions here and in one worker process.
    """
    if not isinstance(family, TaskFamily):
        raise UserError(f"check_task_family takes a TaskFamily, got {type(family).__name__}")
    for name, (_, check) in CHECKS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Gymnasium's are heard in a check of their own
                found = [Finding(name, message) for message in check(family)]
        except Exception as error:  # a user's code may raise anything; the finding names it
            found = [Finding(name, _raised(error))]
        if found:
            return found
    return []


# The checks: each yields the messages of what it finds --------------------------------------------


def _tasks(family: TaskFamily) -> Iterator[str]:
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


def _environment(family: TaskFamily) -> Iterator[str]:
    env = _raw(family)
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
    env.close()


def _spaces(family: TaskFamily) -> Iterator[str]:
    tasks = family.tasks.grid(2, "train")
    one, other = family.make(tasks[0]), family.make(tasks[1])
    observation, action = one.observation_space, one.action_space
    if not isinstance(observation, gym.spaces.Box) or len(observation.shape) != 1:
        yield f"observations must be a flat Box, got {observation}"
    for space in _leaves(one.unwrapped.observation_space):
        if isinstance(space, gym.spaces.Box) and len(space.shape) > 1 and space.dtype == np.uint8:
            yield f"observations hold an image, {space}, which no policy here reads: leave it out"
    kinds = (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
    if not isinstance(action, (gym.spaces.Box, *kinds)) or len(action.shape or ()) > 1:
        yield f"actions must be a flat Box, Discrete, MultiDiscrete or MultiBinary, got {action}"
    vector = family.make_vec(2, 1, autoreset_mode=AutoresetMode.DISABLED)
    for kind, space in (("observation_space", observation), ("action_space", action)):
        if getattr(other, kind) != space:
            yield f"every task must have the same {kind}, got {space} and {getattr(other, kind)}"
        elif (together := getattr(vector, f"single_{kind}")) != space:
            yield f"make_vec must have the {kind} of make, which is {space}, got {together}"
    for env in (one, other, vector):
        env.close()


def _episodes(family: TaskFamily) -> Iterator[str]:
    for task in _example_tasks(family):
        env = family.make(task)
        trace = play(env, 0, random_actions(env.action_space, family.horizon))
        fault = _fault(trace, env.observation_space, family.horizon)
        env.close()
        if fault:
            yield f"{fault} (task {_named(family, task)})"
            return


def _fault(trace: Trace, space: gym.Space, horizon: int) -> str | None:
    assert isinstance(space, gym.spaces.Box)
    for t, seen in enumerate(trace.observation):
        gives = "reset gives" if t == 0 else f"step {t} gives"
        if seen.shape != space.shape:
            return f"{gives} an observation of shape {seen.shape}, the space says {space.shape}"
        if not np.can_cast(seen.dtype, space.dtype):
            return (
                f"{gives} {seen.dtype} observations, the space says {space.dtype}: return"
                f" np.asarray(observation, np.{space.dtype}), or declare the space so"
            )
        if not np.isfinite(seen).all():
            return f"{gives} an observation with {seen[~np.isfinite(seen)][0]} in it"
        for i in np.flatnonzero((seen < space.low) | (seen > space.high)):
            return (
                f"{gives} {seen[i]:g} as component {i} of the observation, outside the space's"
                f" [{space.low[i]:g}, {space.high[i]:g}]"
            )
    for t, reward in enumerate(trace.reward):
        if np.shape(reward) != ():
            return f"step {t + 1} gives a reward of shape {np.shape(reward)}: it must be a number"
        if not np.isfinite(reward):
            return f"step {t + 1} gives a reward of {reward}"
    steps = len(trace.reward)
    if trace.truncated and steps < horizon:
        return (
            f"the environment truncates an episode after {steps} steps, before the family's horizon"
            f" of {horizon}: set horizon={steps}, or lift the environment's own limit"
        )
    if not (trace.terminated or trace.truncated):
        return f"an episode goes on after the horizon of {horizon} steps"
    return None


def _seeding(family: TaskFamily) -> Iterator[str]:
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
            f" differ after {t} steps; reset must set back all that step changes"
        )
    env.close()
    other.close()


def _gymnasium(family: TaskFamily) -> Iterator[str]:
    env = _raw(family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=True, skip_close_check=True)
        except AssertionError as error:
            yield f"gymnasium.utils.env_checker.check_env says: {error}"
    for warning in caught:
        text = re.sub(r"\x1b\[\d+m|WARN: ", "", str(warning.message))
        if not _NO_FAULT.search(text):
            yield f"gymnasium.utils.env_checker.check_env warns: {text}"
    env.close()


def _batch(family: TaskFamily) -> Iterator[str]:
    tasks = _example_tasks(family)
    for task, together in zip(tasks, play_together(family, tasks), strict=True):
        env = family.make(task)
        for seed in range(EPISODES):
            alone = play(env, seed, random_actions(env.action_space, family.horizon, seed))
            # Vectorised functions may round otherwise on another number of rows.
            difference = alone.first_difference(together[seed], tolerance=1e-5)
            if difference is not None:
                yield (
                    f"{difference[0]} of make_vec differ from those of make after {difference[1]}"
                    f" steps of task {_named(family, task)}: a row that a vectorised function"
                    " returns must depend on that row alone (task[:, 0], not task[0])"
                )
                return
        env.close()


def _dependence(family: TaskFamily) -> Iterator[str]:
    tasks = _example_tasks(family)
    if all_equal(play_together(family, tasks)):
        yield _why_equal(family, tasks)
    elif isinstance(family.tasks, Uniform) and 1 < family.tasks.dim <= MOST_COMPONENTS:
        for i, name in enumerate(family.tasks.names):
            pair = np.repeat(family.tasks.grid(1, "train"), 2, axis=0)
            pair[:, i] = [bound[i] for bound in family.tasks.bounds()]
            if all_equal(play_together(family, pair)):
                yield (
                    f"{name} changes neither observations nor rewards, from {pair[0, i]:g} to"
                    f" {pair[1, i]:g}: use it, or leave it out of the task"
                )


def _why_equal(family: TaskFamily, tasks: Tasks) -> str:
    same = "observations and rewards are the same for every task"
    if not isinstance(family, GymnasiumFamily):
        return f"{same} under random actions: nothing in step depends on the task"
    if family.reward is not None or family.keywords:
        what = "reward does" if family.reward is not None else "the keyword arguments do"
        return f"{same} under random actions: what {what} must depend on the task"
    late = []  # the task put in after the reset, where it cannot be lost at it
    for task in tasks:
        env = family.make_bare()
        family.put(env, tasks[0])
        actions = random_actions(env.action_space, family.horizon)
        late.append([play(env, 0, actions, after_reset=partial(family.put, env, task))])
    if not all_equal(late):
        return (
            f"the task is lost at reset: {same}, but not if it is put in after the reset; reset"
            " must leave alone what set_task has set"
        )
    env = family.make_bare()
    known = set(vars(env.unwrapped))
    family.put(env, tasks[0])
    for made in sorted(set(vars(env.unwrapped)) - known):
        return (
            f"{same}: set_task makes a new attribute {made!r}, which the environment does not"
            f" read{did_you_mean(made, known)}"
        )
    return f"{same} under random actions: nothing in step depends on what set_task sets"


def _pickling(family: TaskFamily) -> Iterator[str]:
    if family.source is not None:
        return  # what cannot be sent, a worker makes anew by the family's name
    parts = {f.name: getattr(family, f.name) for f in fields(family)}
    for name, part in {**parts, "the family": family}.items():
        try:
            pickle.dumps(part)
        except Exception as error:  # PicklingError, AttributeError, TypeError, the user's own
            yield (
                f"{name} cannot be sent to a worker process ({error}): let it be made of functions"
                " and classes at the top level of a module, without lambda or nested def"
            )
            return


def _worker(family: TaskFamily) -> Iterator[str]:
    tasks = _example_tasks(family)
    try:
        sent = pickle.dumps(family)
    except Exception:  # as in the check before, which lets this pass
        sent = pickle.dumps(family.source)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            there = pool.submit(_play_there, sent, tasks).result()
    except BrokenProcessPool:
        yield "a worker process died of it; what it printed may say why"
        return
    except RuntimeError as error:
        if "bootstrapping" not in str(error):
            raise
        yield (
            "worker processes import the script that starts them: what it does must stand under"
            " if __name__ == '__main__':"
        )
        return
    if all_equal(there):
        yield (
            "the task is lost on the way to a worker process, where every task plays the same:"
            " set_task and reward must find all they need in the family or in their module"
        )
    elif (difference := first_difference(play_together(family, tasks), there)) is not None:
        i, kind, t = difference
        yield (
            f"{kind} differ in a worker process after {t} steps of task {_named(family, tasks[i])}:"
            " set_task and reward must find all they need in the family or in their module"
        )


def _play_there(sent: bytes, tasks: Tasks) -> list[list[Trace]]:
    try:
        family = pickle.loads(sent)
        if not isinstance(family, TaskFamily):
            name, options = family
            family = make_family(name, **options)
        return play_together(family, tasks)
    except Exception as error:  # whose traceback stays behind
        raise UserError(f"in a worker process, {_raised(error)}") from None


CHECKS: dict[str, tuple[str, Callable[[TaskFamily], Iterator[str]]]] = {
    "tasks": ("drawn by the generator they are given, finite, not all the same", _tasks),
    "environment": ("can be made, reset and stepped", _environment),
    "spaces": ("are flat, and the same for every task", _spaces),
    "episodes": ("are finite, within the spaces, and end at the horizon", _episodes),
    "seeding": ("the same seed and actions give the same episode", _seeding),
    "gymnasium": ("check_env passes", _gymnasium),
    "batch": ("make_vec plays what make plays", _batch),
    "dependence": ("observations or rewards depend on the task", _dependence),
    "pickling": ("the family can be sent to a worker process", _pickling),
    "worker": ("plays the same there", _worker),
}
"""What is checked, in order: name, words, and the messages of what it finds."""


# What the checks share ----------------------------------------------------------------------------


def _raw(family: TaskFamily) -> gym.Env:
    """Return the environment that the user wrote, with a task put in."""
    task = family.tasks.grid(1, "train")[0]
    if isinstance(family, GymnasiumFamily):
        env = family.make_bare(None, task)
        family.put(env, task)
        return env.unwrapped
    env = family.make(task)
    if not isinstance(env, gym.Env):
        raise UserError(f"make must return a gymnasium.Env, got {type(env).__name__}")
    return env.unwrapped


def _example_tasks(family: TaskFamily) -> Tasks:
    drawn = family.tasks.sample(np.random.default_rng(0), 2)
    return np.concatenate([family.tasks.grid(2, "train"), drawn])


def _leaves(space: gym.Space) -> Iterator[gym.Space]:
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        for inner in space.values() if isinstance(space, gym.spaces.Dict) else space:
            yield from _leaves(inner)
    else:
        yield space


def _named(family: TaskFamily, task: NDArray) -> str:
    pairs = [f"{n}={x:g}" for n, x in zip(family.tasks.names, task, strict=True)]
    return ", ".join(pairs[:4]) + (", …" if len(pairs) > 4 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _raised(error: Exception) -> str:
    """Say what was raised and where, in the nearest file that is no library's."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    installed = ("-packages", os.path.dirname(os.__file__), os.path.dirname(__file__))
    own = [f for f in frames if not any(place in f.filename for place in installed)]
    frame = (own or frames)[-1]
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name}"
    return f"{type(error).__name__}: {error} ({where})"
