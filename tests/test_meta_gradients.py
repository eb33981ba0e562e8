"""Meta-gradients and Fisher products against derivations of their own, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import categorical_policy, double_params, gaussian_policy, random_batch
from expecting import refused

from metarl.distributed.chunk_pool import ChunkPool
from metarl.learning.adapter import Adapter, inner_step
from metarl.learning.losses import Batch, likelihood_ratio, log_likelihood
from metarl.learning.meta_gradients.problem import Objective, agreement
from metarl.learning.meta_gradients.unrolled import UnrolledProblem
from metarl.models.networks import flatten, stack, unflatten

SIZES = (0.3, 0.2, 0.15)
OUTER = Objective(likelihood_ratio)


def problem(policy, pool, steps, curvature, **options):
    batches = [random_batch(policy, 3, 20, seed) for seed in range(steps + 1)]
    adapter = Adapter(policy, log_likelihood, SIZES)
    return UnrolledProblem(adapter, batches, pool, OUTER, curvature=curvature, **options)


def losses(policy, stacked, batch):
    return log_likelihood(policy, policy.dist(stacked, batch.observation), batch)


def ratios(policy, stacked, batch):
    return likelihood_ratio(policy, policy.dist(stacked, batch.observation), batch)


def adapted(made, theta, support, curvature=None):
    """The last iterate of parameters that are not stacked."""
    fast, slow, sizes = made.adapter.split(theta)
    start = stack(fast, made.tasks)
    return made.adapter.adapt(start, slow, sizes, support, curvature=curvature)[-1]


def iterates_of(made, theta):
    """theta_1 ... theta_K on all samples."""
    fast, slow, sizes = made.adapter.split(theta)
    found = made.adapter.adapt(stack(fast, made.tasks), slow, sizes, made.batches[:-1])
    return found[1:]


def post_adaptation_loss(made: UnrolledProblem, theta: torch.Tensor, like) -> torch.Tensor:
    """The mean outer loss written out task by task, with no stacking, chunks or vmap."""
    policy, found = made.adapter.model, []
    for t in range(made.tasks):
        params = unflatten(theta, like)
        *support, query = (batch.map(lambda x, t=t: x[t : t + 1]) for batch in made.batches)
        for k, batch in enumerate(support):
            stacked = {name: p[None] for name, p in params.items()}
            loss = losses(policy, stacked, batch).sum()
            slope = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {
                name: p - SIZES[k] * g for (name, p), g in zip(params.items(), slope, strict=True)
            }
        stacked = {name: p[None] for name, p in params.items()}
        found.append(ratios(policy, stacked, query).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_second_order_gradient_matches_central_differences(small_policy, pool, steps):
    meta = double_params(small_policy)
    made = problem(small_policy, pool, steps, curvature=1.0, chunk=2)
    gradient, stats = made.gradient(meta)
    theta = flatten(meta).requires_grad_()
    assert stats["loss"] == pytest.approx(
        float(post_adaptation_loss(made, theta, meta).detach()), abs=1e-12
    )
    for i in range(0, len(theta), 5):
        h = torch.zeros_like(theta)
        h[i] = 1e-5
        up, down = (post_adaptation_loss(made, theta + s * h, meta) for s in (1, -1))
        assert float(gradient[i]) == pytest.approx(
            float((up - down).detach()) / 2e-5, rel=1e-6, abs=1e-8
        )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_first_order_gradient_is_the_outer_gradient_at_the_adapted_parameters(
    small_policy, pool, steps
):
    meta = double_params(small_policy)
    made = problem(small_policy, pool, steps, curvature=0.0, chunk=2)
    gradient, _ = made.gradient(meta)
    expected = torch.zeros_like(gradient)
    for t in range(made.tasks):
        *support, query = (batch.map(lambda x, t=t: x[t : t + 1]) for batch in made.batches)
        fast, slow, sizes = made.adapter.split(meta)
        theta = made.adapter.adapt(stack(fast, 1), slow, sizes, support)[-1]
        theta = {name: p.requires_grad_() for name, p in theta.items()}
        outer = ratios(small_policy, theta, query).sum()
        grads = torch.autograd.grad(outer, list(theta.values()))
        expected += torch.cat([g.reshape(-1) for g in grads]) / made.tasks
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("curvature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_meta_gradient_of_a_quadratic_matches_its_closed_form(steps, curvature):
    # One step maps the miss e = theta - goal to (I - aA) e, so e_K = (I - aA)^K e and
    #   MAML: (I - aA)^K A e_K      FOMAML: A e_K      a share c: (I - caA)^K A e_K
    generator = torch.Generator().manual_seed(steps)
    root = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    A = root @ root.transpose(1, 2) / 4
    goal = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    theta = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()

    def loss(params, batch):
        miss = params["x"] - goal
        return 0.5 * torch.einsum("ti,tij,tj->t", miss, A, miss)

    size = torch.tensor(0.2, dtype=torch.float64)
    params = start = {"x": theta.expand(3, 4)}
    for _ in range(steps):
        params = inner_step(loss, params, {"x": size}, None, start=start, curvature=curvature)
    (gradient,) = torch.autograd.grad(loss(params, None).mean(), theta)

    shrink = torch.eye(4, dtype=torch.float64) - size * A
    power = torch.linalg.matrix_power(shrink, steps)
    miss = power @ (theta.detach() - goal).unsqueeze(-1)
    jacobian = torch.eye(4, dtype=torch.float64) - curvature * size * A
    expected = torch.linalg.matrix_power(jacobian, steps) @ A @ miss
    torch.testing.assert_close(params["x"].detach(), (miss + goal.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(gradient, expected.mean(0).squeeze(-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_fisher_product_matches_the_dense_hessian_of_the_kl(pool, steps):
    # The Hessian of KL(adapted(theta0) || adapted(theta)) in theta at theta0 is J' F J.
    policy = gaussian_policy(observation_dim=2, action_dim=2, hidden=(3,))
    meta = double_params(policy)
    made = problem(policy, pool, steps, curvature=1.0, chunk=2)
    *support, query = made.batches
    theta = flatten(meta).requires_grad_()

    def distribution(theta):
        final = adapted(made, unflatten(theta, meta), support, curvature=1.0)
        return policy.dist(final, query.observation)

    dist = distribution(theta)
    fixed = {name: x.detach() for name, x in dist.items()}

    def kl(theta):
        return (query.weight * policy.kl(fixed, distribution(theta))).sum(1).mean()

    hessian = torch.autograd.functional.hessian(kl, theta.detach())
    with made.linearize(meta) as product:
        columns = [product(e) for e in torch.eye(len(theta), dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns), hessian, rtol=1e-9, atol=1e-11)


def test_fisher_samples_change_the_metric_and_not_the_point_it_is_taken_at(small_policy, pool):
    # With every sample listed the product is the full one; with a part of the support the
    # adapted parameters must still be those of all samples.
    meta = double_params(small_policy)
    full = problem(small_policy, pool, 1, curvature=1.0)
    first_order = problem(small_policy, pool, 1, curvature=0.0)
    every = torch.arange(20).expand(3, -1)
    # Of each task others, and the support's whole.
    some = torch.stack([torch.arange(start, 20, 3)[:6] for start in range(3)])
    v = torch.linspace(-1, 1, len(flatten(meta)), dtype=torch.float64)
    results = []
    for made, samples in ((full, []), (full, [every] * 2), (first_order, [None, some])):
        with made.linearize(meta, iterates_of(made, meta), samples) as product:
            results.append(product(v))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    # Of first order J is that of the network at the adapted parameters, so the product on a part of
    # the query samples is that of a problem whose query holds just these.
    chosen = first_order.batches[-1].select(some)
    alone = UnrolledProblem(made.adapter, [*made.batches[:-1], chosen], pool, OUTER, curvature=0.0)
    with alone.linearize(meta) as product:
        torch.testing.assert_close(results[2], product(v), rtol=1e-10, atol=1e-12)


def test_products_on_a_part_of_the_support_are_taken_at_the_iterates_of_all(small_policy, pool):
    # Of first order J is that of the network at the iterates, wherever they come from.
    meta = double_params(small_policy)
    whole = problem(small_policy, pool, 1, curvature=0.0)
    some = torch.arange(0, 20, 2).expand(3, -1)
    v = torch.linspace(-1, 1, len(flatten(meta)), dtype=torch.float64)
    iterates = iterates_of(whole, meta)
    with (
        whole.linearize(meta) as expected,
        whole.linearize(meta, iterates, [some, None]) as found,
    ):
        torch.testing.assert_close(found(v), expected(v), rtol=1e-10, atol=1e-12)
    with refused("iterates", 1, error=ValueError), whole.linearize(meta, (), [some, None]):
        pass


def test_a_tasks_result_does_not_depend_on_the_other_tasks(small_policy, pool):
    meta = double_params(small_policy)
    together = problem(small_policy, pool, 2, curvature=1.0, chunk=3)
    total = torch.zeros(len(flatten(meta)), dtype=torch.float64)
    for t in range(together.tasks):
        alone = UnrolledProblem(
            together.adapter,
            [batch.map(lambda x, t=t: x[t : t + 1]) for batch in together.batches],
            pool,
            OUTER,
        )
        total += alone.gradient(meta)[0] / together.tasks
    torch.testing.assert_close(together.gradient(meta)[0], total, rtol=1e-12, atol=1e-14)


def test_gradient_and_products_are_bit_identical_at_any_number_of_threads(small_policy):
    meta = {name: p.float() for name, p in double_params(small_policy).items()}
    results = []
    for threads in (1, 2, 3):
        with ChunkPool(threads) as pool:
            made = problem(small_policy, pool, 1, curvature=1.0, chunk=1)
            made.batches = [batch.map(torch.Tensor.float) for batch in made.batches]
            gradient, _ = made.gradient(meta)
            with made.linearize(meta) as product:
                results.append((gradient, product(gradient)))
    for gradient, image in results[1:]:
        assert torch.equal(gradient, results[0][0])
        assert torch.equal(image, results[0][1])


def test_evaluate_gives_the_loss_and_kl_after_adapting_again(small_policy, pool):
    meta = double_params(small_policy)
    made = problem(small_policy, pool, 2, curvature=1.0)
    elsewhere = {name: p + 0.05 for name, p in meta.items()}
    found = made.evaluate(elsewhere)
    theta = flatten(elsewhere).requires_grad_()
    assert found.loss == pytest.approx(
        float(post_adaptation_loss(made, theta, meta).detach()), rel=1e-12
    )
    *support, query = made.batches
    dist = small_policy.dist(adapted(made, elsewhere, support), query.observation)
    expected = float(query.kl(small_policy, dist).mean())
    assert found.kl == pytest.approx(expected, rel=1e-12)


def test_after_one_step_the_gradient_is_linear_in_the_share_of_the_curvature(small_policy, pool):
    meta = double_params(small_policy)

    def gradient(curvature):
        return problem(small_policy, pool, 1, curvature, chunk=2).gradient(meta)[0]

    expected = 0.7 * gradient(0.0) + 0.3 * gradient(1.0)
    torch.testing.assert_close(gradient(0.3), expected, rtol=1e-12, atol=1e-14)
    assert (gradient(0.0) - gradient(1.0)).abs().max() > 1e-3


@pytest.mark.parametrize("curvature", [0.0, 0.3, 1.0])
def test_fisher_products_use_the_share_of_the_curvature(pool, curvature):
    # Of one step J is I - c a H, with H the dense Hessian of a task's inner loss.
    policy = gaussian_policy(observation_dim=2, action_dim=2, hidden=(3,))
    meta = double_params(policy)
    made = problem(policy, pool, 1, curvature, chunk=2)
    theta, expected = flatten(meta), torch.zeros((), dtype=torch.float64)
    for t in range(made.tasks):
        support, query = (batch.map(lambda x, t=t: x[t : t + 1]) for batch in made.batches)

        def stacked(v):
            return stack(unflatten(v, meta), 1)

        def inner(v, batch=support):
            return losses(policy, stacked(v), batch).sum()

        slope = torch.autograd.functional.jacobian(inner, theta)
        hessian = torch.autograd.functional.hessian(inner, theta)
        moved = theta - SIZES[0] * slope
        fixed = policy.dist(stacked(moved), query.observation)

        def kl(v, fixed=fixed, query=query):
            new = policy.dist(stacked(v), query.observation)
            return (query.weight * policy.kl(fixed, new)).sum()

        metric = torch.autograd.functional.hessian(kl, moved)
        jacobian = torch.eye(len(theta), dtype=torch.float64) - curvature * SIZES[0] * hessian
        expected = expected + jacobian.T @ metric @ jacobian / made.tasks
    with made.linearize(meta) as product:
        columns = [product(e) for e in torch.eye(len(theta), dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns), expected, rtol=1e-9, atol=1e-11)


def test_gradient_and_products_of_a_categorical_policy_match_dense_derivatives(pool):
    policy = categorical_policy(observation_dim=2, hidden=(3,), categories=(3, 2))
    rng = np.random.default_rng(0)
    meta = {n: torch.from_numpy(0.5 * rng.standard_normal(s)) for n, s in policy.shapes().items()}

    def batch():
        old = {"logits": torch.from_numpy(rng.standard_normal((2, 12, 5)))}
        action = policy.sample(old, torch.from_numpy(rng.gumbel(size=(2, 12, 5))))
        observation, advantage = (torch.from_numpy(rng.standard_normal((2, 12, n))) for n in (2, 1))
        return Batch(
            observation, action, advantage[..., 0], torch.full((2, 12), 1 / 12).double(),
            policy.log_prob(old, action), old, episodes=1,
        )  # fmt: skip

    support, query = batch(), batch()
    made = UnrolledProblem(Adapter(policy, log_likelihood, SIZES), [support, query], pool, OUTER)
    gradient, _ = made.gradient(meta)
    theta = flatten(meta)

    def adapted_logits(x):
        params = stack(unflatten(x, meta), 2)
        loss = losses(policy, params, support).sum()
        slope = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        new = {n: p - SIZES[0] * g for (n, p), g in zip(params.items(), slope, strict=True)}
        return policy.dist(new, query.observation)["logits"]

    def loss(x):
        return likelihood_ratio(policy, {"logits": adapted_logits(x)}, query).mean()

    expected = torch.autograd.functional.jacobian(loss, theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        fixed = {"logits": adapted_logits_value(made, meta, support, query)}

    def divergence(x):
        return replace(query, old=fixed).kl(policy, {"logits": adapted_logits(x)}).mean()

    hessian = torch.autograd.functional.hessian(divergence, theta)
    v = torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    with made.linearize(meta) as product:
        torch.testing.assert_close(product(v), hessian @ v, rtol=1e-8, atol=1e-10)


def adapted_logits_value(made, meta, support, query):
    with torch.enable_grad():
        params = adapted(made, meta, [support])
    return made.adapter.model.dist(params, query.observation)["logits"].detach()


def test_agreement_is_the_share_of_signal_in_a_mean_gradient():
    rng = torch.Generator().manual_seed(0)
    signal = torch.randn(500, generator=rng)
    sizes = [4] * 40 + [2]
    for noise in (0.0, 1.0, 3.0):
        found = []
        for _ in range(20):
            each = [signal + noise * torch.randn(size, 500, generator=rng) for size in sizes]
            mean = torch.cat(each).mean(0)
            found.append(agreement([x.sum(0) for x in each], sizes, mean))
        expected = 1.0 / (1.0 + noise**2 / sum(sizes))
        assert sum(found) / 20 == pytest.approx(expected, abs=0.01)
    assert math.isnan(agreement([signal], [4], signal / 4))


def test_agreement_of_two_halves_is_their_inner_product():
    # Their noise is independent, so E[a b] is the square of the signal; that of the mean is
    # |a + b|^2 / 4.
    a, b = torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = 4.0 * float(a @ b) / float((a + b).square().sum())
    assert agreement([3 * a, 3 * b], [3, 3], (a + b) / 2) == pytest.approx(expected, rel=1e-12)
