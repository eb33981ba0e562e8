"""Distributions over actions against torch.distributions, quadrature, and their own samples."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from expecting import refused, run
from torch import distributions as reference
from torch.distributions.kl import kl_divergence

import metarl
from metarl.models.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Gaussian,
    SquashedGaussian,
    find_distribution,
)
from metarl.training.run import new_trainer

D = torch.float64
BOX = gym.spaces.Box(-1.0, 1.0, (2,))
BITS = gym.spaces.MultiBinary(2)
DIGITS = gym.spaces.MultiDiscrete([3, 2])

KINDS = {
    "gaussian": (Gaussian(), BOX),
    "squashed": (SquashedGaussian(), BOX),
    "beta": (Beta(), BOX),
    "bernoulli": (Bernoulli(), BITS),
    "categorical": (Categorical(), DIGITS),
}


@dataclass(frozen=True, kw_only=True)
class Laplace(Distribution):
    """A distribution of a user."""

    width: float = 0.5
    """Scale of the noise."""

    def size(self, space):
        return space.shape[0]

    def sample(self, dist, noise):
        centred = noise - 0.5
        return dist["output"] - self.width * centred.sign() * torch.log1p(-2 * centred.abs())

    def mode(self, dist):
        return dist["output"]

    def log_prob(self, dist, action):
        gap = (action - dist["output"]).abs() / self.width
        return (-gap - np.log(2 * self.width)).sum(-1)

    def entropy(self, dist):
        return torch.full_like(dist["output"][..., 0], dist["output"].shape[-1]) * (
            1 + np.log(2 * self.width)
        )

    def kl(self, old, new):
        gap = (old["output"] - new["output"]).abs() / self.width
        return (gap + (-gap).exp() - 1).sum(-1)

    def fisher(self, dist, tangent):
        return {"output": tangent["output"] / self.width**2}


def made(kind, samples=6, seed=0):
    """Return a distribution over its space, and parameters of it, float64."""
    part, space = KINDS[kind]
    over = part.over(space)
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(samples, over.size(space), dtype=D, generator=generator)
    free = {
        n: torch.from_numpy(x) + 0.3 * torch.randn(x.shape, dtype=D, generator=generator)
        for n, x in over.free().items()
    }
    return over, over.parameters(output, free)


def torchs(kind, dist):
    """Return torch's distributions of the same parameters, one for each component."""
    if kind in ("gaussian", "squashed"):
        found = reference.Normal(dist["mean"], dist["log_std"].exp())
        if kind == "squashed":
            found = reference.TransformedDistribution(found, reference.TanhTransform())
        return [found]
    if kind == "beta":
        found = reference.Beta(dist["alpha"], dist["beta"])
        onto = reference.AffineTransform(-1.0, 2.0)
        return [reference.TransformedDistribution(found, onto)]
    if kind == "bernoulli":
        return [reference.Bernoulli(logits=dist["logits"])]
    return [reference.Categorical(logits=x) for x in dist["logits"].split((3, 2), -1)]


def drawn(over, dist, seed=3):
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(over.noise(rng, *next(iter(dist.values())).shape[:-1])).to(D)
    return over.sample(dist, noise)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_equals_torchs(kind):
    over, dist = made(kind)
    action = drawn(over, dist)
    parts = torchs(kind, dist)
    if kind == "categorical":
        pairs = zip(parts, action.unbind(-1), strict=True)
        expected = sum(part.log_prob(x) for part, x in pairs)
    else:
        expected = parts[0].log_prob(action).sum(-1)
    torch.testing.assert_close(over.log_prob(dist, action), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_equals_torchs(kind):
    over, old = made(kind, seed=1)
    _, new = made(kind, seed=2)
    bare = {"squashed": "gaussian"}.get(kind, kind)  # an invertible map leaves the KL as it is
    pairs = list(zip(torchs(bare, old), torchs(bare, new), strict=True))
    if kind == "beta":
        pairs = [(a.base_dist, b.base_dist) for a, b in pairs]
    each = [kl_divergence(a, b) for a, b in pairs]
    expected = sum(each) if kind == "categorical" else each[0].sum(-1)
    torch.testing.assert_close(over.kl(old, new), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli", "categorical"])
def test_the_entropy_equals_torchs(kind):
    over, dist = made(kind)
    each = [part.entropy() for part in torchs(kind, dist)]
    expected = sum(each) if kind == "categorical" else each[0].sum(-1)
    torch.testing.assert_close(over.entropy(dist), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["squashed", "beta"])
def test_the_entropy_of_bounded_actions_equals_an_integral(kind):
    """H = -int p log p, over [-1, 1], component by component."""
    over, dist = made(kind)
    edge = torch.linspace(-1.0, 1.0, 200_001, dtype=D)
    x = 0.5 * (edge[1:] + edge[:-1])
    for i in range(6):
        total = 0.0
        for c in range(2):
            one = {n: p[i : i + 1, c : c + 1] for n, p in dist.items()}
            log = torchs(kind, one)[0].log_prob(x.unsqueeze(-1)).squeeze(-1)
            total -= float((log.exp() * log).sum() * (edge[1] - edge[0]))
        assert float(over.entropy(dist)[i]) == pytest.approx(total, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_product_is_the_hessian_of_the_kl(kind):
    over, dist = made(kind, samples=1)
    names, sizes = list(dist), [p.numel() for p in dist.values()]

    def unpacked(x):
        parts = zip(names, x.split(sizes), dist.values(), strict=True)
        return {n: part.view(p.shape) for n, part, p in parts}

    point = torch.cat([p.flatten() for p in dist.values()])
    hessian = torch.autograd.functional.hessian(
        lambda x: over.kl(unpacked(point), unpacked(x)).sum(), point
    )
    tangent = torch.linspace(-1.0, 2.0, len(point), dtype=D)
    found = over.fisher(dist, unpacked(tangent))
    torch.testing.assert_close(
        torch.cat([found[n].flatten() for n in names]), hessian @ tangent, rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_moments_of_the_distribution(kind):
    over, dist = made(kind, samples=1)
    many = {n: p.expand(40_000, -1) for n, p in dist.items()}
    action = drawn(over, many)
    if kind == "categorical":
        for c, part in enumerate(torchs(kind, dist)):
            share = torch.bincount(action[:, c].long(), minlength=part.probs.shape[-1]) / 40_000
            assert share.tolist() == pytest.approx(part.probs[0].tolist(), abs=0.015)
        return
    told = torchs(kind, dist)[0].sample((40_000,))[:, 0]  # torch's own generator
    for c in range(2):
        a, b = action[:, c], told[:, c]
        error = 6 * float(b.std()) * (2 / 40_000) ** 0.5
        assert float(a.mean()) == pytest.approx(float(b.mean()), abs=error)
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.05)


def test_the_mode_of_a_beta_is_its_maximum():
    over, dist = made("beta", samples=4)
    x = torch.linspace(-0.9999, 0.9999, 20_001, dtype=D)
    for i in range(4):
        for c in range(2):
            one = {n: p[i, c] for n, p in dist.items()}
            best = x[over.log_prob(one, x.unsqueeze(-1)).argmax()]
            assert float(over.mode(dist)[i, c]) == pytest.approx(float(best), abs=2e-4)


def iterate(family, algorithm="maml-trpo", iterations=2, **options):
    values = {"tasks": 4, "episodes": 4, "threads": 1} | options
    with new_trainer(metarl.resolve(None, family, algorithm, values)) as trainer:
        return [trainer.iterate() for _ in range(iterations)], trainer


SCALED = {"policy.action": "scale"}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("navigation-2d", {"policy.distribution": "squashed-gaussian", **SCALED}),
        ("navigation-2d", {"policy.distribution": "beta", **SCALED}),
        ("conftest:code_family", {"family_options": {"kind": "binary"},
                                  "policy.distribution": "bernoulli"}),
        ("navigation-2d", {"policy.distribution": Laplace, "policy.width": 0.3}),
    ],
    ids=["squashed", "beta", "bernoulli", "laplace"],
)  # fmt: skip
@pytest.mark.parametrize("algorithm", ["maml-trpo", "promp"])
def test_each_distribution_trains(family, options, algorithm):
    rows, _ = iterate(family, algorithm, **options)
    assert all(np.isfinite(row["return_post"]) for row in rows)
    assert any(row["kl"] > 0.0 for row in rows)


def test_a_users_distribution_is_named_in_the_config_and_loaded_again(tmp_path):
    config = metarl.resolve(
        None, "navigation-2d", overrides={
            "policy.distribution": f"{__name__}:Laplace", "policy.width": 0.25,
            "iterations": 1, "tasks": 2, "episodes": 2, "threads": 1,
        },
    )  # fmt: skip
    metarl.train(config, tmp_path / "run")
    again = metarl.load(tmp_path / "run").setup
    assert again.options()["policy.distribution"] == f"{__name__}:Laplace"
    assert again.options()["policy.width"] == 0.25
    metarl.evaluate(metarl.load(tmp_path / "run"), tasks=2, episodes=1, steps=1, threads=1)


def test_a_distribution_that_does_not_fit_is_refused():
    with refused("policy.distribution", "beta", "policy.action"):
        iterate("pendulum-gravity", **{"policy.distribution": "beta"})
    with refused("policy.distribution", "categorical"):
        iterate("navigation-2d", **{"policy.distribution": "categorical"})
    with refused("policy.distribution", "gaussian"):
        iterate("bandit", **{"policy.distribution": "gaussian"})
    with refused("policy.distribution", "bernoulli"):
        iterate("bandit", **{"policy.distribution": "bernoulli"})
    with refused("policy.distribution", "gausian", "gaussian"):
        find_distribution("gausian")
    with refused("policy.initial_std"):
        iterate("navigation-2d", **{"policy.distribution": "beta", "policy.initial_std": 0.5})


def test_a_density_of_something_else_is_found_in_a_users_distribution():
    class Wrong(Laplace):
        def log_prob(self, dist, action):
            return super().log_prob({"output": dist["output"] + 0.4}, action)

    with refused("log_prob"):
        iterate("navigation-2d", tasks=5, episodes=5, **{"policy.distribution": Wrong})


def test_a_kl_that_automatic_differentiation_takes_for_flat_is_found():
    class Kinked(Laplace):  # |x| + exp(-|x|): torch's second derivative at 0 is 0, not 1
        fisher = Distribution.fisher

    with refused("policy.distribution", "Kinked", "fisher"):
        iterate("navigation-2d", **{"policy.distribution": Kinked})


class NegativeKL(Laplace):
    def kl(self, old, new):
        return -super().kl(old, new)


class Unsummed(Laplace):
    def log_prob(self, dist, action):
        return -(action - dist["output"]).abs()


class NoKL(Laplace):
    def kl(self, old, new):
        raise NotImplementedError


class NoNoise(Laplace):
    def noise(self, rng, *shape):
        return None


class NoSize(Laplace):
    def size(self, space):
        raise KeyError(space)


@dataclass(frozen=True, kw_only=True)
class Incomplete(Distribution):
    def size(self, space):
        return 2


@pytest.mark.parametrize(
    ("kind", "named"),
    [(NegativeKL, "kl"), (Unsummed, "log_prob"), (NoKL, "NotImplementedError"),
     (NoNoise, "noise"), (NoSize, "size"), (Incomplete, "Incomplete")],
)  # fmt: skip
def test_a_distribution_whose_methods_do_not_work_is_refused(kind, named):
    with refused(named):
        iterate("navigation-2d", **{"policy.distribution": kind})


def test_the_command_line_takes_a_distribution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("--preset", "None", "--iterations", "1", "--tasks", "2", "--episodes", "2")
    said = ("--policy.distribution", "beta", "--policy.action", "scale", "--out", "run")
    assert run("train", "navigation-2d", *common, *said) == 0
    assert run("train", "navigation-2d", *common, "--policy.distribution", "betta") == 2
    bad = ("--policy.distribution", "beta", "--policy.min-std", "0.1")
    assert run("train", "navigation-2d", *common, *bad) == 2
