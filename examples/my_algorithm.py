"""An algorithm of your own is a row of a table; here one row is added and trained for seconds.

MAML takes one policy-gradient step on each batch of episodes. Clipped like PPO's, the inner loss
can take several.
"""

from functools import partial
from pathlib import Path

import metarl
from metarl.algorithms.table import ALGORITHMS, Algorithm
from metarl.learning.losses import clipped_ratio

ALGORITHMS["maml-clipped"] = Algorithm(
    name="maml-clipped",
    description="as maml-trpo, the inner loss clipped",
    source="Finn et al. 2017; Schulman et al. 2017",
    inner_loss=partial(clipped_ratio, clip=0.2),
    defaults={"inner": {"updates": 3}},
)

config = metarl.resolve(
    "icml2017", "navigation-2d", "maml-clipped", overrides={"iterations": 3, "tasks": 10}
)
folder = Path("runs/example-maml-clipped")
meta_policy = metarl.train(config, folder, resume=folder.exists())
print(metarl.evaluate(meta_policy, tasks=10, episodes=10, steps=1).table())
