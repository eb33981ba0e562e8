"""The quick part of `metarl check`, for the start of a run.

A family of the user's own is looked at for a fraction of a second: is the same seed the same
episode, do two copies share state, have observations the type that the space declares? Two copies
are made for this and closed again, and the global generators are put back, so that the run's own
numbers stay as they are. An environment that fails in the meantime fails in the run as well, which
says where; nothing is reported of it here.
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
from metarl.envs.copy_checks import action_pairs, shared, unseeded
from metarl.envs.environment_checks import conversion
from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily
from metarl.envs.global_generators import kept, watched
from metarl.envs.registry import is_built_in
from metarl.envs.seeds import training_seeds
from metarl.envs.traces import close, play, play_beside
from metarl.envs.vector import PHASES, RESET, STEP

STEPS = 40
"""Of an episode, at most."""

SECONDS = 0.5
"""After which nothing more is begun; the first episode takes a quarter of it."""

_log = logging.getLogger(__name__)


def warn_at_start(family: TaskFamily) -> None:
    """Log what `start_findings` finds, one line each."""
    for finding in start_findings(family):
        log_finding(family, finding)


def log_finding(family: TaskFamily, finding: str) -> None:
    """Log a finding about a family."""
    name = family.source[0] if family.source is not None else family.name
    _log.warning("warning: %s: %s (metarl check tells more)", name, finding)


def start_findings(family: TaskFamily, progress: MutableSequence[int] | None = None) -> list[str]:
    """Return what is wrong with a family's environments, as far as it shows at once.

    Args:
        family: those of this package are not looked at.
        progress: as `TaskVectorEnv.progress`, for who watches from another process.

    Raises:
        UserError: the environments cannot be made, or return what they should not.
    """
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
            except Exception:  # the run meets it, and says in which task and worker
                pass
            except BaseException as error:  # sys.exit, for one
                error.add_note(f"{family.name}: in {PHASES[progress[1]]}")
                raise
        gc.collect()  # else what is left of a renderer may blacken the frames of later ones
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

    def made(task: NDArray) -> gym.Env:
        mark(0)
        env = family.make(task)
        closing.callback(close, env)
        mark(RESET)
        return env

    one = made(tasks[0])
    # The space may belong to all copies, and an environment may draw from its own.
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
    together = play_beside(one, made(tasks[1]), (seeds[0], seeds[1]), marked(pairs[:steps]))
    if (difference := first.first_difference(together)) is not None:
        yield shared(difference, used)
