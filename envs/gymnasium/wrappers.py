"""Layers of an environment, and detection of wrappers with running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from metarl.envs.errors import UserError


def layers(env: gym.Env[Any, Any]) -> Iterator[gym.Env[Any, Any]]:
    """Yield an environment's wrappers from the outside in, then the unwrapped environment."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def kind(env: gym.Env[Any, Any]) -> str:
    """Return the name of an environment's class."""
    return type(env).__name__


def refuse_running_statistics(env: gym.Env[Any, Any], name: str) -> None:
    """Raise UserError if a layer of an environment normalizes by running statistics.

    These change from episode to episode, so the same behaviour has another reward later, which
    looks like a gain of adaptation. A wrapper with frozen statistics is accepted.
    """
    found = " and ".join(kind(layer) for layer in layers(env) if _normalizes(layer))
    if found:
        raise UserError(
            f"{name}: {found} inside the environment normalizes by running statistics. They change"
            " from episode to episode and look like a gain of adaptation. Remove it; use"
            " --policy.normalize for observations and a constant factor for rewards"
            " (gym.wrappers.TransformReward)"
        )


def _normalizes(layer: gym.Env[Any, Any]) -> bool:
    if getattr(layer, "update_running_mean", True) is False:
        return False
    own = (gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward)
    return isinstance(layer, own) or any(map(_is_running, getattr(layer, "__dict__", {}).values()))


def _is_running(value: Any) -> bool:
    """Return whether a value has mean, var, count and update, as Gymnasium's RunningMeanStd."""
    if isinstance(value, gym.Env) or not callable(getattr(type(value), "update", None)):
        return False
    found = vars(value) if hasattr(value, "__dict__") else {}
    return all(isinstance(found.get(k), float | int | np.ndarray | np.generic) for k in _RUNNING)


_RUNNING = ("mean", "var", "count")
