"""Proximal meta-policy search (Rothfuss et al. 2019, algorithm 1).

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad mean ratio A            ratio = pi_theta / pi_old at theta = old
        sample query episodes with theta'
    repeat N times, on the same episodes:
        g = d/dtheta mean (clipped surrogate of theta' + eta KL(pi_old || pi_theta))
        theta = Adam step along g

alpha is inner.step_sizes, eta is meta.inner_kl_coef, N is outer.steps. Likelihood ratios are
clipped to 1 +- outer.clip. The inner surrogate has a low-variance curvature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import ClippedSurrogate
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import Batch, likelihood_ratio
from metarl.learning.meta_gradients.problem import Objective, Sampled
from metarl.learning.meta_gradients.unrolled import Unrolled
from metarl.models.networks import Dist
from metarl.parts import tunable


@dataclass(frozen=True, kw_only=True)
class InnerKLPenalty(Unrolled):
    """The exact meta-gradient, with a penalty on the KL from the pre-update policies."""

    needs_policy: ClassVar[bool] = True

    inner_kl_coef: float = tunable(5e-4, 1e-5, 0.1, log=True)
    """Weight of the penalty on the KL from the policies that drew the support samples (eta)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("inner_kl_coef")

    def objective(self, sampled: Sampled) -> Objective:
        steps = len(sampled.adapted.iterates) - 1

        def penalty(model: Any, output: Dist, batch: Batch, chunk: slice) -> Tensor:
            return self.inner_kl_coef / steps * batch.kl(model, output)

        terms = (penalty,) if self.inner_kl_coef else ()
        return replace(sampled.objective, support_terms=terms)


promp = Algorithm(
    name="promp",
    summary="low-variance-curvature inner surrogate, clipped objective, inner KL penalty",
    citation="Rothfuss et al. 2019, arXiv:1810.06784",
    inner=GradientUpdate(loss=likelihood_ratio),
    meta=InnerKLPenalty(),
    outer=ClippedSurrogate(),  # five steps on the whole batch, as in the authors' code
)
