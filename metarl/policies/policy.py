"""Adapted policy: act, play episodes, save, and export as a module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metarl.envs import guard
from metarl.envs.errors import UserError
from metarl.models.export import Bounded, Chosen, make_module
from metarl.models.modules import ModuleNetwork
from metarl.models.networks import Params, copied
from metarl.models.policies import PolicyModel
from metarl.runs import checkpoints
from metarl.runs.files import as_path
from metarl.sampling.episodes import episode
from metarl.sampling.seeding import stream
from metarl.sampling.spaces import (
    ActionMode,
    as_observation,
    env_action,
    middle_and_half,
    space_to_json,
)

_COMPARED = 200  # number of observations
_TIES = 0.02  # allowed share of different categories


def _close(found: NDArray, expected: NDArray) -> bool:
    """Whether arrays are equal up to rounding of two kernels."""
    if found.shape != expected.shape:
        return False
    scale = 1.0 + np.abs(expected).max(initial=0.0, where=np.isfinite(expected))
    return bool(np.allclose(found, expected, rtol=0.0, atol=1e-5 * scale))


class Policy:
    """Ordinary policy that maps observations to actions."""

    def __init__(
        self,
        policy: PolicyModel,
        params: Params,
        space: gym.Space,
        horizon: int,
        mode: ActionMode,
        provenance: Mapping[str, Any],
        record: Mapping[str, Any],
    ) -> None:
        """Create a policy from a network and its parameters. Users call `MetaPolicy.adapt` instead.

        Args:
            policy: policy network.
            params: network parameters by name, not stacked.
            space: action space of the environment.
            horizon: maximum number of steps of an episode, as in the training family.
            mode: mapping of actions to the bounds of the space.
            provenance: `task` (a list of numbers, or None if unknown), `steps`, `episodes` and
                `seed` of the adaptation. Actions use the same seed.
            record: `config` and `family` of the training, see `MetaPolicy.record`.
        """
        self.policy, self.params = policy, copied(params)
        self.provenance, self.record = map(copy.deepcopy, (dict(provenance), dict(record)))
        self._space, self._horizon = copy.deepcopy(space), horizon
        self._mode: ActionMode = mode
        self._rng = stream(provenance["seed"], 0, "test-noise", provenance["steps"])

    def act(self, observation: Any, *, deterministic: bool = False) -> NDArray:
        """Return the action for an observation, in the environment's format.

        Args:
            observation: one observation [*observation_shape] or a batch [n, *observation_shape]. A
                single Dict or Tuple observation is accepted if the network is a custom module that
                reads it.
            deterministic: take the most likely action instead of a sample.

        Returns:
            one action [*action_shape] or a batch [n, *action_shape], within the bounds of the
            action space.

        Raises:
            UserError: the observation has another shape, or is not finite.
        """
        return self.act_raw(observation, deterministic=deterministic)[0]

    def act_raw(
        self, observation: Any, *, deterministic: bool = False
    ) -> tuple[NDArray, NDArray[np.float32]]:
        """Return the result of `act` and the policy's raw action, [..., action_size]."""
        shape = list(self.policy.observation_shape)
        network = self.policy.network
        if isinstance(observation, Mapping | tuple) and isinstance(network, ModuleNetwork):
            observation = gym.spaces.flatten(network.space, observation)
        seen = as_observation(observation, self.policy)
        one = seen.ndim == len(shape)
        if seen.ndim - len(shape) not in (0, 1) or list(seen.shape[-len(shape) :]) != shape:
            numbers = ", ".join(map(str, shape))
            raise UserError(
                f"observations must be [{numbers}] or [n, {numbers}], got {list(seen.shape)}"
            )
        if not np.isfinite(seen).all():
            raise UserError(f"observations must be finite, got {seen[~np.isfinite(seen)][0]}")
        batch = torch.from_numpy(seen[None] if one else seen)
        with torch.inference_mode():
            dist = self.policy.dist(self.params, batch)
            if deterministic:
                action = self.policy.mode(dist)
            else:
                noise = self.policy.noise(self._rng, len(batch))
                action = self.policy.sample(dist, torch.from_numpy(noise))
        acts = env_action(action.numpy(), self._space, self._mode)
        return (acts[0], action[0].numpy()) if one else (acts, action.numpy())

    def play(
        self,
        env: gym.Env,
        *,
        seed: int | None = None,
        deterministic: bool = False,
        on_step: Callable[[int, float], None] | None = None,
    ) -> float:
        """Play one episode, truncated at the horizon, and return the sum of its rewards.

        Args:
            env: environment with the spaces of the adaptation.
            seed: seed of the environment's reset; None does not seed it. Sampled actions use a
                separate stream that continues across calls.
            deterministic: take the most likely action instead of a sample.
            on_step: called after the reset and after every step, with the number of steps taken and
                the return so far.

        Raises:
            UserError: an observation has another shape than the policy's, or is not finite.
        """
        taken, total = 0, 0.0

        def act(observation: Any, t: int) -> NDArray:
            if on_step is not None:
                on_step(t, total)
            return self.act(observation, deterministic=deterministic)

        with guard.restored():
            for step in episode(env, act, self._horizon, seed):
                taken, total = taken + 1, total + step.reward
        if on_step is not None:
            on_step(taken, total)
        return total

    def module(self) -> nn.Module:
        """Return the policy as an ordinary torch module: observations [n, ...] to actions.

        The module takes the most likely action and includes normalization and the mapping of
        actions. It is compared with the policy on random observations.

        Raises:
            UserError: the policy acts differently, for instance because of a custom forward pass in
                a subclass.
        """
        module = make_module(self.policy, copied(self.params), *self._last())
        if self._agrees(module):
            return module
        raise UserError(
            f"{type(self.policy).__name__} acts differently from its network and distribution as a"
            " module: a custom forward pass or custom features are not part of the module"
        )

    def _last(self) -> list[nn.Module]:
        """Return the layers that map the most likely actions to environment actions."""
        space = self._space
        if not isinstance(space, gym.spaces.Box):
            flat = isinstance(space, gym.spaces.Discrete)
            start = np.broadcast_to(getattr(space, "start", 0), self.policy.action_size)
            return [Chosen(start.tolist(), flat)]
        scaling = middle_and_half(space) if self._mode == "scale" else ()
        return [Bounded(space.low, space.high, *scaling)]

    def _agrees(self, module: nn.Sequential) -> bool:
        """Whether a module acts like the policy, before and after the bounds."""
        policy, rng = self.policy, np.random.default_rng(0)  # used only here
        shape = (_COMPARED, *policy.observation_shape)
        if policy.observation_dtype == np.uint8:
            seen = rng.integers(0, 256, shape, np.uint8)
        else:
            spread = np.logspace(-1.0, 1.0, _COMPARED).reshape(-1, *[1] * (len(shape) - 1))
            seen = (spread * rng.standard_normal(shape)).astype(np.float32)
            if policy.normalize:
                mean, var = (self.params[f"norm.{name}"].numpy() for name in ("mean", "var"))
                seen = (mean + np.sqrt(var + 1e-8) * seen).astype(np.float32)
        with torch.inference_mode():
            observation = torch.from_numpy(seen)
            mode = policy.mode(policy.dist(self.params, observation)).numpy()
            acts = module(observation).numpy()
            raw = module[:-1](observation).numpy()
        expected = self.act(seen, deterministic=True)
        same = not isinstance(self._space, gym.spaces.Box) or _close(raw, mode)
        if np.issubdtype(expected.dtype, np.integer):  # near ties may go either way
            return (
                same and acts.shape == expected.shape and bool(np.mean(acts != expected) <= _TIES)
            )
        return same and _close(acts, expected)

    def save(self, path: str | Path) -> None:
        """Write a policy file that `load_policy` reads.

        Raises:
            OSError: the file cannot be written.
        """
        metadata = {
            "kind": "adapted",
            **self.record,
            "adapted": self.provenance,
            "actions": space_to_json(self._space),
            "versions": checkpoints.versions(),
        }
        checkpoints.save(as_path("the file", path), self.params, metadata)
