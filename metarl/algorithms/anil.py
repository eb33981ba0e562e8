"""Almost no inner loop (Raghu et al. 2020): only the last layer adapts.

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta = (body, head)
        head' = head - alpha grad_head L_support(body, head)
        sample query episodes with (body, head')
    g = d/dtheta mean L_query(body, head'(theta))           through the inner step
    theta = TRPO step along g                               mean KL of the adapted <= max_kl

alpha is inner.step_sizes, max_kl is outer.max_kl.
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
