"""First-order MAML with Adam on the policy gradient (Finn et al. 2017, section 5.2).

As `maml_reinforce`, with the identity as d theta' / d theta:

        g = mean dL_query / d theta'
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam
from metarl.learning.meta_gradients.unrolled import FirstOrder

fomaml_reinforce = Algorithm(
    name="fomaml-reinforce",
    summary="as maml-reinforce, the inner steps' Jacobian taken for the identity",
    citation="Finn et al. 2017, section 5.2; Nichol et al. 2018, arXiv:1803.02999",
    meta=FirstOrder(),
    outer=Adam(learning_rate=3e-3),
)
