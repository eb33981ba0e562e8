"""Policies: distributions over actions as pure functions of (parameters, observations).

See `networks` for parameters, stacked over tasks or not.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.envs.errors import UserError
from metarl.models.networks import MLP, Dist, Params, Part


@dataclass(frozen=True, kw_only=True)
class MLPPolicy(MLP):
    """A distribution over actions whose parameters come from an MLP of the observation.

    With `normalize`, observations are scaled by entries `norm.*`, which no gradient moves:
    `track_observations` does. With an `encoder`, observations are images of bytes,
    [..., *encoder.shape], and the MLP reads what it makes of them.
    """

    observation_dim: int
    """Of what the MLP reads: the encoder's features, where there is one."""
    normalize: bool = False

    parameter: ClassVar[str]
    """The parameter of the distribution that the network gives."""

    @property
    @abstractmethod
    def action_size(self) -> int:
        """Size of an action as a vector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder is not None and self.normalize:
            raise UserError("policy.normalize has no effect on images, which are scaled to [0, 1]")

    @property
    def input_dim(self) -> int:
        return self.observation_dim

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.observation_dim,) if self.encoder is None else self.encoder.shape

    @property
    def observation_dtype(self) -> type[np.generic]:
        """What observations are held as."""
        return np.float32 if self.encoder is None else np.uint8

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes()
        if self.normalize:
            shapes["norm.mean"] = shapes["norm.var"] = (self.observation_dim,)
            shapes["norm.count"] = (1,)
        return shapes

    def initial(self, name: str) -> float:
        return 1.0 if name == "norm.var" else super().initial(name)

    def features(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        x = super().features(params, x, weight)
        if self.normalize:
            mean, var = (params[f"norm.{n}"].detach().unsqueeze(-2) for n in ("mean", "var"))
            x = ((x - mean) / (var + 1e-8).sqrt()).clamp(-CLIP, CLIP)
        return x

    def distribution(self, params: Params, observation: Tensor) -> Dist:
        """Return the parameters of the distributions, [..., samples, size] each.

        Args:
            params: leaves [...] or [tasks, ...]; some may be stacked and others not.
            observation: [samples, *observation_shape], or [tasks, samples, *observation_shape].
        """
        return self.head(params, self.forward(params, observation))

    def output(self, params: Params, samples: Any) -> Dist:
        """Return the distributions at a batch's observations, [T, N, ...] each."""
        if self.context_dim and "context" not in params:
            assert samples.context is not None
            params = {**params, "context": samples.context}
        return self.distribution(params, samples.observation)

    def adapts(self, name: str, part: Part) -> bool:
        return not name.startswith("norm.") and super().adapts(name, part)

    def track_observations(
        self, params: Params, parts: Sequence[Tensor], process_group: ProcessGroup = ALONE
    ) -> Params:
        """Return the parameters with observations taken into `norm.*`.

        Chan et al. 1979: mean and variance of the union of two samples.

        Args:
            params: not stacked.
            parts: [n, observation_dim] each, of one chunk of tasks after the other.
            ranks: that have other parts.
        """
        seen = process_group.total(sum(map(len, parts)))
        if not seen:
            return params
        mean, var, count = (params[f"norm.{n}"].double() for n in ("mean", "var", "count"))
        now = process_group.sum_in_order([x.double().sum(0) for x in parts]) / seen
        spread = process_group.sum_in_order([(x.double() - now).square().sum(0) for x in parts])
        total = count + seen
        gap = now - mean
        square = count * var + spread + gap.square() * count * seen / total
        new = {"mean": mean + gap * seen / total, "var": square / total, "count": total}
        return {**params, **{f"norm.{n}": x.to(params["norm.mean"].dtype) for n, x in new.items()}}

    @abstractmethod
    def head(self, params: Params, x: Tensor) -> Dist:
        """Return the distributions of network outputs x, [..., samples, output_dim]."""

    @abstractmethod
    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """Draw what `sample` needs, [*shape, output_dim]."""

    @abstractmethod
    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        """Return actions [..., action_size] from noise [..., output_dim]."""

    @abstractmethod
    def mode(self, dist: Dist) -> Tensor:
        """Return the most likely actions, [..., action_size]."""

    @abstractmethod
    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        """Return the log density of actions, summed over their components, [...]."""

    @abstractmethod
    def kl(self, old: Dist, new: Dist) -> Tensor:
        """Return KL(old || new) in nats, [...]."""

    @abstractmethod
    def fisher(self, dist: Dist, tangent: Dist) -> Dist:
        """Return F t, the Fisher metric of the distribution's parameters applied to a tangent.

        It is the Hessian of KL(dist || .) at dist.
        """

    @abstractmethod
    def entropy(self, dist: Dist) -> Tensor:
        """Return the entropy in nats, [...]."""


CLIP = 10.0
"""Normalized observations are cut to plus or minus so many standard deviations."""


@dataclass(frozen=True, kw_only=True)
class GaussianMLP(MLPPolicy):
    """Diagonal Gaussian: an MLP gives the mean, the log standard deviation is a free vector.

    The policy of Finn et al. 2017 and of TRPO before it.
    """

    action_dim: int
    initial_std: float = 1.0
    min_std: float = 1e-6

    parameter: ClassVar[str] = "mean"

    @property
    def output_dim(self) -> int:
        return self.action_dim

    @property
    def action_size(self) -> int:
        return self.action_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "log_std": (self.action_dim,)}

    def initial(self, name: str) -> float:
        return math.log(self.initial_std) if name == "log_std" else super().initial(name)

    def confined(self, params: Params) -> Params:
        # Below its floor the deviation has no gradient, and would stay there for good.
        return {**params, "log_std": self._log_std(params)}

    def _log_std(self, params: Params) -> Tensor:
        return params["log_std"].clamp(min=math.log(self.min_std))

    def head(self, params: Params, x: Tensor) -> Dist:
        log_std = self._log_std(params)
        return {"mean": x, "log_std": log_std.unsqueeze(-2).expand_as(x)}

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        return rng.standard_normal((*shape, self.action_dim), dtype=np.float32)

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        return torch.addcmul(dist["mean"], dist["log_std"].exp(), noise)

    def mode(self, dist: Dist) -> Tensor:
        return dist["mean"]

    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        log_std = dist["log_std"]
        z = (action - dist["mean"]) * (-log_std).exp()
        constant = 0.5 * math.log(2.0 * math.pi) * self.action_dim
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
        constant = 0.5 * (1.0 + math.log(2.0 * math.pi)) * self.action_dim
        return dist["log_std"].sum(-1) + constant


@dataclass(frozen=True, kw_only=True)
class CategoricalMLP(MLPPolicy):
    """Independent categorical components, such as one for Discrete; an MLP gives the logits.

    An action is a vector of indices, [..., components], held as floats.
    """

    categories: tuple[int, ...]
    """Number of categories of each component."""

    parameter: ClassVar[str] = "logits"

    @property
    def output_dim(self) -> int:
        return sum(self.categories)

    @property
    def action_size(self) -> int:
        return len(self.categories)

    def head(self, params: Params, x: Tensor) -> Dist:
        return {"logits": x}

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        return rng.gumbel(size=(*shape, self.output_dim)).astype(np.float32)

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        # The largest of logits with Gumbel noise falls on i with probability softmax(logits)[i].
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

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.categories, dim=-1)
