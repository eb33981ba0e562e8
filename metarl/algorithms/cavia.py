"""Fast context adaptation (Zintgraf et al. 2019): only a context input adapts.

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta and the context c = 0
        c' = 0 - alpha grad_c L_support(theta, c = 0)
        sample query episodes with theta and c'
    g = d/dtheta mean L_query(theta, c'(theta))             through the inner step
    theta = TRPO step along g                               mean KL of the adapted <= max_kl

c has inner.context components, alpha is inner.step_sizes, max_kl is outer.max_kl.
"""

from __future__ import annotations

from dataclasses import dataclass

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.adapter import Fast
from metarl.learning.inner_update import GradientUpdate
from metarl.parts import fixed, tunable


@dataclass(frozen=True, kw_only=True)
class ContextUpdate(GradientUpdate):
    """Gradient steps on a context vector, an input of the network."""

    step_sizes: tuple[float, ...] = tunable((0.1,), 0.1, 100.0, log=True)
    """Size of each inner step. The last size repeats for later steps."""
    context: int = 8
    """Size of the context vector."""
    adapts: Fast = fixed("context")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "context")

    @property
    def context_dim(self) -> int:
        return self.context


cavia = Algorithm(
    name="cavia",
    summary="only a context vector adapts, an input that starts at zero",
    citation="Zintgraf et al. 2019, arXiv:1810.03642",
    inner=ContextUpdate(step_sizes=(10.0,)),
)
