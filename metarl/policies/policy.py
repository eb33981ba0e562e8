"""Adapted policy: act, play episodes, save, and export as a module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metarl.envs import guard
from metarl.envs.errors import UserError
from metarl.models.export import Bounded, Chosen, make_module
from metarl.models.modules import ModuleNetwork
from metarl.models.networks import Params, State, copied
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
_SEQUENCES = 40  # number of sequences that they form for a recurrent policy
_TIES = 0.02  # allowed share of different categories


def _close(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether arrays are equal up to rounding of two kernels."""
    if found.shape != expected.shape:
        return False
    scale = 1.0 + np.abs(expected).max(initial=0.0, where=np.isfinite(expected))
    return bool(np.allclose(found, expected, rtol=0.0, atol=1e-5 * scale))


def _same_actions(found: NDArray, expected: NDArray) -> bool:
    if np.issubdtype(expected.dtype, np.integer):  # near ties may go either way
        return found.shape == expected.shape and bool(np.mean(found != expected) <= _TIES)
    return _close(found, expected)


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

    def initial_state(self, count: int | None = None) -> State:
        """Return the state at the start of an episode, for `act`.

        It is empty unless the network is recurrent. A state is a dict of tensors.

        Args:
            count: number of episodes of a batch of observations; None for one observation.
        """
        with torch.inference_mode():
            state = self.policy.initial_state(self.params, 1 if count is None else count)
        return {name: x[0] if count is None else x for name, x in state.items()}

    @overload
    def act(
        self, observation: Any, *, state: None = None, deterministic: bool = False
    ) -> NDArray[Any]: ...

    @overload
    def act(
        self, observation: Any, *, state: State, deterministic: bool = False
    ) -> tuple[NDArray[Any], State]: ...

    def act(
        self, observation: Any, *, state: State | None = None, deterministic: bool = False
    ) -> NDArray[Any] | tuple[NDArray[Any], State]:
        """Return the action for an observation, in the environment's format.

        A recurrent policy needs its state, and returns the next one:

            state = policy.initial_state()
            while ...:
                action, state = policy.act(observation, state=state)

        Args:
            observation: one observation [*observation_shape] or a batch [n, *observation_shape]. A
                single Dict or Tuple observation is accepted if the network is a custom module that
                reads it.
            state: state from `initial_state` or from the previous step of the same episodes.
            deterministic: take the most likely action instead of a sample.

        Returns:
            one action [*action_shape] or a batch [n, *action_shape], within the bounds of the
            action space. With `state`, a tuple of the action and the next state.

        Raises:
            UserError: the observation has another shape, or is not finite; the policy is recurrent
                and `state` is missing or of another shape.
        """
        action, _, after = self.act_raw(observation, state=state, deterministic=deterministic)
        return action if state is None else (action, after)

    def act_raw(
        self, observation: Any, *, state: State | None = None, deterministic: bool = False
    ) -> tuple[NDArray[Any], NDArray[np.float32], State]:
        """Return the result of `act`, with the raw action [..., action_size] before the state."""
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
        batch = torch.from_numpy(seen[None] if one else seen)
        before = self._checked_state(state, None if one else len(seen))
        with torch.inference_mode():
            output, after = self.policy.step(self.params, batch, before)
            dist = self.policy.head(self.params, output)
            if deterministic:
                action = self.policy.mode(dist)
            else:
                noise = self.policy.noise(self._rng, len(batch))
                action = self.policy.sample(dist, torch.from_numpy(noise))
        acts = env_action(action.numpy(), self._space, self._mode)
        if one:
            return acts[0], action[0].numpy(), {name: x[0] for name, x in after.items()}
        return acts, action.numpy(), after

    def _checked_state(self, state: State | None, count: int | None) -> State:
        """Return a state with an axis of observations; raise UserError if it does not fit."""
        expected = {name: list(x.shape) for name, x in self.initial_state(count).items()}
        if expected and state is None:
            raise UserError(
                "a recurrent policy needs its state: state = policy.initial_state() at the start of"
                " an episode, then action, state = policy.act(observation, state=state)"
            )
        given = {} if state is None else state
        found = {n: list(x.shape) for n, x in given.items()} if isinstance(given, dict) else given
        if found != expected:
            raise UserError(f"state must be tensors of shapes {expected}, got {found}")
        return {name: x[None] if count is None else x for name, x in given.items()}

    def play(
        self,
        env: gym.Env[Any, Any],
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
        taken, total, state = 0, 0.0, self.initial_state()

        def act(observation: Any, t: int) -> NDArray[Any]:
            nonlocal state
            if on_step is not None:
                on_step(t, total)
            action, state = self.act(observation, state=state, deterministic=deterministic)
            return action

        with guard.restored():
            for step in episode(env, act, self._horizon, seed):
                taken, total = taken + 1, total + step.reward
        if on_step is not None:
            on_step(taken, total)
        return total

    def module(self) -> nn.Module:
        """Return the policy as an ordinary torch module: observations [n, ...] to actions.

        The module of a recurrent policy maps observations and the tensors of a state, in the order
        of `initial_state(n)`, to a tuple of actions and the tensors of the next state.

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

    def _agrees(self, module: nn.Module) -> bool:
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
        if policy.recurrent:
            return self._agrees_in_sequences(module, seen)
        assert isinstance(module, nn.Sequential)
        with torch.inference_mode():
            observation = torch.from_numpy(seen)
            mode = policy.mode(policy.dist(self.params, observation)).numpy()
            acts = module(observation).numpy()
            raw = module[:-1](observation).numpy()
        expected = self.act(seen, deterministic=True)
        same = not isinstance(self._space, gym.spaces.Box) or _close(raw, mode)
        return same and _same_actions(acts, expected)

    def _agrees_in_sequences(self, module: nn.Module, seen: NDArray) -> bool:
        """Whether a module of a recurrent policy acts like it and keeps the same state."""
        state = self.initial_state(_SEQUENCES)
        for one in seen.reshape(-1, _SEQUENCES, *seen.shape[1:]):
            with torch.inference_mode():
                acts, *own = module(torch.from_numpy(one), *state.values())
            expected, state = self.act(one, state=state, deterministic=True)
            pairs = zip(own, state.values(), strict=True)
            same = all(_close(a.numpy(), b.numpy()) for a, b in pairs)
            if not (same and _same_actions(acts.numpy(), expected)):
                return False
        return True

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
