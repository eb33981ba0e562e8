"""Sequential episodes of one ordinary Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from metarl.envs import guard
from metarl.envs.errors import NonFiniteError
from metarl.envs.gymnasium.observations import check_fits
from metarl.envs.gymnasium.step_results import plain_reset, plain_step, success
from metarl.envs.gymnasium.wrappers import refuse_running_statistics
from metarl.envs.seeds import foreign_seed
from metarl.envs.single import SingleTaskEnv
from metarl.models.networks import Params, State
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import RandomKey, RolloutBuffer
from metarl.sampling.spaces import ActionMode, check_spaces, env_action
from metarl.sampling.trajectories import Rollout


@dataclass(frozen=True)
class Step:
    """Result of one environment step."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


def episode(
    env: gym.Env, act: Callable[[Any, int], Any], horizon: int, seed: int | None
) -> Iterator[Step]:
    """Play one episode of at most `horizon` steps. `act` takes an observation and its time."""
    with guard.user_code():
        observation, _ = plain_reset(env.reset(seed=seed))
    for t in range(horizon):
        action = act(observation, t)
        with guard.user_step():
            observation, *rest = env.step(action)
            step = Step(observation, *plain_step(*rest))
        yield step
        if step.terminated or step.truncated:
            return


def collect_episodes(
    env: gym.Env,
    policy: PolicyModel,
    params: Params,
    *,
    episodes: int,
    horizon: int,
    key: RandomKey,
    mode: ActionMode = "clip",
) -> Rollout:
    """Sample episodes of an environment.

    Args:
        params: parameters of one policy, not stacked.
        horizon: maximum length of an episode, whatever the limit of the environment.

    Raises:
        UserError: the environment's spaces do not fit the policy.
        NonFiniteError: an observation is not finite, or the simulation diverged in every episode.
    """
    name = getattr(env.spec, "id", None) or type(env.unwrapped).__name__
    check_spaces(env, policy, name)
    refuse_running_statistics(env, name)
    buffer = RolloutBuffer(policy, 1, episodes, horizon)
    native = isinstance(env.unwrapped, SingleTaskEnv)
    seeds: list[Any] = key.episode_seeds(0, episodes)
    if not native:
        seeds = [foreign_seed(seed) for seed in seeds]
    noise = torch.from_numpy(policy.noise(key.noise(0), episodes, horizon))
    state: State = {}

    def act(observation: Any, t: int) -> NDArray:
        nonlocal state
        check_fits(observation, env.observation_space, name)
        buffer.observation[0, e, t] = observation
        if not np.isfinite(observation).all():
            raise NonFiniteError(f"observation is not finite at step {t} of episode {e}")
        seen = torch.from_numpy(buffer.observation[0, e, t : t + 1])
        output, state = policy.step(params, seen, state if t else policy.initial_state(params, 1))
        dist = policy.head(params, output)
        action = policy.sample(dist, noise[e, t])
        buffer.action[0, e, t] = action[0].numpy()
        buffer.output[0, e, t] = output[0].numpy()
        return env_action(action[0].numpy(), env.action_space, mode)

    with guard.restored(), torch.inference_mode():
        for e, seed in enumerate(seeds):
            step = Step(None, 0.0, False, False, {})
            for t, step in enumerate(episode(env, act, horizon, seed)):
                buffer.reward[0, e, t] = step.reward
                buffer.valid[0, e, t] = True
                # In other environments' info, this word may mean anything.
                buffer.diverged[0, e] |= native and bool(step.info.get("diverged", False))
                buffer.success[0, e] |= (success(step.info) or 0.0) > 0.0
            buffer.last_observation[0, e] = step.observation
            buffer.terminated[0, e] = step.terminated
            buffer.truncated[0, e] = not step.terminated
    if buffer.diverged.all():
        raise NonFiniteError(f"the simulation diverged in every episode of {episodes}")
    stacked = {name: p.detach()[None] for name, p in params.items()}
    return buffer.rollout(policy, stacked, np.empty((1, 0)))
