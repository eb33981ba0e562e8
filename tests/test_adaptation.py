"""The inner update and its losses against plain autograd, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import double_params, random_batch
from torch.distributions import Independent, Normal

from metarl.learning.adapter import Adapter, inner_step, size_at
from metarl.learning.advantages import Advantages, to_batch
from metarl.learning.baselines import LinearFeatures
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.losses import likelihood_ratio, log_likelihood
from metarl.models.networks import stack
from metarl.sampling.trajectories import Rollout


def constant_step_sizes(params, sizes):
    return {name: torch.tensor(sizes, dtype=p.dtype) for name, p in params.items()}


def losses(policy, loss=log_likelihood):
    return lambda params, batch: loss(policy, policy.dist(params, batch.observation), batch)


def test_zero_steps_are_the_identity(small_policy):
    params = stack(double_params(small_policy), 3)
    adapter = Adapter(small_policy, log_likelihood, (0.1,))
    iterates = adapter.adapt(params, {}, constant_step_sizes(params, [0.1]), [], curvature=1.0)
    assert len(iterates) == 1
    assert iterates[0] is params


def test_steps_beyond_the_given_sizes_use_the_last_size():
    assert [size_at([0.3, 0.1], k) for k in range(4)] == [0.3, 0.1, 0.1, 0.1]
    assert float(size_at(torch.tensor([0.5]), 7)) == 0.5


@pytest.mark.parametrize("curvature", [None, 0.0, 0.3, 1.0])
def test_each_task_takes_its_own_gradient_step_on_each_batch(small_policy, curvature):
    params = double_params(small_policy)
    batches = [random_batch(small_policy, 3, 20, seed) for seed in range(3)]
    sizes = constant_step_sizes(params, [0.3, 0.1])
    adapter = Adapter(small_policy, log_likelihood, (0.3, 0.1))
    leaves = {name: p.requires_grad_() for name, p in stack(params, 3).items()}
    iterates = adapter.adapt(leaves, {}, sizes, batches, curvature=curvature)
    for t in range(3):
        theta = {name: p.clone().requires_grad_() for name, p in params.items()}
        for k, batch in enumerate(batches):
            n = batch.weight[t] > 0
            dist = small_policy.dist(theta, batch.observation[t][n])
            density = Independent(Normal(dist["mean"], dist["log_std"].exp()), 1)
            # The mean over this task's valid steps, never over tasks.
            value = -(density.log_prob(batch.action[t][n]) * batch.advantage[t][n]).mean()
            slope = torch.autograd.grad(value, list(theta.values()))
            size = [0.3, 0.1, 0.1][k]  # steps beyond those given repeat the last
            theta = {
                name: (p - size * g).detach().requires_grad_()
                for (name, p), g in zip(theta.items(), slope, strict=True)
            }
            for name, p in theta.items():
                torch.testing.assert_close(
                    iterates[k + 1][name][t].detach(), p.detach(), rtol=1e-12, atol=1e-14
                )


def test_step_sizes_may_differ_by_layer_and_entry(small_policy):
    params = stack(double_params(small_policy), 2)
    batch = random_batch(small_policy, 2, 10, 0)
    loss = losses(small_policy)
    ones = dict.fromkeys(params, torch.ones((), dtype=torch.float64))
    unit = inner_step(loss, params, ones, batch, start=params)
    sizes = dict.fromkeys(params, torch.zeros((), dtype=torch.float64))
    sizes["log_std"] = torch.tensor([0.5, 0.0], dtype=torch.float64)
    moved = inner_step(loss, params, sizes, batch, start=params)
    for name in params:
        expected = params[name] + (unit[name] - params[name]) * sizes[name]
        torch.testing.assert_close(moved[name], expected)
    assert torch.equal(moved["layer0.weight"], params["layer0.weight"])


def test_likelihood_ratios_are_one_before_an_update(small_policy):
    params = stack(double_params(small_policy), 2)
    batch = random_batch(small_policy, 2, 30, 0)
    dist = small_policy.dist(params, batch.observation)
    fresh = {**vars(batch), "old": dist, "old_log_prob": small_policy.log_prob(dist, batch.action)}
    batch = type(batch)(**fresh)
    ratio = (small_policy.log_prob(dist, batch.action) - batch.old_log_prob).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-12, atol=0)
    expected = -(batch.weight * batch.advantage).sum(1)
    torch.testing.assert_close(likelihood_ratio(small_policy, dist, batch), expected)
    kl = batch.kl(small_policy, dist)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-15)


def test_ratio_and_likelihood_have_the_same_gradient_at_the_old_policy(small_policy):
    theta = {n: p.requires_grad_() for n, p in double_params(small_policy).items()}
    batch = random_batch(small_policy, 2, 30, 0)
    dist = small_policy.dist(stack(theta, 2), batch.observation)
    old = {n: x.detach() for n, x in dist.items()}
    batch = type(batch)(
        **{**vars(batch), "old": old, "old_log_prob": small_policy.log_prob(old, batch.action)}
    )
    grads = [
        torch.autograd.grad(
            losses(small_policy, loss)(stack(theta, 2), batch).sum(), list(theta.values())
        )
        for loss in (likelihood_ratio, log_likelihood)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_invalid_samples_do_not_count(small_policy):
    params = stack(double_params(small_policy), 2)
    batch = random_batch(small_policy, 2, 16, 0)
    junk = torch.where(batch.weight > 0, 0.0, 1e3)
    spoiled = type(batch)(
        **{
            **vars(batch),
            "observation": batch.observation + junk.unsqueeze(-1),
            "advantage": batch.advantage + junk,
        }
    )
    for loss in (log_likelihood, likelihood_ratio):
        of = losses(small_policy, loss)
        torch.testing.assert_close(of(params, batch), of(params, spoiled))


def test_weights_of_selected_samples_sum_to_one(small_policy):
    batch = random_batch(small_policy, 2, 16, 0)
    part = batch.select(torch.tensor([0, 3, 15]))
    torch.testing.assert_close(part.weight.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.equal(part.action, batch.action[:, [0, 3, 15]])
    nothing = batch.select(torch.tensor([15]))
    assert torch.equal(nothing.weight, torch.zeros(2, 1, dtype=torch.float64))


def whole_rollout(policy, tasks, seed):
    """Two episodes a task of twelve steps each, as some other policy would have drawn them."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape))

    grid = (tasks, 2, 12)
    no = torch.zeros(grid[:2], dtype=torch.bool)
    old = {
        "mean": draw(*grid, policy.action_size),
        "log_std": 0.1 * draw(*grid, policy.action_size),
    }
    return Rollout(
        tasks=draw(tasks, 1),
        observation=draw(*grid, policy.observation_shape[0]),
        last_observation=draw(*grid[:2], policy.observation_shape[0]),
        action=draw(*grid, policy.action_size),
        behaviour=old,
        reward=draw(*grid),
        valid=torch.ones(grid, dtype=torch.bool),
        terminated=no,
        truncated=~no,
        diverged=no,
    )


@pytest.mark.parametrize("updates", [1, 2])
def test_every_proximal_step_pulls_towards_the_initialization(small_policy, pool, updates):
    # The live inner loop, and the one that is differentiated, against plain gradient descent.
    adapter = Adapter(small_policy, likelihood_ratio, (0.3, 0.2), updates=updates, proximal=2.0)
    batches = [
        to_batch(small_policy, rollout, Advantages(), LinearFeatures(), {}, pool)
        for rollout in (whole_rollout(small_policy, 5, seed) for seed in range(3))
    ]
    meta = double_params(small_policy)
    live = InnerLoop(adapter, pool).run(lambda params, k: batches[k], meta, 5, steps=3, query=False)
    fast, slow, sizes = adapter.split(meta)
    start = {n: p.clone().requires_grad_() for n, p in stack(fast, 5).items()}
    differentiated = adapter.adapt(start, slow, sizes, live.batches, curvature=1.0)
    theta = stack(meta, 5)
    for k, batch in enumerate(live.batches):
        for _ in range(updates):
            leaves = {n: p.detach().clone().requires_grad_() for n, p in theta.items()}
            loss = losses(small_policy, likelihood_ratio)(leaves, batch).sum()
            distance = sum((leaves[n] - meta[n]).square().sum() for n in leaves)
            slope = torch.autograd.grad(loss + distance, list(leaves.values()))  # 2.0 / 2
            size = (0.3, 0.2, 0.2)[k]
            theta = {n: p - size * g for (n, p), g in zip(leaves.items(), slope, strict=True)}
        for name, p in theta.items():
            torch.testing.assert_close(live.iterates[k + 1][name], p, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(differentiated[k + 1][name], p, rtol=1e-9, atol=1e-10)
