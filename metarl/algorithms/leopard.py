"""LEOPARD (Bansal et al. 2020): the last layer is generated from the support.

As `maml_reinforce`, for few-shot classification:

            (W_k, b_k) = mean over class k of generator(embedding)
            theta' = theta - alpha grad L_support(theta)        upper layers only, alpha learned
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
