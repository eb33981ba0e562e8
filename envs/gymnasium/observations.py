"""Observations for policies: one flat vector, or one image.

Gymnasium's `flatten` turns a `Dict` or `Tuple` of numbers into a vector: component after component,
in the order of the space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import UserError

FLATTENABLE = (
    gym.spaces.Box,
    gym.spaces.Discrete,
    gym.spaces.MultiDiscrete,
    gym.spaces.MultiBinary,
)


def is_image(space: gym.Space) -> bool:
    """Return whether observations are one image: uint8, [height, width] or with channels."""
    return (
        isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)
    )


def has_pixels(space: gym.Space) -> bool:
    """Return whether a space has pixels: 0 to 255 in at least two axes, with any dtype."""
    return (
        isinstance(space, gym.spaces.Box)
        and len(space.shape) >= 2
        and bool(np.all(space.low == 0))
        and bool(np.all(space.high == 255))
    )


def components(
    space: gym.Space, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the leaves of nested Dict and Tuple spaces, each with its path of names."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        named = space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space)
        for name, inner in named:
            yield from components(inner, (*path, str(name)))
    else:
        yield path, space


def columns(space: gym.Space) -> list[tuple[str, int, int]]:
    """Return the name, first column and end of each component in the flat vector."""
    found, start = [], 0
    for path, leaf in components(space):
        end = start + gym.spaces.flatdim(leaf)
        found.append((".".join(path), start, end))
        start = end
    return found


def fits(observation: Any, space: gym.Space) -> bool:
    """Return whether a space's dtype can hold the numbers of an observation.

    Floats may be rounded. A Dict or Tuple fits if all its components fit.
    """
    if isinstance(space, gym.spaces.Dict):
        return all(name in observation and fits(observation[name], s) for name, s in space.items())
    if isinstance(space, gym.spaces.Tuple):
        pairs = zip(observation, space, strict=False)
        return len(observation) == len(space) and all(fits(one, s) for one, s in pairs)
    if getattr(observation, "dtype", None) is space.dtype:
        return True
    seen = np.asarray(observation)
    assert space.dtype is not None
    if space.dtype.kind == "f":
        return seen.dtype.kind in "fiub"
    if seen.dtype.kind not in "iub":
        return False
    return np.can_cast(seen.dtype, space.dtype) or np.array_equal(seen, seen.astype(space.dtype))


def misfit(observation: Any, space: gym.Space) -> str:
    """Describe dtypes that are incompatible, for an observation that does not fit."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        named = space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space)
        for name, inner in named:
            try:
                if not fits(observation[name], inner):
                    return f"component {name!r}: {misfit(observation[name], inner)}"
            except (KeyError, IndexError, TypeError):
                return f"component {name!r} of its observation_space is missing"
        return f"{len(observation)} components, its observation_space has {len(space)}"
    found = np.asarray(observation).dtype
    return (
        f"{found} numbers, which its observation_space of {space.dtype} cannot hold; declare the"
        f" space as np.float32, or return np.asarray(observation, np.{space.dtype})"
    )


def check_fits(observation: Any, space: gym.Space, name: str) -> None:
    """Raise UserError unless a space's dtype can hold the numbers of an observation."""
    if not fits(observation, space):
        raise UserError(f"{name}: the environment returned {misfit(observation, space)}")


class FlatObservation(gym.wrappers.FlattenObservation):
    """Gymnasium's FlattenObservation that refuses observations which it would truncate."""

    def __init__(self, env: gym.Env[Any, Any], name: str) -> None:
        super().__init__(env)
        self._name = name

    def observation(self, observation: Any) -> NDArray[Any]:
        check_fits(observation, self.env.observation_space, self._name)
        return super().observation(observation)


def structure_of(env: gym.Env[Any, Any]) -> gym.Space:
    """Return the space of an environment's observations before they are flattened."""
    layer = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, FlatObservation):
            return layer.env.observation_space
        layer = layer.env
    return env.observation_space


def flattened(space: gym.Space) -> gym.Space:
    """Return the default space for policies: one image or a flat vector."""
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    return space if flat or is_image(space) else gym.spaces.flatten_space(space)
