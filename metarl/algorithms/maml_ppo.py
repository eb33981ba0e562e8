"""MAML with PPO's clipped objective (Finn et al. 2017; Schulman et al. 2017).

As `maml_trpo`, with other last lines:

        repeat 5 times, on the same episodes:
            g = d/dtheta mean clipped surrogate of theta'(theta)
            theta = Adam step along g
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
