"""Meta-SGD (Li et al. 2017): a step size, and its sign, for every parameter.

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha * grad L_support(theta)      elementwise, alpha learned
        sample query episodes with theta'
    g = d/d(theta, alpha) mean L_query(theta'(theta, alpha))
    (theta, alpha) = TRPO step along g                      mean KL of the theta' <= max_kl

alpha starts at inner.step_sizes, max_kl is outer.max_kl.
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
