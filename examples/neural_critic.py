"""A neural critic as the baseline, against the linear one: returns after adaptation."""

from pathlib import Path

import metarl
from metarl.runs.metrics import read_metrics

if __name__ == "__main__":
    for baseline in ("linear", "critic"):
        options = {"baseline": baseline, "iterations": 3, "tasks": 10}
        config = metarl.resolve("metarl2026", "navigation-2d", "maml-trpo", options)
        folder = Path(f"runs/example-baseline-{baseline}")
        metarl.train(config, folder, resume="auto")
        returns = [row["return_post"] for row in read_metrics(folder)]
        print(baseline, " ".join(f"{value:.1f}" for value in returns))
