"""Signals in an inner step, and what is said of a run that does not adapt."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import gaussian_policy, random_batch
from expecting import mentions

from metarl.learning.adapter import Adapter
from metarl.learning.losses import Batch, dice, log_likelihood
from metarl.learning.signals import inner_gradient_cosine
from metarl.sampling.spaces import beyond_bounds
from metarl.training.diagnosis import findings

POLICY = gaussian_policy(observation_dim=3, action_dim=2, hidden=(4,))


def episodes_of(count: int, seed: int = 0) -> Batch:
    """Two tasks of some episodes of 6 steps, float64; the last step of odd episodes is missing."""
    batch = random_batch(POLICY, 2, 6 * count, seed)
    valid = torch.ones(2, count, 6, dtype=torch.float64)
    valid[:, 1::2, -1] = 0.0
    weight = valid.flatten(1)
    kwargs = {**vars(batch), "weight": weight / weight.sum(1, keepdim=True), "episodes": count}
    return Batch(**kwargs)


def params():
    made = POLICY.init(np.random.default_rng(3))
    return {name: p.double() for name, p in made.items()}


@pytest.mark.parametrize("loss", [log_likelihood, dice])
def test_inner_gradient_cosine_is_the_cosine_of_two_halves(loss):
    batch, theta = episodes_of(5), params()
    expected = []
    for task in range(2):
        slopes = []
        for first in (0, 2):  # of five episodes the last is left out
            total = torch.zeros((), dtype=torch.float64)
            leaves = {n: p.clone().requires_grad_() for n, p in theta.items()}
            for s in range(6 * first, 6 * (first + 2)):
                dist = POLICY.dist(leaves, batch.observation[task, s : s + 1])
                score = POLICY.log_prob(dist, batch.action[task, s : s + 1]).sum()
                total = total + (batch.weight[task, s] > 0) * batch.advantage[task, s] * score
            slope = torch.autograd.grad(total, [*leaves.values()])
            slopes.append(torch.cat([g.flatten() for g in slope]))
        expected.append(float(torch.cosine_similarity(*slopes, dim=0)))
    found = inner_gradient_cosine(Adapter(POLICY, loss, (0.1,)), theta, batch)
    assert found == pytest.approx(np.mean(expected), rel=1e-9)


def test_inner_gradient_cosine_needs_two_episodes():
    adapter = Adapter(POLICY, log_likelihood, (0.1,))
    assert math.isnan(inner_gradient_cosine(adapter, params(), episodes_of(1)))


def test_actions_beyond_the_bounds_are_found():
    box = gym.spaces.Box(np.array([-2.0, -1.0]), np.array([2.0, np.inf]), dtype=np.float64)
    action = np.array([[1.5, 5.0], [-2.5, -1.5], [0.0, 0.0]])
    cut = beyond_bounds(action, box, "clip")
    assert cut is not None
    assert cut.tolist() == [[False, False], [True, True], [False, False]]
    scaled = beyond_bounds(action, box, "scale")  # 1.5 is beyond 1 there
    assert scaled is not None
    assert scaled.tolist() == [[True, False], [True, True], [False, False]]
    assert beyond_bounds(action, gym.spaces.Discrete(3), "clip") is None


def rows(**values):
    return [{"gain": 50.0 + i % 2, **values} for i in range(20)]


def test_a_run_that_adapts_has_one_finding():
    # A first policy of unit deviation and mean 0 is cut this often.
    healthy = {"inner_kl": 0.5, "clip_fraction": 0.33, "inner_gradient_cosine": 0.4}
    (gain,) = findings(rows(**healthy, gradient_agreement=None))
    assert mentions(gain, 50.5, 10)  # the mean of the last iterations
    assert findings([{"gain": None}]) == []
    assert findings([]) == []


@pytest.mark.parametrize(
    ("metric", "value", "names"),
    [
        ("inner_kl", 0.002, [0.002, "inner.step_sizes", "inner.min_kl"]),
        ("inner_kl", 4.0, [4, "inner.step_sizes"]),
        ("clip_fraction", 0.45, ["45%", "policy.output_scale", "policy.initial_std"]),
        ("inner_gradient_cosine", 0.04, [0.04, "advantage.gae_lambda", "advantage.targets"]),
        ("gradient_agreement", -0.2, [-0.2]),
    ],
)
def test_each_obstacle_to_adaptation_is_named(metric, value, names):
    found = findings(rows(**{metric: value}))
    assert len(found) == 2
    assert mentions(found[1], *names)


def test_the_spread_of_stratified_tasks_is_not_reported_as_noise():
    assert len(findings(rows(gradient_agreement=-0.9), stratified=True)) == 1


def test_a_gain_within_its_noise_reads_differently_from_a_clear_one():
    noisy, clear = (
        findings([{"gain": (-1) ** i * noise + 0.1} for i in range(10)]) for noise in (10.0, 0.01)
    )
    assert mentions(noisy[0], 0.1)
    assert mentions(clear[0], 0.1)
    assert noisy[0] != clear[0]  # of the same mean
