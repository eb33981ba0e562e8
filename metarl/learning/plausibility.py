"""Sequential test of whether the policy chose given actions. It is valid after every action.

The test statistic is a test martingale: the likelihood ratio between alternative explanations of
the actions and the policy. If the policy draws the actions, its mean is 1 at any time. The
probability that it ever exceeds 1 / p is at most p (Ville 1939; Ramdas et al. 2023, section 3,
arXiv:2210.01948).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from metarl.models.distributions import Categorical, Gaussian
from metarl.models.networks import Dist
from metarl.models.policies import PolicyModel

FALSE_ALARM = 1e-4
"""Probability that actions of the policy itself are ever found implausible."""

_BINS = 8
_PRIOR = 0.5  # initial count of each bin or category
_OWN = 0.01  # share of policy actions in the mixture with uniform actions


class Plausibility:
    """Test of whether collected actions are implausible for the policy.

    There are two alternative explanations. First, the quantiles of each component (or its
    categories) have other frequencies, for instance with a constant action. Second, actions are
    drawn uniformly from their space.

    Args:
        policy: policy with a `Gaussian` or `Categorical` distribution.
        uniform: log-probability or log-density of each component under uniform actions,
            [action_size]; NaN for components without one.
        whole: whether actions are integers; uniform integers may be at the bounds.
        rng: places a clipped action among the samples that are clipped to the same value.
    """

    def __init__(
        self,
        policy: PolicyModel,
        uniform: NDArray[np.float64],
        whole: bool,
        rng: np.random.Generator,
    ) -> None:
        self._distribution, self._uniform, self._whole, self._rng = (
            policy.distribution,
            uniform,
            whole,
            rng,
        )
        size = policy.action_size
        own = policy.distribution
        sizes = own.categories if isinstance(own, Categorical) else (_BINS,) * size
        self._counts = [np.full(n, _PRIOR) for n in sizes]
        self._by_frequency = np.zeros(size)  # log-ratios so far, by component
        self._by_uniform = 0.0
        self.count = 0
        """Number of actions so far."""

    @staticmethod
    def knows(policy: PolicyModel) -> bool:
        """Whether the test supports the policy's distribution."""
        return type(policy.distribution) in (Gaussian, Categorical)

    @property
    def implausible(self) -> bool:
        """Whether the actions are implausible for the policy."""
        both = self._by_frequency
        found = np.logaddexp.reduce([both.sum(), np.logaddexp.reduce(both) - math.log(len(both))])
        found = np.logaddexp(found - math.log(2.0), self._by_uniform) - math.log(2.0)
        return bool(found > -math.log(FALSE_ALARM))

    def add(self, dist: Dist, low: NDArray, high: NDArray) -> None:
        """Add one action.

        Args:
            dist: distribution of the policy, [1, size] each.
            low, high: range of the policy samples that the environment maps to the action,
                [action_size]; equal unless the action was clipped or rounded.
        """
        bins, log_ratio, log_prob = self._explained(dist, low, high)
        self._by_frequency += log_ratio
        for counts, i in zip(self._counts, bins, strict=True):
            counts[i] += 1.0
        known = np.isfinite(self._uniform)
        cut = ~np.isfinite(high - low) & (not self._whole)  # uniform actions are never clipped
        gain = -np.inf if cut[known].any() else float((self._uniform - log_prob)[known].sum())
        self._by_uniform += float(np.logaddexp(math.log(1.0 - _OWN) + gain, math.log(_OWN)))
        self.count += 1

    def _explained(
        self, dist: Dist, low: NDArray, high: NDArray
    ) -> tuple[NDArray[np.int64], NDArray, NDArray]:
        """Return each component's bin and log-ratio, and the policy's log-density."""
        if isinstance(self._distribution, Categorical):
            bins = low.astype(np.int64)
            logits = dist["logits"][0].double().split(self._distribution.categories)
            parts = zip(logits, bins, strict=True)
            log_prob = np.array([float(part.log_softmax(-1)[i]) for part, i in parts])
            usual = log_prob
        else:
            mean, log_std = (dist[name][0].double().numpy() for name in ("mean", "log_std"))
            std = np.exp(log_std)
            z = (low - mean) / std
            below, above = _normal_cdf(z), _normal_cdf((high - mean) / std)
            point = low == high
            density = -0.5 * np.where(point, z, 0.0) ** 2 - log_std - 0.5 * math.log(2.0 * math.pi)
            log_prob = np.where(point, density, np.log(np.maximum(above - below, 1e-300)))
            quantile = below + (above - below) * self._rng.random(len(low))
            bins = (quantile * _BINS).astype(np.int64).clip(0, _BINS - 1)
            usual = np.full(len(low), -math.log(_BINS))
        shares = [counts[i] / counts.sum() for counts, i in zip(self._counts, bins, strict=True)]
        return bins, np.log(shares) - usual, log_prob


def _normal_cdf(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in z])
