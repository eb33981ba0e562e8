"""Load, adapt to one task, act, save."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from expecting import mentions, refused, run
from test_evaluation import navigator

import metarl
from metarl.envs.errors import NonFiniteError
from metarl.envs.single import SingleTaskEnv
from metarl.policies.loading import load, shipped
from metarl.runs.checkpoints import CheckpointError


def test_adapting_by_hand_and_by_the_method_agree():
    # One REINFORCE step written out on the episodes that `adapt` samples.
    from metarl.distributed.chunk_pool import ChunkPool
    from metarl.learning.advantages import estimate
    from metarl.sampling.episodes import collect_episodes
    from metarl.sampling.rollouts import RandomKey

    meta = navigator()
    env = gym.make("metarl/Navigation2D-v0", goal=(0.3, 0.2), horizon=15)
    policy = meta.adapt(env, steps=1, episodes=6, seed=4)
    rollout = collect_episodes(
        env, meta.policy, meta.params, episodes=6, horizon=15, key=RandomKey(4, split="test")
    )
    with ChunkPool(1) as pool:
        advantage, _ = estimate(
            rollout, meta.algorithm.advantage, meta.algorithm.baseline, {}, pool
        )
    theta = {name: p.clone().requires_grad_() for name, p in meta.params.items()}
    dist = meta.policy.dist(theta, rollout.observation[0].flatten(0, 1))
    log_prob = meta.policy.log_prob(dist, rollout.action[0].flatten(0, 1))
    valid = rollout.valid[0].flatten()
    loss = -(log_prob * advantage[0].flatten())[valid].mean()
    slopes = torch.autograd.grad(loss, list(theta.values()))
    for (name, p), slope in zip(theta.items(), slopes, strict=True):
        expected = (p - 0.5 * slope).detach()
        torch.testing.assert_close(policy.params[name], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(policy.params["log_std"], meta.params["log_std"])


def test_parameters_from_elsewhere_make_a_policy():
    meta = navigator()
    arrays = {name: p.double().numpy() for name, p in reversed(meta.params.items())}
    made = metarl.MetaPolicy.of(arrays, meta.setup)
    assert list(made.params) == list(meta.params)  # in the order that sums follow
    assert made.digest == meta.digest
    arrays["log_std"][0] += 1.0  # a copy is taken
    assert made.digest == meta.digest


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"log_std": None}, "log_std"),
        ({"layer0.weight": np.zeros((8, 2))}, "layer0.weight"),
        ({"layer0.bias": np.full(8, np.nan)}, "layer0.bias"),
        ({"layer7.bias": np.zeros(8)}, "layer7.bias"),
        ({"layer0.bias": "zero"}, "params"),
    ],
)
def test_parameters_of_another_network_are_refused(change, name):
    meta = navigator()
    params = {**meta.params, **change}
    params = {key: value for key, value in params.items() if value is not None}
    with refused(name):
        metarl.MetaPolicy.of(params, meta.setup)


def test_an_environment_and_its_task_vector_give_the_same_policy():
    meta = navigator()
    env = gym.make("metarl/Navigation2D-v0", goal=(0.3, 0.2), horizon=15)
    by_env = meta.adapt(env, steps=2, episodes=3)
    by_task = meta.adapt([0.3, 0.2], steps=2, episodes=3)
    assert all(torch.equal(by_env.params[name], by_task.params[name]) for name in meta.params)


def test_unrelated_info_entries_leave_out_no_episode():
    meta = navigator()

    class Point(gym.Env):
        """Navigation under another class, whose info is its own."""

        def __init__(self):
            self.inner = gym.make("metarl/Navigation2D-v0", goal=(0.3, 0.2), horizon=15)
            self.observation_space = self.inner.observation_space
            self.action_space = self.inner.action_space
            self.word: object = False

        def reset(self, *, seed=None, options=None):
            return self.inner.reset(seed=seed, options=options)

        def step(self, action):
            *step, info = self.inner.step(action)
            return *step, {**info, "diverged": self.word, "success": self.word}

    env = Point()
    expected = meta.adapt(env, episodes=3)
    assert not torch.equal(expected.params["log_std"], meta.params["log_std"])
    for env.word in (True, np.array([True, False]), "no"):
        found = meta.adapt(env, episodes=3)
        assert all(torch.equal(p, expected.params[name]) for name, p in found.params.items())


def test_adapting_to_a_task_whose_every_episode_diverges_is_an_error(monkeypatch):
    meta, native = navigator(), SingleTaskEnv.step

    def diverging(self, action):
        *step, info = native(self, action)
        return *step, {**info, "diverged": True}

    monkeypatch.setattr(SingleTaskEnv, "step", diverging)
    with refused("diverged", 3, error=NonFiniteError):
        meta.adapt([0.3, 0.2], episodes=3)


def test_an_oracle_takes_no_step(tmp_path, capsys, monkeypatch):
    from metarl.cli.adaptation import film
    from metarl.plots import video as videos

    oracle = navigator("oracle")
    policy = oracle.adapt([0.3, 0.2], steps=2)
    assert policy.provenance["steps"] == 0
    assert policy.params["context"].tolist() == pytest.approx([0.6, 0.4])  # of [-1, 1]
    for name, p in oracle.params.items():
        assert torch.equal(policy.params[name], p)
    oracle.save(tmp_path / "told.safetensors")
    goal = ["--task", "goal_x=0.3", "goal_y=0.2"]
    assert run("adapt", str(tmp_path / "told.safetensors"), *goal) == 0
    assert mentions(capsys.readouterr().out, 0)
    assert run("export", str(tmp_path / "told.safetensors")) == 2
    assert mentions(capsys.readouterr().err, "oracle", "--task", "goal_x", "goal_y")
    monkeypatch.setattr(videos, "prepare", lambda: None)
    monkeypatch.setattr(videos, "record", lambda policies, *_, **__: policies)
    assert list(film(str(tmp_path / "told.safetensors"), [])) == ["observes its task"]


def test_adapt_takes_the_requested_number_of_steps():
    meta = navigator()
    results = [meta.adapt([0.3, 0.2], steps=k, episodes=3).params["log_std"] for k in range(4)]
    assert torch.equal(results[0], meta.params["log_std"])
    for k in range(3):
        assert not torch.equal(results[k], results[k + 1])
    sized = meta.adapt([0.3, 0.2], steps=1, episodes=3, step_sizes=[1e-12])
    torch.testing.assert_close(sized.params["log_std"], meta.params["log_std"])


def test_actions_have_the_shape_and_bounds_of_the_environment():
    meta = navigator()
    policy = meta.adapt([0.0, 0.3], steps=0)
    one = policy.act(np.zeros(2))
    assert one.shape == (2,)
    assert one.dtype == np.float32
    batch = policy.act(100 * np.ones((5, 2)))
    assert batch.shape == (5, 2)
    assert (np.abs(batch) <= 1.0).all()
    still = [policy.act(np.zeros(2), deterministic=True) for _ in range(2)]
    assert np.array_equal(*still)
    assert not np.array_equal(policy.act(np.zeros(2)), policy.act(np.zeros(2)))


def test_a_loaded_policy_equals_the_saved_one(tmp_path):
    meta = navigator()
    meta.save(tmp_path / "mine.safetensors")
    again = load(tmp_path / "mine.safetensors")
    assert again.setup == meta.setup
    assert list(again.params) == list(meta.params)
    assert all(torch.equal(again.params[name], meta.params[name]) for name in meta.params)


def test_what_cannot_be_loaded_or_adapted_is_refused_by_name(tmp_path):
    with refused("nothing-here", *shipped(), error=CheckpointError):
        load("nothing-here")
    with refused(tmp_path, error=CheckpointError):
        load(tmp_path)
    meta = navigator()
    for odd in (-1, None, "2"):
        replace(meta, provenance={"iteration": odd}).save(tmp_path / "odd.safetensors")
        with refused("odd.safetensors", "iteration", repr(odd), error=CheckpointError):
            load(tmp_path / "odd.safetensors")
    with refused("metarl/HalfCheetahDir-v0", "(2,)"):
        meta.adapt(gym.make("metarl/HalfCheetahDir-v0", direction=1.0))
    with refused("seed", -1):
        meta.adapt([0.0, 0.1], seed=-1)
    with refused("vector environment"):
        meta.adapt(gym.make_vec("metarl/Navigation2D-v0", num_envs=2))
    with refused("[2]", "[5]"):
        meta.adapt([0.0, 0.1], steps=0).act(np.zeros(5))
    assert meta.adapt([0.0, 0.1], steps=0).act(np.zeros((0, 2))).shape == (0, 2)
    for bad in (np.nan, np.inf):
        with refused("observations", bad):
            meta.adapt([0.0, 0.1], steps=0).act([0.0, bad])
    with refused("steps", -1):
        meta.adapt([0.0, 0.1], steps=-1)
    for name, odd in (("steps", 1.5), ("episodes", 2.5), ("seed", "a")):
        with refused(name, repr(odd)):
            meta.adapt([0.0, 0.1], **{name: odd})
    assert meta.adapt([0.0, 0.1], step_sizes=np.array([0.1]), episodes=2).provenance["steps"] == 1
    with refused(tmp_path, "metarl adapt", error=CheckpointError):
        metarl.load_policy(tmp_path)


@pytest.mark.parametrize("name", shipped())
def test_shipped_policies_load_and_know_their_family(name):
    meta = metarl.load(name)
    assert meta.family.name in name
    assert meta.provenance["env_steps"] > 0
    assert meta.provenance["versions"]["mujoco"]
    task = meta.family.tasks.grid(1)[0]
    policy = meta.adapt(task, steps=1, episodes=1)
    env = meta.family.make(task)
    observation, _ = env.reset(seed=0)
    assert env.action_space.contains(policy.act(observation))
