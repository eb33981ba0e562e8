"""Train algorithms for few-shot classification on several seeds; write a table of accuracies.

    python scripts/compare_classifiers.py characters --family-options size=14 --out runs/classifiers

Accuracies are for the same test tasks after 0, 1, ... inner steps. Existing runs are continued.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import metarl
from metarl.cli.errors import exit_code
from metarl.envs.registry import parse_options
from metarl.evaluation.curves import Curve
from metarl.runs.metrics import read_metrics

ROWS = (
    "protomaml", "leopard", "maml-trpo", "fomaml-trpo", "maml++", "meta-sgd", "anil", "cavia",
    "reptile", "imaml", "pretrained",
)  # fmt: skip


@dataclass
class Arguments:
    """Compare algorithms on few-shot classification."""

    family: Annotated[str, tyro.conf.Positional]
    """Family of classification tasks."""
    out: Path
    """Folder for the runs and table.md."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""
    algorithms: tuple[str, ...] = ROWS
    """Algorithms to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each algorithm."""
    iterations: int = 2000
    """Meta-iterations of each run."""
    network: str = "mlp"
    """mlp, or conv4."""
    hidden: tuple[int, ...] = (128, 64)
    """Hidden layers of the mlp."""
    tasks: int = 600
    """Number of test tasks."""
    steps: int = 3
    """Number of inner steps."""
    threads: int = 1
    """Threads of training and evaluation."""


def cells(name: str, curve: Curve, minutes: float | None) -> list[str]:
    """Return a row: accuracies with half their 95 % interval over tasks, by seed, and the gain."""
    values = [
        f"{mean:.1f} ± {(high - low) / 2:.1f}"
        for mean, (low, high) in zip(curve.returns, curve.ci95, strict=True)
    ]
    if curve.algorithm == "nearest-prototype":
        return [name, *values[:1], *[""] * len(values), "", ""]
    mean, low, high = curve.gain()
    gain = f"{mean:+.1f}" + (", not significant" if low <= 0.0 <= high else "")
    by_seed = np.nanmean(curve.per_seed[:, :, 1], axis=1)
    seeds = ", ".join(f"{x:.1f}" for x in by_seed) if len(by_seed) > 1 else ""
    return [name, *values, gain, seeds, "" if minutes is None else f"{minutes:.1f}"]


def main(arguments: Arguments) -> int:
    options = parse_options(arguments.family_options)
    said = {
        "family_options": options,
        "policy.network": arguments.network,
        "iterations": arguments.iterations,
        "checkpoint_every": arguments.iterations,
        "threads": arguments.threads,
    }
    counts = ["pre-adaptation", "1 step", *(f"{k} steps" for k in range(2, arguments.steps + 1))]
    heads = ["accuracy, %", *counts, "gain of 1 step", "1 step, by seed", "core-minutes"]
    shown: dict[str, list[str]] = {}
    for name in arguments.algorithms:
        folders = [arguments.out / f"{name}-{seed}" for seed in arguments.seeds]
        for folder, seed in zip(folders, arguments.seeds, strict=True):
            own = {} if arguments.network == "conv4" else {"policy.hidden": arguments.hidden}
            config = metarl.resolve(None, arguments.family, name, {**said, **own, "seed": seed})
            metarl.train(config, folder, resume="auto")
        minutes = [sum(r["seconds_processor"] for r in read_metrics(f)) / 60 for f in folders]
        result = metarl.evaluate(
            folders, tasks=arguments.tasks, steps=arguments.steps, drawn=True, name=name,
            threads=arguments.threads, from_scratch=name == arguments.algorithms[0],
        )  # fmt: skip
        shown[name] = cells(name, result.curve, sum(minutes) / len(minutes))
        for other, curve in result.references.items():
            if other != "random":  # which uses the step sizes of the same row
                shown.setdefault(other, cells(other, curve, None))
        lines = [heads, ["---"] * len(heads), *shown.values()]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        (arguments.out / "table.md").write_text(text, "utf-8")
        (arguments.out / f"{name}.json").write_text(json.dumps(result.to_json()), "utf-8")
    print((arguments.out / "table.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    given = tyro.cli(Arguments, description=Arguments.__doc__)
    raise SystemExit(exit_code(lambda: main(given)))
