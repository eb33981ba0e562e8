"""Reptile (Nichol et al. 2018): move towards the adapted parameters.

for each iteration:
    sample tasks
    for each task:
        theta_0 = theta
        repeat K times: sample episodes with theta_k, theta_{k+1} = theta_k - alpha grad L(theta_k)
    g = mean (theta - theta_K)                              no query episodes
    theta = Adam step along g

alpha is inner.step_sizes, K is inner.steps. Adam's step size is outer.learning_rate.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import likelihood_ratio
from metarl.learning.meta_gradients.reptile import Reptile

reptile = Algorithm(
    name="reptile",
    summary="moves towards the adapted parameters; samples no query episodes",
    citation="Nichol et al. 2018, arXiv:1803.02999",
    # With one step, it is joint training. Its effect comes from further steps on new samples.
    inner=GradientUpdate(loss=likelihood_ratio, steps=4),
    meta=Reptile(),
    outer=Adam(learning_rate=3e-3),
)
