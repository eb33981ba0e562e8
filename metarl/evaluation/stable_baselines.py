"""PPO of stable-baselines3 from scratch on each held-out task, if the package is installed.

Schulman et al. 2017, arXiv:1707.06347; Raffin et al. 2021, JMLR 22:268. For comparability, hidden
layers, discount and GAE lambda are the policy's. All other settings are the defaults of
stable-baselines3. An update uses at most the env steps of an inner step.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from metarl.envs import TaskFamily
from metarl.envs.errors import check_one_of
from metarl.envs.policy_spaces import image_size
from metarl.evaluation.scratch import Trained
from metarl.evaluation.statistics import Floats
from metarl.learning.advantages import Advantages
from metarl.models.encoders import NatureCNN
from metarl.sampling.episodes import episode
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import ActionMode, env_action


def installed() -> bool:
    """Whether stable-baselines3 can be imported."""
    return importlib.util.find_spec("stable_baselines3") is not None


def train_by_ppo(
    family: TaskFamily,
    tasks: Floats,
    *,
    hidden: Sequence[int],
    mode: ActionMode,
    advantage: Advantages,
    episodes: int,
    updates: int,
    measured: set[int],
    key: RandomKey,
) -> Trained:
    """Train policies with `updates` updates.

    Tasks are trained one after the other. Returns come from separate episodes with sampled actions.

    Args:
        measured: numbers of updates after which returns are measured; other returns are NaN.
    """
    from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]  (an extra)

    returns = np.full((len(tasks), updates + 1, episodes), np.nan)
    used = np.zeros((2, len(tasks), updates + 1))  # episodes and steps
    steps = max(episodes * family.horizon, 2)  # steps of an update; it normalizes advantages
    for i, task in enumerate(tasks):
        env, watched = (_Counter(_as_acted_in(family.make(task), mode)) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a smaller last minibatch
            model = PPO(
                _policy_class(env.observation_space),
                env,
                n_steps=steps,
                batch_size=min(64, steps),
                gamma=advantage.discount,
                gae_lambda=advantage.gae_lambda,
                policy_kwargs={"net_arch": list(hidden)},
                seed=key.episode_seeds(i, 1)[0],
                device="cpu",
            )
        act = partial(_act, model)
        for n in range(updates + 1):
            if n in measured:
                seeds = key.episode_seeds(i, episodes)
                played = [episode(watched, act, family.horizon, seed) for seed in seeds]
                returns[i, n] = [sum(step.reward for step in one) for one in played]
            used[:, i, n] = env.episodes, env.steps
            if n < updates:
                model.learn(steps, reset_num_timesteps=n == 0)
        env.close()
        watched.close()
    return Trained(returns.mean(axis=2), returns, *used)


class _Counter(gym.Wrapper):
    """Counts steps, and episodes with at least one step."""

    episodes = 0
    steps = 0
    _fresh = True

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self._fresh = True
        return super().reset(**options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.episodes += self._fresh
        self.steps += 1
        self._fresh = False
        return super().step(action)


def _act(model: Any, observation: NDArray, t: int) -> NDArray:
    return model.predict(observation)[0]


def _policy_class(space: gym.Space) -> str:
    """Return the policy class: convolutional if its network supports the images."""
    assert isinstance(space, gym.spaces.Box)
    image = space.dtype == np.uint8 and len(space.shape) == 3
    large = image and min(image_size(space.shape)[1:]) >= NatureCNN.least
    return "CnnPolicy" if large else "MlpPolicy"


def _as_acted_in(env: gym.Env, mode: ActionMode) -> gym.Env:
    """Adapt a Box to the config's action mode: with `scale`, its bounds become +-1."""
    space = env.action_space
    check_one_of("policy.action", mode, get_args(ActionMode))
    if mode != "scale" or not isinstance(space, gym.spaces.Box):
        return env
    unit = gym.spaces.Box(-1.0, 1.0, space.shape, np.float32)
    return gym.wrappers.TransformAction(env, partial(env_action, space=space, mode=mode), unit)
