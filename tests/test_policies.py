"""Policies against torch.distributions, enumeration and layer-by-layer arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import categorical_policy, double_params, gaussian_policy
from torch.distributions import Independent, Normal, kl_divergence

from metarl.models.networks import affine, flatten, stack, tanh, unflatten


def reference(dist):
    return Independent(Normal(dist["mean"], dist["log_std"].exp()), 1)


@pytest.fixture
def two_dists(small_policy):
    observation = torch.randn(
        2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return [
        small_policy.dist(stack(double_params(small_policy, seed), 2), observation)
        for seed in (1, 2)
    ]


@pytest.mark.parametrize("sizes", [(1, 64), (64, 1), (1, 1), (64, 64), (17, 6)])
@pytest.mark.parametrize("samples", [1, 20])
def test_sampling_gives_a_task_the_same_bits_alone_and_among_others(sizes, samples):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x, weight, bias = draw(7, samples, sizes[0]), draw(7, *sizes), draw(7, sizes[1])
    with torch.inference_mode():
        together = affine(x, weight, bias)
        for t in range(7):
            own = slice(t, t + 1)
            assert torch.equal(affine(x[own], weight[own], bias[own]), together[own])


def test_log_prob_and_kl_match_torch_distributions(small_policy, two_dists):
    old, new = two_dists
    action = small_policy.sample(old, torch.ones_like(old["mean"]))
    torch.testing.assert_close(
        small_policy.log_prob(new, action), reference(new).log_prob(action), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(
        small_policy.kl(old, new), kl_divergence(reference(old), reference(new)), rtol=1e-12, atol=0
    )


def test_a_sample_is_the_mean_plus_noise_times_the_standard_deviation(small_policy, two_dists):
    dist = two_dists[0]
    noise = torch.full_like(dist["mean"], -2.0)
    expected = dist["mean"] - 2.0 * dist["log_std"].exp()
    torch.testing.assert_close(small_policy.sample(dist, noise), expected)
    assert torch.equal(small_policy.mode(dist), dist["mean"])


def test_fisher_is_the_hessian_of_the_kl(small_policy):
    point = torch.tensor([0.3, -0.2, 0.1, -0.4], dtype=torch.float64)

    def dist(x):
        return {"mean": x[:2], "log_std": x[2:]}

    hessian = torch.autograd.functional.hessian(
        lambda x: small_policy.kl(dist(point), dist(x)), point
    )
    tangent = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    found = small_policy.fisher(dist(point), dist(tangent))
    expected = hessian @ tangent
    torch.testing.assert_close(torch.cat([found["mean"], found["log_std"]]), expected)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_stacked_parameters_give_what_each_task_gives_alone(activation):
    policy = gaussian_policy(observation_dim=3, action_dim=2, hidden=(5, 4), activation=activation)
    tasks = [double_params(policy, seed) for seed in range(3)]
    stacked = {name: torch.stack([p[name] for p in tasks]) for name in tasks[0]}
    observation = torch.randn(
        3, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    together = policy.dist(stacked, observation)
    function = torch.tanh if activation == "tanh" else torch.relu
    for t, p in enumerate(tasks):
        x = observation[t]
        for i in range(2):
            x = function(x @ p[f"layer{i}.weight"] + p[f"layer{i}.bias"])
        x = x @ p["layer2.weight"] + p["layer2.bias"]
        torch.testing.assert_close(together["mean"][t], x, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(policy.dist(p, observation[t])["mean"], x)
        torch.testing.assert_close(together["log_std"][t], p["log_std"].expand(6, 2))


def test_context_adds_inputs(small_policy):
    wide = gaussian_policy(observation_dim=2, action_dim=2, hidden=(5, 4), context_dim=1)
    params = double_params(wide)
    observation, context = torch.ones(6, 2, dtype=torch.float64), torch.tensor([0.7]).double()
    joined = torch.cat([observation, context.expand(6, 1)], dim=1)
    found = wide.dist({**params, "context": context}, observation)["mean"]
    torch.testing.assert_close(found, small_policy.dist(params, joined)["mean"])


def test_tanh_has_all_its_derivatives():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(tanh(x), torch.tanh(x), rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(tanh, x)
    assert torch.autograd.gradgradcheck(tanh, x)


def test_initial_weights_are_xavier_and_biases_zero():
    policy = gaussian_policy(observation_dim=300, action_dim=6, hidden=(200,), initial_std=0.5)
    params = policy.init(np.random.default_rng(0))
    bound = np.sqrt(6 / 500)
    weight = params["layer0.weight"]
    assert weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not params["layer0.bias"].any()
    torch.testing.assert_close(params["log_std"].exp(), torch.full((6,), 0.5))


def test_standard_deviation_has_a_floor():
    policy = gaussian_policy(observation_dim=1, action_dim=1, hidden=(), min_std=0.1)
    params = policy.init(np.random.default_rng(0))
    params["log_std"] = torch.tensor([-50.0])
    dist = policy.dist(params, torch.zeros(1, 1))
    assert float(dist["log_std"].exp()) == pytest.approx(0.1)
    # From below its floor it cannot be moved; confined, it can, and gives the same policy.
    confined = policy.confined(params)
    assert torch.equal(policy.dist(confined, torch.zeros(1, 1))["log_std"], dist["log_std"])
    for held, slope in ((params, 0.0), (confined, -1.0)):
        leaf = held["log_std"].clone().requires_grad_()
        dist = policy.dist({**held, "log_std": leaf}, torch.zeros(1, 1))
        density = policy.log_prob(dist, dist["mean"].detach()).sum()
        assert float(torch.autograd.grad(density, leaf)[0]) == slope


def test_flatten_and_unflatten_are_inverse(small_policy):
    params = double_params(small_policy)
    again = unflatten(flatten(params), params)
    assert all(torch.equal(params[name], again[name]) for name in params)


# Categorical --------------------------------------------------------------------------------------

CHOICES = categorical_policy(observation_dim=3, hidden=(5,), categories=(3, 2))


def logits(*shape, seed=0):
    return {"logits": torch.from_numpy(np.random.default_rng(seed).standard_normal((*shape, 5)))}


def joint(dist):
    """Probabilities of all six actions, by the product rule."""
    a, b = dist["logits"][..., :3].softmax(-1), dist["logits"][..., 3:].softmax(-1)
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


ACTIONS = torch.tensor([[i, j] for i in range(3) for j in range(2)], dtype=torch.float64)


def test_categorical_densities_kl_and_entropy_match_enumeration():
    old, new = logits(4), logits(4, seed=1)
    p, q = joint(old), joint(new)
    for i, action in enumerate(ACTIONS):
        found = CHOICES.log_prob(old, action.expand(4, 2))
        torch.testing.assert_close(found, p[:, i].log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(CHOICES.kl(old, new), (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(CHOICES.entropy(old), -(p * p.log()).sum(-1))
    assert torch.equal(CHOICES.mode(old), ACTIONS[p.argmax(-1)])


def test_categorical_fisher_is_the_hessian_of_the_kl():
    dist = logits()

    def divergence(x):
        return CHOICES.kl(dist, {"logits": x})

    hessian = torch.autograd.functional.hessian(divergence, dist["logits"])
    tangent = logits(seed=2)
    found = CHOICES.fisher(dist, tangent)["logits"]
    torch.testing.assert_close(found, hessian @ tangent["logits"], rtol=1e-10, atol=1e-12)


def test_categorical_samples_have_their_probabilities():
    dist = logits()
    count = 40_000
    noise = torch.from_numpy(CHOICES.noise(np.random.default_rng(0), count)).double()
    action = CHOICES.sample({"logits": dist["logits"].expand(count, 5)}, noise)
    found = torch.stack([(action == a).all(-1).double().mean() for a in ACTIONS])
    error = (joint(dist) * (1 - joint(dist)) / count).sqrt()
    assert ((found - joint(dist)).abs() < 4 * error).all()


# Normalized observations --------------------------------------------------------------------------


def test_running_statistics_are_those_of_all_observations_together():
    policy = gaussian_policy(observation_dim=3, action_dim=2, hidden=(4,), normalize=True)
    params = {n: p.double() for n, p in policy.init(np.random.default_rng(0)).items()}
    rng = np.random.default_rng(1)
    parts = [torch.from_numpy(5.0 + 3.0 * rng.standard_normal((n, 3))) for n in (7, 1, 30)]
    for part in parts:
        params = policy.track_observations(params, part.split(4))
    together = torch.cat(parts)
    torch.testing.assert_close(params["norm.mean"], together.mean(0))
    torch.testing.assert_close(params["norm.var"], together.var(0, correction=0))
    assert params["norm.count"].item() == pytest.approx(38)
    plain = dataclasses.replace(policy, normalize=False)
    scaled = (together - together.mean(0)) / together.std(0, correction=0)
    torch.testing.assert_close(
        policy.dist(params, together)["mean"],
        plain.dist(params, scaled)["mean"],
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


def test_no_gradient_moves_the_statistics():
    policy = gaussian_policy(observation_dim=3, action_dim=2, hidden=(4,), normalize=True)
    params = {n: p.requires_grad_() for n, p in policy.init(np.random.default_rng(0)).items()}
    policy.dist(params, torch.randn(5, 3))["mean"].sum().backward()
    assert all((p.grad is None) == n.startswith(("norm", "log")) for n, p in params.items())


def test_output_scale_scales_the_initial_last_layer():
    sizes = {"observation_dim": 3, "action_dim": 2, "hidden": (4,)}
    full = gaussian_policy(**sizes).init(np.random.default_rng(0))
    small = gaussian_policy(**sizes, output_scale=0.1).init(np.random.default_rng(0))
    assert torch.equal(full["layer0.weight"], small["layer0.weight"])
    assert torch.allclose(0.1 * full["layer1.weight"], small["layer1.weight"])
