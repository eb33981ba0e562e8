"""MAML with Adam on the policy gradient (Finn et al. 2017).

As `maml_trpo`, with another last line:

        theta = Adam step along g
"""

from __future__ import annotations

from metarl.algorithms.algorithm import Algorithm
from metarl.learning.gradient_steps import Adam

maml_reinforce = Algorithm(
    name="maml-reinforce",
    summary="as maml-trpo, the outer step by Adam on the policy gradient",
    citation="Finn et al. 2017, arXiv:1703.03400",
    outer=Adam(learning_rate=3e-3),
)
