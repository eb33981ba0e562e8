"""First-order MAML with Adam on the policy gradient (Finn et al. 2017, section 5.2).

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad L_support(theta)        policy gradient, K steps
        sample query episodes with theta'
    g = mean dL_query / dtheta'                             d theta' / d theta = 1
    theta = Adam step along g

alpha is inner.step_sizes, K is inner.steps. Adam's step size is outer.learning_rate.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam
from metarl.learning.meta_gradients.unrolled import FirstOrder

fomaml_reinforce = Algorithm(
    name="fomaml-reinforce",
    summary="as maml-reinforce, the inner steps' Jacobian taken for the identity",
    citation="Finn et al. 2017, arXiv:1703.03400; Nichol et al. 2018, arXiv:1803.02999",
    meta=FirstOrder(),
    outer=Adam(learning_rate=3e-3),
)
