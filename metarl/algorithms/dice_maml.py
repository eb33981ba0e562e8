"""MAML with the loaded DiCE inner objective (Foerster et al. 2018; Farquhar et al. 2019).

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad L_dice(theta)           `dice` in metarl/learning/losses.py
        sample query episodes with theta'
    g = d/dtheta mean L_query(theta'(theta))                through the inner step
    theta = TRPO step along g                               mean KL of the theta' <= max_kl

alpha is inner.step_sizes, max_kl is outer.max_kl. Higher derivatives of L_dice contain the scores
of earlier actions, discounted by inner.decay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.adapter import Adapter
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import Loss, dice
from metarl.models.networks import Model
from metarl.parts import fixed, tunable


@dataclass(frozen=True, kw_only=True)
class DiceUpdate(GradientUpdate):
    """Gradient steps on the loaded DiCE objective."""

    loss: Loss | None = fixed(dice)
    decay: float = tunable(0.8, 0.5, 1.0)
    """Discount of earlier actions' scores at later time steps (lambda of loaded DiCE): 1 is
    unbiased, smaller values have less variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_fraction("decay")

    def adapter(self, model: Model, loss: Loss) -> Adapter:
        return replace(super().adapter(model, loss), loss=partial(dice, decay=self.decay))


dice_maml = Algorithm(
    name="dice-maml",
    summary="loaded DiCE inner objective: higher-order terms, unbiased at decay 1",
    citation="Foerster et al. 2018, arXiv:1802.05098; Farquhar et al. 2019, arXiv:1909.10549",
    # decay 1 is unbiased; its variance at 200 steps prevented learning.
    inner=DiceUpdate(),
)
