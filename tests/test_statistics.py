"""Statistics against scipy, by hand, and by simulation of what an interval promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy
from scipy import stats

from metarl.evaluation.statistics import (
    bootstrap_interval,
    conditional_value_at_risk,
    interquartile_mean,
    interquartile_mean_interval,
)

RNG = "rng" if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 15) else "random_state"


def test_the_interquartile_mean_by_hand():
    # Of 8 values two are cut at either end: (3 + 4 + 5 + 6) / 4. Of 6, one: (2 + 3 + 4 + 9) / 4.
    assert interquartile_mean(np.array([8.0, 1, 6, 3, 5, 4, 100, -7])) == pytest.approx(4.5)
    assert interquartile_mean(np.array([-50.0, 2, 3, 4, 9, 70])) == pytest.approx(4.5)
    assert interquartile_mean(np.array([1.0, 2.0, 9.0])) == pytest.approx(4.0)
    both = np.random.default_rng(0).standard_normal((5, 13))
    np.testing.assert_allclose(interquartile_mean(both), stats.trim_mean(both, 0.25, axis=1))


def test_the_interquartile_mean_leaves_out_missing_scores():
    # The worst of 1 ... 8 diverged: of the seven others one is cut at either end.
    values = np.array([np.nan, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    rng = np.random.default_rng(0)
    assert interquartile_mean(rng.permutation(values)) == pytest.approx(5.0)
    rows = np.stack([values, np.arange(1.0, 9.0), np.full(8, np.nan)])
    np.testing.assert_allclose(interquartile_mean(rows), [5.0, 4.5, np.nan])
    np.testing.assert_allclose(interquartile_mean(rows.T, axis=0), [5.0, 4.5, np.nan])
    scores = rng.standard_normal((3, 9))
    gone = np.column_stack([scores, np.full(3, np.nan)])
    assert interquartile_mean(gone.ravel()) == interquartile_mean(scores.ravel())


def test_the_interval_over_seeds_leaves_out_missing_scores():
    # Of 5 tasks one is not known: some resamples hold little else, a few nothing else.
    scores = np.random.default_rng(1).standard_normal((6, 5))
    scores[:, 2] = np.nan
    low, high = interquartile_mean_interval(scores)
    assert low < interquartile_mean(scores.ravel()) < high
    without = interquartile_mean_interval(np.delete(scores, 2, axis=1))
    assert (low, high) == pytest.approx(without, abs=0.15 * (high - low))
    nothing = interquartile_mean_interval(np.full((5, 20), np.nan))
    assert np.isnan(nothing).all()


@pytest.mark.parametrize("tasks", [8, 40])
def test_the_interval_is_scipys_at_the_expanded_level(tasks):
    values = np.random.default_rng(1).exponential(size=tasks)
    # What Hesterberg's expansion makes of the level, by an equation of its own: the tail of a
    # normal that is as far out as Student's quantile is in units of the bootstrap's deviation,
    # which lacks the factor sqrt(n / (n - 1)).
    student = stats.t.ppf(0.975, tasks - 1) * values.std(ddof=1) / values.std(ddof=0)
    level = 1.0 - 2.0 * stats.norm.sf(student)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        method="percentile",
        n_resamples=200_000,
        **{RNG: 2},
    ).confidence_interval
    spread = expected.high - expected.low
    assert bootstrap_interval(values) == pytest.approx(
        (expected.low, expected.high), abs=0.03 * spread
    )


def test_the_interval_of_a_ratio_is_scipys():
    # Three columns that are resampled together: (a - r) / (o - r), as in "gap closed".
    rng = np.random.default_rng(3)
    random, oracle = rng.normal(0.0, 1.0, 60), rng.normal(10.0, 1.0, 60)
    adapted = 0.5 * random + 0.5 * oracle + rng.normal(0.0, 0.3, 60)

    def gap(a, r, o, axis):
        return (a.mean(axis) - r.mean(axis)) / (o.mean(axis) - r.mean(axis))

    expected = stats.bootstrap(
        (adapted, random, oracle), gap, paired=True, vectorized=True, method="percentile",
        confidence_level=1.0 - 2.0 * stats.norm.sf(stats.t.ppf(0.975, 59) * math.sqrt(60 / 59)),
        n_resamples=20_000, **{RNG: 4},
    ).confidence_interval  # fmt: skip

    def statistic(samples):
        a, r, o = np.moveaxis(samples.mean(axis=1), -1, 0)
        return (a - r) / (o - r)

    found = bootstrap_interval(np.stack([adapted, random, oracle], axis=1), statistic)
    spread = expected.high - expected.low
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * spread)


@pytest.mark.parametrize(
    ("tasks", "least", "most"), [(8, 0.92, 0.975), (20, 0.93, 0.97), (40, 0.93, 0.97)]
)
def test_the_interval_covers_the_mean_as_often_as_it_says(tasks, least, most):
    rng = np.random.default_rng(tasks)
    hits = []
    for _ in range(600):
        low, high = bootstrap_interval(rng.normal(3.0, 2.0, tasks))
        hits.append(low <= 3.0 <= high)
    assert least < np.mean(hits) < most  # 2.5 standard errors are 0.022


def test_the_interval_over_seeds_covers_where_seeds_differ():
    # Scores: seed effect + task effect + chance, all normal, so the interquartile mean is theirs.
    # Resampling the seeds of each task apart, as if they were independent, covers 0.45 of the time.
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(100):
        scores = rng.normal(0, 1, (8, 1)) + rng.normal(0, 1, (1, 20)) + rng.normal(0, 1, (8, 20))
        low, high = interquartile_mean_interval(scores)
        hits.append(low <= 0.0 <= high)
    assert 0.85 < np.mean(hits) <= 1.0


def test_too_few_scores_give_nan_and_equal_scores_equal_intervals():
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.ones(1)))
    assert all(math.isnan(bound) for bound in interquartile_mean_interval(np.ones((1, 9))))
    values = np.random.default_rng(6).standard_normal(9)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(np.full(9, 2.0)) == pytest.approx((2.0, 2.0))


def test_the_conditional_value_at_risk_by_hand():
    values = np.random.default_rng(0).permutation(np.arange(1.0, 26.0))
    # A tenth of 25 values: the two smallest, and half of the third.
    assert conditional_value_at_risk(values) == pytest.approx((1.0 + 2.0 + 0.5 * 3.0) / 2.5)
    assert conditional_value_at_risk(values, 0.2) == pytest.approx(3.0)
    assert conditional_value_at_risk(values, 1.0) == pytest.approx(values.mean())
    # Half a value is the smallest one.
    assert conditional_value_at_risk(values[:5]) == pytest.approx(values[:5].min())
    assert conditional_value_at_risk(np.array([np.nan, 3.0, 2.0])) == pytest.approx(2.0)
    assert math.isnan(conditional_value_at_risk(np.array([np.nan])))


def test_the_conditional_value_at_risk_maximizes_its_dual():
    # Rockafellar and Uryasev 2000, theorem 1: max over t of t - mean(max(t - x, 0)) / fraction.
    values = np.random.default_rng(1).standard_normal(37)
    for fraction in (0.1, 0.25, 0.6):
        dual = max(t - np.maximum(t - values, 0.0).mean() / fraction for t in values)
        assert conditional_value_at_risk(values, fraction) == pytest.approx(dual)
