"""Almost no inner loop (Raghu et al. 2020): only the last layer adapts.

As `maml_trpo`, with theta = (body, head):

            head' = head - alpha grad_head L_support(body, head)
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.inner_update import GradientUpdate

anil = Algorithm(
    name="anil",
    summary="only the last layer adapts, not the standard deviation",
    citation="Raghu et al. 2020, arXiv:1909.09157",
    # With fewer parameters, the same change needs a larger step.
    inner=GradientUpdate(adapts="head", step_sizes=(0.5,)),
)
