"""Train algorithms with an equal budget of env steps; write a table and a plot.

    python scripts/compare_algorithms.py navigation-2d --env-steps 5000000 --out runs/compare

Each run's checkpoints are evaluated on the same held-out tasks, after one inner step (the
references `pretrained` and `oracle` too). A run that exists already is resumed, so that a broken
comparison goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import metarl
from metarl.algorithms import ALGORITHMS, find_algorithm
from metarl.config import Config
from metarl.metrics import read_metrics


@dataclass
class Arguments:
    """Train algorithms with an equal budget of env steps; write a table and a plot."""

    family: Annotated[str, tyro.conf.Positional]
    """Task family."""
    out: Path
    """Folder for the runs, table.md, results.json and comparison.png."""
    preset: str = "icml2017"
    """Preset of all runs."""
    algorithms: tuple[str, ...] = field(default_factory=lambda: tuple(ALGORITHMS))
    """Algorithms to compare."""
    env_steps: int = 5_000_000
    """Budget of each run."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each algorithm."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layers (tanh) of all policies."""
    trace: float = 0.95
    """Trace decay of all advantages."""
    points: int = 5
    """Checkpoints evaluated along each run."""


def run_config(arguments: Arguments, name: str, seed: int) -> Config:
    base = metarl.preset_config(arguments.preset, arguments.family, name)
    row = find_algorithm(name)
    rollouts = base.inner.steps + (row.gradient != "displacement")
    horizon = metarl.MetaPolicy({}, base).family.horizon
    iterations = max(1, arguments.env_steps // (rollouts * base.tasks * base.episodes * horizon))
    return dataclasses.replace(
        base,
        seed=seed,
        iterations=iterations,
        checkpoint_every=max(1, iterations // arguments.points),
        policy=dataclasses.replace(base.policy, hidden=arguments.hidden, activation="tanh"),
        advantage=dataclasses.replace(base.advantage, trace=arguments.trace),
    )


def curve(folder: Path, steps: int) -> list[dict[str, float]]:
    """Held-out returns of a run's checkpoints, with env steps and seconds of training."""
    rows = read_metrics(folder)
    seconds = np.cumsum([row["seconds_iteration"] for row in rows])
    points = []
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        meta = metarl.load(path)
        result = metarl.evaluate(meta, steps=steps)
        iteration = meta.record["iteration"]
        points.append(
            {
                "env_steps": meta.record["env_steps"],
                "seconds": float(seconds[iteration - 1]) if iteration else 0.0,
                "before": result.curve.returns[0],
                "after": result.curve.returns[-1],
                "low": result.curve.ci95[-1][0],
                "high": result.curve.ci95[-1][1],
            }
        )
    return points


def plot(results: dict[str, list[dict[str, float]]], family: str, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    lines = ["-", "--", "-.", ":"]
    for i, (label, points) in enumerate(results.items()):
        style = {"linestyle": lines[i // 5 % 4], "color": f"C{i % 10}", "marker": "os^Dv"[i % 5]}
        after = [p["after"] for p in points]
        left.plot([p["env_steps"] / 1e6 for p in points], after, markersize=4, **style)
        right.plot([p["seconds"] / 60 for p in points], after, markersize=4, label=label, **style)
    left.set_xlabel("env steps (millions)")
    left.set_ylabel(f"return on {family} after one inner step, 40 held-out tasks")
    right.set_xlabel("wall-clock of training (minutes)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=130)


def main(arguments: Arguments) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {}
    table = [
        "| algorithm | seed | iterations | env steps | minutes | before | after one step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in arguments.algorithms:
        for seed in arguments.seeds:
            folder = arguments.out / f"{name}-{seed}"
            config = run_config(arguments, name, seed)
            metarl.train(config, folder, resume=(folder / "config.json").exists())
            points = curve(folder, steps=0 if find_algorithm(name).told else 1)
            results[name if len(arguments.seeds) == 1 else f"{name} {seed}"] = points
            last = points[-1]
            table.append(
                f"| {name} | {seed} | {config.iterations} | {last['env_steps'] / 1e6:.1f}M"
                f" | {last['seconds'] / 60:.1f} | {last['before']:.1f}"
                f" | {last['after']:.1f} ± {(last['high'] - last['low']) / 2:.1f} |"
            )
            print(table[-1], flush=True)
            (arguments.out / "table.md").write_text("\n".join(table) + "\n")
            (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
            plot(results, arguments.family, arguments.out / "comparison.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=Arguments.__doc__))
