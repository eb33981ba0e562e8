"""Each algorithm's formula against a derivation of its own, in float64; and how they combine."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from conftest import double_params, random_batch, same_params, small, timeless
from expecting import refused

from metarl import evaluate, load, resolve, train
from metarl.algorithms import algorithms, e_maml, find_algorithm
from metarl.algorithms.maml_plus_plus import annealed_weights
from metarl.algorithms.promp import InnerKLPenalty
from metarl.learning.adapter import Adapter
from metarl.learning.gradient_steps import Adam, shorten
from metarl.learning.inner_loop import Adapted
from metarl.learning.linear_solves import conjugate_gradient_each
from metarl.learning.losses import (
    Batch,
    clipped_ratio,
    dice,
    likelihood_ratio,
    log_likelihood,
)
from metarl.learning.meta_gradients.implicit import ImplicitProblem
from metarl.learning.meta_gradients.problem import (
    Evaluation,
    Objective,
    QueryProblem,
    Sampled,
)
from metarl.learning.meta_gradients.reptile import ReptileProblem
from metarl.learning.meta_gradients.unrolled import Unrolled, UnrolledProblem
from metarl.learning.outer import cosine
from metarl.models.networks import Model, flatten, stack, unflatten
from metarl.sampling.trajectories import Rollout
from metarl.training.run import new_trainer

D = torch.float64

# Quadratics ---------------------------------------------------------------------------------------
#
# Task t has the loss (x - g_t)' A_t (x - g_t) / 2 in the parameters x; its minimum is g_t. One step
# of size a maps the miss e = x - g to (I - aA) e.

TASKS, DIM = 3, 4


@dataclass(frozen=True)
class Point(Model):
    """A model that gives its parameter vector itself."""

    context_dim: int = 0

    def shapes(self):
        return {"x": (DIM,)}

    def init(self, rng):
        return {"x": torch.zeros(DIM)}

    def output(self, params, samples):
        return {"x": params["x"]}

    def adapts(self, name, part):
        return True

    def kl(self, old, new):
        return torch.zeros(TASKS, 1, dtype=D)


def quadratic(policy, dist, batch):
    miss = dist["x"] - batch.observation[:, 0]
    return 0.5 * torch.einsum("ti,tij,tj->t", miss, batch.action, miss)


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def task_batch(goal, A):
    ones = torch.ones(TASKS, 1, dtype=D)
    return Batch(goal[:, None], A, ones, ones, ones, {}, episodes=1)


def spd(seed):
    root = draw(TASKS, DIM, DIM, seed=seed)
    return root @ root.transpose(1, 2) / 4 + 0.2 * torch.eye(DIM, dtype=D)


A, B = spd(1), spd(2)
GOAL, QUERY_GOAL = draw(TASKS, DIM, seed=3), draw(TASKS, DIM, seed=4)
THETA = {"x": draw(DIM, seed=5)}
SUPPORT, QUERY = task_batch(GOAL, A), task_batch(QUERY_GOAL, B)
EYE = torch.eye(DIM, dtype=D)
OBJECTIVE = Objective(quadratic)


def times(matrix, vector):
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def moved(steps, size=0.2):
    """x after steps on the support loss."""
    power = torch.linalg.matrix_power(EYE - size * A, steps)
    return GOAL + times(power, THETA["x"] - GOAL)


def test_reptiles_gradient_is_the_displacement(pool):
    for steps, updates in ((1, 1), (2, 1), (1, 3)):
        adapter = Adapter(Point(), quadratic, (0.2,), updates=updates)
        problem = ReptileProblem(adapter, [SUPPORT] * steps, pool, OBJECTIVE, chunk=2)
        gradient, _ = problem.gradient(THETA)
        expected = (THETA["x"] - moved(steps * updates)).mean(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_iterates_are_kept_for_the_first_of_several_outer_steps(pool):
    # Told what the inner loop found, Adam's first gradient takes it, and its second finds it anew.
    adapter = Adapter(Point(), quadratic, (0.2,))
    wrong = [{"x": 5.0 + moved(1)}]
    told = ReptileProblem(adapter, [SUPPORT], pool, OBJECTIVE, iterates=wrong)
    outer = Adam(learning_rate=0.1, steps=2).without_policies()
    found, _, _ = outer.step(told, THETA, outer.init(THETA))
    first = (THETA["x"] - wrong[0]["x"]).mean(0)
    x, m, v = THETA["x"], 0.1 * first, 0.001 * first**2
    x = x - 0.1 * (m / 0.1) / ((v / 0.001).sqrt() + 1e-8)
    second = 0.2 * times(A, x - GOAL).mean(0)
    m, v = 0.9 * m + 0.1 * second, 0.999 * v + 0.001 * second**2
    x = x - 0.1 * (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    torch.testing.assert_close(found["x"], x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_imamls_gradient_is_the_exact_implicit_one(pool, strength):
    # argmin of loss + s/2 |x - theta|^2 is (A + s)^-1 (A g + s theta); its Jacobian s (A + s)^-1.
    adapter = Adapter(Point(), quadratic, (0.1,), updates=4000, proximal=strength)
    problem = ImplicitProblem(adapter, [SUPPORT, QUERY], pool, OBJECTIVE, iterations=20)
    gradient, stats = problem.gradient(THETA)
    system = A + strength * EYE
    solution = torch.linalg.solve(system, times(A, GOAL) + strength * THETA["x"])
    outer = times(B, solution - QUERY_GOAL)
    expected = strength * torch.linalg.solve(system, outer)
    torch.testing.assert_close(gradient, expected.mean(0), rtol=1e-8, atol=1e-10)
    assert stats["implicit_residual"] < 1e-8
    assert stats["inner_residual"] < 1e-8
    assert stats["low_curvature"] == 0.0


def backtracked(size, updates):
    """Return what backtracking finds of the inner problem with lambda = 2, [TASKS, DIM]."""
    adapter = Adapter(Point(), quadratic, (size,), updates=updates, proximal=2.0, backtrack=True)
    start, sizes = stack(THETA, TASKS), {"x": torch.tensor([size], dtype=D)}
    return adapter.step(start, {}, sizes, SUPPORT, 0, start=start)["x"]


def proximal_objective(x, t):
    return 0.5 * (x - GOAL[t]) @ A[t] @ (x - GOAL[t]) + (x - THETA["x"]).square().sum()


@pytest.mark.parametrize("size", [0.1, 3.0, 1e200])
def test_backtracking_halves_the_step_of_a_task_whose_objective_rises(size):
    # Few updates, so that each rise and fall is clear; the last size leads beyond all numbers.
    updates = 8
    found = backtracked(size, updates)
    halved = 0
    for t in range(TASKS):
        x, step = THETA["x"], size
        for _ in range(updates):
            new = x - step * (A[t] @ (x - GOAL[t]) + 2.0 * (x - THETA["x"]))
            rise = proximal_objective(new, t) - proximal_objective(x, t)
            assert not rise.abs() < 1e-9 * proximal_objective(x, t), "rounding would decide"
            if rise <= 0.0:
                x = new
            else:
                step, halved = step / 2, halved + 1
        torch.testing.assert_close(found[t], x, rtol=1e-9, atol=1e-12)
    assert (halved > 0) == (size > 1.0)


@pytest.mark.parametrize("size", [0.1, 3.0, 1e200])
def test_backtracking_never_raises_a_tasks_objective_beyond_rounding(size):
    before = [proximal_objective(THETA["x"], t) for t in range(TASKS)]
    for updates in range(1, 31):
        found = backtracked(size, updates)
        after = [proximal_objective(found[t], t) for t in range(TASKS)]
        for high, low in zip(before, after, strict=True):
            assert low <= high * (1.0 + 1e-12)
        before = after


def test_backtracking_finds_the_minimum_from_a_size_that_is_too_large():
    pull = 2.0 * EYE.expand_as(A)
    minimum = torch.linalg.solve(A + pull, times(A, GOAL) + times(pull, THETA["x"]))
    torch.testing.assert_close(backtracked(3.0, 200), minimum, rtol=1e-5, atol=1e-6)


def test_imaml_reports_an_unfinished_inner_problem_and_solve(pool):
    adapter = Adapter(Point(), quadratic, (0.1,), updates=2, proximal=0.1)
    _, stats = ImplicitProblem(adapter, [SUPPORT, QUERY], pool, OBJECTIVE, iterations=1).gradient(
        THETA
    )
    assert stats["inner_residual"] > 0.1
    assert stats["implicit_residual"] > 0.01


def test_imaml_ignores_tasks_with_an_unsolved_inner_problem(pool):
    # One update of size 1 / (4 strength) leaves pull and slope apart by three times the pull.
    solved, wild = ((0.1, 4000, 3.0), (1.0 / 12.0, 1, 3.0))
    gradients = {}
    for size, updates, strength in (solved, wild):
        adapter = Adapter(Point(), quadratic, (size,), updates=updates, proximal=strength)
        problem = ImplicitProblem(adapter, [SUPPORT, QUERY], pool, OBJECTIVE)
        gradients[updates], stats = problem.gradient(THETA)
        assert stats["unsolved"] == pytest.approx(float(updates == 1))
    assert gradients[4000].abs().max() > 0.1
    assert not gradients[1].any()


@pytest.mark.parametrize("curvature", [-5.0 * A, (-0.9 * EYE).expand_as(A)])
def test_imaml_detects_curvature_that_is_not_clearly_positive(pool, curvature):
    hollow = task_batch(GOAL, curvature)
    adapter = Adapter(Point(), quadratic, (1e-3,), updates=1, proximal=1.0)
    problem = ImplicitProblem(adapter, [hollow, QUERY], pool, OBJECTIVE, worst_residual=math.inf)
    gradient, stats = problem.gradient(THETA)
    assert stats["low_curvature"] == pytest.approx(1.0)
    slope = THETA["x"] - 1e-3 * times(curvature, THETA["x"] - GOAL) - QUERY_GOAL
    torch.testing.assert_close(gradient, times(B, slope).mean(0), rtol=1e-12, atol=1e-14)


def test_conjugate_gradient_solves_each_tasks_system():
    b = draw(TASKS, DIM, seed=9)
    x, residual, curved = conjugate_gradient_each(lambda v: times(A, v), b, 10)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)
    assert (residual < 1e-8).all()
    assert not curved.any()


@pytest.mark.parametrize("learned", ["layer", "parameter"])
def test_gradients_of_step_sizes_match_their_closed_form(pool, learned):
    # d/da of L(x - a g) is -g . grad L: for each entry alone (Meta-SGD), or their sum.
    adapter = Adapter(Point(), quadratic, (0.2,), learned=learned)
    meta = {
        **THETA,
        "step_size.x": torch.full((1, DIM) if learned == "parameter" else (1,), 0.2, dtype=D),
    }
    gradient, _ = UnrolledProblem(adapter, [SUPPORT, QUERY], pool, OBJECTIVE).gradient(meta)
    slope = times(A, THETA["x"] - GOAL)
    outer = times(B, moved(1) - QUERY_GOAL)
    each = -(slope * outer).mean(0)
    expected = each if learned == "parameter" else each.sum()[None]
    torch.testing.assert_close(gradient[DIM:], expected, rtol=1e-12, atol=1e-14)
    jacobian = EYE - 0.2 * A
    torch.testing.assert_close(gradient[:DIM], times(jacobian, outer).mean(0))


@pytest.mark.parametrize("curvature", [0.0, 0.3, 1.0])
def test_multi_step_loss_weighs_every_iterate(pool, curvature):
    adapter = Adapter(Point(), quadratic, (0.2,))
    weights = (0.3, 0.7)
    objective = dataclasses.replace(OBJECTIVE, step_weights=weights)
    # Two steps on the support loss; iterate 1 is judged by batch 1, iterate 2 by the query.
    batches = [SUPPORT, SUPPORT, QUERY]
    problem = UnrolledProblem(adapter, batches, pool, objective, curvature=curvature)
    gradient, stats = problem.gradient(THETA)
    expected, loss = torch.zeros(DIM, dtype=D), 0.0
    for k, weight, goal, H in ((1, 0.3, GOAL, A), (2, 0.7, QUERY_GOAL, B)):
        miss = moved(k) - goal
        outer = times(H, miss)
        jacobian = torch.linalg.matrix_power(EYE - 0.2 * curvature * A, k)
        expected += weight * times(jacobian, outer).mean(0)
        loss += weight * 0.5 * float((miss * outer).sum(1).mean())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert stats["loss"] == pytest.approx(loss, rel=1e-12)


def test_several_updates_on_a_batch_are_unrolled(pool):
    adapter = Adapter(Point(), quadratic, (0.2,), updates=3)
    gradient, _ = UnrolledProblem(adapter, [SUPPORT, QUERY], pool, OBJECTIVE).gradient(THETA)
    outer = times(B, moved(3) - QUERY_GOAL)
    jacobian = torch.linalg.matrix_power(EYE - 0.2 * A, 3)
    torch.testing.assert_close(gradient, times(jacobian, outer).mean(0), rtol=1e-12, atol=1e-14)


def test_annealed_weights_and_cosine_match_their_formulas():
    assert annealed_weights(2, 0.0) == pytest.approx((0.5, 0.5))
    assert annealed_weights(3, 0.5) == pytest.approx((1 / 6, 1 / 6, 2 / 3))
    assert annealed_weights(3, 1.0) == annealed_weights(3, 7.0) == (0.0, 0.0, 1.0)
    assert annealed_weights(0, 0.3) == ()
    assert [cosine(p) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


# A tabular MDP, by enumeration --------------------------------------------------------------------
#
# Two states, two actions, two steps; every trajectory is listed, so expectations are exact sums.

REWARD = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=D)  # [state, action]
NEXT = torch.tensor([[[0.8, 0.2], [0.3, 0.7]], [[0.5, 0.5], [0.1, 0.9]]], dtype=D)
STEPS = 2
PATHS = list(itertools.product(range(2), range(2), range(2)))  # a0, s1, a1; s0 is 0


@dataclass(frozen=True)
class Table(Model):
    """A softmax policy: logits for each state and action."""

    context_dim: int = 0

    def shapes(self):
        return {"logits": (2, 2)}

    def init(self, rng):
        return {"logits": torch.zeros(2, 2)}

    def output(self, params, samples):
        return self.dist(params, samples.observation)

    def adapts(self, name, part):
        return True

    def dist(self, params, observation):
        return {"logits": (observation.to(D) @ params["logits"]).log_softmax(-1)}

    def log_prob(self, dist, action):
        return dist["logits"].gather(-1, action.long()).squeeze(-1)

    def kl(self, old, new):
        return (old["logits"].exp() * (old["logits"] - new["logits"])).sum(-1)


TABLE = Table()


def with_context(policy, size):
    network = dataclasses.replace(policy.network, context_dim=size)
    return dataclasses.replace(policy, network=network)


LOGITS = {"logits": draw(2, 2, seed=11)}


def path_batch(paths, weight):
    """One task whose episodes are these paths; advantages are the rewards to come."""
    states = [(0, s1) for _, s1, _ in paths]
    acts = [(a0, a1) for a0, _, a1 in paths]
    rewards = [[float(REWARD[s, a]) for s, a in zip(*path, strict=True)]
               for path in zip(states, acts, strict=True)]  # fmt: skip
    to_come = [[r0 + r1, r1] for r0, r1 in rewards]
    observation = torch.nn.functional.one_hot(torch.tensor(states).flatten(), 2).to(D)[None]
    action = torch.tensor(acts).flatten()[None, :, None]
    old = TABLE.dist(stack(LOGITS, 1), observation)
    weights = torch.as_tensor(weight, dtype=D).repeat_interleave(STEPS)[None]
    return Batch(
        observation, action, torch.tensor(to_come, dtype=D).flatten()[None], weights,
        TABLE.log_prob(old, action), old, episodes=len(paths),
    )  # fmt: skip


def path_log_prob(logits, path):
    a0, s1, a1 = path
    log = logits.log_softmax(-1)
    return log[0, a0] + NEXT[0, a0, s1].log() + log[s1, a1]


def expected_return(logits):
    total = torch.zeros((), dtype=D)
    for a0, s1, a1 in PATHS:
        total = total + path_log_prob(logits, (a0, s1, a1)).exp() * (REWARD[0, a0] + REWARD[s1, a1])
    return total


def path_rollout(paths, scales):
    """An episode a task; task t pays scales[t] times the reward."""
    rewards = [[c * float(REWARD[0, a0]), c * float(REWARD[s1, a1])]
               for (a0, s1, a1), c in zip(paths, scales, strict=True)]  # fmt: skip
    empty = torch.zeros(len(paths), 1, STEPS, 1)
    ended = torch.ones(len(paths), 1, dtype=torch.bool)
    return Rollout(
        tasks=torch.zeros(len(paths), 1, dtype=D), observation=empty,
        last_observation=empty[:, :, 0], action=empty, behaviour={},
        reward=torch.tensor(rewards, dtype=D).unsqueeze(1),
        valid=torch.ones(len(paths), 1, STEPS, dtype=torch.bool), terminated=ended,
        truncated=~ended, diverged=~ended,
    )  # fmt: skip


def joined(batches):
    """Batches of one task each as a batch of several."""
    tensors = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("observation", "action", "advantage", "weight", "old_log_prob")
    }
    old = {"logits": torch.cat([batch.old["logits"] for batch in batches])}
    return Batch(**tensors, old=old, episodes=batches[0].episodes)


def test_e_mamls_estimator_is_the_gradient_of_the_return_after_adaptation(pool, monkeypatch):
    # grad E over support of J(theta'(support)), every support set and query of two tasks listed;
    # the credit, its baseline and its units are those that the trainer's problem has.
    size, scales, sampling_credit = 0.4, (1.0, -1.5), e_maml.sampling_credit
    adapter = Adapter(TABLE, log_likelihood, (size,))
    meta = find_algorithm("e-maml").meta
    assert meta.sampling_coef == 1.0

    def adapted(logits, path, scale):
        a0, s1, a1 = path
        log = logits.log_softmax(-1)
        first, second = scale * REWARD[0, a0], scale * REWARD[s1, a1]
        score = log[0, a0] * (first + second) + log[s1, a1] * second
        (slope,) = torch.autograd.grad(score / STEPS, logits, create_graph=True)
        return logits + size * slope

    logits = LOGITS["logits"].clone().requires_grad_()
    truth = torch.zeros((), dtype=D)
    chance = {path: path_log_prob(logits, path).exp() for path in PATHS}
    likely, support, query = {}, {}, {}
    for c, path in itertools.product(scales, PATHS):
        after = adapted(logits, path, c)
        truth = truth + chance[path] * c * expected_return(after) / len(scales)
        final = {"logits": after.detach()}
        likely[c, path] = {q: path_log_prob(final["logits"], q).exp() for q in PATHS}
        one = path_batch([path], [1.0 / STEPS])
        support[c, path] = dataclasses.replace(one, advantage=c * one.advantage)
        # The query's own expectation is exact: every path, as likely as it is.
        every = path_batch(PATHS, [1.0 / STEPS] * len(PATHS))
        dist = TABLE.dist(stack(final, 1), every.observation)
        weight = torch.stack(list(likely[c, path].values())).repeat_interleave(STEPS)[None]
        query[c, path] = dataclasses.replace(
            every, advantage=c * every.advantage, old=dist, weight=weight / STEPS,
            old_log_prob=TABLE.log_prob(dist, every.action),
        )  # fmt: skip

    estimate = {True: torch.zeros(4, dtype=D), False: torch.zeros(4, dtype=D)}
    for paths in itertools.product(PATHS, repeat=2):
        pairs = list(zip(scales, paths, strict=True))
        batches = [joined([batch[pair] for pair in pairs]) for batch in (support, query)]
        query_batch = dataclasses.replace(batches[1], advantage_scale=torch.ones(2, dtype=D))
        credit = torch.zeros(2, dtype=D)
        for queries in itertools.product(PATHS, repeat=2):
            sampled = dataclasses.replace(query_batch, rollout=path_rollout(queries, scales))
            both = [likely[pair][q] for pair, q in zip(pairs, queries, strict=True)]
            credit += both[0] * both[1] * sampling_credit(sampled)
        # The gradient is linear in the credit: its expectation stands for that of every query.
        monkeypatch.setattr(e_maml, "sampling_credit", lambda *_, found=credit: found)
        adapted_batches = Adapted([{}], {}, LOGITS, batches=[batches[0], sampled])
        made = Sampled(adapter, adapted_batches, pool, Objective(likelihood_ratio))
        for credited, gradient in ((True, meta), (False, Unrolled())):
            weight = float((chance[paths[0]] * chance[paths[1]]).detach())
            estimate[credited] -= weight * gradient.problem(made).gradient(LOGITS)[0]
    (expected,) = torch.autograd.grad(truth / STEPS, logits)  # a loss is a mean over steps
    # The credit divides by the mean length of an episode, which is float32.
    torch.testing.assert_close(estimate[True], expected.flatten(), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(estimate[False], expected.flatten(), rtol=1e-2, atol=1e-3)


def mean_hessian(loss):
    """E over trajectories of the Hessian of -loss of one trajectory, at the old parameters."""
    total = torch.zeros(4, 4, dtype=D)
    for path in PATHS:
        batch = path_batch([path], [1.0])

        def value(flat, batch=batch):
            dist = TABLE.dist({"logits": flat.view(1, 2, 2)}, batch.observation)
            return -loss(TABLE, dist, batch).sum()

        chance = path_log_prob(LOGITS["logits"], path).exp()
        flat = LOGITS["logits"].flatten()
        total += chance * torch.autograd.functional.hessian(value, flat)
    return total


def mean_outer_products(within_a_step, across_steps):
    """E of the products of scores that the Hessian of the return has, parts of them."""
    total = torch.zeros(4, 4, dtype=D)
    for a0, s1, a1 in PATHS:
        logits = LOGITS["logits"].clone().requires_grad_()
        log = logits.log_softmax(-1)
        scores = [
            torch.autograd.grad(x, logits, retain_graph=True)[0].flatten()
            for x in (log[0, a0], log[s1, a1])
        ]
        first, second = REWARD[0, a0] + REWARD[s1, a1], REWARD[s1, a1]
        chance = path_log_prob(LOGITS["logits"], (a0, s1, a1)).exp()
        if within_a_step:
            total += chance * first * torch.outer(scores[0], scores[0])
            total += chance * second * torch.outer(scores[1], scores[1])
        if across_steps:
            cross = torch.outer(scores[0], scores[1])
            total += chance * second * (cross + cross.T)
    return total


TRUE_HESSIAN = torch.autograd.functional.hessian(
    lambda flat: expected_return(flat.view(2, 2)), LOGITS["logits"].flatten()
)


def test_dices_hessian_is_unbiased():
    torch.testing.assert_close(mean_hessian(dice), TRUE_HESSIAN, rtol=1e-10, atol=1e-12)


def test_decayed_dice_keeps_a_share_of_the_products_across_steps():
    expected = TRUE_HESSIAN - 0.7 * mean_outer_products(False, True)
    found = mean_hessian(partial(dice, decay=0.3))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_plain_hessian_lacks_exactly_the_products_of_scores():
    missing = mean_outer_products(True, True)
    assert missing.abs().max() > 0.1
    torch.testing.assert_close(mean_hessian(log_likelihood) + missing, TRUE_HESSIAN)


def test_promps_surrogate_has_the_low_variance_curvature():
    # It has the products within a step and leaves out those across steps.
    across = mean_outer_products(False, True)
    torch.testing.assert_close(mean_hessian(likelihood_ratio) + across, TRUE_HESSIAN)
    within = mean_outer_products(True, False)
    torch.testing.assert_close(
        mean_hessian(likelihood_ratio), mean_hessian(log_likelihood) + within
    )


def dice_hessian(batch, decay=1.0):
    """Hessian of one sample's DiCE loss at the old parameters."""

    def value(flat):
        dist = TABLE.dist({"logits": flat.view(1, 2, 2)}, batch.observation)
        return dice(TABLE, dist, batch, decay=decay).sum()

    return torch.autograd.functional.hessian(value, LOGITS["logits"].flatten())


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_dice_matches_its_recursion_step_by_step(decay):
    # Of one sample and not of the mean: time reversed has the same mean, and more variance.
    batch = path_batch(PATHS[:3], [0.5, 0.3, 0.2])

    def box(w):
        return torch.exp(w - w.detach())

    def recursion(flat):
        dist = TABLE.dist({"logits": flat.view(1, 2, 2)}, batch.observation)
        log_prob = TABLE.log_prob(dist, batch.action)[0]
        loss = through = torch.zeros((), dtype=D)
        for i, log in enumerate(log_prob):
            before = decay * through if i % STEPS else torch.zeros((), dtype=D)
            through = before + log
            gain = box(through) - box(before)
            loss = loss - batch.weight[0, i] * batch.advantage[0, i] * gain
        return loss

    expected = torch.autograd.functional.hessian(recursion, LOGITS["logits"].flatten())
    torch.testing.assert_close(dice_hessian(batch, decay), expected)


@pytest.mark.parametrize("loss", [log_likelihood, likelihood_ratio, dice, partial(dice, decay=0.3)])
def test_the_gradient_of_every_inner_loss_is_the_policy_gradient(loss):
    total = torch.zeros(2, 2, dtype=D)
    for path in PATHS:
        logits = LOGITS["logits"].clone().requires_grad_()
        batch = path_batch([path], [1.0])
        dist = TABLE.dist({"logits": logits[None]}, batch.observation)
        (slope,) = torch.autograd.grad(-loss(TABLE, dist, batch).sum(), logits)
        total += path_log_prob(LOGITS["logits"], path).exp() * slope
    logits = LOGITS["logits"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(expected_return(logits), logits)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-13)


def test_dice_ignores_steps_after_the_end_of_an_episode():
    whole = path_batch(PATHS[:3], [1.0] * 3)
    weight = whole.weight.clone()
    weight[0, 1] = 0.0  # the first episode ends after one step
    changed = whole.action.clone()
    changed[0, 1] = 1 - changed[0, 1]

    ended = dataclasses.replace(whole, weight=weight)
    other = dataclasses.replace(ended, action=changed)
    torch.testing.assert_close(dice_hessian(ended), dice_hessian(other))


def test_dice_accepts_a_selection_of_whole_episodes():
    chosen = [PATHS[2], PATHS[0]]
    part = path_batch(PATHS[:3], [1.0] * 3).select(torch.tensor([[[4, 5], [0, 1]]]))

    assert part.episodes == 2
    alone = path_batch(chosen, [1.0] * 2)
    # A selection's weights sum to 1 again.
    torch.testing.assert_close(dice_hessian(part) * alone.weight.sum(), dice_hessian(alone))


def test_dice_refuses_samples_without_their_order():
    loose = path_batch(PATHS[:3], [1.0] * 3).select(torch.tensor([0, 3, 4, 5]))
    with refused("DiCE", error=ValueError):
        dice_hessian(loose)


# ProMP's other parts ------------------------------------------------------------------------------


def test_the_clipped_objective_matches_a_scalar_reference(small_policy):
    params = stack(double_params(small_policy, 3), 2)
    batch = random_batch(small_policy, 2, 40, 0)
    dist = small_policy.dist(params, batch.observation)
    log_prob = small_policy.log_prob(dist, batch.action)
    found = clipped_ratio(small_policy, dist, batch, clip=0.2)
    cuts = 0
    for t in range(2):
        total = 0.0
        for n in range(40):
            ratio = float((log_prob[t, n] - batch.old_log_prob[t, n]).exp())
            advantage = float(batch.advantage[t, n])
            cut = min(max(ratio, 0.8), 1.2)
            cuts += cut != ratio
            total += float(batch.weight[t, n]) * min(ratio * advantage, cut * advantage)
        assert float(found[t]) == pytest.approx(-total, rel=1e-12)
    assert cuts > 10


def test_inner_kl_is_measured_from_the_policies_before_the_update(small_policy, pool):
    meta = double_params(small_policy)
    batches = [random_batch(small_policy, 3, 20, seed) for seed in range(3)]
    adapter = Adapter(small_policy, likelihood_ratio, (0.1,))

    def loss(coefficient):
        adapted = Adapted([{}] * 3, {}, meta, batches=batches)
        sampled = Sampled(adapter, adapted, pool, Objective(likelihood_ratio))
        penalty = InnerKLPenalty(inner_kl_coef=coefficient)
        return penalty.problem(sampled).evaluate(meta).loss

    fast, slow, sizes = adapter.split(meta)
    iterates = adapter.adapt(stack(fast, 3), slow, sizes, batches[:2])
    kls = [
        batch.kl(small_policy, small_policy.dist(iterate, batch.observation))
        for iterate, batch in zip(iterates, batches[:2], strict=False)
    ]
    expected = 0.7 * float(torch.stack(kls).mean())
    assert loss(0.7) - loss(0.0) == pytest.approx(expected, rel=1e-10)


# Adam ---------------------------------------------------------------------------------------------


class Slope:
    """A problem whose gradient is given."""

    iterates = ()

    def __init__(self, *gradients):
        self.gradients = list(gradients)

    def gradient(self, meta, iterates=()):
        return self.gradients.pop(0), {"loss": 0.0}


def test_adam_follows_its_formula():
    meta = {"x": draw(DIM, seed=1)}
    slopes = [draw(DIM, seed=s) for s in (2, 3, 4)]
    outer = Adam(learning_rate=0.1).without_policies()
    state = outer.init(meta)
    x, m, v = meta["x"], torch.zeros(DIM, dtype=D), torch.zeros(DIM, dtype=D)
    for i, g in enumerate(slopes, start=1):
        meta, state, stats = outer.step(Slope(g), meta, state, rate=0.5)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - 0.05 * (m / (1 - 0.9**i)) / ((v / (1 - 0.999**i)).sqrt() + 1e-8)
        torch.testing.assert_close(meta["x"], x, rtol=1e-6, atol=1e-9)
    assert float(state["x/step"]) == 3
    assert stats["finite"]


def test_outer_steps_stop_beyond_the_kl_bound():
    class Moving(QueryProblem):
        def __init__(self):
            self.kls = [0.0, 0.03, 0.06]

        def gradient(self, meta, iterates=()):
            return torch.ones(DIM, dtype=D), {"loss": 0.0, "kl": self.kls.pop(0)}

        def evaluate(self, meta):
            return Evaluation(0.0, 0.0)

    meta = {"x": draw(DIM, seed=1)}
    outer = Adam(steps=5, max_kl=0.05)
    _, state, stats = outer.step(Moving(), meta, outer.init(meta))
    assert stats["outer_steps"] == 2  # from 0 and 0.03, not from 0.06
    assert float(state["x/step"]) == 2


@pytest.mark.parametrize("curvature", [0.5, 4.0])
def test_a_step_beyond_the_kl_bound_is_shortened(curvature):
    # KL = c |x - x0|^2 + 100 |x - x0|^4: not the square that the cut assumes.
    meta, new = {"x": draw(DIM, seed=1)}, {"x": draw(DIM, seed=2)}

    class Bowl:
        def evaluate(self, at):
            square = float((at["x"] - meta["x"]).square().sum())
            return Evaluation(1.0, curvature * square + 100 * square**2)

    found, after, share = shorten(Bowl(), meta, new, 0.05)
    torch.testing.assert_close(found["x"], meta["x"] + share * (new["x"] - meta["x"]))
    assert after.kl == Bowl().evaluate(found).kl
    assert 0.005 < after.kl <= 0.05
    same, _, whole = shorten(Bowl(), meta, found, 0.05)
    assert same is found
    assert whole == 1.0


def test_a_step_whose_kl_is_always_nan_is_abandoned():
    class Void:
        def evaluate(self, at):
            return Evaluation(1.0, 0.0 if at is meta else math.nan)

    meta = {"x": draw(DIM, seed=1)}
    found, _, share = shorten(Void(), meta, {"x": draw(DIM, seed=2)}, 0.05)
    assert found is meta
    assert share == 0.0


def test_a_gradient_that_is_not_finite_changes_nothing_in_adam():
    meta = {"x": draw(DIM, seed=1)}
    outer = Adam().without_policies()
    state = outer.init(meta)
    bad = torch.full((DIM,), torch.nan, dtype=D)
    new, after, stats = outer.step(Slope(bad), meta, state)
    assert new is meta
    assert after is state
    assert not stats["finite"]


# What adapts --------------------------------------------------------------------------------------


def test_only_the_fast_parameters_adapt(small_policy):
    batch = random_batch(small_policy, 2, 20, 0)
    for fast, names in (("all", set(small_policy.shapes())),
                        ("head", {"layer2.weight", "layer2.bias"})):  # fmt: skip
        adapter = Adapter(small_policy, log_likelihood, (0.1,), fast=fast)
        start, slow, sizes = adapter.split(double_params(small_policy))
        assert set(start) == names
        assert set(slow) == set(small_policy.shapes()) - names
        new = adapter.adapt(stack(start, 2), slow, sizes, [batch])[-1]
        assert set(new) == names
        assert all((new[name] - start[name]).abs().max() > 0 for name in names)
    told = with_context(small_policy, 3)
    adapter = Adapter(told, log_likelihood, (0.1,), fast="context")
    start, slow, sizes = adapter.split(double_params(told))
    assert set(start) == {"context"}
    assert not start["context"].any()
    new = adapter.adapt(stack(start, 2), slow, sizes, [batch])[-1]["context"]
    assert new.shape == (2, 3)
    assert not torch.equal(new[0], new[1])


def test_cavias_gradient_matches_central_differences(small_policy, pool):
    told = with_context(small_policy, 2)
    adapter = Adapter(told, log_likelihood, (0.5,), fast="context")
    meta = double_params(told)
    batches = [random_batch(told, 2, 20, seed) for seed in range(2)]
    problem = UnrolledProblem(adapter, batches, pool, Objective(likelihood_ratio))
    gradient, _ = problem.gradient(meta)
    theta = flatten(meta)
    for i in range(0, len(theta), 7):
        h = torch.zeros_like(theta)
        h[i] = 1e-5
        up, down = (problem.evaluate(unflatten(theta + s * h, meta)).loss for s in (1, -1))
        assert float(gradient[i]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-8)


# The table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, row in algorithms().items() if row.head == "meta"])
def test_every_algorithm_trains_resumes_repeats_and_evaluates(tmp_path, name):
    def config(threads=1):
        return small(name, threads=threads)

    whole = train(config(), tmp_path / "whole")
    # Interrupted: a run's schedule is that of its whole length.
    done: list[dict] = []
    train(config(), tmp_path / "parts", callbacks=[done.append], stop=lambda: len(done) == 2)
    parts = train(config(threads=2), tmp_path / "parts", resume=True)
    assert len(done) == 2
    assert same_params(whole, parts)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    loaded = load(tmp_path / "whole")
    assert same_params(whole, loaded)
    result = evaluate(loaded, tasks=3, episodes=2, steps=2, threads=1)
    assert np.isfinite(result.curve.per_task).all()
    assert len(result.curve.step_sizes) == (0 if name in ("oracle", "rl2") else 2)  # it takes none
    start = new_trainer(config())
    initial = start.state.params
    start.close()
    still = all(torch.equal(initial[n], whole.params[n]) for n in initial)
    assert still == (name == "random")
    rows = timeless(tmp_path / "whole")
    # What has no surrogate says so, and not 0.
    assert (rows[0].get("surrogate_before") is None) == (name in ("reptile", "random"))
    samples = 4 * 5 * 4 * 12  # iterations x tasks x episodes x horizon, for one rollout
    inner_steps = config().setup.algorithm.inner.steps
    rollouts = inner_steps if name == "reptile" else inner_steps + 1
    if name == "rl2":
        rollouts = 2  # episodes of a trial
    assert (inner_steps == 0) == (name in ("pretrained", "oracle", "rl2"))
    # Reptile samples nothing with its last parameters: the return after is that of those before.
    assert len(rows[-1]["returns"]) == rollouts
    assert rows[-1]["return_post"] == rows[-1]["returns"][-1]
    assert samples * rollouts * 0.9 < rows[-1]["env_steps"] <= samples * rollouts


def test_learned_step_sizes_are_used_in_evaluation(tmp_path):
    meta = train(small("meta-sgd", iterations=2, tasks=4, threads=1), tmp_path / "run")
    sizes = torch.cat([p.flatten() for n, p in meta.params.items() if n.startswith("step_size.")])
    found = evaluate(meta, tasks=2, episodes=2, steps=1, threads=1)
    assert found.curve.step_sizes == pytest.approx([float(sizes.mean())], rel=1e-5)
    assert float(sizes.std()) > 0.0
    given = evaluate(meta, tasks=2, episodes=2, steps=1, step_sizes=[0.3], threads=1)
    assert given.curve.step_sizes == [0.3]


def test_an_oracle_observes_its_task(tmp_path):
    config = small("oracle", iterations=1, tasks=4, episodes=2, threads=1)
    meta = train(config, tmp_path / "run")
    assert meta.policy.context_dim == 2
    np.testing.assert_allclose(meta.context(np.array([[0.5, -0.25]]))["context"], [[1.0, -0.5]])
    policy = meta.adapt([0.3, 0.2], steps=0)
    other = meta.adapt([-0.3, 0.2], steps=0)
    origin = np.zeros(2)
    assert not np.array_equal(
        policy.act(origin, deterministic=True), other.act(origin, deterministic=True)
    )
    with refused("oracle", "task"):
        meta.adapt(meta.family.make(np.array([0.3, 0.2])), steps=0)


def test_the_inner_loss_of_an_algorithm_can_be_another():
    """Ratios have the curvature of DiCE at decay 0, and log-likelihoods another."""

    def gradient_norm(name, loss=None):
        algorithm = find_algorithm(name)
        if loss is not None:
            inner = dataclasses.replace(algorithm.inner, loss=loss)
            algorithm = dataclasses.replace(algorithm, inner=inner)
        said = {"tasks": 4, "episodes": 4, "threads": 1}
        said |= {"inner.decay": 0.0} if name == "dice-maml" else {}
        with new_trainer(resolve("metarl2026", "navigation-2d", algorithm, said)) as trainer:
            return trainer.iterate()["gradient_norm"]

    ratios, usual = gradient_norm("maml-trpo", likelihood_ratio), gradient_norm("maml-trpo")
    assert ratios == pytest.approx(gradient_norm("dice-maml"), rel=1e-4)
    assert abs(ratios / usual - 1.0) > 1e-3
    assert usual == gradient_norm("maml-trpo", log_likelihood)
    # The steps are the same: only their curvature differs.
    first = gradient_norm("fomaml-trpo")
    assert first == pytest.approx(gradient_norm("fomaml-trpo", likelihood_ratio), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "names"),
    [
        # Options of a part that the algorithm does not have.
        ("maml-trpo", {"outer.learning_rate": 0.5}, "outer.learning_rate"),
        ("maml-trpo", {"outer.minibatches": 2}, "outer.minibatches"),
        ("promp", {"outer.cg_iterations": 5}, "outer.cg_iterations"),
        ("random", {"outer.learning_rate": 0.5}, "outer.learning_rate"),
        ("random", {"outer.schedule": "cosine"}, "outer.schedule"),
        ("maml-reinforce", {"outer.clip": 0.1}, "outer.clip"),
        ("reptile", {"outer.max_kl": 0.1}, "outer.max_kl"),
        ("maml-trpo", {"policy.filters": 8}, "policy.filters"),
        ("reptile", {"meta.inner_kl_coef": 0.1}, "meta.inner_kl_coef"),
        ("maml-trpo", {"inner.backtrack": True}, "inner.backtrack"),
        ("maml-trpo", {"meta.anneal_fraction": 0.5}, "meta.anneal_fraction"),
        ("maml-trpo", {"meta.sampling_coef": 0.5}, "meta.sampling_coef"),
        ("fomaml-trpo", {"meta.second_order": 0.5}, "meta.second_order"),
        ("reptile", {"meta.second_order": 0.5}, "meta.second_order"),
        ("oracle", {"meta.second_order": 0.5}, "meta.second_order"),
        ("maml-trpo", {"inner.loss": "dice"}, "inner.loss"),
        ("promp", {"inner.decay": 0.5}, "inner.decay"),
        ("maml-trpo", {"inner.context": 3}, "inner.context"),
        ("oracle", {"inner.steps": 1}, "inner.steps"),
        ("pretrained", {"inner.steps": 1}, "inner.steps"),
        ("meta-sgd", {"inner.min_kl": 0.1}, "inner.min_kl"),
        ("imaml", {"inner.min_kl": 0.1}, "inner.min_kl"),
        # Values that a part does not take.
        ("maml-trpo", {"inner.updates": 2}, "inner.updates 2"),
        ("maml-trpo", {"advantage.targets": "lambda-returns"},
         "advantage.targets advantage.gae_lambda"),
        ("promp", {"meta.second_order": -0.5}, "meta.second_order -0.5"),
        ("maml++", {"meta.anneal_fraction": 1.5}, "meta.anneal_fraction 1.5"),
        ("dice-maml", {"inner.decay": 1.5}, "inner.decay 1.5"),
        ("imaml", {"inner.proximal": 0.0}, "inner.proximal 0.0"),
        # Parts that do not go together.
        ("imaml", {"inner.steps": 2}, "imaml inner.steps 2"),
        ("reptile", {"inner.steps": 0}, "reptile inner.steps 0"),
        ("e-maml", {"inner.steps": 0}, "e-maml inner.steps 0"),
    ],
)  # fmt: skip
def test_options_that_an_algorithm_does_not_take_are_refused_by_name(name, changes, names):
    with refused(*names.split()):
        resolve(None, "navigation-2d", name, changes)


def test_defaults_of_an_algorithm_override_the_preset():
    config = resolve("icml2017", "navigation-2d", "reptile")
    assert config.setup.algorithm.inner.steps == 4
    assert config.setup.algorithm.inner.step_sizes == (0.5,)
    assert config.setup.algorithm.inner.sizes_in_evaluation == (0.5, 0.25)
    assert resolve("icml2017", "navigation-2d", "promp").setup.algorithm.meta.inner_kl_coef == 5e-4
    for name in ("anil", "cavia", "meta-sgd", "maml++"):
        assert (
            resolve("icml2017", "navigation-2d", name).setup.algorithm.inner.sizes_in_evaluation
            == ()
        )


def test_algorithms_name_their_paper_and_are_found_by_name():
    for name, row in algorithms().items():
        assert find_algorithm(name) is row
        assert "20" in row.citation
    with refused("reptil", "reptile"):
        find_algorithm("reptil")
