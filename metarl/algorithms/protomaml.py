"""ProtoMAML (Triantafillou et al. 2020): the last layer starts at the prototypes of the classes.

for each iteration:
    sample tasks, and the support and query of each
    for each task:
        W_k = 2 c_k, b_k = -|c_k|^2                         c_k the mean embedding of class k
        theta' = theta - alpha grad L_support(theta)        K steps from that last layer
    g = d/dtheta mean L_query(theta'(theta))                through that start too
    theta = Adam step along g

alpha is inner.step_sizes, K is inner.steps. Adam's step size is outer.learning_rate.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam

protomaml = Algorithm(
    name="protomaml",
    summary="the last layer starts at the prototypes of the support's classes",
    citation="Triantafillou et al. 2020, arXiv:1903.03096",
    head="prototypes",
    outer=Adam(),
)
