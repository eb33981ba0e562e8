"""Conjugate gradient against a direct solve; the step against what TRPO promises."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from expecting import refused

from metarl.learning.linear_solves import conjugate_gradient
from metarl.learning.meta_gradients import Evaluation, UnrolledProblem
from metarl.learning.trust_region import TrustRegion, TrustRegionConfig


def spd(n: int, seed: int = 0) -> torch.Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_conjugate_gradient_matches_a_direct_solve(n):
    A = spd(n)
    b = torch.linspace(-1, 2, n, dtype=torch.float64)
    found, residual = conjugate_gradient(lambda v: A @ v, b, iterations=4 * n, tolerance=1e-26)
    torch.testing.assert_close(residual, b - A @ found, rtol=0, atol=1e-9)
    torch.testing.assert_close(found, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)


def test_conjugate_gradient_minimizes_over_the_krylov_space():
    # After k products x minimizes 1/2 x'Ax - b'x over span{b, Ab, ..., A^(k-1) b}.
    A, b = spd(8), torch.linspace(-1, 2, 8, dtype=torch.float64)
    basis = torch.stack([torch.linalg.matrix_power(A, i) @ b for i in range(3)], dim=1)
    expected = basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ b)
    found, residual = conjugate_gradient(lambda v: A @ v, b, iterations=3)
    torch.testing.assert_close(residual, b - A @ found, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-9, 1e6])
def test_conjugate_gradient_does_not_depend_on_scale(factor):
    A, b = spd(8), torch.linspace(-1, 2, 8, dtype=torch.float64)
    usual = conjugate_gradient(lambda v: A @ v, b, iterations=5)[0]
    scaled = conjugate_gradient(lambda v: A @ v, factor * b, iterations=5)[0]
    torch.testing.assert_close(scaled, factor * usual, rtol=1e-9, atol=0.0)


class Quadratic(UnrolledProblem):
    """A problem with loss g'x + x'Bx / 2 and KL x'Fx / 2 around x = 0."""

    def __init__(self, gradient, B, F):
        self.g, self.B, self.F = gradient, B, F
        self.iterates, self.products = (), 1.0

    def gradient(self, meta):
        return self.g, {"loss": 0.0}

    def evaluate(self, meta):
        x = meta["x"]
        return Evaluation(float(self.g @ x + 0.5 * x @ self.B @ x), float(0.5 * x @ self.F @ x))

    @contextmanager
    def linearize(self, meta, iterates):
        yield lambda v: self.products * (self.F @ v)


ZERO = {"x": torch.zeros(4, dtype=torch.float64)}
GRADIENT = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)


def test_on_a_linear_loss_the_step_is_the_natural_gradient_to_the_bound():
    F = spd(4)
    config = TrustRegionConfig(max_kl=0.02, cg_damping=0.0, cg_iterations=40)
    made = Quadratic(GRADIENT, torch.zeros(4, 4, dtype=torch.float64), F)
    # The bound is met up to rounding, so allow the first or the second step length.
    new, _, stats = TrustRegion(config).step(made, ZERO, {})
    natural = torch.linalg.solve(F, GRADIENT)
    length = math.sqrt(2 * 0.02 / float(natural @ F @ natural))
    factor = 0.8 ** (stats["line_search_steps"] - 1)
    assert stats["line_search_steps"] in (1, 2)
    torch.testing.assert_close(new["x"], -factor * length * natural, rtol=1e-6, atol=1e-9)
    assert stats["kl"] <= 0.02
    assert stats["surrogate_after"] > stats["surrogate_before"]


def test_the_line_search_shrinks_until_the_loss_falls():
    stiff = 30.0 * torch.eye(4, dtype=torch.float64)
    made = Quadratic(GRADIENT, stiff, torch.eye(4, dtype=torch.float64))
    new, _, stats = TrustRegion(TrustRegionConfig(max_kl=0.5)).step(made, ZERO, {})
    assert stats["line_search_steps"] > 1
    assert made.evaluate(new).loss < 0.0


def flat_quadratic(B=0.0, slack=6.0):
    """Fisher products that are `slack` times the curvature of the KL."""
    made = Quadratic(GRADIENT, B * torch.eye(4).double(), torch.eye(4).double())
    made.products = slack
    return made


@pytest.mark.parametrize("slack", [6.0, 30.0])
def test_a_step_below_the_bound_may_grow_to_it(slack):
    # The KL of the first step is 1 / slack of the bound: sqrt(slack) times as far would meet it.
    short = TrustRegionConfig(max_kl=0.02, cg_damping=0.0)
    new, _, stats = TrustRegion(short).step(flat_quadratic(slack=slack), ZERO, {})
    assert stats["kl"] == pytest.approx(0.02 / slack)
    assert "step_scale" not in stats
    long = TrustRegionConfig(max_kl=0.02, cg_damping=0.0, growth_steps=5)
    grown, _, told = TrustRegion(long).step(flat_quadratic(slack=slack), ZERO, {})
    scale = told["step_scale"]
    torch.testing.assert_close(grown["x"], scale * new["x"])
    assert 0.57 * 0.02 < told["kl"] <= 0.02
    assert told["kl"] == pytest.approx(scale**2 * 0.02 / slack)
    assert told["surrogate_after"] > stats["surrogate_after"]
    # No more evaluations than it says, and no more than are allowed.
    few = TrustRegionConfig(max_kl=0.02, cg_damping=0.0, growth_steps=1)
    once, _, told = TrustRegion(few).step(flat_quadratic(slack=slack), ZERO, {})
    torch.testing.assert_close(once["x"], 2.0 * new["x"])
    assert told["line_search_steps"] == 2


def test_a_step_grows_no_further_than_the_bound():
    class Steep(Quadratic):
        def evaluate(self, meta):
            # Twice as far as the first step the KL is not four times, but far more.
            after = super().evaluate(meta)
            return Evaluation(after.loss, after.kl + 1e4 * after.kl**3)

    made = Steep(GRADIENT, torch.zeros(4, 4).double(), torch.eye(4).double())
    made.products = 6.0
    config = TrustRegionConfig(max_kl=0.02, cg_damping=0.0, growth_steps=5)
    _, _, stats = TrustRegion(config).step(made, ZERO, {})
    assert stats["step_scale"] == 1.0
    assert stats["line_search_steps"] == 2
    assert stats["kl"] < 0.01


def test_a_step_grows_no_further_than_the_surrogate_improves():
    # Along -g the loss is least at 1 / B; the first step is 0.8 of the way.
    slack, length = 50.0, float(GRADIENT.norm())
    first = math.sqrt(2 * 0.02 / slack) / length
    made = flat_quadratic(B=0.8 / first, slack=slack)
    config = TrustRegionConfig(max_kl=0.02, cg_damping=0.0, growth_steps=5)
    new, _, stats = TrustRegion(config).step(made, ZERO, {})
    assert stats["step_scale"] == 1.0
    assert stats["line_search_steps"] == 2
    torch.testing.assert_close(new["x"], -first * GRADIENT)
    # A step that had to shrink does not grow again.
    stiff = flat_quadratic(B=2.5 / first, slack=slack)
    _, _, stats = TrustRegion(config).step(stiff, ZERO, {})
    assert stats["step_scale"] == pytest.approx(0.8 ** (stats["line_search_steps"] - 1))
    assert stats["step_scale"] < 1.0


def test_without_improvement_the_parameters_do_not_change():
    made = Quadratic(GRADIENT, 1e9 * torch.eye(4, dtype=torch.float64), torch.eye(4).double())
    new, _, stats = TrustRegion(TrustRegionConfig(max_kl=0.5)).step(made, ZERO, {})
    assert new is ZERO
    assert stats["line_search_steps"] == 0
    assert stats["finite"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    gradient = GRADIENT.clone()
    gradient[2] = bad
    made = Quadratic(gradient, torch.zeros(4, 4).double(), torch.eye(4).double())
    new, _, stats = TrustRegion(TrustRegionConfig()).step(made, ZERO, {})
    assert new is ZERO
    assert not stats["finite"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_kl", 0.0),
        ("cg_iterations", 0),
        ("backtrack", 1.0),
        ("fisher_fraction", 0.0),
        ("growth_steps", -1),
    ],
)
def test_bad_values_are_refused_by_name(key, value):
    with refused(f"trust_region.{key}", value):
        TrustRegionConfig(**{key: value})
