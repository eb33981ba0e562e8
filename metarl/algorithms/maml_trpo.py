"""Model-agnostic meta-learning with a trust region (Finn et al. 2017, algorithm 3).

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad L_support(theta)        policy gradient, K steps
        sample query episodes with theta'
    g = d/dtheta mean L_query(theta'(theta))                through the inner steps
    theta = TRPO step along g                               mean KL of the theta' <= max_kl

alpha is inner.step_sizes, K is inner.steps. meta.second_order weights the second derivatives,
outer.max_kl bounds the step.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.meta_gradients.unrolled import Unrolled
from metarl.learning.trust_region import TrustRegion

maml_trpo = Algorithm(
    name="maml-trpo",
    summary="policy-gradient inner steps, exact second-order meta-gradient, TRPO",
    citation="Finn et al. 2017, arXiv:1703.03400",
    inner=GradientUpdate(),
    meta=Unrolled(),
    outer=TrustRegion(),
)
