"""LEOPARD (Bansal et al. 2020): the last layer is generated from the support.

for each iteration:
    sample tasks, and the support and query of each
    for each task:
        (W_k, b_k) = mean over class k of generator(embedding)
        theta' = theta - alpha[layer, step] grad L_support(theta)   upper layers only, alpha learned
    g = d/d(theta, alpha) mean L_query(theta'(theta, alpha))
    (theta, alpha) = Adam step along g

alpha starts at inner.step_sizes. Adam's step size is outer.learning_rate.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam
from metarl.learning.inner_update import LearnedStepSizes

leopard = Algorithm(
    name="leopard",
    summary="the last layer is generated from the support; upper layers adapt",
    citation="Bansal et al. 2020, arXiv:1911.03863",
    head="generated",
    inner=LearnedStepSizes(adapts="upper"),
    outer=Adam(),
)
