"""Success in the info of any environment is reported where it is present, and only there."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from metarl.config.options import Config
from metarl.envs import GymnasiumFamily, Uniform
from metarl.evaluation.evaluate import evaluate
from metarl.policies.meta_policy import MetaPolicy
from metarl.training.run import new_trainer


class Coin(gym.Env):
    """Succeeds in every second episode of each environment, and says so as `say` tells it."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    task = np.zeros(1)

    def __init__(self, kind="bool"):
        self.say = SAID[kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.lucky = bool(self.np_random.integers(2))
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        done = self.lucky and self.time == 3
        return np.full(1, float(self.lucky), np.float32), float(done), False, False, self.say(done)


SAID = {
    "bool": lambda done: {"success": done},
    "np.bool_": lambda done: {"success": np.bool_(done)},
    "float": lambda done: {"success": float(done)},
    "array": lambda done: {"success": np.array(done)},
    "only when done": lambda done: {"success": True} if done else {},
    "never": lambda done: {},
    "word": lambda done: {"success": "no"},
    "vector": lambda done: {"success": np.array([True, False])},
    "none": lambda done: {"success": None},
}


def coin(kind: str = "bool") -> GymnasiumFamily:
    tasks = Uniform({"side": (-1.0, 1.0)})
    return GymnasiumFamily(
        name="coin", env=Coin, tasks=tasks, horizon=4, env_options={"kind": kind}
    )


def policy(kind: str) -> MetaPolicy:
    values = {"tasks": 2, "episodes": 2, "iterations": 1}
    config = Config.of("test_success:coin", "maml-trpo", {"kind": kind}).with_options(values)
    with new_trainer(config) as trainer:
        return trainer.meta_policy()


@pytest.mark.parametrize("kind", ["bool", "np.bool_", "float", "array", "only when done"])
def test_success_is_reported_for_the_policy_and_references(kind):
    found = evaluate(policy(kind), tasks=4, episodes=10, steps=1, threads=1)
    data = found.to_json()
    # The reward of an episode is 1 if it succeeds.
    assert data["success"] == pytest.approx(data["returns"])
    assert 0.0 < data["success"][0] < 1.0
    assert data["references"]["random"]["success"] == pytest.approx(
        data["references"]["random"]["returns"]
    )
    assert f"{100.0 * data['success'][0]:.1f}" in found.table()
    assert "success" in found.table()


@pytest.mark.parametrize("kind", ["never", "word", "vector", "none"])
def test_no_success_is_reported_where_none_is_told(kind):
    found = evaluate(policy(kind), tasks=2, episodes=2, steps=1, threads=1)
    assert "success" not in found.to_json()
    assert "success" not in found.to_json()["references"]["random"]
    assert "success" not in found.table()


def test_success_passes_through_workers():
    one = policy("only when done")
    rates = [
        evaluate(one, tasks=4, episodes=4, steps=1, threads=1, workers=workers).to_json()["success"]
        for workers in (0, 2)
    ]
    assert rates[0] == rates[1]


def test_the_vector_environment_tells_success_of_those_that_moved():
    env = coin("only when done").make_vec(8, 1, autoreset_mode="Disabled")
    env.reset(seed=0)
    said = []
    for _ in range(4):
        observation, _, _, _, info = env.step(np.zeros((8, 1), np.float32))
        said.append(info.get("success"))
    assert said[0] is said[1] is said[3] is None
    assert said[2].tolist() == observation[:, 0].tolist()
