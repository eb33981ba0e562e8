"""Two new algorithms: MAML with other inner losses, trained for a few seconds.

MAML takes one policy-gradient step on each batch of episodes. Clipped like PPO's, the inner loss
can take several. From a shell:

    metarl train navigation-2d --algorithm examples.my_algorithm:maml_clipped --iterations 3
"""

import dataclasses
from functools import partial
from pathlib import Path

import metarl
from metarl.algorithms import find_algorithm
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import clipped_ratio, likelihood_ratio

maml_clipped = dataclasses.replace(
    find_algorithm("maml-trpo"),
    name="maml-clipped",
    summary="as maml-trpo, the inner loss clipped",
    citation="Finn et al. 2017; Schulman et al. 2017",
    inner=GradientUpdate(loss=partial(clipped_ratio, clip=0.2), updates=3),
)

# The same first step, with the low-variance curvature of ProMP in the meta-gradient.
maml_ratio = dataclasses.replace(
    find_algorithm("maml-trpo"),
    name="maml-ratio",
    summary="as maml-trpo, the inner loss with likelihood ratios",
    citation="Finn et al. 2017; Rothfuss et al. 2019",
    inner=GradientUpdate(loss=likelihood_ratio),
)

if __name__ == "__main__":
    config = metarl.resolve(
        "icml2017", "navigation-2d", "my_algorithm:maml_clipped", {"iterations": 3, "tasks": 10}
    )
    meta_policy = metarl.train(config, Path("runs/example-maml-clipped"), resume="auto")
    print(metarl.evaluate(meta_policy, tasks=10, episodes=10, steps=1).table())
