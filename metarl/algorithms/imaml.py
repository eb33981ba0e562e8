"""Implicit MAML (Rajeswaran et al. 2019): differentiate the solution of a proximal inner problem.

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = argmin L_support(phi) + lambda / 2 |phi - theta|^2     M steps of size alpha
        sample query episodes with theta'
        g_task = (I + H / lambda)^-1 grad L_query(theta')               by conjugate gradient
    theta = Adam step along mean g_task

lambda is inner.proximal, M is inner.updates, alpha is inner.step_sizes. H is the Hessian of
L_support at theta'. meta.cg_iterations is the number of iterations of conjugate gradient.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam
from metarl.learning.inner_update import ProximalUpdate
from metarl.learning.losses import likelihood_ratio
from metarl.learning.meta_gradients.implicit import Implicit

imaml = Algorithm(
    name="imaml",
    summary="proximal inner problem, implicit meta-gradient by conjugate gradient",
    citation="Rajeswaran et al. 2019, arXiv:1909.04630",
    inner=ProximalUpdate(loss=likelihood_ratio),
    meta=Implicit(),
    outer=Adam(learning_rate=3e-3),
)
