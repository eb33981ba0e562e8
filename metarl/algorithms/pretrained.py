"""Reference: one policy for all tasks, which adapts in evaluation only (Finn et al. 2017).

for each iteration:
    sample tasks, and episodes of each with theta
    theta = TRPO step on all episodes                       no inner step, KL <= max_kl

max_kl is outer.max_kl. Evaluation takes inner steps of size inner.step_sizes.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.inner_update import EvaluationUpdate
from metarl.learning.meta_gradients.unrolled import FirstOrder

pretrained = Algorithm(
    name="pretrained",
    summary="reference: one policy for all tasks, no adaptation in training",
    citation="Finn et al. 2017, arXiv:1703.03400",
    inner=EvaluationUpdate(),
    meta=FirstOrder(),
    role="pretrained",
)
