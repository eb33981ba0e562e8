"""Spaces that policies support; `metarl check` and training use the same rules."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from metarl.envs.errors import UserError
from metarl.envs.gymnasium.observations import components, has_pixels, is_image

LEAST_IMAGE = 4
"""Smallest height and width of an image in pixels, for the smallest image network."""


def image_size(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return channels, height and width of an image [H, W], [H, W, C] or [C, H, W].

    Channels are the smaller one of the first and the last axis, or the last if both are equal.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    first, middle, last = shape
    return (first, middle, last) if first < last else (last, first, middle)


def categories(space: gym.Space) -> tuple[int, ...] | None:
    """Return the number of categories of each component of an action, None for a flat Box.

    Raises:
        UserError: policies do not support the space.
    """
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
        return tuple(int(n) for n in space.nvec)
    if isinstance(space, gym.spaces.MultiBinary) and len(space.shape) == 1:
        return (2,) * space.shape[0]
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return None
    raise no_actions(space)


def no_actions(space: gym.Space) -> UserError:
    """Return the error for an action space that policies do not support."""
    remedy = ""
    if isinstance(space, gym.spaces.Box):
        remedy = "; reshape actions in a wrapper (gym.wrappers.TransformAction)"
    return UserError(
        "actions must be a flat Box, such as shape (1,), Discrete, a flat MultiDiscrete or"
        f" MultiBinary, got {space}{remedy}"
    )


def check_pixels(name: str, space: gym.Space) -> None:
    """Raise UserError if flattening a space would turn an image into raw numbers.

    Args:
        name: name of the family.
        space: space of the observations before they are flattened.
    """
    if is_image(space):
        return
    for path, leaf in components(space):
        if not has_pixels(leaf):
            continue
        shape = list(leaf.shape or ())
        if not path:
            raise UserError(
                f"{name}: observations are {leaf.dtype} images of {shape}, which would become raw"
                " numbers from 0 to 255; return uint8 of [height, width] or [height, width,"
                " channels], or scale them (gym.wrappers.TransformObservation)"
            )
        raise UserError(
            f"{name}: the component {'.'.join(path)!r} of the observation is an image of {shape},"
            " which would become raw numbers from 0 to 255. Use your own network"
            " (--policy.network module:attribute). Or use a function as env that returns only the"
            f" image (gym.wrappers.TransformObservation(env, lambda o: o[{path[0]!r}],"
            f" env.observation_space[{path[0]!r}])), drops it"
            " (gym.wrappers.FilterObservation), or scales it"
        )


def check_policy_spaces(name: str, observation: gym.Space, action: gym.Space) -> None:
    """Raise UserError unless policies support the observations and the actions.

    Args:
        name: name of the family.
        observation: space of the flattened observations.
        action: space of the actions.
    """
    flat = isinstance(observation, gym.spaces.Box) and len(observation.shape) == 1
    if not (flat or is_image(observation)):
        raise UserError(
            f"{name}: observations must be a flat Box or one uint8 image, got {observation}"
        )
    shape = observation.shape or ()
    if not np.prod(shape):
        raise UserError(f"{name}: observations have no component: {observation}")
    if not flat and min(image_size(shape)[1:]) < LEAST_IMAGE:
        raise UserError(
            f"{name}: images must be at least {LEAST_IMAGE} pixels high and wide, got"
            f" {observation.shape}; enlarge or flatten them (gym.wrappers.FlattenObservation)"
        )
    try:
        counts = categories(action)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if counts == () or not np.prod(action.shape or ()):
        raise UserError(f"{name}: actions have no component: {action}")
