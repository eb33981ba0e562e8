"""Baselines by name: zero, the critic that learns between iterations, and a user's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from expecting import refused, run

import metarl
from metarl.distributed.chunk_pool import ChunkPool
from metarl.learning.advantages import Advantages, estimate, gae
from metarl.learning.baselines import ZeroBaseline
from metarl.learning.critic import Critic
from metarl.sampling.trajectories import Rollout
from metarl.training.run import new_trainer

OWN = """
from dataclasses import dataclass
import torch
from metarl.learning.baselines import Baseline

@dataclass(frozen=True, kw_only=True)
class Half(Baseline):
    name = "half"
    share: float = 0.5

    def fit(self, state, observation, valid):
        return lambda target: self.share * target
"""


def rollout(seed: int, tasks: int = 5, episodes: int = 3, horizon: int = 6) -> Rollout:
    """Ragged episodes whose reward is the first component of the observation."""
    rng = np.random.default_rng(seed)
    grid = (tasks, episodes, horizon)
    observation = torch.from_numpy(rng.normal(2.0, 3.0, (*grid, 2))).float()
    length = torch.from_numpy(rng.integers(2, horizon + 1, grid[:2]))
    valid = torch.arange(horizon) < length.unsqueeze(-1)
    observation = torch.where(valid.unsqueeze(-1), observation, 0.0)
    none = torch.zeros(grid[:2], dtype=torch.bool)
    return Rollout(
        tasks=torch.zeros(tasks, 1, dtype=torch.float64),
        observation=observation,
        last_observation=observation[:, :, -1],
        action=torch.zeros(*grid, 1),
        behaviour={},
        reward=observation[..., 0],
        valid=valid,
        terminated=none,
        truncated=~none,
        diverged=none,
    )


def config(**changes):
    usual = {"iterations": 2, "tasks": 4, "episodes": 2, "threads": 1}
    options = {"family_options": {"horizon": 12}}
    return metarl.resolve(None, "navigation-2d", "maml-trpo", {**usual, **options, **changes})


def test_without_a_baseline_advantages_are_discounted_sums():
    drawn = rollout(0)
    options = Advantages(discount=0.9, gae_lambda=0.8, normalize=False)
    found, _ = estimate(drawn, options, ZeroBaseline(), {}, ChunkPool(1))
    reward = drawn.reward.double()
    expected = gae(reward, torch.zeros_like(reward), 0.9, 0.8)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_critic_values_before_it_sees_the_returns():
    critic, drawn = Critic(hidden=(8,)), rollout(1)
    state = critic.init((2,), np.random.default_rng(0))
    fit = critic.fit(state, drawn.observation, drawn.valid)
    ones = torch.ones(drawn.valid.shape, dtype=torch.float64)
    assert torch.equal(fit(ones), fit(3.0 * ones))
    assert (fit(ones)[~drawn.valid] == 0.0).all()


def test_a_critic_keeps_the_moments_of_all_it_saw():
    critic = Critic(hidden=(8,), steps=1)
    state = critic.init((2,), np.random.default_rng(0))
    drawn = [rollout(seed) for seed in range(3)]
    state = critic.update(state, drawn[:2], 0.9)
    state = critic.update(state, drawn[2:], 0.9)
    seen = np.concatenate([r.observation[r.valid].numpy() for r in drawn])
    assert float(state["count"]) == len(seen)
    np.testing.assert_allclose(state["observation.mean"].numpy(), seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state["observation.square"].numpy(), (seen**2).mean(0), rtol=1e-5)


def test_a_critic_learns_the_returns_of_what_it_sees():
    critic = Critic(hidden=(32,), steps=60, learning_rate=1e-2)
    state = critic.init((2,), np.random.default_rng(0))
    for seed in range(12):
        state = critic.update(state, [rollout(seed, tasks=20)], 0.0)  # returns are rewards
    other = rollout(99, tasks=20)
    values = critic.values(state, other.observation)[other.valid]
    rewards = other.reward[other.valid]
    assert (values - rewards).square().mean() < 0.1 * rewards.var()


def test_a_run_with_a_critic_continues_exactly_and_saves_it(tmp_path):
    changes = {"baseline": "critic", "baseline.hidden": (8,), "baseline.steps": 3}
    whole = metarl.train(config(**changes), tmp_path / "whole")
    metarl.train(config(**changes, iterations=1), tmp_path / "parts")
    parts = metarl.train(config(**changes), tmp_path / "parts", resume=True)
    assert whole.digest == parts.digest
    whole.save(tmp_path / "policy.safetensors")
    for what in (tmp_path / "whole", tmp_path / "policy.safetensors"):
        loaded = metarl.load(what)
        assert loaded.baseline.keys() == whole.baseline.keys()
        for name, value in whole.baseline.items():
            assert torch.equal(loaded.baseline[name], value), name


def test_a_baseline_of_ones_own_is_chosen_by_module_and_attribute(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--tasks", "4", "--episodes", "2", "--iterations", "1", "--threads", "1"]
    own = ["--baseline", "halves:Half", "--baseline.share", "0.25", "--out", "run"]
    assert run("train", "navigation-2d", *flags, *own) == 0
    options = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["options"]
    assert options["baseline"] == "halves:Half"
    assert options["baseline.share"] == 0.25
    assert metarl.load("run").setup.options()["baseline.share"] == 0.25


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"baseline": "linaer"}, ("linaer", "linear")),
        ({"baseline": "zero", "baseline.ridge": 1.0}, ("baseline.ridge",)),
        ({"baseline": "critic", "baseline.steps": 0}, ("baseline.steps", 0)),
    ],
)
def test_what_is_no_baseline_or_option_of_it_is_refused(changes, names):
    with refused(*names):
        config(**changes)


@pytest.mark.parametrize("value", [None, torch.zeros(3), "a function"])
def test_a_baseline_whose_values_have_another_shape_is_refused(value):
    class Wrong(ZeroBaseline):
        def fit(self, state, observation, valid):
            return value if isinstance(value, str) else lambda target: value

    values = {"tasks": 2, "episodes": 2, "threads": 1, "baseline": Wrong}
    with (
        refused("baseline", "zero"),
        new_trainer(metarl.resolve(None, "navigation-2d", overrides=values)) as t,
    ):
        t.iterate()
