"""MAML++ (Antoniou et al. 2019): learned step sizes, a multi-step loss, annealed order.

for each iteration:
    sample tasks
    for each task, for each of K steps:
        sample episodes with theta_k                                        theta_0 = theta
        theta_{k+1} = theta_k - alpha[layer, k] grad L_support(theta_k)     alpha learned
    g = d/d(theta, alpha) mean sum_k w_k L_query(theta_k)   of first order at first
    (theta, alpha) = Adam step along g                      on a cosine schedule

K is inner.steps, alpha starts at inner.step_sizes. The weights w_k start equal. Over the first
meta.anneal_fraction of the run, they move to the last step. After that, the meta-gradient is
second order. The schedule is outer.schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam
from metarl.learning.inner_update import LearnedStepSizes
from metarl.learning.meta_gradients.problem import Objective, Sampled
from metarl.learning.meta_gradients.unrolled import Unrolled
from metarl.parts import tunable


@dataclass(frozen=True, kw_only=True)
class Annealed(Unrolled):
    """Multi-step loss and first-order gradient early; exact gradient of the last loss later."""

    anneal_fraction: float = tunable(0.3, 0.0, 1.0)
    """Share of the run in which the losses of earlier inner steps fade out and the meta-gradient is
    first order; afterwards it is second order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_fraction("anneal_fraction")

    def annealed(self, progress: float) -> float:
        """Return the progress of annealing; 1 or more after its end."""
        return progress / self.anneal_fraction if self.anneal_fraction else 1.0

    def curvature(self, progress: float) -> float:
        return 0.0 if self.annealed(progress) < 1.0 else self.second_order

    def objective(self, sampled: Sampled) -> Objective:
        steps = len(sampled.adapted.batches) - 1
        weights = annealed_weights(steps, self.annealed(sampled.progress))
        return replace(sampled.objective, step_weights=weights)

    def change(self, planned: int, total: int, iteration: int) -> str:
        ends = [math.ceil(self.anneal_fraction * end) for end in (planned, total)]
        if ends[0] == ends[1]:
            return ""
        return f"multi-step loss and first order last until iteration {ends[1]}, not {ends[0]}"


def annealed_weights(steps: int, progress: float) -> tuple[float, ...]:
    """Return the weights of the losses of iterates 1 ... K (Antoniou et al. 2019, section 4).

    Uniform at progress 0; all weight is on the last iterate from progress 1.
    """
    progress = min(max(progress, 0.0), 1.0)
    early = (1.0 - progress) / max(steps, 1)
    return (early,) * (steps - 1) + (1.0 - early * (steps - 1),) if steps else ()


maml_plus_plus = Algorithm(
    name="maml++",
    summary="step sizes a layer and step, multi-step loss, order annealed, cosine",
    citation="Antoniou et al. 2019, arXiv:1810.09502",
    inner=LearnedStepSizes(steps=2),
    meta=Annealed(),
    outer=Adam(learning_rate=3e-3, schedule="cosine"),
)
