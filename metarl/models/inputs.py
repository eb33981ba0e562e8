"""Inputs of users' networks: the components of a space, from the one array of a rollout."""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from metarl.envs.errors import UserError
from metarl.envs.gymnasium.observations import components, is_image


class Inputs:
    """Inputs of a module: from the one array that a rollout keeps to the space's components.

    Args:
        space: of the inputs, before they are flattened.
        context_dim: size of a context input.
        label: of the network, for messages.
    """

    def __init__(self, space: gym.Space, context_dim: int, label: str) -> None:
        self.space, self.context_dim = space, context_dim
        self.images = is_image(space)
        self.flat = isinstance(space, gym.spaces.Box) and (
            self.images or len(space.shape) == 1 or space.dtype == np.float32
        )
        shape = space.shape if self.flat else (gym.spaces.flatdim(space),)
        assert shape is not None
        self.shape: tuple[int, ...] = tuple(shape)
        if context_dim and isinstance(space, gym.spaces.Dict) and "context" in space.spaces:
            raise UserError(
                f"policy.network {label} gets the task's context as the entry context, which the"
                f" observations have already: {space}; rename theirs"
            )
        if context_dim and self.images:
            raise UserError(
                f"policy.network {label} reads images, which a task's context cannot be appended"
                " to: give observations as a Dict, which gets the entry context"
            )

    @property
    def given(self) -> gym.Space:
        """The space that the module is made for: the inputs with the context."""
        if not self.context_dim:
            return self.space
        more = gym.spaces.Box(-np.inf, np.inf, (self.context_dim,), np.float32)
        if isinstance(self.space, gym.spaces.Dict):
            return gym.spaces.Dict([*self.space.items(), ("context", more)])
        if isinstance(self.space, gym.spaces.Tuple):
            return gym.spaces.Tuple([*self.space, more])
        size = int(math.prod(self.shape)) + self.context_dim
        return gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    @property
    def all_floats(self) -> bool:
        """Whether every component is of floating-point numbers."""
        return all(
            isinstance(leaf, gym.spaces.Box) and np.issubdtype(leaf.dtype, np.floating)
            for _, leaf in components(self.space)
        )

    def example(self, count: int) -> Tensor:
        """Return inputs of a sample of the space each, [count, *shape]."""
        space = copy.deepcopy(self.space)
        space.seed(0)
        drawn = [space.sample() for _ in range(count)]
        dtype = np.uint8 if self.images else np.float32
        flat = drawn if self.flat else [gym.spaces.flatten(space, x) for x in drawn]
        return torch.from_numpy(np.stack([np.asarray(x, dtype) for x in flat]))

    def split(self, x: Tensor, context: Tensor | None) -> Any:
        """Return inputs [samples, *shape] as the module reads them."""
        if context is not None:
            context = context.expand(x.shape[0], -1)
        if self.flat:
            return x if context is None else torch.cat([x.flatten(1), context], dim=1)
        found, end = _split(self.space, x, 0)
        assert end == x.shape[1]
        if context is None:
            return found
        if isinstance(found, dict):
            return {**found, "context": context}
        return (*found, context) if isinstance(found, tuple) else torch.cat([found, context], 1)


def _split(space: gym.Space, x: Tensor, start: int) -> tuple[Any, int]:
    """Return the part of flat inputs [samples, size] that belongs to a space, and its end."""
    if isinstance(space, gym.spaces.Dict):
        found = {}
        for name, inner in space.items():
            found[name], start = _split(inner, x, start)
        return found, start
    if isinstance(space, gym.spaces.Tuple):
        parts = []
        for inner in space:
            part, start = _split(inner, x, start)
            parts.append(part)
        return tuple(parts), start
    end = start + gym.spaces.flatdim(space)
    part = x[:, start:end]
    if isinstance(space, gym.spaces.Discrete):  # kept as one-hot vectors
        return part.argmax(1) + int(space.start), end
    if isinstance(space, gym.spaces.MultiDiscrete):
        sizes = [int(n) for n in space.nvec.flatten()]
        digits = torch.stack([one.argmax(1) for one in part.split(sizes, dim=1)], dim=1)
        digits = digits + torch.from_numpy(np.asarray(space.start, np.int64).flatten())
        return digits.unflatten(1, space.nvec.shape), end
    assert space.shape is not None
    part = part.unflatten(1, space.shape) if space.shape else part[:, 0]
    if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8:
        return part.to(torch.uint8), end
    return part, end
