"""`Policy.module()` acts as `Policy.act` does for every distribution, or an error says why not."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import policy_options, reals
from expecting import refused

from metarl.domains.reinforcement import make_policy
from metarl.models.policies import PolicyModel
from metarl.policies.export import export
from metarl.policies.policy import Policy

BOX = gym.spaces.Box(-2.0, 3.0, (2,))


def _made(distribution="gaussian", space=BOX, action="clip", **options):
    if action != "clip":
        options["action"] = action
    policy = policy_options(hidden=(8,), distribution=distribution, **options)
    network = make_policy(policy, reals(3), space)
    params = network.init(np.random.default_rng(0))
    return Policy(network, params, space, 10, action, {"seed": 0, "steps": 0}, {})


@pytest.mark.parametrize(
    ("distribution", "action"),
    [("gaussian", "clip"), ("gaussian", "scale"), ("squashed-gaussian", "scale"),
     ("beta", "scale")],
)  # fmt: skip
def test_the_module_acts_as_the_policy(distribution, action):
    policy = _made(distribution, action=action)
    seen = 2.0 * np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32)
    found = policy.module()(torch.from_numpy(seen)).detach().numpy()
    np.testing.assert_allclose(found, policy.act(seen, deterministic=True), atol=1e-5)


@pytest.mark.parametrize("distribution", ["squashed-gaussian", "beta"])
def test_a_squash_is_in_the_module_and_in_the_exported_file(distribution, tmp_path):
    policy, plain = _made(distribution, action="scale"), _made("gaussian", action="scale")
    plain.params = {name: 3.0 * p for name, p in plain.params.items()}
    policy.params = {name: 3.0 * p for name, p in policy.params.items()}
    seen = torch.from_numpy(np.random.default_rng(1).standard_normal((50, 3)).astype(np.float32))
    inner, bare = (p.module()[:-1](seen).abs().max() for p in (policy, plain))
    assert inner <= 1.0 < bare
    export(policy, tmp_path / "policy", "torchscript", gym.spaces.Box(-3.0, 3.0, (3,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the format's age
        loaded = torch.jit.load(str(tmp_path / "policy"))
    np.testing.assert_allclose(
        loaded(seen).numpy(), policy.act(seen.numpy(), deterministic=True), atol=1e-4
    )


def test_a_policy_that_the_module_would_not_have_is_refused():
    class Other(PolicyModel):
        def network_output(self, params, observation):
            return 2.0 * super().network_output(params, observation)

    policy = _made()
    policy.policy = Other(**{k: getattr(policy.policy, k) for k in ("network", "distribution")})
    with refused("Other"):
        policy.module()


def test_whole_numbers_agree_up_to_near_ties():
    policy = _made("gaussian", gym.spaces.Box(-3, 4, (2,), np.int64))
    policy.params = {name: 5.0 * p for name, p in policy.params.items()}
    assert policy.module() is not None


def test_normalized_observations_far_away_agree():
    policy = _made(normalize=True)
    params = dict(policy.params)
    params["norm.mean"] = torch.tensor([1e3, -5.0, 0.0])
    params["norm.var"] = torch.tensor([1e4, 1e-2, 1.0])
    policy.params = params
    assert policy.module() is not None
