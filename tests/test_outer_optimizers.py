"""Outer steps by any optimizer of torch, and what enters their gradient, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import double_params, random_batch, small
from expecting import refused

import metarl
from metarl.algorithms import Algorithm, find_algorithm
from metarl.algorithms.named_parts import find_outer
from metarl.config.options import Config
from metarl.learning.adapter import Adapter
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import likelihood_ratio, log_likelihood
from metarl.learning.meta_gradients.implicit import ImplicitProblem
from metarl.learning.meta_gradients.problem import Objective
from metarl.learning.meta_gradients.reptile import ReptileProblem
from metarl.learning.meta_gradients.unrolled import UnrolledProblem
from metarl.models.networks import flatten, unflatten
from metarl.training.run import new_trainer

D = torch.float64
META = {
    "weight": torch.linspace(-1.0, 2.0, 6, dtype=D).view(2, 3),
    "bias": torch.tensor([0.3, -0.7], dtype=D),
}


class Valley:
    """A problem with the objective sum(c x^2) / 2 + sum(x) of the flat meta-parameters x."""

    iterates = ()
    curvatures = torch.linspace(0.2, 3.0, 8, dtype=D)

    def gradient(self, meta, iterates=()):
        return self.curvatures * flatten(meta) + 1.0, {"loss": 0.0}


def by_hand(optimizer, rates, **arguments):
    """Return the meta-parameters after steps of one optimizer that lives on."""
    leaves = [p.clone().requires_grad_() for p in META.values()]
    made = optimizer(leaves, lr=1.0, **arguments)
    for rate in rates:
        made.param_groups[0]["lr"] = rate
        made.zero_grad()
        x = torch.cat([p.flatten() for p in leaves])
        (0.5 * (Valley.curvatures * x * x).sum() + x.sum()).backward()
        made.step()
    return dict(zip(META, (p.detach() for p in leaves), strict=True))


CASES = {
    "adam": {},
    "adamw": {"weight_decay": 0.1, "betas": (0.8, 0.95)},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "nadam": {"momentum_decay": 0.01},
    "rmsprop": {"momentum": 0.5},
    "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
    "radam": {},
    "rprop": {},
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_those_of_the_optimizer_itself(name, steps):
    options = {"learning_rate": 0.05, "steps": steps, "max_norm": 1e9, **CASES[name]}
    outer = find_outer(name).with_options(options).without_policies()
    meta, state = META, outer.init(META)
    shares = [1.0, 1.0, 0.5, 0.25, 0.25, 0.125]
    for share in shares:
        before = {key: x.clone() for key, x in state.items()}
        meta, new, stats = outer.step(Valley(), meta, state, share)
        # A checkpoint holds the same tensors from the start, and a step changes none of them.
        assert {k: x.shape for k, x in new.items()} == {k: x.shape for k, x in state.items()}
        assert all(torch.equal(state[key], x) for key, x in before.items())
        assert stats["outer_steps"] == steps
        state = new
    rates = [0.05 * share for share in shares for _ in range(steps)]
    expected = by_hand(type(outer).optimizer, rates, **CASES[name])
    for key, p in expected.items():
        torch.testing.assert_close(meta[key], p, rtol=1e-12, atol=1e-14)
    assert (flatten(meta) - flatten(META)).abs().min() > 1e-3


class Counting(torch.optim.Optimizer):
    """Keeps a plain number."""

    def __init__(self, params, lr=1e-3, weight_decay=0):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = 1


class Ascent(torch.optim.SGD):
    """A class of one's own."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = -p.grad
        return super().step(closure)


def test_a_class_is_an_outer_optimizer_with_its_arguments_as_options():
    assert find_outer(torch.optim.SGD) == find_outer("sgd") == find_outer("SGD")
    outer = find_outer(f"{__name__}:Ascent").with_options({"learning_rate": 0.5, "max_norm": 1e9})
    found, _, _ = outer.without_policies().step(Valley(), META, {})
    gradient = Valley().gradient(META)[0]
    torch.testing.assert_close(flatten(found), flatten(META) + 0.5 * gradient)
    assert find_outer(Counting).with_options({"weight_decay": 0.5}).options()["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("name", "nearest"), [("adamww", "adamw"), ("sdg", "sgd"), ("trust-regio", "trust-region")]
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    with refused("outer", name, nearest):
        find_outer(name)
    with refused("outer", name, nearest):
        small().with_options({"outer": name})


@pytest.mark.parametrize("what", [3, None, torch.nn.Linear, torch.optim.Optimizer])
def test_what_is_no_optimizer_is_refused(what):
    with refused("outer"):
        outer = find_outer(what)
        outer.init(META)


@pytest.mark.parametrize("name", ["lbfgs", "sparseadam", Counting])
def test_an_optimizer_that_cannot_take_plain_steps_is_refused(name):
    outer = find_outer(name)
    with refused("outer", outer.name):
        outer.init(META)


def test_values_that_the_optimizer_refuses_are_refused():
    with refused("outer", "adamw"):
        find_outer("adamw").with_options({"betas": (1.5, 0.9)}).init(META)
    with refused("outer.momentum"):
        find_outer("adamw").with_options({"momentum": 0.5})


@pytest.mark.parametrize("name", ["adafactor", "adamw", "sgd", "rprop"])
def test_a_config_with_any_optimizer_comes_back_from_its_file(name):
    config = small().with_options({"outer": name, "outer.learning_rate": 0.02})
    assert Config.from_json(config.to_json()) == config


def test_statistics_and_the_fitted_factor_do_not_decay():
    options = {
        "outer": "adamw", "outer.weight_decay": 0.5, "outer.learning_rate": 0.1,
        "policy.normalize": True, "inner.min_kl": 0.05, "outer.max_kl": 1e9, "outer.max_norm": 1e-9,
        "tasks": 3, "episodes": 2,
    }  # fmt: skip
    found = []
    for decay in (0.0, 0.5):
        with new_trainer(small(**{**options, "outer.weight_decay": decay})) as trainer:
            trainer.iterate()
            found.append(trainer.state.params)
    plain, decayed = found
    kept = [name for name in plain if name.startswith("norm.")]
    for name in (*kept, "step_factor"):
        assert torch.equal(plain[name], decayed[name]), name
    assert plain["step_factor"] > 1.0
    assert (plain["layer0.weight"] - decayed["layer0.weight"]).abs().max() > 1e-3


# What enters the meta-gradient --------------------------------------------------------------------

WEIGHTS = torch.tensor([0.2, 2.5, 0.3], dtype=D)
SIZE = 0.3


def regularizer(meta):
    return sum((0.1 * p.square() + 0.05 * p**3).sum() for p in meta.values())


def regularizer_slope(theta):
    return 0.2 * theta + 0.15 * theta**2


OBJECTIVE = Objective(likelihood_ratio, task_weights=WEIGHTS, regularizer=regularizer)


def task_loss(policy, loss, theta, like, batch, t):
    """The loss of one task at flat parameters, without stacking of tasks."""
    params = {name: p[None] for name, p in unflatten(theta, like).items()}
    one = batch.map(lambda x: x[t : t + 1])
    return loss(policy, policy.dist(params, one.observation), one)[0]


def one_step(policy, theta, like, batch, t, loss=log_likelihood):
    value = task_loss(policy, loss, theta, like, batch, t)
    return theta - SIZE * torch.autograd.grad(value, theta, create_graph=True)[0]


@pytest.fixture
def batches(small_policy):
    return [random_batch(small_policy, 3, 20, seed) for seed in range(3)]


def test_weights_and_regularizer_enter_the_unrolled_gradient(small_policy, pool, batches):
    meta, (support, _, query) = double_params(small_policy), batches
    adapter = Adapter(small_policy, log_likelihood, (SIZE,))
    problem = UnrolledProblem(adapter, [support, query], pool, OBJECTIVE, chunk=2)
    theta = flatten(meta).requires_grad_()
    each = [
        task_loss(
            small_policy, likelihood_ratio, one_step(small_policy, theta, meta, support, t), meta,
            query, t,
        )
        for t in range(3)
    ]  # fmt: skip
    mean = (torch.stack(each) * WEIGHTS).sum() / 3
    slope = torch.autograd.grad(mean, theta)[0] + regularizer_slope(theta.detach())
    gradient, stats = problem.gradient(meta)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-12)
    value = float(mean.detach() + regularizer(meta))
    assert stats["loss"] == pytest.approx(value, rel=1e-12)
    assert problem.evaluate(meta).loss == pytest.approx(value, rel=1e-12)


def test_weights_and_regularizer_enter_reptiles_gradient(small_policy, pool, batches):
    meta = double_params(small_policy)
    adapter = Adapter(small_policy, log_likelihood, (SIZE,))
    problem = ReptileProblem(adapter, batches, pool, OBJECTIVE, chunk=2)
    start = flatten(meta)
    expected = regularizer_slope(start)
    for t in range(3):
        theta = start.clone().requires_grad_()
        for batch in batches:
            theta = one_step(small_policy, theta, meta, batch, t).detach().requires_grad_()
        expected = expected + WEIGHTS[t] * (start - theta.detach()) / 3
    gradient, _ = problem.gradient(meta)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_weights_and_regularizer_enter_the_implicit_gradient(small_policy, pool, batches):
    # (I + H / s)^-1 grad L_query of each task, by a dense solve, at the inner problem's solution.
    meta, (support, _, query), strength = double_params(small_policy), batches, 20.0
    adapter = Adapter(small_policy, log_likelihood, (0.02,), updates=300, proximal=strength)
    problem = ImplicitProblem(
        adapter, [support, query], pool, OBJECTIVE, chunk=2, iterations=60, least_curvature=1e-3
    )
    start = flatten(meta)
    expected, value = regularizer_slope(start), float(regularizer(meta))
    for t in range(3):

        def inner(x, t=t):
            return task_loss(small_policy, log_likelihood, x, meta, support, t)

        def outer(x, t=t):
            return task_loss(small_policy, likelihood_ratio, x, meta, query, t)

        theta = start
        for _ in range(300):
            slope = torch.autograd.functional.jacobian(inner, theta)
            theta = theta - 0.02 * (slope + strength * (theta - start))
        hessian = torch.autograd.functional.hessian(inner, theta)
        system = torch.eye(len(start), dtype=D) + hessian / strength
        slope = torch.autograd.functional.jacobian(outer, theta)
        expected = expected + WEIGHTS[t] * torch.linalg.solve(system, slope) / 3
        value += float(WEIGHTS[t] * outer(theta)) / 3
    gradient, stats = problem.gradient(meta)
    assert stats["inner_residual"] < 1e-6
    assert stats["low_curvature"] == stats["unsolved"] == 0.0
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert stats["loss"] == pytest.approx(value, rel=1e-6)  # told in float32


@pytest.mark.parametrize("name", ["maml-trpo", "reptile", "imaml"])
def test_an_algorithm_hands_its_weights_and_its_regularizer_to_the_meta_gradient(name):
    # The worst task alone counts, three times; the weights are scaled to a mean of 1.
    seen = []

    def worst(returns):
        seen.append(returns)
        return 7.0 * (returns == returns.min()).double()

    algorithm = dataclasses.replace(
        find_algorithm(name), source="", name="mine", task_weights=worst,
        regularizer=lambda meta: sum(p.square().sum() for p in meta.values()),
    )  # fmt: skip
    objectives = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watched(type(algorithm.meta)):
        def problem(self, sampled):
            objectives.append(sampled.objective)
            return super().problem(sampled)

    algorithm = dataclasses.replace(algorithm, meta=Watched())
    with new_trainer(small(algorithm, tasks=3)) as trainer:
        row = trainer.iterate()
    (objective,), (returns,) = objectives, seen
    assert returns.shape == (3,)
    expected = torch.zeros(3, dtype=returns.dtype)
    expected[returns.argmin()] = 3.0
    torch.testing.assert_close(objective.task_weights, expected)
    assert objective.regularizer is algorithm.regularizer
    assert row["skipped_updates"] == 0


@pytest.mark.parametrize(
    "weights",
    [
        lambda returns: returns[:2], lambda returns: 1.0, lambda returns: 0.0 * returns,
        lambda returns: torch.full_like(returns, -1.0),
        lambda returns: torch.full_like(returns, torch.nan),
    ],
)  # fmt: skip
def test_weights_that_are_no_weights_are_refused(weights):
    algorithm = Algorithm(name="mine", inner=GradientUpdate(), task_weights=weights)
    with refused("task_weights"), new_trainer(small(algorithm, tasks=3)) as trainer:
        trainer.iterate()


@pytest.mark.parametrize(
    "regularizer",
    [lambda meta: 0.0, lambda meta: torch.ones(()), lambda meta: next(iter(meta.values()))],
)
def test_a_regularizer_that_is_no_number_of_the_parameters_is_refused(regularizer):
    algorithm = Algorithm(name="mine", regularizer=regularizer)
    with refused("regularizer"), new_trainer(small(algorithm, tasks=3)) as trainer:
        trainer.iterate()


def test_task_weights_are_refused_where_tasks_have_no_returns():
    with refused("mine", "sinusoid"):
        Config.of("sinusoid", Algorithm(name="mine", task_weights=np.ones_like))


class Breaks(torch.optim.Optimizer):
    """Writes numbers that are not finite."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.fill_(torch.nan)


def test_an_optimizer_that_leaves_no_numbers_is_counted_as_skipped():
    values = {"tasks": 2, "episodes": 2, "threads": 1, "outer": Breaks}
    with new_trainer(metarl.resolve(None, "navigation-2d", overrides=values)) as trainer:
        before = {name: p.clone() for name, p in trainer.state.params.items()}
        row = trainer.iterate()
        assert row["skipped_updates"] == 1
        assert all(torch.equal(p, before[name]) for name, p in trainer.state.params.items())
