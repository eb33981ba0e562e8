"""Reference: the random initialization; training does not change it (Finn et al. 2017).

theta = random initialization
in evaluation: theta' = theta - alpha grad L_support(theta)

alpha is inner.step_sizes.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.meta_gradients.unrolled import FirstOrder
from metarl.learning.outer import NoUpdate

random = Algorithm(
    name="random",
    summary="reference: the random initialization, which training does not change",
    citation="Finn et al. 2017, arXiv:1703.03400",
    meta=FirstOrder(),
    outer=NoUpdate(),
    role="untrained",
)
