"""Checks of state that episodes and copies of an environment share, and of seeding.

Each check yields messages of its findings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from metarl.envs.checks.global_generators import watched
from metarl.envs.checks.traces import (
    LONGEST,
    Doubt,
    Trace,
    close,
    outermost,
    play,
    play_beside,
    random_actions,
)
from metarl.envs.family import TaskFamily
from metarl.envs.seeds import foreign_seed, training_seeds

CONSEQUENCE = "results then depend on the number of workers, threads and tasks"


def check_seeding(family: TaskFamily) -> Iterator[str]:
    task = family.tasks.grid(1, "train")[0]
    seed = training_seeds(1)[0]
    env, other = family.make(task), family.make(task)
    actions = random_actions(env.action_space, family.horizon)
    with watched() as used:
        first, fresh, again = (play(e, seed, actions) for e in (env, other, env))
    if (difference := first.first_difference(fresh)) is not None:
        yield unseeded(difference, used)
    elif (difference := first.first_difference(again)) is not None:
        kind, t = difference
        yield (
            f"an episode depends on earlier episodes: with the same seed and actions, {kind}"
            f" differ after {t} steps{_and_uses(used)}; reset must restore all state that step"
            " changes (if the environment is not yours, restore it in the reset of a wrapper, or"
            " make a new environment there)"
        )
    elif (name := _info_difference(first, fresh)) is not None:
        yield Doubt(
            f"info[{name!r}] differs with the same seed and actions: a reward, `achieved` or"
            " success that reads it is not reproducible; everything else is"
        )
    close(env)
    close(other)


def unseeded(difference: tuple[str, int], used: Iterable[str]) -> str:
    """Return the message that equal seeds and actions gave different episodes, with causes."""
    kind, t = difference
    where = f"step {t}" if t else "reset"
    return (
        f"the same seed and actions gave different {kind} at {where}{_and_uses(used)}; draw all"
        " random numbers from self.np_random, which super().reset(seed=seed) seeds; other possible"
        " causes are state that outlives the episode, the clock, or another process"
    )


def _and_uses(used: Iterable[str]) -> str:
    names = _listed(used)
    return f", and the environment uses the global generator of {names}" if names else ""


def _listed(used: Iterable[str]) -> str:
    return " and of ".join(sorted(used))


def _info_difference(one: Trace, other: Trace) -> str | None:
    """Return the first numeric entry of info that differs between equal episodes."""
    for mine, theirs in zip(one.info, other.info, strict=False):
        for name in mine.keys() & theirs.keys():
            a, b = np.asarray(mine[name]), np.asarray(theirs[name])
            numeric = a.dtype.kind in "biuf" and b.dtype.kind in "biuf"
            if numeric and (a.shape != b.shape or not np.allclose(a, b, equal_nan=True)):
                return name
    return None


def check_copies(family: TaskFamily) -> Iterator[str]:
    """Play two copies in turn, then close one and play the other again."""
    tasks = family.tasks.grid(2, "train")
    seeds = training_seeds(2)
    with contextlib.ExitStack() as stack:
        one = family.make(tasks[0])
        stack.callback(close, one)
        pairs = action_pairs(one.action_space, min(family.horizon, LONGEST))
        mine = [action for action, _ in pairs]
        with watched() as used:
            alone = play(one, seeds[0], mine)  # before there is another copy
        other = family.make(tasks[1])
        together = play_beside(one, other, (seeds[0], seeds[1]), pairs)
        close(other)
        if (difference := alone.first_difference(together)) is not None:
            yield shared(difference, used)
            return
        if _share_info(family):
            yield (
                "two copies return the same info dictionary, so rewards and measures of one copy"
                " are read from the other; return a new dictionary at every step"
            )
        if (difference := alone.first_difference(play(one, seeds[0], mine))) is not None:
            yield (
                f"{difference[0]} of one copy differ after {difference[1]} steps once another copy"
                " was made, played and closed: copies must not share state, such as a module-level"
                f" object or a class attribute; {CONSEQUENCE}"
            )


def _share_info(family: TaskFamily) -> bool:
    """Return whether two environments without metarl's wrappers return the same dictionary."""
    infos, seed = [], training_seeds(1)[0]
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            env = outermost(family)
            stack.callback(close, env)
            env.reset(seed=foreign_seed(seed))
            infos.append(env.step(random_actions(env.action_space, 1)[0])[4])
    return infos[0] is infos[1]


def action_pairs(space: gym.Space, steps: int) -> list[tuple[Any, Any]]:
    """Return random actions of two copies."""
    return list(zip(random_actions(space, steps, 0), random_actions(space, steps, 1), strict=True))


def shared(difference: tuple[str, int], used: Iterable[str]) -> str:
    """Return the message that two copies affect each other, with the shared state if known."""
    kind, t = difference
    where = f"step {t}" if t else "reset"
    seen = (
        f"two copies stepped in turn give other {kind} at {where} than a single copy: they share"
        " state"
    )
    if names := _listed(used):
        return (
            f"{seen}, and the environment uses the global generator of {names}, which all copies"
            " share; draw from self.np_random, which super().reset(seed=seed) seeds;"
            f" {CONSEQUENCE}"
        )
    return (
        f"{seen}; possible causes are a module-level object such as a simulator, a class attribute"
        " that reset, step or set_task changes, or a generator that all copies use; give each"
        f" copy its own; {CONSEQUENCE}"
    )
