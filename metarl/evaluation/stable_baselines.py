"""PPO of stable-baselines3 from scratch on each held-out task, where the package is installed.

Its own defaults (Schulman et al. 2017, arXiv:1707.06347; Raffin et al. 2021, JMLR 22:268), but for
what makes it comparable: the hidden layers, discount and trace decay are the config's, and an
update is made on as many env steps as an inner step's episodes have at most.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import partial
from typing import Any, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from metarl.config.options import Config
from metarl.envs import TaskFamily
from metarl.envs.errors import UserError, check_one_of
from metarl.envs.policy_spaces import image_size
from metarl.evaluation.statistics import Floats
from metarl.models.encoders import NatureCNN
from metarl.sampling.episodes import episode
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import ActionMode, env_action


def installed() -> bool:
    """Whether stable-baselines3 can be imported."""
    return importlib.util.find_spec("stable_baselines3") is not None


def train_by_ppo(
    family: TaskFamily,
    goals: Floats,
    config: Config,
    *,
    episodes: int,
    updates: int,
    measured: set[int],
    address: RandomKey,
) -> Floats:
    """Return the returns of policies trained by 0 ... `updates` updates, [tasks, updates + 1].

    They are means over `episodes` episodes of their own, with sampled actions, after those numbers
    of updates that are `measured`; NaN after others. Tasks are trained one after the other.
    """
    from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]  (an extra)

    assert config.advantage is not None
    hidden = config.options().get("policy.hidden")
    if hidden is None:
        raise UserError(
            "stable-baselines3 is compared with the built-in networks only, and policy.network is"
            f" {config.options()['policy.network']}"
        )
    returns = np.full((len(goals), updates + 1), np.nan)
    steps = max(episodes * family.horizon, 2)  # of an update, which normalizes advantages
    for i, goal in enumerate(goals):
        env, watched = (_as_acted_in(family.make(goal), config.action_mode) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a last minibatch that is smaller
            model = PPO(
                _policy_class(env.observation_space),
                env,
                n_steps=steps,
                batch_size=min(64, steps),
                gamma=config.advantage.discount,
                gae_lambda=config.advantage.gae_lambda,
                policy_kwargs={"net_arch": list(hidden)},
                seed=address.episode_seeds(i, 1)[0],
                device="cpu",
            )
        act = partial(_act, model)
        for n in range(updates + 1):
            if n in measured:
                seeds = address.episode_seeds(i, episodes)
                played = [episode(watched, act, family.horizon, seed) for seed in seeds]
                returns[i, n] = np.mean([sum(step.reward for step in one) for one in played])
            if n < updates:
                model.learn(steps, reset_num_timesteps=n == 0)
        env.close()
        watched.close()
    return returns


def _act(model: Any, observation: NDArray, t: int) -> NDArray:
    return model.predict(observation)[0]


def _policy_class(space: gym.Space) -> str:
    """Return the class of policies: convolutional for images that its network can read."""
    assert isinstance(space, gym.spaces.Box)
    image = space.dtype == np.uint8 and len(space.shape) == 3
    large = image and min(image_size(space.shape)[1:]) >= NatureCNN.least
    return "CnnPolicy" if large else "MlpPolicy"


def _as_acted_in(env: gym.Env, mode: ActionMode) -> gym.Env:
    """Let a Box be acted in as the config's policy does: with `scale`, by +-1 for its bounds."""
    space = env.action_space
    check_one_of("policy.action", mode, get_args(ActionMode))
    if mode != "scale" or not isinstance(space, gym.spaces.Box):
        return env
    unit = gym.spaces.Box(-1.0, 1.0, space.shape, np.float32)
    return gym.wrappers.TransformAction(env, partial(env_action, space=space, mode=mode), unit)
