"""MAML with PPO's clipped objective (Finn et al. 2017; Schulman et al. 2017).

for each iteration:
    sample tasks
    for each task:
        sample support episodes with theta
        theta' = theta - alpha grad L_support(theta)        policy gradient, K steps
        sample query episodes with theta'
    repeat N times, on the same episodes:
        g = d/dtheta mean clipped surrogate of theta'(theta)
        theta = Adam step along g

alpha is inner.step_sizes, K is inner.steps, N is outer.steps. Likelihood ratios are clipped to
1 +- outer.clip. Adam's step size is outer.learning_rate.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import ClippedSurrogate

maml_ppo = Algorithm(
    name="maml-ppo",
    summary="as maml-trpo, five outer steps by Adam on PPO's clipped objective",
    citation="Finn et al. 2017, arXiv:1703.03400; Schulman et al. 2017, arXiv:1707.06347",
    outer=ClippedSurrogate(),
)
