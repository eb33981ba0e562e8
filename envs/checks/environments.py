"""Checks of a family's tasks, spaces and episodes.

Each check yields messages of its findings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from metarl.envs.checks.traces import (
    Doubt,
    Trace,
    close,
    example_tasks,
    named_task,
    play,
    random_actions,
)
from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily
from metarl.envs.gymnasium.observations import fits, misfit, structure_of
from metarl.envs.gymnasium.step_results import plain_step
from metarl.envs.policy_spaces import check_pixels, check_policy_spaces
from metarl.envs.seeds import training_seeds

LARGEST_VECTOR = 10_000
"""Size of a flat observation above which an MLP deserves a warning."""

IN_A_ROW = 3
"""Episodes of the first task that are played in one environment, as in `adapt`."""

LEAST_WITHIN, WIDEST = 0.1, 10.0
"""Limits of an action's range; a new policy's actions have mean 0 and standard deviation 1.

The range should contain at least this share of them, and half its width should be at most WIDEST.
"""


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
            yield (
                "tasks.sample gives other tasks with a generator of the same seed: it must draw"
                " only from the given generator, and depend on nothing else"
            )
            return
        if not np.array_equal(grid, tasks.grid(16, split), equal_nan=True):
            yield "tasks.grid gives other tasks at the second call: it must return the same tasks"
            return
        if split == "train" and np.all(drawn == drawn[0]):
            yield "all training tasks are the same: there is nothing to adapt to"


def check_spaces(family: TaskFamily) -> Iterator[str]:
    tasks = family.tasks.grid(2, "train")
    one, other = family.make(tasks[0]), family.make(tasks[1])
    observation, action = one.observation_space, one.action_space
    try:
        check_policy_spaces(family.name, observation, action)
    except UserError as error:
        yield str(error)
    structure = structure_of(one)
    try:
        check_pixels(family.name, structure)
    except UserError as error:
        # A user's network may read the components of a Dict or Tuple.
        yield str(error) if isinstance(structure, gym.spaces.Box) else Doubt(error)
    size = observation.shape[0] if observation.shape and len(observation.shape) == 1 else 0
    if size > LARGEST_VECTOR:
        yield Doubt(
            f"observations are {size:,} numbers for an MLP; if they include an image, return only"
            " the image as uint8 with a wrapper, so that a convolutional network reads it"
        )
    if isinstance(action, gym.spaces.Box):
        yield from _range_of_actions(action)
    vector = family.make_vec(2, 1, autoreset_mode=AutoresetMode.DISABLED)
    for kind, space in (("observation_space", observation), ("action_space", action)):
        if getattr(other, kind) != space:
            yield f"every task must have the same {kind}, got {space} and {getattr(other, kind)}"
        elif (together := getattr(vector, f"single_{kind}")) != space:
            yield f"make_vec must have the {kind} of make, which is {space}, got {together}"
    for env in (one, other, vector):
        close(env)


def _range_of_actions(space: gym.spaces.Box) -> Iterator[str]:
    """Yield findings about bounds that leave no choice or do not suit a policy's first actions."""
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    if not low.size:
        return
    if wrong := np.flatnonzero(~(low <= high)).tolist():
        yield f"the bounds of action {wrong[0]} are [{low[wrong[0]]:g}, {high[wrong[0]]:g}]"
        return
    locked = low == high
    if locked.all():
        yield (
            f"the bounds of every action are equal, {space}: the environment receives the same"
            " action whatever a policy does; declare the range, or -inf and inf if it has none"
        )
        return
    for i in np.flatnonzero(locked).tolist():
        yield Doubt(
            f"the bounds of action {i} are equal: it is always {low[i]:g}, and the policy's samples"
            " for it only add noise to the gradient; declare its range, or remove it with a"
            " wrapper"
        )
    half = 0.5 if np.issubdtype(space.dtype, np.integer) else 0.0  # whole numbers are rounded to
    for i in np.flatnonzero(~locked).tolist():
        within = _below(high[i] + half) - _below(low[i] - half)
        bounds = f"the bounds of action {i} are [{low[i]:g}, {high[i]:g}]"
        if within < LEAST_WITHIN:
            yield Doubt(
                f"{bounds}: a new policy's actions are about 1 in size, and {1 - within:.0%} of"
                " them are clipped; train with --policy.action scale, which maps [-1, 1] onto"
                " finite bounds"
            )
        elif WIDEST < 0.5 * (high[i] - low[i]) < np.inf:
            yield Doubt(
                f"{bounds}: a new policy's actions are about 1 in size, a small part of this range;"
                " train with --policy.action scale, which maps [-1, 1] onto the bounds"
            )
        else:
            continue
        return  # report only one action


def _below(x: float) -> float:
    """Return the probability that a standard normal number is below x."""
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def check_episodes(family: TaskFamily) -> Iterator[str]:
    doubted = False
    for i, task in enumerate(example_tasks(family)):
        env = family.make(task)
        episodes = IN_A_ROW if i == 0 else 1
        doubts: list[str] = []
        for e, seed in enumerate(training_seeds(episodes, task=i)):
            trace = play(env, seed, random_actions(env.action_space, family.horizon, e))
            after = f", episode {e + 1} of one environment" if e else ""
            for fault in _faults(trace, env.observation_space, family.horizon):
                said = type(fault)(f"{fault} (task {named_task(family, task)}{after})")
                if not isinstance(fault, Doubt):
                    yield said
                    return
                if e == 0:
                    doubts.append(said)
        close(env)
        if not doubted:  # report warnings only once
            yield from doubts
        doubted |= bool(doubts)


def _faults(trace: Trace, space: gym.Space, horizon: int) -> Iterator[str]:
    """Yield the faults of an episode in order, and each kind of doubt once."""
    assert isinstance(space, gym.spaces.Box)
    converted = outside = False
    for t, seen in enumerate(trace.observation):
        gives = "reset gives" if t == 0 else f"step {t} gives"
        if seen.shape != space.shape:
            yield f"{gives} an observation of shape {seen.shape}, but the space has {space.shape}"
        if not fits(seen, space):
            yield f"{gives} {misfit(seen, space)}"
        if not converted and (becomes := conversion(seen, space)) is not None:
            converted = True
            yield Doubt(f"{gives} {becomes}")
        if not np.isfinite(seen).all():
            yield f"{gives} an observation that contains {seen[~np.isfinite(seen)][0]}"
        for i in np.flatnonzero((seen < space.low) | (seen > space.high)):
            if outside:
                break
            outside = True
            yield Doubt(
                f"{gives} {seen.flat[i]:g} as component {i} of the observation, outside the"
                f" space's [{space.low.flat[i]:g}, {space.high.flat[i]:g}]: observations are not"
                " clipped, so policies see this value; declare a wider space if it is yours"
            )
    for t, (reward, flags) in enumerate(zip(trace.reward, trace.flags, strict=True)):
        try:
            paid, *_ = plain_step(reward, *flags, trace.info[t + 1])
        except UserError as error:
            yield f"step {t + 1}: {error}"
            return
        if not np.isfinite(paid):
            yield f"step {t + 1} gives a reward of {paid}"
    steps = len(trace.reward)
    if trace.truncated and steps < horizon:
        yield Doubt(
            f"the environment truncates an episode after {steps} steps, before the family's horizon"
            f" of {horizon}: if this is its time limit, set horizon={steps}, or raise the limit;"
            " if it truncates for another reason, ignore this"
        )
    if not (trace.terminated or trace.truncated):
        yield f"an episode continues after the horizon of {horizon} steps"


def conversion(seen: NDArray[Any], space: gym.Space) -> str | None:
    """Describe the conversion of observations to their space's type, or return None."""
    if space.dtype is None or np.can_cast(seen.dtype, space.dtype):
        return None
    return (
        f"{seen.dtype} observations, which are converted to {space.dtype} as the space declares;"
        f" return np.asarray(observation, np.{space.dtype}) if this is intended"
    )
