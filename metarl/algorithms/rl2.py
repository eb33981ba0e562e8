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
    repeat N times, on the same trials:
        g = d/dtheta mean clipped surrogate of A
        theta = Adam step along g

E is trial.episodes, N is outer.steps. Likelihood ratios are clipped to 1 +- outer.clip. Adam's step
size is outer.learning_rate. h has policy.units components.
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import ClippedSurrogate
from metarl.learning.inner_update import NoInnerUpdate
from metarl.learning.meta_gradients.unrolled import FirstOrder
from metarl.sampling.trials import Trials

rl2 = Algorithm(
    name="rl2",
    summary="a recurrent policy that remembers several episodes of a task; no inner steps",
    citation="Duan et al. 2016, arXiv:1611.02779",
    inner=NoInnerUpdate(),
    meta=FirstOrder(),
    outer=ClippedSurrogate(),
    trial=Trials(),
    network="gru",
)
