"""First-order MAML with a trust region (Finn et al. 2017, section 5.2).

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad L_support(theta)        policy gradient, K steps
        sample query episodes with theta'
    g = mean dL_query / dtheta'                             d theta' / d theta = 1
    theta = TRPO step along g                               mean KL of the theta' <= max_kl

alpha is inner.step_sizes, K is inner.steps, max_kl is outer.max_kl.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.meta_gradients.unrolled import FirstOrder

fomaml_trpo = Algorithm(
    name="fomaml-trpo",
    summary="as maml-trpo, the inner steps' Jacobian taken for the identity",
    citation="Finn et al. 2017, arXiv:1703.03400; Nichol et al. 2018, arXiv:1803.02999",
    meta=FirstOrder(),
)
