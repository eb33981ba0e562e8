"""Reference: a policy that observes the task vector (Finn et al. 2017).

for each iteration:
    sample tasks, and episodes of each with theta(task)
    theta = TRPO step on all episodes                       no inner step, KL <= max_kl

max_kl is outer.max_kl.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.inner_update import EvaluationUpdate
from metarl.learning.meta_gradients.unrolled import FirstOrder

oracle = Algorithm(
    name="oracle",
    summary="reference: the policy observes the task vector",
    citation="Finn et al. 2017, arXiv:1703.03400",
    inner=EvaluationUpdate(),
    meta=FirstOrder(),
    task_conditioned=True,
    role="oracle",
)
