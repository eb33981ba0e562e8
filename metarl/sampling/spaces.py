"""Between a policy's actions and an environment's: clipping, scaling, categories, what fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from metarl.envs import TaskVectorEnv
from metarl.envs.errors import UserError, check_one_of
from metarl.envs.policy_spaces import categories, no_actions
from metarl.models.policies import PolicyModel

ActionMode = Literal["clip", "scale"]
_MODES = get_args(ActionMode)

_ROUNDING = 1e-6  # of a bound, in an action that another program computed
_WRAP = "gymnasium.wrappers.FlattenObservation makes them one"


def as_observation(observation: Any, policy: PolicyModel) -> NDArray:
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
    if policy.images and seen.dtype != np.uint8:
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
    check_one_of("policy.action", mode, _MODES)
    if isinstance(space, gym.spaces.Discrete):
        return action[..., 0].astype(np.int64) + space.start
    if isinstance(space, gym.spaces.MultiDiscrete):
        return action.astype(space.dtype) + space.start
    if isinstance(space, gym.spaces.MultiBinary):
        return action.astype(space.dtype)
    if not isinstance(space, gym.spaces.Box):
        raise no_actions(space)
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
    check_one_of("policy.action", mode, _MODES)
    taken, counts = np.atleast_1d(np.asarray(action, np.float64)), categories(space)
    if taken.shape != (space.shape or (1,)) or not np.isfinite(taken).all():
        raise _none_of(action, space)
    if counts is not None:
        taken = taken - getattr(space, "start", 0)
        if not ((taken == np.rint(taken)) & (taken >= 0) & (taken < counts)).all():
            raise _none_of(action, space)
    elif mode == "scale":
        assert isinstance(space, gym.spaces.Box)
        middle, half = middle_and_half(space)
        # A locked component, low == high, has one action, whatever the policy drew.
        taken = np.divide(taken - middle, half, out=np.zeros_like(taken), where=half > 0.0)
    return taken.astype(np.float32)


def check_action(action: Any, space: gym.Space) -> None:
    """Raise UserError unless an environment's action is one of its space, up to rounding."""
    taken = np.atleast_1d(np.asarray(policy_action(action, space, "clip"), np.float64))
    if not isinstance(space, gym.spaces.Box):
        return
    taken = np.asarray(action, np.float64)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite bounds
        outside = (taken < low - _ROUNDING * np.abs(low)) | (
            taken > high + _ROUNDING * np.abs(high)
        )
    whole = np.issubdtype(space.dtype, np.integer)
    if outside.any() or (whole and (taken != np.rint(taken)).any()):
        raise _none_of(action, space)


def _none_of(action: Any, space: gym.Space) -> UserError:
    return UserError(f"action {action} is none of {space}")


def drawn_between(
    action: NDArray, space: gym.Space, mode: ActionMode
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return between what a policy drew that `env_action` made this action of, [action_size] both.

    They are equal unless a Box's bounds cut it, or whole numbers were rounded to.
    """
    raw = policy_action(action, space, mode).astype(np.float64)
    low, high = raw.copy(), raw.copy()
    if not isinstance(space, gym.spaces.Box):
        return low, high
    taken = np.asarray(action, np.float64)
    if np.issubdtype(space.dtype, np.integer):
        half = middle_and_half(space)[1] if mode == "scale" else 1.0
        unit = 0.5 / np.where(half > 0.0, half, 1.0)
        low, high = low - unit, high + unit
    low[taken <= space.low] = -np.inf
    high[taken >= space.high] = np.inf
    return low, high


def uniform_log_prob(space: gym.Space, mode: ActionMode) -> NDArray[np.float64]:
    """Return each component's log-density under uniform actions, in a policy's units.

    Of whole numbers it is a log-probability. It is NaN where a Box is not bounded, or has one value
    only.
    """
    counts = categories(space)
    if counts is not None:
        return -np.log(np.asarray(counts, np.float64))
    assert isinstance(space, gym.spaces.Box)
    width = space.high.astype(np.float64) - space.low.astype(np.float64)
    if np.issubdtype(space.dtype, np.integer):
        width = width + 1.0
    elif mode == "scale":
        width = np.where(bounded(space) & (width > 0.0), 2.0, width)
    with np.errstate(divide="ignore"):
        found = -np.log(width)
    return np.where(bounded(space) & (space.low < space.high), found, np.nan)


def bounded(space: gym.spaces.Box) -> NDArray[np.bool_]:
    """Return which components of a Box have a finite width, which actions may be scaled to."""
    with np.errstate(over="ignore"):
        return np.isfinite(space.high - space.low)


def middle_and_half(space: gym.spaces.Box) -> tuple[NDArray, NDArray]:
    """Return a Box's middle and half width; 0 and 1 where it is not bounded."""
    low, high = (np.where(bounded(space), x, y) for x, y in ((space.low, -1.0), (space.high, 1.0)))
    return 0.5 * high + 0.5 * low, 0.5 * high - 0.5 * low  # neither sum overflows


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Return a space of actions, one that `categories` knows, as plain values."""
    keys: dict[Any, tuple[str, ...]] = {
        gym.spaces.Box: ("low", "high"),
        gym.spaces.Discrete: ("n", "start"),
        gym.spaces.MultiDiscrete: ("nvec", "start"),
        gym.spaces.MultiBinary: ("n",),
    }
    kind = next((kind for kind in keys if isinstance(space, kind)), None)
    if kind is None:
        raise no_actions(space)
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
    check_one_of("kind", data["kind"], ("Discrete", "MultiDiscrete"))
    kind = gym.spaces.Discrete if data["kind"] == "Discrete" else gym.spaces.MultiDiscrete
    return kind(**values, dtype=dtype.type)


def check_spaces(env: TaskVectorEnv | gym.Env, policy: PolicyModel, name: str) -> None:
    """Raise UserError if an environment's spaces are not those of the policy."""
    vector = isinstance(env, TaskVectorEnv)
    observation = env.single_observation_space if vector else env.observation_space
    action = env.single_action_space if vector else env.action_space
    box = isinstance(observation, gym.spaces.Box)
    bytes_ = not policy.images or observation.dtype == np.uint8
    if not box or not bytes_ or observation.shape != policy.observation_shape:
        wrap = "" if box else f": {_WRAP}"
        made_for = "a Box of bytes" if policy.images else "a Box"
        raise UserError(
            f"{name}: observations are {observation}, but the policy is made for {made_for} of"
            f" shape {policy.observation_shape}{wrap}"
        )
    made = policy.distribution.space
    assert made is not None
    known = categories(made)
    if categories(action) != known or (known is None and action.shape != made.shape):
        raise UserError(f"{name}: actions are {action}, but the policy is made for {made}")


def beyond_bounds(action: NDArray, space: gym.Space, mode: ActionMode) -> NDArray | None:
    """Return which components of a policy's actions [..., n] a Box's bounds cut.

    None for other spaces, which cut nothing.
    """
    check_one_of("policy.action", mode, _MODES)
    if not isinstance(space, gym.spaces.Box):
        return None
    low, high = space.low, space.high
    if mode == "scale":
        finite = bounded(space)
        low, high = np.where(finite, -1.0, low), np.where(finite, 1.0, high)
    return (action < low) | (action > high)
