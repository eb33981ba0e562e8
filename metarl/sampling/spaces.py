"""Conversion between policy actions and environment actions, and checks of spaces."""

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

_ROUNDING = 1e-6  # relative to a bound, for actions that another program computed
_WRAP = "gymnasium.wrappers.FlattenObservation makes them one"


def as_observation(observation: Any, policy: PolicyModel) -> NDArray:
    """Return observations of any shape as the array that a policy reads.

    Raises:
        UserError: the observations are not an array (a Dict or Tuple), images are not bytes, or a
            number is not finite.
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
    if not np.isfinite(found).all():
        raise UserError(f"observations must be finite, got {found[~np.isfinite(found)][0]}")
    return found


def env_action(action: NDArray, space: gym.Space, mode: ActionMode) -> NDArray:
    """Return a policy's action [..., action_size] in the environment's format.

    Box: `clip` clips to the bounds; `scale` first maps [-1, 1] to the finite bounds. Actions of an
    integer Box are rounded.
    Discrete spaces: integers that count from the space's start.
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
    """Return the policy action [action_size] that corresponds to an environment's action.

    The inverse of `env_action`, except for clipping. Values beyond the bounds of a Box are allowed.

    Raises:
        UserError: the action has another shape, is not finite or is not a valid category.
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
        # A locked component (low == high) has one action, whatever the policy drew.
        taken = np.divide(taken - middle, half, out=np.zeros_like(taken), where=half > 0.0)
    return taken.astype(np.float32)


def check_action(action: Any, space: gym.Space) -> None:
    """Raise UserError if an environment action is outside its space, up to rounding."""
    taken = np.atleast_1d(np.asarray(policy_action(action, space, "clip"), np.float64))
    if not isinstance(space, gym.spaces.Box):
        return
    taken = np.asarray(action, np.float64)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    with np.errstate(invalid="ignore"):  # from infinite bounds
        outside = (taken < low - _ROUNDING * np.abs(low)) | (
            taken > high + _ROUNDING * np.abs(high)
        )
    whole = np.issubdtype(space.dtype, np.integer)
    if outside.any() or (whole and (taken != np.rint(taken)).any()):
        raise _none_of(action, space)


def _none_of(action: Any, space: gym.Space) -> UserError:
    return UserError(f"action {action} is not in {space}")


def drawn_between(
    action: NDArray, space: gym.Space, mode: ActionMode
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the range of policy actions that `env_action` maps to this one, [action_size] each.

    Both are equal unless the bounds of a Box clipped the action, or it was rounded to an integer.
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
    """Return each component's log-density under uniform actions, in the policy's units.

    For integers, it is a log-probability. It is NaN if a component of a Box is unbounded or has
    only one value.
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
    """Return a mask of the Box components with finite width, which actions may be scaled to."""
    with np.errstate(over="ignore"):
        return np.isfinite(space.high - space.low)


def middle_and_half(space: gym.spaces.Box) -> tuple[NDArray, NDArray]:
    """Return the middle and half width of a Box; 0 and 1 for unbounded components."""
    low, high = (np.where(bounded(space), x, y) for x, y in ((space.low, -1.0), (space.high, 1.0)))
    return 0.5 * high + 0.5 * low, 0.5 * high - 0.5 * low  # neither sum overflows


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Return an action space, one that `categories` supports, as JSON values."""
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
    """Return the space of the JSON values from `space_to_json`."""
    values = {key: value for key, value in data.items() if key not in ("kind", "dtype")}
    dtype = np.dtype(data["dtype"])
    if data["kind"] == "Box":
        low, high = (np.array(values[key], dtype) for key in ("low", "high"))
        return gym.spaces.Box(low, high, dtype=dtype.type)
    if data["kind"] == "MultiBinary":
        return gym.spaces.MultiBinary(values["n"])
    check_one_of("kind", data["kind"], ("Discrete", "MultiDiscrete"))
    kind = gym.spaces.Discrete if data["kind"] == "Discrete" else gym.spaces.MultiDiscrete
    if dtype != np.int64:  # the default, and the only one in older Gymnasium
        values["dtype"] = dtype.type
    return kind(**values)


def check_spaces(env: TaskVectorEnv | gym.Env, policy: PolicyModel, name: str) -> None:
    """Raise UserError if an environment's spaces do not fit the policy."""
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
    """Return a mask of the components of policy actions [..., n] that the Box bounds clip.

    Return None for other spaces, which clip nothing.
    """
    check_one_of("policy.action", mode, _MODES)
    if not isinstance(space, gym.spaces.Box):
        return None
    low, high = space.low, space.high
    if mode == "scale":
        finite = bounded(space)
        low, high = np.where(finite, -1.0, low), np.where(finite, 1.0, high)
    return (action < low) | (action > high)
