"""Adaptation from transitions as they come, for whoever owns the environment: a robot, a server."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from metarl.envs.errors import UserError
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.networks import Params, copied, stack
from metarl.learning.policies import MLPPolicy
from metarl.learning.settings import own_settings
from metarl.learning.trajectories import Rollout
from metarl.running.config import Config
from metarl.running.fingerprint import Fingerprint
from metarl.running.policy import Policy
from metarl.sampling.rollouts import RolloutBuffer
from metarl.sampling.spaces import as_observation, policy_action

_LARGEST = float(np.finfo(np.float32).max)  # as rewards are held


@dataclass
class _Episode:
    """Transitions in their order."""

    observation: list[NDArray] = field(default_factory=list)
    action: list[NDArray] = field(default_factory=list)
    """As the policy drew them, before any clipping."""
    reward: list[float] = field(default_factory=list)
    before: int = 0
    """Steps of the same episode that an inner step was taken on already."""
    terminated: bool = False
    over: bool = False


class OnlineAdapter:
    """Adapts a meta-policy to one task by transitions that it is given, and drives no environment.

    adapter = meta_policy.adapter()
    while ...:
        action = adapter.act(observation)
        ...
        adapter.add(observation, action, reward, terminated, truncated)
    policy = adapter.adapted()

    Every call of `adapted` takes one inner step on the transitions since the one before, and later
    actions are those of the new parameters. An episode goes on from call to call of `add` until it
    ends or the horizon is reached; one that has not ended yet counts as cut for that inner step,
    and what comes of it later is one of its own for the next.
    """

    def __init__(
        self,
        loop: InnerLoop,
        params: Params,
        action_space: gym.Space,
        horizon: int,
        config: Config,
        seed: int = 0,
        trained_on: Fingerprint | None = None,
    ) -> None:
        """Make an adapter; `MetaPolicy.adapter` does so for its user.

        Args:
            loop: how to adapt.
            params: meta-parameters to adapt from.
            action_space: of the environment that is acted in.
            horizon: steps after which an episode is cut.
            config: of the training behind it.
            seed: of the actions.
            trained_on: what identifies the family as it was in training, if that is known.
        """
        assert isinstance(loop.adapter.model, MLPPolicy)
        self._loop, self._network = loop, loop.adapter.model
        self._space, self._horizon, self._config, self._seed = action_space, horizon, config, seed
        self._trained_on = trained_on
        fast, self._slow, self._step_sizes = loop.adapter.split(params)
        self._start = self._fast = stack(fast, 1)
        self._steps = self._seen = self._running = 0
        self._episodes: list[_Episode] = []
        self._drawn: tuple[NDArray, NDArray] | None = None  # the environment's action, the raw one
        self._policy = self._made()

    @property
    def transitions(self) -> int:
        """Transitions since the last step."""
        return sum(len(episode.reward) for episode in self._episodes)

    def act(self, observation: Any) -> NDArray:
        """Return an action for one observation, drawn from the policy as it stands."""
        action, raw = self._policy.act_raw(observation)
        self._drawn = np.array(action), raw
        return action

    def add(
        self,
        observation: Any,
        action: Any,
        reward: float,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Take one transition.

        Args:
            observation: before the action.
            action: as the environment took it. One that `act` gave last is known as it was drawn;
                any other is taken for what the policy drew.
            reward: for the action.
            terminated: the task ended with it.
            truncated: it was cut, as after the last step of an episode by time.

        Raises:
            UserError: something is not finite, has another shape, or is no action of the space.
        """
        policy = self._network
        seen = as_observation(observation, policy)
        if seen.shape != policy.observation_shape:
            raise UserError(
                f"observations must be {list(policy.observation_shape)}, got {list(seen.shape)}"
            )
        if not np.isfinite(seen).all():
            raise UserError(f"observations must be finite, got {seen[~np.isfinite(seen)][0]}")
        if not abs(reward) <= _LARGEST:
            raise UserError(f"reward must be a finite number of float32, got {reward}")
        if self._drawn is not None and np.array_equal(self._drawn[0], action):
            raw = self._drawn[1]
        else:
            raw = policy_action(action, self._space, self._config.policy.action)
        self._drawn = None
        if not self._episodes or self._episodes[-1].over:
            self._episodes.append(_Episode(before=self._running))
            self._running = 0
        episode = self._episodes[-1]
        episode.observation.append(np.array(seen))  # the caller may change its own
        episode.action.append(raw)
        episode.reward.append(float(reward))
        episode.terminated = bool(terminated)
        full = episode.before + len(episode.reward) >= self._horizon
        episode.over = bool(terminated or truncated or full)

    def adapted(self) -> Policy:
        """Take an inner step on the transitions since the last one, if any, and return the policy.

        Raises:
            NonFiniteError: an adapted parameter is not a finite number.
        """
        if self._episodes:
            with own_settings():
                batch, _ = self._loop.prepare(self._rollout())
                self._fast = self._loop.step(
                    self._fast, self._slow, self._step_sizes, batch, self._steps, start=self._start
                )
            self._steps += 1
            self._seen += len(self._episodes)
            last = self._episodes[-1]
            self._running = 0 if last.over else last.before + len(last.reward)
            self._episodes = []
            self._policy = self._made()
        policy = copy.copy(self._policy)  # which draws from the same stream
        policy.params = copied(policy.params)
        return policy

    def _params(self) -> Params:
        return self._loop.adapter.params(self._fast, self._slow, 1)

    def _made(self) -> Policy:
        params = {name: p[0].detach().clone() for name, p in self._params().items()}
        provenance = {
            "task": None,
            "steps": self._steps,
            "episodes": self._seen,
            "seed": self._seed,
        }
        return Policy(
            self._network, params, self._space, self._horizon, self._config, provenance,
            self._trained_on,
        )  # fmt: skip

    def _rollout(self) -> Rollout:
        """Return the transitions as episodes of one task, with what the policy gave at each."""
        policy, params = self._network, self._params()
        longest = max(len(episode.reward) for episode in self._episodes)
        memory = RolloutBuffer(policy, 1, len(self._episodes), longest)
        for e, episode in enumerate(self._episodes):
            steps = len(episode.reward)
            memory.observation[0, e, :steps] = episode.observation
            memory.action[0, e, :steps] = episode.action
            memory.reward[0, e, :steps] = episode.reward
            memory.valid[0, e, :steps] = True
            memory.last_observation[0, e] = episode.observation[-1]  # what came after has no use
            memory.terminated[0, e] = episode.terminated
            memory.truncated[0, e] = not episode.terminated
            with torch.inference_mode():
                seen = torch.from_numpy(memory.observation[:, e, :steps])
                dist = policy.distribution(params, seen)
                memory.output[0, e, :steps] = dist[policy.parameter][0].numpy()
        detached = {name: p.detach() for name, p in params.items()}
        return memory.rollout(policy, detached, np.full((1, 0), np.nan))
