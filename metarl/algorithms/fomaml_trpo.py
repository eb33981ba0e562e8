"""First-order MAML with a trust region (Finn et al. 2017, section 5.2).

As `maml_trpo`, with the identity as d theta' / d theta:

        g = mean dL_query / d theta'
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.meta_gradients.unrolled import FirstOrder

fomaml_trpo = Algorithm(
    name="fomaml-trpo",
    summary="as maml-trpo, the inner steps' Jacobian taken for the identity",
    citation="Finn et al. 2017, section 5.2; Nichol et al. 2018, arXiv:1803.02999",
    meta=FirstOrder(),
)
