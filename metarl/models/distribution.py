"""Base class of distributions over actions: pure functions of a dict of tensors.

A distribution is a part: its fields are options `policy.*`. `over(space)` fits it to an action
space. Actions are vectors, [..., action_size] floats, before the mapping to environment actions.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from metarl.envs.errors import UserError, raised
from metarl.envs.policy_spaces import categories
from metarl.models.networks import Dist, Params
from metarl.parts import Part

_EPS = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True, kw_only=True)
class Distribution(Part, ABC):
    """Base class of distributions over actions.

    A subclass defines `size`, `sample`, `mode`, `log_prob`, `entropy` and `kl`. The default `noise`
    is uniform. The default Fisher product uses the Hessian of `kl` by automatic differentiation.
    """

    section: ClassVar[str] = "policy"

    name: ClassVar[str] = ""
    scaled: ClassVar[bool] = False
    """Whether actions are in [-1, 1], and must be mapped to the bounds of a Box."""

    space: gym.Space | None = dataclasses.field(
        default=None, hash=False, metadata={"option": False}
    )
    """The action space; None before `over`."""

    def over(self, space: gym.Space) -> Self:
        """Return the distribution for an action space.

        Raises:
            UserError: the distribution does not support the space.
        """
        self.check(space)
        return dataclasses.replace(self, space=space)

    def check(self, space: gym.Space) -> None:
        """Raise UserError if an action space is not supported; by default, only a flat Box is."""
        if categories(space) is not None:
            raise UserError(f"policy.distribution {self.label} is for a Box, got actions {space}")

    @property
    def label(self) -> str:
        """Name for messages."""
        return self.source or self.name or type(self).__name__

    @property
    def action_size(self) -> int:
        """Size of an action as a vector."""
        assert self.space is not None
        return int(np.prod(self.space.shape)) if self.space.shape else 1

    @abstractmethod
    def size(self, space: gym.Space) -> int:
        """Return the size of the network's output for an action space."""

    def free(self) -> dict[str, NDArray[np.float64]]:
        """Return initial values of learned parameters that do not depend on observations.

        They are meta-parameters, such as the log standard deviation of a Gaussian.
        """
        return {}

    def confined(self, free: Params) -> Params:
        """Return free parameters of the same distribution with nonzero gradients."""
        return free

    def parameters(self, output: Tensor, free: Params) -> Dist:
        """Return the distribution's parameters.

        Args:
            output: output of the network, [..., samples, size].
            free: see `free`; [...] each.

        Returns:
            parameters by name; by default only the output, under the name "output".
        """
        return {"output": output}

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """Draw the noise that `sample` needs.

        By default uniform in (0, 1), [*shape, action_size].
        """
        drawn = rng.random((*shape, self.action_size), dtype=np.float32)
        return drawn.clip(0.5 * _EPS, 1.0 - 0.5 * _EPS)

    @abstractmethod
    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        """Return the actions [..., action_size] for given noise."""

    @abstractmethod
    def mode(self, dist: Dist) -> Tensor:
        """Return the most likely actions, [..., action_size]."""

    @abstractmethod
    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        """Return the log-density of actions, summed over their components, [...]."""

    @abstractmethod
    def entropy(self, dist: Dist) -> Tensor:
        """Return the entropy in nats, [...]."""

    @abstractmethod
    def kl(self, old: Dist, new: Dist) -> Tensor:
        """Return KL(old || new), [...]."""

    def fisher(self, dist: Dist, tangent: Dist) -> Dist:
        """Return F t: the Fisher metric of the distribution's parameters, applied to a tangent.

        F is the Hessian of KL(dist || .) at dist (Schulman et al. 2015, appendix C,
        arXiv:1502.05477).
        """
        with torch.enable_grad():
            old = {name: x.detach() for name, x in dist.items()}
            new = {name: x.clone().requires_grad_() for name, x in old.items()}
            leaves = list(new.values())
            slope = torch.autograd.grad(
                self.kl(old, new).sum(), leaves, create_graph=True, materialize_grads=True
            )
            along = sum((g * tangent[n].detach()).sum() for g, n in zip(slope, new, strict=True))
            assert isinstance(along, Tensor)
            if not along.requires_grad:
                return {name: torch.zeros_like(x) for name, x in new.items()}
            product = torch.autograd.grad(along, leaves, materialize_grads=True)
        return dict(zip(new, product, strict=True))

    def std(self, free: Params) -> float:
        """Return the mean standard deviation of the actions; NaN if it depends on observations."""
        return math.nan

    def exact(self, dist: Dist) -> Tensor | None:
        """Return a mask [...] of actions whose rounding does not affect their density; None: all.

        The density check at the start of a run excludes the other actions.
        """
        return None


_TRIED = 4  # outputs that a distribution is tried with


def check_distribution(distribution: Distribution, space: gym.Space) -> None:
    """Try every method of a user's distribution once.

    Raises:
        UserError: a method fails or returns another shape, or `kl` is negative.
    """
    rng, name = np.random.default_rng(0), f"policy.distribution {distribution.label}"

    def call(method: str, *arguments: Any) -> Any:
        try:
            with torch.enable_grad():
                return getattr(distribution, method)(*arguments)
        except Exception as error:
            raise UserError(f"{name}: {method} raised {raised(error)}") from error

    def same(method: str, found: Any, shape: list[int]) -> None:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if got != shape:
            raise UserError(f"{name}: {method} must return {shape} here, got {got}")

    size = call("size", space)
    if not isinstance(size, int | np.integer) or size < 1:
        raise UserError(f"{name}: size must return a number of outputs, got {size!r}")
    numbers = torch.from_numpy(rng.standard_normal((2, 1, _TRIED, size)).astype(np.float32))
    free = {n: torch.from_numpy(np.asarray(x, np.float32)) for n, x in call("free").items()}
    here, there = (call("parameters", x, free) for x in numbers)
    noise = call("noise", rng, 1, _TRIED)
    if not isinstance(noise, np.ndarray) or noise.dtype.kind not in "biuf":
        raise UserError(f"{name}: noise must return an array of numbers, got {noise!r}")
    action = call("sample", here, torch.from_numpy(noise))
    actions = [1, _TRIED, distribution.action_size]
    same("sample", action, actions)
    same("mode", call("mode", here), actions)
    same("log_prob", call("log_prob", here, action.detach()), actions[:2])
    same("entropy", call("entropy", here), actions[:2])
    apart, nothing = call("kl", here, there), call("kl", here, here)
    for found in (apart, nothing):
        same("kl", found, actions[:2])
    if not (bool((apart > -1e-5).all()) and bool((nothing.abs() < 1e-4).all())):
        raise UserError(
            f"{name}: kl(old, new) must be positive, and 0 for equal distributions, got"
            f" {apart.flatten().tolist()} and {nothing.flatten().tolist()}"
        )
    tangent = {n: torch.ones_like(x) for n, x in here.items()}
    product = call("fisher", here, tangent)
    for n, x in here.items():
        same(f"fisher of {n}", product[n], list(x.shape))
    along = sum(float((product[n] * tangent[n]).sum()) for n in here)
    if not along >= 0.0:
        raise UserError(f"{name}: the Fisher metric must be positive, got {along:g}")
