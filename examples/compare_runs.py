"""Train two algorithms alike and compare them on the same tasks; takes seconds.

Three iterations show how it is done, not which algorithm is better.
"""

from pathlib import Path

import metarl
from metarl.plots.learning_curves import plot_learning

folders = {}
for algorithm in ("maml-trpo", "promp"):
    config = metarl.resolve(
        "icml2017", "navigation-2d", algorithm, overrides={"iterations": 2, "tasks": 5}
    )
    folders[algorithm] = Path(f"runs/example-{algorithm}")
    metarl.train(config, folders[algorithm], resume=folders[algorithm].exists())

result = metarl.evaluate(
    folders["maml-trpo"],
    references={"promp": folders["promp"]},
    name="maml-trpo",
    tasks=6,
    episodes=5,
    steps=2,
)
print(result.table())
print(result.verdicts())
print(*plot_learning(list(folders.values()), Path("runs/example-comparison.png")))
