"""The layers of an environment: its wrappers, and those that normalize as they go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from metarl.envs.errors import UserError


def layers(env: gym.Env) -> Iterator[gym.Env]:
    """Give an environment's wrappers from the outside in, then the unwrapped environment."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def kind(env: gym.Env) -> str:
    """Return the name of an environment's class."""
    return type(env).__name__


def refuse_running_statistics(env: gym.Env, name: str) -> None:
    """Raise UserError if a layer of an environment normalizes by statistics that it keeps.

    They change from episode to episode: the same behaviour is paid otherwise later on, and looks
    like a gain of adaptation. A wrapper whose statistics are frozen is accepted.
    """
    found = " and ".join(kind(layer) for layer in layers(env) if _normalizes(layer))
    if found:
        raise UserError(
            f"{name}: {found} inside the environment normalizes by running statistics, which change"
            " from episode to episode and look like a gain of adaptation: leave it out;"
            " --policy.normalize normalizes observations, and rewards may take a constant factor"
            " (gym.wrappers.TransformReward)"
        )


def _normalizes(layer: gym.Env) -> bool:
    if getattr(layer, "update_running_mean", True) is False:
        return False
    own = (gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward)
    return isinstance(layer, own) or any(map(_is_running, getattr(layer, "__dict__", {}).values()))


def _is_running(value: Any) -> bool:
    """Whether this is like Gymnasium's RunningMeanStd: mean, variance, count and an update."""
    if isinstance(value, gym.Env) or not callable(getattr(type(value), "update", None)):
        return False
    found = vars(value) if hasattr(value, "__dict__") else {}
    return all(isinstance(found.get(k), float | int | np.ndarray | np.generic) for k in _RUNNING)


_RUNNING = ("mean", "var", "count")
