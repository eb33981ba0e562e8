"""Neural critic: a value function for all tasks, trained in every iteration."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from metarl.distributed.chunk_pool import slices
from metarl.distributed.process_group import ALONE, CHUNK, ProcessGroup
from metarl.learning.advantages import discounted_sum
from metarl.learning.baselines import Baseline, Fit, seen
from metarl.learning.gradient_steps import Adam
from metarl.models.networks import Params, tanh, unflatten
from metarl.sampling.trajectories import Rollout
from metarl.sampling.trials import baseline_input

_OPTIMIZER = "optimizer:"  # prefix of the optimizer's state
_CLIP = 10.0  # bound on scaled observations


@dataclass(frozen=True, kw_only=True)
class Critic(Baseline):
    """An MLP of observation and time, trained on the discounted returns of all tasks.

    It is trained with Adam after each iteration. The values of an iteration therefore do not depend
    on its own returns. Observations and returns are scaled by their running mean and standard
    deviation.

    The critic does not observe the task. With a small gae_lambda, its values replace the rewards
    that distinguish the tasks: keep gae_lambda near 1.
    """

    name: ClassVar[str] = "critic"

    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""
    learning_rate: float = 3e-3
    """Step size of Adam."""
    steps: int = 40
    """Adam steps per iteration, each on one episode of every task."""

    def __post_init__(self) -> None:
        self.require("hidden", all(size >= 1 for size in self.hidden), "sizes of at least 1")
        self.require_positive("learning_rate")
        self.require_at_least(1, "steps")

    def init(self, observation_shape: tuple[int, ...], rng: np.random.Generator) -> Params:
        blank = torch.zeros(1, 1, 1, *observation_shape)
        size = seen(blank, len(observation_shape)).shape[-1]
        sizes = (size + 1, *self.hidden, 1)
        state: Params = {}
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            bound = math.sqrt(6.0 / (inputs + outputs))
            values = rng.uniform(-bound, bound, (inputs, outputs)).astype(np.float32)
            state[f"layer{i}.weight"] = torch.from_numpy(values)
            state[f"layer{i}.bias"] = torch.zeros(outputs)
        moments = Adam().init(dict(state))
        state |= {f"{_OPTIMIZER}{name}": x for name, x in moments.items()}
        for name, width in (("observation", size), ("return", 1)):
            state |= {f"{name}.mean": torch.zeros(width), f"{name}.square": torch.ones(width)}
        return state | {"count": torch.zeros(1)}

    def fit(self, state: Params, observation: Tensor, valid: Tensor) -> Fit:
        value = self.values(state, observation).double()
        value = torch.where(valid, value, 0.0)
        return lambda target: value

    def values(self, state: Params, observation: Tensor) -> Tensor:
        """Return the values of observations [T, E, H, *observation_shape], [T, E, H]."""
        with torch.no_grad():
            scaled = self._network(state, self._inputs(state, observation))
        return scaled * _deviation(state, "return") + state["return.mean"]

    def update(
        self,
        state: Params,
        rollouts: Sequence[Rollout],
        discount: float,
        process_group: ProcessGroup = ALONE,
    ) -> Params:
        """Return the state after an iteration's rollouts.

        Sums over tasks are computed in chunks, in a fixed order. The result does not depend on the
        number of processes.
        """
        data = [
            (
                dataclasses.replace(r, observation=baseline_input(r)),
                discounted_sum(r.reward.double(), discount).float(),
            )
            for r in rollouts
        ]
        state = {**state, **self._statistics(state, data, process_group)}
        names = [name for name in state if name.startswith("layer")]
        moments = {
            name.removeprefix(_OPTIMIZER): x
            for name, x in state.items()
            if name.startswith(_OPTIMIZER)
        }
        optimizer = Adam(learning_rate=self.learning_rate)
        for step in range(self.steps):
            rollout, target = data[step % len(data)]
            episode = (step // len(data)) % target.shape[1]
            params = {name: state[name] for name in names}
            gradient = self._gradient(state, params, rollout, target, episode, process_group)
            leaves, moments = optimizer.advance(
                list(params.values()), names, list(unflatten(gradient, params).values()), moments,
                self.learning_rate,
            )  # fmt: skip
            state |= dict(zip(names, leaves, strict=True))
        return state | {f"{_OPTIMIZER}{name}": x for name, x in moments.items()}

    def _gradient(
        self,
        state: Params,
        params: Params,
        rollout: Rollout,
        target: Tensor,
        episode: int,
        process_group: ProcessGroup,
    ) -> Tensor:
        """Return the flat gradient of the mean squared error of one episode of every task."""
        scale, mean = _deviation(state, "return"), state["return.mean"]
        parts, count = [], 0
        for chunk in slices(len(target), CHUNK):
            one = slice(episode, episode + 1)
            valid = rollout.valid[chunk, one]
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            found = self._network(leaves, self._inputs(state, rollout.observation[chunk, one]))
            error = found - (target[chunk, one] - mean) / scale
            loss = torch.where(valid, error.square(), 0.0).sum()
            slopes = torch.autograd.grad(loss, list(leaves.values()))
            parts.append(torch.cat([g.reshape(-1) for g in slopes]))
            count += int(valid.sum())
        total = process_group.total(count)
        return process_group.sum_in_order(parts) / max(total, 1)

    def _statistics(
        self, state: Params, data: Sequence[tuple[Rollout, Tensor]], process_group: ProcessGroup
    ) -> Params:
        """Return running means and mean squares of observations and returns, and their count."""
        parts = []
        for chunk in slices(len(data[0][1]), CHUNK):
            sums = []
            for rollout, target in data:
                valid = rollout.valid[chunk]
                x = seen(rollout.observation[chunk], rollout.observation.dim() - 3)[valid].double()
                y = target[chunk][valid].double().unsqueeze(-1)
                one = torch.full((1,), float(len(x)), dtype=torch.float64)
                sums.append(torch.cat([one, *(f(v).sum(0) for v in (x, y) for f in _POWERS)]))
            parts.append(torch.stack(sums).sum(0))
        total = process_group.sum_in_order(parts)
        seen_now, before = float(total[0]), float(state["count"])
        if not seen_now:
            return {}
        size = len(state["observation.mean"])
        means = (total[1:] / seen_now).split([size, size, 1, 1])
        share = seen_now / (before + seen_now)
        names = ("observation.mean", "observation.square", "return.mean", "return.square")
        new = {
            name: (state[name].double() + share * (now - state[name].double())).float()
            for name, now in zip(names, means, strict=True)
        }
        return new | {"count": torch.tensor([before + seen_now], dtype=torch.float32)}

    def _inputs(self, state: Params, observation: Tensor) -> Tensor:
        """Return the input of the network, [T, E, H, size + 1]: scaled observations and time."""
        x = seen(observation, observation.dim() - 3).float()
        x = (x - state["observation.mean"]) / _deviation(state, "observation")
        time = torch.arange(x.shape[2], dtype=x.dtype) / 100.0
        return torch.cat([x.clamp(-_CLIP, _CLIP), time.expand(*x.shape[:3]).unsqueeze(-1)], dim=-1)

    def _network(self, params: Params, x: Tensor) -> Tensor:
        for i in range(len(self.hidden) + 1):
            x = x @ params[f"layer{i}.weight"] + params[f"layer{i}.bias"]
            x = tanh(x) if i < len(self.hidden) else x
        return x.squeeze(-1)


_POWERS = (lambda v: v, torch.square)


def _deviation(state: Params, name: str) -> Tensor:
    """Return the running standard deviation of observations or returns; 1 without data."""
    variance = state[f"{name}.square"] - state[f"{name}.mean"].square()
    return variance.clamp(min=1e-8).sqrt()
