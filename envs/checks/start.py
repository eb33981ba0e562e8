"""Quick part of `metarl check` for the start of a run.

A user's family is checked for a fraction of a second. The same seed must give the same episode, two
copies must not share state, and observations must have the type of their space. Setting a task must
do more than add an attribute. For this, two or three copies are made and closed. The global
generators are restored, so the run's random numbers do not change. An environment that fails here
also fails in the run, which reports the place; therefore nothing is reported here.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, MutableSequence
from typing import Any

import gymnasium as gym
from numpy.typing import NDArray

from metarl.envs import guard
from metarl.envs.checks.copies import action_pairs, shared, unseeded
from metarl.envs.checks.environments import conversion
from metarl.envs.checks.global_generators import kept, watched
from metarl.envs.checks.tasks import new_attribute
from metarl.envs.checks.traces import close, named_task, play, play_beside
from metarl.envs.errors import UserError, add_note
from metarl.envs.family import TaskFamily
from metarl.envs.gymnasium.family import GymnasiumFamily
from metarl.envs.registry import is_built_in
from metarl.envs.seeds import training_seeds
from metarl.envs.trials import TrialFamily
from metarl.envs.vector import PHASES, RESET, STEP

STEPS = 40
"""Largest number of steps of an episode."""

SECONDS = 0.5
"""Time limit for new work; the first episode may use a quarter of it."""

_log = logging.getLogger(__name__)


def warn_at_start(family: TaskFamily) -> None:
    """Log the findings of `start_findings`, one line each."""
    for finding in start_findings(family):
        log_finding(family, finding)


def log_finding(family: TaskFamily, finding: str) -> None:
    """Log a finding about a family."""
    name = family.source[0] if family.source is not None else family.name
    _log.warning("warning: %s: %s (run metarl check for more)", name, finding)


def start_findings(family: TaskFamily, progress: MutableSequence[int] | None = None) -> list[str]:
    """Return the faults of a family's environments that a quick check finds.

    Args:
        family: the family; families of this package are not checked.
        progress: as `TaskVectorEnv.progress`, for a reader in another process.

    Raises:
        UserError: the environments cannot be made, or return invalid values.
    """
    if isinstance(family, TrialFamily):
        family = family.base
    if family.source is not None and is_built_in(family.source[0]):
        return []
    found: list[str] = []
    progress = progress or [0, 0, -1]
    with guard.user_code(), kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.ExitStack() as closing:
            try:
                for finding in _look(family, closing, progress):
                    found.append(finding)
            except UserError:
                raise
            except Exception:  # the run raises it again, with its task and worker
                pass
            except BaseException as error:  # such as SystemExit
                add_note(error, f"{family.name}: in {PHASES[progress[1]]}")
                raise
        gc.collect()  # remains of a renderer could blacken the frames of later ones
    return found


def _look(
    family: TaskFamily, closing: contextlib.ExitStack, progress: MutableSequence[int]
) -> Iterator[str]:
    begin = time.monotonic()
    tasks, seeds = family.tasks.grid(2, "train"), training_seeds(2)

    def late(part: float = 1.0) -> bool:
        return time.monotonic() - begin > part * SECONDS

    def mark(phase: int) -> None:
        progress[:] = [progress[0] + 1, phase, -1]

    def marked(actions: Iterable[Any], part: float = math.inf) -> Iterator[Any]:
        for action in actions:
            mark(STEP)
            yield action
            if late(part):
                return

    def made(task: NDArray[Any]) -> gym.Env[Any, Any]:
        mark(0)
        env = family.make(task)
        closing.callback(close, env)
        mark(RESET)
        return env

    one = made(tasks[0])
    # Copies may share the space, and an environment may sample from it.
    pairs = action_pairs(copy.deepcopy(one.action_space), min(family.horizon, STEPS))
    mine = [action for action, _ in pairs]
    with watched() as used:
        first = play(one, seeds[0], marked(mine, 0.25))
    for seen in first.observation:
        if (becomes := conversion(seen, one.observation_space)) is not None:
            yield f"the environment gives {becomes}"
            break
    if late():
        return
    steps = len(first.reward)
    again = play(one, seeds[0], marked(mine[:steps]))
    if (difference := first.first_difference(again)) is not None:
        yield unseeded(difference, used)
        return
    if late():
        return
    two = made(tasks[1])
    together = play_beside(one, two, (seeds[0], seeds[1]), marked(pairs[:steps]))
    if (difference := first.first_difference(together)) is not None:
        yield shared(difference, used)
        return
    if late() or not isinstance(family, GymnasiumFamily) or family.set_task is None:
        return
    other = play(two, seeds[0], marked(mine[:steps]))
    if first.first_difference(other) is None and (added := new_attribute(family, tasks[1])):
        pair = " and ".join(named_task(family, task) for task in tasks)
        yield f"observations and rewards were the same for {pair}: {added}"
