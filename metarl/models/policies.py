"""Policies: a network and a distribution over actions, as functions of parameters and observations.

See `networks` for parameters, stacked over tasks or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.models.distribution import Distribution
from metarl.models.networks import Dist, Model, Network, Params, Part, State

CLIP = 10.0
"""Normalized observations are clipped to plus or minus this many standard deviations."""


@dataclass(frozen=True, kw_only=True)
class PolicyModel(Model):
    """A distribution over actions whose parameters a network computes from the observation.

    With `normalize`, observations are scaled by entries `norm.*`. These have no gradient;
    `track_observations` updates them.
    """

    network: Network
    distribution: Distribution
    """Distribution, fitted to the action space."""
    normalize: bool = False

    @property
    def action_size(self) -> int:
        """Size of an action as a vector."""
        return self.distribution.action_size

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return self.network.input_shape

    @property
    def observation_dtype(self) -> type[np.generic]:
        """Storage type of observations."""
        return self.network.input_dtype

    @property
    def images(self) -> bool:
        """Whether observations are images of bytes."""
        return self.observation_dtype is np.uint8

    def shapes(self) -> dict[str, tuple[int, ...]]:
        own = {name: tuple(p.shape) for name, p in self._constants().items()}
        return {**self.network.shapes(), **own}

    def init(self, rng: np.random.Generator) -> Params:
        return {**self.network.init(rng), **self._constants()}

    def _constants(self) -> Params:
        """Return the initial parameters besides the network's."""
        values: dict[str, NDArray] = {}
        if self.normalize:
            shape = self.observation_shape
            values = {"norm.mean": np.zeros(shape), "norm.var": np.ones(shape)}
            values["norm.count"] = np.zeros(1)
        values |= self.distribution.free()
        return {name: torch.from_numpy(x.astype(np.float32)) for name, x in values.items()}

    def network_output(self, params: Params, observation: Tensor) -> Tensor:
        """Return the network's output, [..., samples, size].

        Args:
            params: leaves [...] or [tasks, ...]; some may be stacked and others not.
            observation: [samples, *observation_shape], or [tasks, samples, *observation_shape].
        """
        return self.network.forward(params, self._normalized(params, observation))

    def _normalized(self, params: Params, observation: Tensor) -> Tensor:
        if not self.normalize:
            return observation
        mean, var = (params[f"norm.{n}"].detach().unsqueeze(-2) for n in ("mean", "var"))
        return ((observation - mean) / (var + 1e-8).sqrt()).clamp(-CLIP, CLIP)

    def initial_state(self, params: Params, *samples: int) -> State:
        """Return the network's state at the start of episodes, [*samples, *size] each."""
        return self.network.initial_state(params, samples)

    def step(self, params: Params, observation: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the network's output at one step of episodes, and its state after the step.

        Args:
            params, observation: see `network_output`.
            state: state before the step; empty for a network without one.
        """
        if not self.recurrent:
            return self.network_output(params, observation), state
        return self.network.step(params, self._normalized(params, observation), state)

    def replay(self, params: Params, observation: Tensor, state: State | None = None) -> Tensor:
        """Return the network's outputs in whole episodes, [T, E x H, size].

        Args:
            observation: [T, E, H, *observation_shape].
            state: state before the first step, [T, E, *size] each. NaN, and None, stand for the
                initial state, which may depend on the parameters.
        """
        flat = observation.flatten(1, 2)
        if not self.recurrent:
            return self.network_output(params, flat)
        sequences = self._normalized(params, flat).unflatten(1, observation.shape[1:3])
        start = self.initial_state(params, *observation.shape[:2])
        if state is not None:
            start = {n: torch.where(state[n].isnan(), x, state[n]) for n, x in start.items()}
        return self.network.replay(params, sequences, start)

    def head(self, params: Params, output: Tensor) -> Dist:
        """Return the distributions of network outputs [..., samples, size]."""
        return self.distribution.parameters(output, params)

    def dist(self, params: Params, observation: Tensor) -> Dist:
        """Return the distributions at observations, see `network_output`."""
        return self.head(params, self.network_output(params, observation))

    def output(self, params: Params, samples: Any) -> Dist:
        """Return the distributions at a batch's observations, [T, N, ...] each.

        A recurrent network replays each episode from its start.

        Raises:
            ValueError: the network is recurrent, and the samples are not whole episodes.
        """
        params, seen = self.in_context(params, samples), samples.observation
        if not self.recurrent:
            return self.dist(params, seen)
        if not samples.episodes:
            raise ValueError("a recurrent policy needs whole episodes")
        sequences = seen.unflatten(1, (samples.episodes, -1))
        return self.head(params, self.replay(params, sequences, samples.state))

    def confined(self, params: Params) -> Params:
        return {**params, **self.distribution.confined(params)}

    def adapts(self, name: str, part: Part) -> bool:
        if name.startswith("norm."):
            return False
        if name in self.distribution.free():
            return part == "all"
        return super().adapts(name, part)

    def track_observations(
        self, params: Params, parts: Sequence[Tensor], process_group: ProcessGroup = ALONE
    ) -> Params:
        """Return the parameters with `norm.*` updated by observations.

        Chan et al. 1979: mean and variance of the union of two samples.

        Args:
            params: parameters, not stacked.
            parts: [n, observation_dim] each, one for each chunk of tasks.
            process_group: group with the other parts.
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

    def noise(self, rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        """Draw the noise that `sample` needs, [*shape, size]."""
        return self.distribution.noise(rng, *shape)

    def sample(self, dist: Dist, noise: Tensor) -> Tensor:
        """Return the actions [..., action_size] for given noise."""
        return self.distribution.sample(dist, noise)

    def mode(self, dist: Dist) -> Tensor:
        """Return the most likely actions, [..., action_size]."""
        return self.distribution.mode(dist)

    def log_prob(self, dist: Dist, action: Tensor) -> Tensor:
        """Return the log-density of actions, summed over their components, [...]."""
        return self.distribution.log_prob(dist, action)

    def kl(self, old: Dist, new: Dist) -> Tensor:
        """Return KL(old || new), [...]."""
        return self.distribution.kl(old, new)

    def fisher(self, dist: Dist, tangent: Dist) -> Dist:
        """Return F t, the Fisher metric of the distribution's parameters applied to a tangent."""
        return self.distribution.fisher(dist, tangent)

    def entropy(self, dist: Dist) -> Tensor:
        """Return the entropy in nats, [...]."""
        return self.distribution.entropy(dist)
