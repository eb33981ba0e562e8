"""Meta-SGD (Li et al. 2017): a step size, and its sign, for every parameter.

As `maml_trpo`, with alpha a vector of meta-parameters:

            theta' = theta - alpha * grad L_support(theta)      elementwise
        (theta, alpha) = TRPO step along d/d(theta, alpha) mean L_query(theta')
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.inner_update import LearnedStepSizes

meta_sgd = Algorithm(
    name="meta-sgd",
    summary="a step size, and its sign, for every parameter, learned",
    citation="Li et al. 2017, arXiv:1707.09835",
    inner=LearnedStepSizes(per="parameter"),
)
