"""Families whose best return is known exactly: random MDPs, and bandits.

A task vector is the flattened tables: the mean reward of each state and action and, with more than
one state, the probability of each next state. An oracle therefore observes the complete task, and
`optimal_return` needs only the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_one_of
from metarl.envs.family import TaskFamily
from metarl.envs.registry import register
from metarl.envs.single import SingleTaskEnv
from metarl.envs.tasks import Split, TaskDistribution, Tasks, Uniform
from metarl.envs.vector import Advanced, Floats, TaskVectorEnv

_GRID_SEEDS = {"train": 1, "test": 2}


class RandomTables(TaskDistribution):
    """Distribution of MDPs: mean rewards from N(1, 1), transitions from a flat Dirichlet.

    Duan et al. 2016 (arXiv:1611.02779).
    """

    def __init__(self, states: int, actions: int) -> None:
        self.states, self.actions = states, actions
        pairs = [f"{s}_{a}" for s in range(states) for a in range(actions)]
        self.names = (
            *(f"reward_{pair}" for pair in pairs),
            *(f"transition_{pair}_{s}" for pair in pairs for s in range(states)),
        )

    def sample(self, rng: np.random.Generator, n: int, split: Split = "train") -> Tasks:
        check_one_of("split", split, get_args(Split))
        pairs = self.states * self.actions
        rewards = rng.normal(1.0, 1.0, (n, pairs))
        transitions = rng.dirichlet(np.ones(self.states), (n, pairs))
        return np.concatenate([rewards, transitions.reshape(n, -1)], axis=1)

    def grid(self, n: int, split: Split = "test") -> Tasks:
        """Return n tasks from a fixed stream of the split; a lattice needs few dimensions."""
        check_one_of("split", split, get_args(Split))
        return self.sample(np.random.default_rng([0, _GRID_SEEDS[split]]), n)

    def describe(self) -> str:
        return (
            f"{self.states} x {self.actions} mean rewards ~ N(1, 1),"
            f" transitions to {self.states} states ~ Dirichlet(1)"
        )

    def bounds(self, split: Split = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return N(1, 1) to three standard deviations for rewards, [0, 1] for probabilities."""
        check_one_of("split", split, get_args(Split))
        pairs = self.states * self.actions
        rest = self.dim - pairs
        return np.repeat([-2.0, 0.0], [pairs, rest]), np.repeat([4.0, 1.0], [pairs, rest])


Payoff = Literal["normal", "bernoulli"]


@dataclass(frozen=True, kw_only=True)
class TabularFamily(TaskFamily):
    """Family of finite MDPs; episodes start in state 0, and observations are one-hot states."""

    states: int
    actions: int
    payoff: Payoff
    """Distribution of rewards: N(mean, 1), or 1 with probability `mean` and else 0."""

    parallel: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(f"{self.name}: payoff", self.payoff, get_args(Payoff))

    def make(
        self, task: ArrayLike | None = None, *, render_mode: str | None = None
    ) -> gym.Env[Any, Any]:
        return SingleTaskEnv(self, task, render_mode)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> TabularVectorEnv:
        options.pop("threads", None)
        return TabularVectorEnv(self, num_tasks, episodes, **options)

    def tables(self, tasks: Tasks) -> tuple[Floats, Floats]:
        """Return mean rewards [n, states, actions] and transitions [n, states, actions, states]."""
        shape = (len(tasks), self.states, self.actions)
        pairs = self.states * self.actions
        rewards = tasks[:, :pairs].reshape(shape)
        if self.states == 1:
            return rewards, np.ones((*shape, 1))
        return rewards, tasks[:, pairs:].reshape(*shape, self.states)

    def optimal_return(self, tasks: Tasks) -> Floats:
        """Return the largest expected return of an episode of each task [n, task_dim], [n].

        Backward induction, V_h(s) = max_a r(s, a) + sum_s' P(s' | s, a) V_{h+1}(s'). The policy
        that knows the task and the remaining steps reaches this value, and no policy exceeds it.
        """
        rewards, transitions = self.tables(tasks)
        value = np.zeros((len(tasks), self.states))
        for _ in range(self.horizon):
            value = (rewards + np.einsum("nsat,nt->nsa", transitions, value)).max(axis=2)
        return value[:, 0]


class TabularVectorEnv(TaskVectorEnv):
    """Vector environment of all MDPs."""

    family: TabularFamily

    def __init__(
        self,
        family: TabularFamily,
        num_tasks: int,
        episodes: int,
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        if render_mode is not None:
            raise UserError(f"{family.name} has no render mode, got {render_mode!r}")
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=gym.spaces.Box(0.0, 1.0, (family.states,), np.float32),
            action_space=gym.spaces.Discrete(family.actions),
            metadata={"render_modes": []},
            **options,
        )
        shape = (self.num_envs, family.states, family.actions)
        self._rewards = np.zeros(shape)
        self._cumulative = np.zeros((*shape, family.states))
        self._state = np.zeros(self.num_envs, np.int64)
        self._time = np.zeros(self.num_envs, np.int64)
        self._rngs: list[np.random.Generator | None] = [None] * self.num_envs
        # Drawn at the start of each episode, so other sub-environments do not change it.
        self._chance = np.zeros((self.num_envs, family.horizon))
        self._luck = np.zeros((self.num_envs, family.horizon))

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        family = self.family
        self._rewards[ids], transitions = family.tables(self._tasks[ids])
        self._cumulative[ids] = transitions.cumsum(axis=-1)
        for i, seed in zip(ids, seeds, strict=True):
            rng = self._rngs[i]
            if seed is not None or rng is None:
                rng = self._rngs[i] = seeding.np_random(seed)[0]
            self._chance[i] = rng.random(family.horizon)
            normal = family.payoff == "normal"
            self._luck[i] = (rng.standard_normal if normal else rng.random)(family.horizon)
        self._state[ids] = self._time[ids] = 0

    def advance(self, ids: NDArray[np.int64] | None, actions: Any) -> Advanced:
        moved = np.arange(self.num_envs) if ids is None else ids
        action = np.asarray(actions)
        if action.shape != (self.num_envs,) or not np.issubdtype(action.dtype, np.integer):
            raise UserError(f"actions must be {self.num_envs} whole numbers, got {actions}")
        chosen = action[moved]
        if ((chosen < 0) | (chosen >= self.family.actions)).any():
            raise UserError(f"actions must be from 0 to {self.family.actions - 1}, got {chosen}")
        state, time = self._state[moved], self._time[moved]
        mean, luck = self._rewards[moved, state, chosen], self._luck[moved, time]
        reward = np.zeros(self.num_envs)
        reward[moved] = mean + luck if self.family.payoff == "normal" else luck < mean
        passed = self._chance[moved, time, None] >= self._cumulative[moved, state, chosen, :-1]
        self._state[moved] = passed.sum(axis=1)
        self._time[moved] += 1
        return reward, None, None, None, {}

    def _observe(self) -> NDArray[Any]:
        return np.eye(self.family.states, dtype=np.float32)[self._state]


@register(gymnasium_id="metarl/TabularMDP-v0", max_episode_steps=10)
def tabular_mdp(states: int = 10, actions: int = 5, horizon: int = 10) -> TabularFamily:
    """Random MDPs as in RL^2 (Duan et al. 2016, arXiv:1611.02779)."""
    if states < 2 or actions < 2:
        raise UserError(f"states and actions must be at least 2, got {states} and {actions}")
    return TabularFamily(
        name="tabular-mdp",
        description=f"random MDP of {states} states and {actions} actions, rewards N(mean, 1)",
        tasks=RandomTables(states, actions),
        horizon=horizon,
        states=states,
        actions=actions,
        payoff="normal",
    )


@register(gymnasium_id="metarl/Bandit-v0", max_episode_steps=10)
def bandit(arms: int = 5, horizon: int = 10) -> TabularFamily:
    """Bernoulli bandits; arms pay 1 with p ~ U[0, 1] (Duan et al. 2016), one pull per step."""
    if arms < 2:
        raise UserError(f"arms must be at least 2, got {arms}")
    return TabularFamily(
        name="bandit",
        description=f"{arms} arms that pay 1 with hidden probabilities",
        tasks=Uniform({f"arm_{k}": (0.0, 1.0) for k in range(arms)}),
        horizon=horizon,
        states=1,
        actions=arms,
        payoff="bernoulli",
    )
