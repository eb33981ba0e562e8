"""Adaptation from a stream of transitions, when your program steps the environment."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs.errors import UserError
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.losses import Batch, dice, likelihood_ratio, log_likelihood
from metarl.learning.plausibility import Plausibility
from metarl.models.networks import Params, State, copied, stack
from metarl.models.policies import PolicyModel
from metarl.models.settings import own_settings
from metarl.policies.policy import Policy
from metarl.sampling.rollouts import RolloutBuffer
from metarl.sampling.spaces import (
    ActionMode,
    as_observation,
    check_action,
    drawn_between,
    policy_action,
    uniform_log_prob,
)
from metarl.sampling.trajectories import Rollout

_LARGEST = float(np.finfo(np.float32).max)  # the type of stored rewards
_EFFECTIVE = 0.1  # effective share of the transitions below which a warning is given


@dataclass
class _Episode:
    """Transitions of an episode, in order."""

    observation: list[NDArray[Any]] = field(default_factory=list)
    action: list[NDArray[Any]] = field(default_factory=list)
    """Actions as the policy sampled them, before clipping."""
    reward: list[float] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    """Log-densities under the policy that chose the actions; NaN if it is the current policy."""
    before: int = 0
    """Steps of the same episode that an earlier inner step used."""
    state: State = field(default_factory=dict)
    """A recurrent policy's state before the first of these transitions; NaN at the start."""
    terminated: bool = False
    over: bool = False


class OnlineAdapter:
    """Adapter of a meta-policy to one task from given transitions. It steps no environment itself.

    In your own loop:

        adapter = meta_policy.adapter()
        while ...:
            action = adapter.act(observation)
            ...
            adapter.add(observation, action, reward, terminated, truncated)
        policy = adapter.adapted()

    Each call of `adapted` takes one inner step on the transitions since the previous call. Later
    actions use the new parameters. An episode continues across calls of `add` until it ends or
    reaches the horizon. For the inner step, an unfinished episode counts as truncated. Its later
    transitions count as a separate episode for the next inner step. A recurrent policy keeps its
    state across this inner step; the step after it starts from that state.
    """

    def __init__(
        self,
        loop: InnerLoop,
        params: Params,
        prepare: Callable[[Rollout, ChunkPool], Batch],
        action_space: gym.Space,
        horizon: int,
        mode: ActionMode,
        record: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        """Create an adapter. Users call `MetaPolicy.adapter` instead.

        Args:
            loop: inner loop.
            params: meta-parameters to adapt from.
            prepare: function that estimates the advantages of a rollout.
            action_space: action space of the environment.
            horizon: maximum number of steps of an episode.
            mode: mapping of actions to the bounds of the space.
            record: config and family of the training, see `MetaPolicy.record`.
            seed: seed of the actions.
        """
        assert isinstance(loop.adapter.model, PolicyModel)
        self._loop, self._network, self._prepare = loop, loop.adapter.model, prepare
        self._space, self._horizon, self._record, self._seed = action_space, horizon, record, seed
        self._mode: ActionMode = mode
        fast, self._slow, self._step_sizes = loop.adapter.split(params)
        self._start = self._fast = stack(fast, 1)
        self._steps = self._seen = self._running = 0
        self._episodes: list[_Episode] = []
        self._drawn: tuple[NDArray[Any], NDArray[Any]] | None = (
            None  # environment action and raw action
        )
        self._plausibility: Plausibility | None = None
        if Plausibility.knows(self._network):
            self._plausibility = Plausibility(
                self._network,
                uniform_log_prob(action_space, mode),
                np.issubdtype(action_space.dtype, np.integer),
                np.random.default_rng(seed),
            )
        self._warned: set[str] = set()
        self._policy = self._made()
        self._state = self._policy.initial_state()  # before the next observation

    @property
    def transitions(self) -> int:
        """Number of transitions since the last inner step."""
        return sum(len(episode.reward) for episode in self._episodes)

    def act(self, observation: Any) -> NDArray[Any]:
        """Return an action for one observation, sampled from the current policy."""
        action, raw, _ = self._policy.act_raw(observation, state=self._state)
        self._drawn = np.array(action), raw
        return action

    def add(
        self,
        observation: Any,
        action: Any,
        reward: float,
        terminated: bool = False,
        truncated: bool = False,
        *,
        log_prob: float | None = None,
    ) -> None:
        """Add one transition.

        Inner losses assume that the policy chose the action. One warning is given if the actions
        are implausible for the policy. The false alarm rate of this test is one in 10,000 adapters.

        Args:
            observation: observation before the action.
            action: action as the environment took it. If it is the last action of `act`, its
                sampled value is known. Any other action is treated as the policy's sample.
            reward: reward of the action.
            terminated: the task ended with this step.
            truncated: the episode was cut, for instance at a time limit.
            log_prob: log-density (log-probability for categories) of the action under the policy
                that chose it, if it is another policy. In nats, summed over components, in the
                policy's units: with `policy.action` scale, these are [-1, 1]. The inner loss is
                then weighted by the ratio of both policies. The likelihood ratio replaces the
                log-likelihood; custom losses receive it as `old_log_prob`.

        Raises:
            UserError: a value is not finite, has another shape, or is not an action of the space.
                Also if `log_prob` is given and the algorithm's inner loss cannot use it.
        """
        policy = self._network
        seen = as_observation(observation, policy)
        if seen.shape != policy.observation_shape:
            raise UserError(
                f"observations must be {list(policy.observation_shape)}, got {list(seen.shape)}"
            )
        if not abs(reward) <= _LARGEST:
            raise UserError(f"reward must be a finite number of float32, got {reward}")
        check_action(action, self._space)
        self._check_log_prob(log_prob)
        if self._drawn is not None and np.array_equal(self._drawn[0], action):
            raw = self._drawn[1]
        else:
            raw = policy_action(action, self._space, self._mode)
            if log_prob is None:
                self._judge(seen, action)
        self._drawn = None
        if not self._episodes or self._episodes[-1].over:
            known = self._state
            if not self._running:
                known = {name: torch.full_like(x, torch.nan) for name, x in known.items()}
            self._episodes.append(_Episode(before=self._running, state=known))
            self._running = 0
        episode = self._episodes[-1]
        episode.observation.append(np.array(seen))  # the caller may reuse its array
        episode.action.append(raw)
        episode.reward.append(float(reward))
        episode.log_prob.append(np.nan if log_prob is None else float(log_prob))
        episode.terminated = bool(terminated)
        full = episode.before + len(episode.reward) >= self._horizon
        episode.over = bool(terminated or truncated or full)
        if self._state:
            self._state = self._policy.initial_state() if episode.over else self._after(seen)[1]

    def adapted(self) -> Policy:
        """Take an inner step on the transitions since the last one, if any, and return the policy.

        Raises:
            NonFiniteError: an adapted parameter is not a finite number.
        """
        if self._episodes:
            with own_settings():
                batch = self._prepare(self._rollout(), self._loop.pool)
                loop, batch = self._weighted(batch)
                self._fast = loop.step(
                    self._fast, self._slow, self._step_sizes, batch, self._steps, start=self._start
                )
            self._steps += 1
            self._seen += len(self._episodes)
            last = self._episodes[-1]
            self._running = 0 if last.over else last.before + len(last.reward)
            self._episodes = []
            self._policy = self._made()
            if last.over:
                self._state = self._policy.initial_state()
        policy = copy.copy(self._policy)  # the copy draws from the same stream
        policy.params = copied(policy.params)
        return policy

    def _check_log_prob(self, log_prob: float | None) -> None:
        if log_prob is None:
            return
        if (
            isinstance(log_prob, bool)
            or not isinstance(log_prob, Real)
            or not np.isfinite(log_prob)
        ):
            raise UserError(f"log_prob must be a finite number, got {log_prob!r}")
        loss = self._loop.adapter.loss
        if isinstance(loss, partial) and loss.func is dice:
            raise UserError(
                "log_prob has no effect with the inner loss dice, which needs actions of the policy"
                " itself"
            )

    def _judge(self, seen: NDArray[Any], action: Any) -> None:
        """Warn once if the actions so far are implausible for the policy."""
        test = self._plausibility
        if test is None or "implausible" in self._warned:
            return
        dist = self._network.head(self._policy.params, self._after(seen)[0])
        test.add(dist, *drawn_between(action, self._space, self._mode))
        if test.implausible:
            self._warn(
                "implausible",
                f"the policy did not choose these actions ({test.count} given to add that act did"
                " not return): an inner step on them may lead anywhere. Use act, or give log_prob",
            )

    def _after(self, seen: NDArray) -> tuple[Tensor, State]:
        """Return the network's output [1, size] at an observation, and the state after it."""
        state = {name: x[None] for name, x in self._state.items()}
        with torch.inference_mode():
            observation = torch.from_numpy(np.ascontiguousarray(seen[None]))
            output, after = self._network.step(self._policy.params, observation, state)
        return output, {name: x[0] for name, x in after.items()}

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=4)

    def _weighted(self, batch: Batch) -> tuple[InnerLoop, Batch]:
        """Return the inner loop and the samples, weighted by the known `log_prob` values."""
        given = torch.full(batch.old_log_prob.shape, torch.nan).view(1, len(self._episodes), -1)
        for e, episode in enumerate(self._episodes):
            given[0, e, : len(episode.log_prob)] = torch.tensor(episode.log_prob)
        given = given.flatten(1)
        known = torch.isfinite(given)
        if not known.any():
            return self._loop, batch
        ratio = torch.where(known, (batch.old_log_prob - given).double().exp(), 1.0)
        ratio = ratio[batch.weight > 0]
        effective = float(ratio.sum() ** 2 / ratio.square().sum()) / len(ratio)
        if not effective > _EFFECTIVE:
            self._warn(
                "weights",
                f"log_prob: {100 * effective:.2g} % of the transitions carry all the weight: the"
                " policy that chose these actions is too far from this one",
            )
        loop = self._loop
        if loop.adapter.loss is log_likelihood:  # same gradient, but weighted
            loop = replace(loop, adapter=replace(loop.adapter, loss=likelihood_ratio))
        return loop, replace(batch, old_log_prob=torch.where(known, given, batch.old_log_prob))

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
            self._network, params, self._space, self._horizon, self._mode, provenance,
            self._record,
        )  # fmt: skip

    def _rollout(self) -> Rollout:
        """Return the transitions as episodes of one task, with the network's outputs."""
        policy, params = self._network, self._params()
        longest = max(len(episode.reward) for episode in self._episodes)
        memory = RolloutBuffer(policy, 1, len(self._episodes), longest)
        for e, episode in enumerate(self._episodes):
            steps = len(episode.reward)
            memory.observation[0, e, :steps] = episode.observation
            memory.action[0, e, :steps] = episode.action
            memory.reward[0, e, :steps] = episode.reward
            memory.valid[0, e, :steps] = True
            memory.last_observation[0, e] = episode.observation[-1]  # not used
            memory.terminated[0, e] = episode.terminated
            memory.truncated[0, e] = not episode.terminated
            with torch.inference_mode():
                seen = torch.from_numpy(memory.observation[:, e : e + 1, :steps])
                before = {name: x[None, None] for name, x in episode.state.items()}
                memory.output[0, e, :steps] = policy.replay(params, seen, before)[0].numpy()
        detached = {name: p.detach() for name, p in params.items()}
        rollout = memory.rollout(policy, detached, np.full((1, 0), np.nan))
        states = [episode.state for episode in self._episodes]
        state = {name: torch.stack([s[name] for s in states])[None] for name in states[0]}
        return replace(rollout, state=state or None)
