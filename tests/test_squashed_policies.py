"""`Policy.module()` acts as `Policy.act` does, whatever kind of policy it is, or says why not."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from expecting import refused

from metarl.config.options import Config
from metarl.domains.reinforcement import PolicyOptions
from metarl.models.policies import CategoricalMLP, GaussianMLP
from metarl.policies.export import export
from metarl.policies.policy import Policy

BOX = gym.spaces.Box(-2.0, 3.0, (2,))


@dataclass(frozen=True, kw_only=True)
class Squashed(GaussianMLP):
    """A Gaussian squashed by tanh."""

    def sample(self, dist, noise):
        return torch.tanh(super().sample(dist, noise))

    def mode(self, dist):
        return torch.tanh(super().mode(dist))


@dataclass(frozen=True, kw_only=True)
class Doubled(GaussianMLP):
    """A network with a forward pass of its own."""

    def forward(self, params, x, weight=None):
        return 2.0 * super().forward(params, x, weight)


@dataclass(frozen=True, kw_only=True)
class Normalized(GaussianMLP):
    """One that looks at the batch."""

    def features(self, params, x, weight=None):
        x = super().features(params, x, weight)
        return x - x.mean(-2, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Unlikeliest(CategoricalMLP):
    """Takes the least likely category."""

    def mode(self, dist):
        return super().mode({"logits": -dist["logits"]})


def _made(kind, space=BOX, action="clip", **options):
    config = Config(family="navigation-2d", policy=PolicyOptions(action=action))
    if issubclass(kind, GaussianMLP):
        options.setdefault("action_dim", 2)
    network = kind(observation_dim=3, hidden=(8,), **options)
    params = network.init(np.random.default_rng(0))
    return Policy(network, params, space, 10, config, {"seed": 0, "steps": 0})


@pytest.mark.parametrize("action", ["clip", "scale"])
@pytest.mark.parametrize("kind", [GaussianMLP, Squashed])
def test_the_module_acts_as_the_policy(kind, action):
    policy = _made(kind, action=action)
    seen = 2.0 * np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32)
    found = policy.module()(torch.from_numpy(seen)).detach().numpy()
    np.testing.assert_allclose(found, policy.act(seen, deterministic=True), atol=1e-5)


def test_a_squash_is_in_the_module_and_in_the_exported_file(tmp_path):
    policy, plain = _made(Squashed), _made(GaussianMLP)
    plain.params = {name: 3.0 * p for name, p in plain.params.items()}
    policy.params = plain.params
    seen = torch.from_numpy(np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32))
    assert policy.module()(seen).abs().max() <= 1.0 < plain.module()(seen).abs().max()
    export(policy, tmp_path / "policy", "torchscript", gym.spaces.Box(-3.0, 3.0, (3,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the format's age
        loaded = torch.jit.load(str(tmp_path / "policy"))
    np.testing.assert_allclose(
        loaded(seen).numpy(), policy.act(seen.numpy(), deterministic=True), atol=1e-4
    )


def test_a_patched_mode_is_found_as_well(monkeypatch):
    monkeypatch.setattr(GaussianMLP, "mode", lambda self, dist: torch.tanh(dist["mean"]))
    policy = _made(GaussianMLP)
    policy.params = {name: 3.0 * p for name, p in policy.params.items()}
    seen = np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32)
    found = policy.module()(torch.from_numpy(seen)).detach().numpy()
    np.testing.assert_allclose(found, policy.act(seen, deterministic=True), atol=1e-5)


@pytest.mark.parametrize("kind", [Doubled, Normalized])
def test_a_network_that_the_module_would_not_have_is_refused(kind):
    with refused(kind.__name__):
        _made(kind).module()


def test_another_choice_of_categories_is_refused():
    with refused("Unlikeliest"):
        _made(Unlikeliest, gym.spaces.Discrete(5), categories=(5,)).module()


def test_whole_numbers_agree_up_to_near_ties():
    policy = _made(GaussianMLP, gym.spaces.Box(-3, 4, (2,), np.int64))
    policy.params = {name: 5.0 * p for name, p in policy.params.items()}
    assert policy.module() is not None


def test_normalized_observations_far_away_agree():
    policy = _made(GaussianMLP, normalize=True)
    params = dict(policy.params)
    params["norm.mean"] = torch.tensor([1e3, -5.0, 0.0])
    params["norm.var"] = torch.tensor([1e4, 1e-2, 1.0])
    policy.params = params
    assert policy.module() is not None
    assert dataclasses.is_dataclass(policy.policy)
