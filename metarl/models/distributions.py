"""Built-in distributions over actions, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import scipy.special
import torch
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.policy_spaces import categories
from metarl.models.distribution import Distribution
from metarl.models.networks import Dist, Params
from metarl.parts import find_part, tunable


@dataclass(frozen=True, kw_only=True)
class Gaussian(Distribution):
    """Diagonal Gaussian. The network returns the mean; the log standard deviation is a free vector.

    It is the policy of Finn et al. 2017, and of TRPO.
    """

    name: ClassVar[str] = "gaussian"

    initial_std: float = tunable(1.0, 0.2, 8.0, log=True)
    """Initial standard deviation of the actions."""
    min_std: float = 1e-6
    """Lower bound on the standard deviation of the actions."""

    def __post_init__(self) -> None:
        self.require_positive("initial_std", "min_std")
        below = self.min_std <= self.initial_std
        self.require("min_std", below, f"at most {self.key('initial_std')}, {self.initial_std}")

    def size(self, space: gym.Space) -> int:
        assert space.shape is not None
        return space.shape[0]

    def free(self) -> dict[str, NDArray[np.float64]]:
        return {"log_std": np.full(self.action_size, math.log(self.initial_std))}

    def confined(self, free: Params) -> Params:
        # Below its bound, the standard deviation has no gradient and would stay there forever.
        return {"log_std": self._log_std(free)}

    def _log_std(self, free: Params) -> Tensor:
        return free["log_std"].clamp(min=math.log(self.min_std))

    def parameters(self, output: Tensor, free: Params) -> Dist:
        return {"mean": output, "log_std": self._log_std(free).unsqueeze(-2).expand_as(output)}

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        return rng.standard_normal((*shape, self.action_size), dtype=np.float32)

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        return torch.addcmul(dist["mean"], dist["log_std"].exp(), noise)

    def mode(self, dist: Dist) -> Tensor:
        return dist["mean"]

    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        log_std = dist["log_std"]
        z = (action - dist["mean"]) * (-log_std).exp()
        constant = 0.5 * math.log(2.0 * math.pi) * z.shape[-1]
        return -0.5 * z.square().sum(-1) - log_std.sum(-1) - constant

    def kl(self, old: Dist, new: Dist) -> Tensor:
        precision = (-2.0 * new["log_std"]).exp()
        second = (2.0 * old["log_std"]).exp() + (old["mean"] - new["mean"]).square()
        each = new["log_std"] - old["log_std"] + 0.5 * (second * precision - 1.0)
        return each.sum(-1)

    def fisher(self, dist: Dist, tangent: Dist) -> Dist:
        # 1 / std^2 for the mean, 2 for log_std.
        return {
            "mean": tangent["mean"] * (-2.0 * dist["log_std"]).exp(),
            "log_std": 2.0 * tangent["log_std"],
        }

    def entropy(self, dist: Dist) -> Tensor:
        constant = 0.5 * (1.0 + math.log(2.0 * math.pi)) * dist["log_std"].shape[-1]
        return dist["log_std"].sum(-1) + constant

    def std(self, free: Params) -> float:
        return float(self._log_std(free).exp().mean())

    def exact(self, dist: Dist) -> Tensor | None:
        step = 1e3 * torch.finfo(dist["mean"].dtype).eps * dist["mean"].abs()
        return (dist["log_std"].exp() > step).all(-1)


_BOUND = 1.0 - 1e-6
"""Largest magnitude of a squashed action; float32 rounds larger values to 1."""


@dataclass(frozen=True, kw_only=True)
class SquashedGaussian(Gaussian):
    """tanh of a Gaussian (Haarnoja et al. 2018, appendix C, arXiv:1801.01290).

    Actions are in (-1, 1), and `policy.action scale` maps them to the bounds. KL and Fisher metric
    equal the Gaussian's, because an invertible map does not change them.
    """

    name: ClassVar[str] = "squashed-gaussian"
    scaled: ClassVar[bool] = True

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        return super().sample(dist, noise).tanh().clamp(-_BOUND, _BOUND)

    def mode(self, dist: Dist) -> Tensor:
        """Return tanh of the mean, which is the median."""
        return dist["mean"].tanh()

    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        bounded = action.clamp(-_BOUND, _BOUND)
        slope = torch.log1p(-bounded.square()).sum(-1)  # log |d tanh(u) / du|
        return super().log_prob(dist, bounded.atanh()) - slope

    def entropy(self, dist: Dist) -> Tensor:
        """Return the Gaussian's entropy plus E[log(1 - tanh(u)^2)] (Gauss-Hermite quadrature)."""
        nodes, weights = _hermite(dist["mean"])
        u = dist["mean"].unsqueeze(-1) + dist["log_std"].exp().unsqueeze(-1) * nodes
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which does not overflow.
        slope = 2.0 * (math.log(2.0) - u - functional.softplus(-2.0 * u))
        return super().entropy(dist) + (weights * slope).sum(-1).sum(-1)

    def exact(self, dist: Dist) -> Tensor | None:
        # Beyond 5, tanh in float32 has lost three digits of its argument.
        return (dist["mean"].abs() + 4.0 * dist["log_std"].exp() < 5.0).all(-1)


@cache
def _nodes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    nodes, weights = hermegauss(32)
    return nodes, weights / weights.sum()


def _hermite(like: Tensor) -> tuple[Tensor, Tensor]:
    nodes, weights = _nodes()
    return like.new_tensor(nodes), like.new_tensor(weights)


@dataclass(frozen=True, kw_only=True)
class Beta(Distribution):
    """Beta distributions of the components (Chou et al. 2017), mapped from [0, 1] to [-1, 1].

    Both concentrations are 1 + softplus of the network's outputs, so each component has one
    maximum. `policy.action scale` maps actions to the bounds.
    """

    name: ClassVar[str] = "beta"
    scaled: ClassVar[bool] = True

    def size(self, space: gym.Space) -> int:
        assert space.shape is not None
        return 2 * space.shape[0]

    def parameters(self, output: Tensor, free: Params) -> Dist:
        first, second = (1.0 + functional.softplus(x) for x in output.chunk(2, dim=-1))
        return {"alpha": first, "beta": second}

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        """Return actions from the inverse of the cumulative distribution function."""
        a, b, u = (x.detach().double().numpy() for x in (dist["alpha"], dist["beta"], noise))
        drawn = scipy.special.betaincinv(a, b, u)
        return torch.from_numpy(2.0 * drawn - 1.0).to(dist["alpha"].dtype).clamp(-_BOUND, _BOUND)

    def mode(self, dist: Dist) -> Tensor:
        a, b = dist["alpha"], dist["beta"]
        return (a - b) / (a + b - 2.0)

    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        a, b = dist["alpha"], dist["beta"]
        x = 0.5 * (1.0 + action.clamp(-_BOUND, _BOUND))
        each = (a - 1.0) * x.log() + (b - 1.0) * torch.log1p(-x) - _log_beta(a, b)
        return (each - math.log(2.0)).sum(-1)  # from the map of [0, 1] to [-1, 1]

    def entropy(self, dist: Dist) -> Tensor:
        a, b = dist["alpha"], dist["beta"]
        each = _log_beta(a, b) - (a - 1.0) * a.digamma() - (b - 1.0) * b.digamma()
        each = each + (a + b - 2.0) * (a + b).digamma()
        return (each + math.log(2.0)).sum(-1)

    def kl(self, old: Dist, new: Dist) -> Tensor:
        a, b, c, d = old["alpha"], old["beta"], new["alpha"], new["beta"]
        each = _log_beta(c, d) - _log_beta(a, b)
        each = each + (a - c) * a.digamma() + (b - d) * b.digamma()
        return (each + (c - a + d - b) * (a + b).digamma()).sum(-1)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return a.lgamma() + b.lgamma() - (a + b).lgamma()


@dataclass(frozen=True, kw_only=True)
class Categorical(Distribution):
    """Independent categorical components, one for Discrete. The network returns the logits.

    An action is a vector of indices, [..., components], stored as floats.
    """

    name: ClassVar[str] = "categorical"

    def check(self, space: gym.Space) -> None:
        if categories(space) is None:
            raise UserError(
                f"policy.distribution {self.label} is for Discrete, MultiDiscrete and MultiBinary,"
                f" got actions {space}"
            )

    @property
    def categories(self) -> tuple[int, ...]:
        """Number of categories of each component."""
        assert self.space is not None
        return categories(self.space) or ()

    @property
    def action_size(self) -> int:
        return len(self.categories)

    def size(self, space: gym.Space) -> int:
        return sum(categories(space) or ())

    def parameters(self, output: Tensor, free: Params) -> Dist:
        return {"logits": output}

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        return rng.gumbel(size=(*shape, sum(self.categories))).astype(np.float32)

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        # The argmax of logits with Gumbel noise is i with probability softmax(logits)[i].
        return self.mode({"logits": dist["logits"] + noise})

    def mode(self, dist: Dist) -> Tensor:
        parts = self._parts(dist["logits"])
        return torch.stack([part.argmax(-1) for part in parts], dim=-1).to(dist["logits"].dtype)

    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        index = action.long().unsqueeze(-1).unbind(-2)
        parts = self._parts(dist["logits"])
        picked = [part.log_softmax(-1).gather(-1, i) for part, i in zip(parts, index, strict=True)]
        return torch.cat(picked, dim=-1).sum(-1)

    def kl(self, old: Dist, new: Dist) -> Tensor:
        each = []
        for a, b in zip(self._parts(old["logits"]), self._parts(new["logits"]), strict=True):
            log_a = a.log_softmax(-1)
            each.append((log_a.exp() * (log_a - b.log_softmax(-1))).sum(-1))
        return torch.stack(each).sum(0)

    def fisher(self, dist: Dist, tangent: Dist) -> Dist:
        # diag(p) - p p' for each component.
        parts = []
        for x, t in zip(self._parts(dist["logits"]), self._parts(tangent["logits"]), strict=True):
            p = x.softmax(-1)
            parts.append(p * (t - (p * t).sum(-1, keepdim=True)))
        return {"logits": torch.cat(parts, dim=-1)}

    def entropy(self, dist: Dist) -> Tensor:
        logs = [part.log_softmax(-1) for part in self._parts(dist["logits"])]
        return torch.stack([-(x.exp() * x).sum(-1) for x in logs]).sum(0)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.split(self.categories, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Distribution):
    """Independent Bernoulli components, for MultiBinary. The network returns the log-odds of 1."""

    name: ClassVar[str] = "bernoulli"

    def check(self, space: gym.Space) -> None:
        if not isinstance(space, gym.spaces.MultiBinary) or len(space.shape) != 1:
            raise UserError(
                f"policy.distribution {self.label} is for a flat MultiBinary, got actions {space}"
            )

    def size(self, space: gym.Space) -> int:
        assert space.shape is not None
        return space.shape[0]

    def parameters(self, output: Tensor, free: Params) -> Dist:
        return {"logits": output}

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        return (noise < dist["logits"].sigmoid()).to(dist["logits"].dtype)

    def mode(self, dist: Dist) -> Tensor:
        return (dist["logits"] > 0.0).to(dist["logits"].dtype)

    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        sign = 2.0 * action - 1.0
        return functional.logsigmoid(sign * dist["logits"]).sum(-1)

    def entropy(self, dist: Dist) -> Tensor:
        x = dist["logits"]
        return (functional.softplus(x) - x * x.sigmoid()).sum(-1)

    def kl(self, old: Dist, new: Dist) -> Tensor:
        a, b = old["logits"], new["logits"]
        each = a.sigmoid() * (a - b) + functional.softplus(b) - functional.softplus(a)
        return each.sum(-1)

    def fisher(self, dist: Dist, tangent: Dist) -> Dist:
        p = dist["logits"].sigmoid()
        return {"logits": p * (1.0 - p) * tangent["logits"]}


@dataclass(frozen=True, kw_only=True)
class AutoDistribution(Gaussian):
    """Gaussian for a Box, categorical for Discrete, MultiDiscrete and MultiBinary."""

    name: ClassVar[str] = "auto"

    def over(self, space: gym.Space) -> Distribution:  # type: ignore[override]
        if categories(space) is None:
            return Gaussian(initial_std=self.initial_std, min_std=self.min_std).over(space)
        for name in self.own_options():
            raise UserError(f"policy.{name} has no effect on {space} actions")
        return Categorical().over(space)


DISTRIBUTIONS: dict[str, type[Distribution]] = {
    kind.name: kind
    for kind in (AutoDistribution, Gaussian, SquashedGaussian, Beta, Categorical, Bernoulli)
}
"""Distributions by name."""


def find_distribution(what: Any) -> Distribution:
    """Return a distribution.

    Args:
        what: the distribution, its class, its name, or `module:attribute`.

    Raises:
        UserError: the value is something else.
    """
    made = find_part(what, Distribution, "distribution", DISTRIBUTIONS.get)
    if made is None:
        raise UserError(
            f"policy.distribution must be one of {', '.join(DISTRIBUTIONS)}, module:attribute or a"
            f" metarl.Distribution, got {what!r}{did_you_mean(what, DISTRIBUTIONS)}"
        )
    return made
