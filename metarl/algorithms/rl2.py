"""RL^2 (Duan et al. 2016): the policy learns about its task in its memory, without gradients.

for each iteration:
    sample tasks
    for each task, repeat:
        h = initial state of the policy
        for each episode of a trial of E episodes:
            for each step:                                  h lasts for the trial
                x = (observation, previous action, previous reward, end of an episode)
                action, h ~ pi_theta(x, h)
    A = advantages of the return of the whole trial
    g = d/dtheta mean surrogate of A
    theta = TRPO step along g                               mean KL of the policies <= max_kl

E is trial.episodes, outer.max_kl bounds the step. h has policy.units components.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.inner_update import NoInnerUpdate
from metarl.learning.meta_gradients.unrolled import FirstOrder
from metarl.learning.trust_region import TrustRegion
from metarl.sampling.trials import Trials

rl2 = Algorithm(
    name="rl2",
    summary="a recurrent policy that remembers several episodes of a task; no inner steps",
    citation="Duan et al. 2016, arXiv:1611.02779",
    inner=NoInnerUpdate(),
    meta=FirstOrder(),
    outer=TrustRegion(),
    trial=Trials(),
    network="gru",
)
