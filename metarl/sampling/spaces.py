"""Between a policy's actions and an environment's: clipping, scaling, categories, what fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from metarl.envs import TaskVectorEnv
from metarl.envs.errors import UserError
from metarl.envs.policy_spaces import categories
from metarl.learning.policies import CategoricalMLP, MLPPolicy

ActionMode = Literal["clip", "scale"]

_WRAP = "gymnasium.wrappers.FlattenObservation makes them one"


def as_observation(observation: Any, policy: MLPPolicy) -> NDArray:
    """Return observations as the array that a policy reads, of any shape.

    Raises:
        UserError: they are no array, as those of a Dict or Tuple, or images of other than bytes.
    """
    try:
        seen = np.asarray(observation)
        found = seen.astype(policy.observation_dtype, copy=False)
    except (TypeError, ValueError) as error:
        kind = type(observation).__name__
        wrap = f": {_WRAP}" if isinstance(observation, Mapping | tuple) else f" ({error})"
        raise UserError(f"observations must be an array, got a {kind}{wrap}") from error
    if seen.dtype.kind not in "biuf":
        raise UserError(f"observations must be real numbers, got {seen.dtype}")
    if policy.encoder is not None and seen.dtype != np.uint8:
        if seen.dtype.kind not in "iu":
            raise UserError(f"images must be bytes of 0 to 255, got {seen.dtype}")
        if seen.size and not (seen.min() >= 0 and seen.max() <= 255):
            raise UserError(f"images must be bytes of 0 to 255, got {seen.min()} to {seen.max()}")
    return found


def env_action(action: NDArray, space: gym.Space, mode: ActionMode) -> NDArray:
    """Return a policy's action [..., action_size] as the environment takes it.

    For a Box, `clip` cuts it to the bounds, and `scale` maps [-1, 1] onto finite bounds first; a
    Box of whole numbers gets the nearest one.
    Discrete spaces get whole numbers that count from their start.
    """
    if isinstance(space, gym.spaces.Discrete):
        return action[..., 0].astype(np.int64) + space.start
    if isinstance(space, gym.spaces.MultiDiscrete):
        return action.astype(space.dtype) + space.start
    if isinstance(space, gym.spaces.MultiBinary):
        return action.astype(space.dtype)
    assert isinstance(space, gym.spaces.Box)
    if mode == "scale":
        middle, half = middle_and_half(space)
        action = middle + half * action
    if np.issubdtype(space.dtype, np.integer):
        action = np.rint(action)
    return np.clip(action, space.low, space.high).astype(space.dtype, copy=False)


def policy_action(action: NDArray, space: gym.Space, mode: ActionMode) -> NDArray[np.float32]:
    """Return what a policy would have drawn for an action of the environment's, [action_size].

    The inverse of `env_action`, up to what that cuts: beyond the bounds of a Box is allowed.

    Raises:
        UserError: it has another shape, is not finite, or names no category.
    """
    taken, counts = np.atleast_1d(np.asarray(action, np.float64)), categories(space)
    wrong = UserError(f"action {action} is none of {space}")
    if taken.shape != (space.shape or (1,)) or not np.isfinite(taken).all():
        raise wrong
    if counts is not None:
        taken = taken - getattr(space, "start", 0)
        if not ((taken == np.rint(taken)) & (taken >= 0) & (taken < counts)).all():
            raise wrong
    elif mode == "scale":
        assert isinstance(space, gym.spaces.Box)
        middle, half = middle_and_half(space)
        taken = (taken - middle) / half
    return taken.astype(np.float32)


def bounded(space: gym.spaces.Box) -> NDArray[np.bool_]:
    """Return which components of a Box have a finite width, which actions may be scaled to."""
    with np.errstate(over="ignore"):
        return np.isfinite(space.high - space.low)


def middle_and_half(space: gym.spaces.Box) -> tuple[NDArray, NDArray]:
    """Return a Box's middle and half width; 0 and 1 where it is not bounded."""
    low, high = (np.where(bounded(space), x, y) for x, y in ((space.low, -1.0), (space.high, 1.0)))
    return 0.5 * (high + low), 0.5 * (high - low)


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Return a space of actions, one that `categories` knows, as plain values."""
    keys = {
        gym.spaces.Box: ("low", "high"),
        gym.spaces.Discrete: ("n", "start"),
        gym.spaces.MultiDiscrete: ("nvec", "start"),
        gym.spaces.MultiBinary: ("n",),
    }
    kind = next(kind for kind in keys if isinstance(space, kind))
    found = {key: np.asarray(getattr(space, key)).tolist() for key in keys[kind]}
    return {"kind": kind.__name__, "dtype": str(space.dtype), **found}


def space_from_json(data: Mapping[str, Any]) -> gym.Space:
    """Return the space that `space_to_json` wrote."""
    values = {key: value for key, value in data.items() if key not in ("kind", "dtype")}
    dtype = np.dtype(data["dtype"])
    if data["kind"] == "Box":
        low, high = (np.array(values[key], dtype) for key in ("low", "high"))
        return gym.spaces.Box(low, high, dtype=dtype.type)
    if data["kind"] == "MultiBinary":
        return gym.spaces.MultiBinary(values["n"])
    kind = gym.spaces.Discrete if data["kind"] == "Discrete" else gym.spaces.MultiDiscrete
    return kind(**values, dtype=dtype.type)


def check_spaces(env: TaskVectorEnv | gym.Env, policy: MLPPolicy, name: str) -> None:
    """Raise UserError if an environment's spaces are not those of the policy."""
    vector = isinstance(env, TaskVectorEnv)
    observation = env.single_observation_space if vector else env.observation_space
    action = env.single_action_space if vector else env.action_space
    box = isinstance(observation, gym.spaces.Box)
    bytes_ = policy.encoder is None or observation.dtype == np.uint8
    if not box or not bytes_ or observation.shape != policy.observation_shape:
        wrap = "" if box else f": {_WRAP}"
        made_for = "a Box" if policy.encoder is None else "a Box of bytes"
        raise UserError(
            f"{name}: observations are {observation}, but the policy is made for {made_for} of"
            f" shape {policy.observation_shape}{wrap}"
        )
    if isinstance(policy, CategoricalMLP):
        if categories(action) != policy.categories:
            raise UserError(
                f"{name}: actions are {action}, but the policy is made for components of"
                f" {policy.categories} categories"
            )
    elif categories(action) is not None or action.shape != (policy.action_size,):
        raise UserError(
            f"{name}: actions are {action}, but the policy is made for a Box of shape"
            f" ({policy.action_size},)"
        )


def beyond_bounds(action: NDArray, space: gym.Space, mode: ActionMode) -> NDArray | None:
    """Return which components of a policy's actions [..., n] a Box's bounds cut.

    None for other spaces, which cut nothing.
    """
    if not isinstance(space, gym.spaces.Box):
        return None
    low, high = space.low, space.high
    if mode == "scale":
        finite = bounded(space)
        low, high = np.where(finite, -1.0, low), np.where(finite, 1.0, high)
    return (action < low) | (action > high)
