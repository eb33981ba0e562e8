"""Checks of the results of `reset` and `step`, by this package and by Gymnasium's checker.

Training depends only on some of the warnings of Gymnasium's `check_env`. For these, a check of this
package tests the fact itself and names the consequence, because `check_env` stops at the first
assertion. The messages in `SETTLED` are not repeated; all others are passed on.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env

from metarl.envs.checks.traces import Doubt, close, outermost, random_actions, short
from metarl.envs.family import TaskFamily
from metarl.envs.seeds import foreign_seed, training_seeds

SEED = foreign_seed(training_seeds(1)[0])

SETTLED = (
    # Training does not depend on these.
    "value is -?infinity",  # bounds of observations are not used; unbounded actions are passed on
    "alternative render modes",  # the environment was not made by gymnasium.make
    "different from the unwrapped version",  # wrappers are checked with their environment
    "`seed` function is dropped",  # reset(seed=...) is called, and tested by `seeding`
    "`return_info` is deprecated",
    "does not provide a `seed`|does not provide an `options`",  # any **name of keywords will do
    "expecting a numpy array, actual type|should be an int or np.int64|expecting a tuple",
    "should be `None`, otherwise",  # below: `check_gymnasium`
    "share an object",
    r"super\(\).reset|has been generated given a seed|is not properly been updated",
    # `episodes` tests each value of whole episodes.
    "not within the observation space|should be a dict|must be a dict",
    "expecting numpy array dtype",
    "`terminated` signal|`truncated` signal|`done` signal|truncates after 1 step",
    "reward returned by|reward is a NaN|reward is an inf",
    "`info` returned by|second element returned",
    # `seeding` compares whole episodes.
    "non-deterministic|although similar|not equivalent for the same seed",
    # `spaces` measures the range of actions and checks the components of observations.
    "symmetric and normalized|maximum and minimum values are equal|greater than a high value",
)
"""Patterns of messages of gymnasium 1.0 to 1.4 that are not passed on."""


def check_environment(family: TaskFamily) -> Iterator[str]:
    env = outermost(family)
    for kind in ("observation_space", "action_space"):
        if not isinstance(getattr(env, kind, None), gym.Space):
            found = type(getattr(env, kind, None)).__name__
            yield f"{kind} must be a space of gymnasium.spaces, got {found}"
            return
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
    result: Any = env.reset(seed=SEED)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        yield f"reset must return (observation, info), info a dictionary, got {short(result)}"
        return
    result = env.step(random_actions(env.action_space, 1)[0])
    if not (isinstance(result, tuple) and len(result) == 5):
        yield (
            "step must return (observation, reward, terminated, truncated, info), got"
            f" {short(result)}"
        )
    elif not isinstance(result[4], Mapping):
        yield f"step must return a dictionary as info, such as {{}}, got {short(result[4])}"
    try:
        env.close()
    except Exception as error:  # the user's own
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        yield Doubt(f"close raises {text}: runs continue, but its resources may stay open")


def check_gymnasium(family: TaskFamily) -> Iterator[str]:
    env = outermost(family)
    yield from _reset_faults(env)
    yield from _reuse(env)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=True, skip_close_check=True)
        except (AssertionError, gym.error.Error) as error:
            said = [str(error)]
    said += [re.sub(r"\x1b\[\d+m|WARN: ", "", str(warning.message)) for warning in caught]
    for text in dict.fromkeys(said):
        if not any(re.search(pattern, text) for pattern in SETTLED):
            yield Doubt(
                f"gymnasium.utils.env_checker.check_env says: {text.rstrip('.')} (it is unknown"
                " whether training depends on this)"
            )
    close(env)


def _reset_faults(env: gym.Env[Any, Any]) -> Iterator[str]:
    declared = inspect.signature(env.reset).parameters.get("seed")
    if declared is not None and declared.default not in (None, inspect.Parameter.empty):
        yield Doubt(
            f"reset has the default seed={declared.default!r}: episodes that start without a seed,"
            " as in other libraries and --from-scratch, are all the same; declare seed=None"
        )
    env.reset(seed=SEED)
    if env.unwrapped.np_random_seed != SEED:
        yield Doubt(
            "reset does not seed self.np_random: the episodes played here do not depend on it, but"
            " episodes that draw from it cannot be reproduced; begin reset with"
            " super().reset(seed=seed)"
        )


def _reuse(env: gym.Env[Any, Any]) -> Iterator[str]:
    """Yield a doubt if the result of a call changes with the next call."""
    actions = random_actions(env.action_space, 2)
    observation, info = env.reset(seed=SEED)
    calls = [(observation, info)]
    for action in actions:
        observation, _, terminated, truncated, info = env.step(action)
        calls.append((observation, info))
        if terminated or truncated:
            break
    for (seen, said), (later, following) in pairwise(calls):
        if _share(seen, later):
            yield Doubt(
                "observations of two steps share memory, so a stored observation changes with the"
                " next step: training and evaluation copy them; copy them in your own loop, such as"
                " one with an online adapter, or return a new array from the environment"
            )
            return
        if said is following and said:
            yield Doubt(
                "steps return the same info dictionary, so a stored one changes with the next step:"
                " training reads it at once; return a new dictionary from the environment"
            )
            return


def _share(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype != object and bool(np.shares_memory(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return any(_share(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return any(_share(a, b) for a, b in zip(one, other, strict=False))
    return False
