"""MAML with Adam on the policy gradient (Finn et al. 2017).

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad L_support(theta)        policy gradient, K steps
        sample query episodes with theta'
    g = d/dtheta mean L_query(theta'(theta))                through the inner steps
    theta = Adam step along g

alpha is inner.step_sizes, K is inner.steps. Adam's step size is outer.learning_rate.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam

maml_reinforce = Algorithm(
    name="maml-reinforce",
    summary="as maml-trpo, the outer step by Adam on the policy gradient",
    citation="Finn et al. 2017, arXiv:1703.03400",
    outer=Adam(learning_rate=3e-3),
)
