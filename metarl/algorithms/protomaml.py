"""ProtoMAML (Triantafillou et al. 2020): the last layer starts at the prototypes of the classes.

As `maml_reinforce`, for few-shot classification:

            W_k = 2 c_k, b_k = -|c_k|^2                         c_k the mean embedding of class k
            theta' = theta - alpha grad L_support(theta)        from that last layer
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
