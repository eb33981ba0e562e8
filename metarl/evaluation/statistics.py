"""Statistics for few tasks and seeds: bootstrap intervals and interquartile means.

The random numbers are fixed: equal scores give equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

RESAMPLES = 10_000
TAIL = 0.5 - 0.95 / 2.0
"""Probability below and above an interval."""

CVAR = 0.1
"""Fraction of the worst tasks; their mean is the conditional value at risk."""

FEWEST = 6
"""Minimum number of tasks for a bootstrap interval of 95 %. Resampled means stay between the
smallest and the largest of n values, which enclose a median with probability 1 - 2^(1-n)."""


def interquartile_mean(values: Floats, axis: int = -1) -> Floats:
    """Return the mean of the middle half. A quarter, rounded down, is cut at either end.

    Agarwal et al. 2021 (arXiv:2108.13264): it combines the robustness of a median with the
    stability of a mean. NaN is left out, for instance for a task whose every episode diverged.
    Without other values, the result is NaN.
    """
    ordered = np.sort(np.moveaxis(values, axis, -1), axis=-1)  # NaN is last
    known = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    rank = np.arange(ordered.shape[-1])
    middle = (rank >= known // 4) & (rank < known - known // 4)
    count = middle.sum(axis=-1)
    total = np.where(middle, ordered, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def conditional_value_at_risk(values: Floats, fraction: float = CVAR) -> float:
    """Return the mean of the smallest `fraction` of values [n].

    Rockafellar and Uryasev 2002 (doi:10.1016/S0378-4266(02)00271-6): the value at the edge of the
    tail has a weight below 1, so that the weights sum to n * fraction. If that is below 1, the
    result is the smallest value. NaN values are left out; without others the result is NaN.
    """
    ordered = np.sort(values[np.isfinite(values)])
    if not len(ordered):
        return math.nan
    tail = max(fraction * len(ordered), 1.0)
    weights = np.clip(tail - np.arange(len(ordered)), 0.0, 1.0)
    return float((weights * ordered).sum() / tail)


def _mean(samples: Floats) -> Floats:
    return samples.mean(axis=1)


def bootstrap_interval(
    values: Floats, statistic: Callable[[Floats], Floats] = _mean
) -> tuple[float, float]:
    """Return the 95 % interval of a statistic of n tasks, by resampling whole tasks.

    The expanded percentile bootstrap (Hesterberg 2015, arXiv:1411.5279, section 3.3). Its
    percentiles are at Phi(-sqrt(n / (n - 1)) t_{n-1}), since 2.5 % is too narrow for few tasks. For
    means of normal values, it is nearly Student's interval. The bounds are NaN for fewer than two
    tasks.

    Args:
        values: [n, ...]; the values of a task stay together.
        statistic: maps samples [resamples, n, ...] to [resamples]; by default their means.
    """
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    picks = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    reach = math.sqrt(n / (n - 1)) * stats.t.ppf(TAIL, n - 1)
    tail = float(stats.norm.cdf(reach))
    low, high = np.quantile(statistic(values[picks]), (tail, 1.0 - tail))
    return float(low), float(high)


def interquartile_mean_interval(scores: Floats) -> tuple[float, float]:
    """Return the 95 % interval of the interquartile mean of scores [seeds, tasks].

    Seeds and tasks are both resampled as a whole: a seed is one trained policy, good or bad at all
    tasks at once. With few seeds, the variation between seeds is hard to estimate: simulated
    intervals with 3 seeds cover 0.87 of the time. NaN scores are left out, and so are resamples
    without any other score.
    """
    seeds, tasks = scores.shape
    if seeds < 2 or tasks < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(tasks, size=(RESAMPLES, 1, tasks))
    means = interquartile_mean(scores[rows, columns].reshape(RESAMPLES, -1))
    known = means[np.isfinite(means)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, (TAIL, 1.0 - TAIL))
    return float(low), float(high)
