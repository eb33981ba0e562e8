"""Train algorithms with an equal budget of env steps; write a table and a plot.

    python scripts/compare_algorithms.py navigation-2d --env-steps 5000000 --out runs/compare

Each run's checkpoints are evaluated on the same held-out tasks, after one inner step (the oracle,
which is told its task, before any). Runs take one thread each, and the plot shows processor time:
so several of these scripts may share a machine and an output folder, each with some of the
algorithms. A run that exists already is resumed, and what was evaluated is not evaluated again; so
a broken comparison goes on where it stopped, and one with all the algorithms joins the parts.
Started by torchrun, the ranks share the tasks of each run and of each evaluation.
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
from metarl.commands.errors import exit_code
from metarl.envs.registry import parse_options
from metarl.learning.algorithms import ALGORITHMS, find_algorithm
from metarl.learning.ranks import Ranks, joined
from metarl.running.config import Config
from metarl.running.metrics import read_metrics

OF_POLICIES = [row.name for row in ALGORITHMS.values() if row.head == "meta"]
"""Other algorithms are for few-shot classification alone."""


@dataclass
class Arguments:
    """Train algorithms with an equal budget of env steps; write a table and a plot."""

    family: Annotated[str, tyro.conf.Positional]
    """Task family."""
    out: Path
    """Folder for the runs, table.md, results.json and comparison.png."""
    preset: str = "metarl2026"
    """Preset of all runs."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""
    algorithms: tuple[str, ...] = field(default_factory=lambda: tuple(OF_POLICIES))
    """Algorithms to compare."""
    tasks: int | None = None
    """Tasks a meta-iteration; by default the preset's."""
    env_steps: int = 5_000_000
    """Budget of each run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each algorithm's runs."""
    points: int = 5
    """Checkpoints evaluated along each run."""


def run_config(arguments: Arguments, name: str, seed: int) -> Config:
    base = metarl.resolve(arguments.preset, arguments.family, name)
    options = {**base.family_options, **parse_options(arguments.family_options)}
    base = dataclasses.replace(base, tasks=arguments.tasks or base.tasks, family_options=options)
    row = find_algorithm(name)
    rollouts = base.inner.steps + (row.gradient != "displacement")
    horizon = metarl.MetaPolicy({}, base).family.horizon
    iterations = max(1, arguments.env_steps // (rollouts * base.tasks * base.episodes * horizon))
    if row.outer == "none":
        iterations = 1  # nothing changes
    return dataclasses.replace(
        base,
        seed=seed,
        threads=1,
        iterations=iterations,
        checkpoint_every=max(1, iterations // arguments.points),
    )


def curve(folder: Path, steps: int, ranks: Ranks) -> list[dict[str, float]]:
    """Held-out returns of a run's checkpoints, with env steps and seconds of training."""
    rows = read_metrics(folder)
    seconds = np.cumsum([row["seconds_processor"] for row in rows])
    store = folder / "comparison.json"
    stored = ranks.from_main(json.loads(store.read_text()) if store.exists() else [])
    known = {p["iteration"]: p for p in stored}
    points = []
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        meta = metarl.load(path)
        iteration = meta.provenance["iteration"]
        if iteration not in known:
            result = metarl.evaluate(meta, steps=steps, threads=1, ranks=ranks)
            known[iteration] = {
                "iteration": iteration,
                "env_steps": meta.provenance["env_steps"],
                "seconds": float(seconds[iteration - 1]) if iteration else 0.0,
                "before": result.curve.returns[0],
                "after": result.curve.returns[-1],
            }
        points.append(known[iteration])
    if ranks.is_main:
        store.write_text(json.dumps(points, indent=2))
    return points


Results = dict[str, dict[int, list[dict[str, float]]]]  # algorithm, seed, checkpoint


def last_returns(runs: dict[int, list[dict[str, float]]]) -> list[float]:
    return [points[-1]["after"] for points in runs.values()]


def plot(results: Results, family: str, path: Path) -> None:
    """Draw the mean over seeds, with a band from the worst one to the best."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    lines = ["-", "--", "-.", ":"]
    for i, (name, runs) in enumerate(results.items()):
        style = {"linestyle": lines[i // 5 % 4], "color": f"C{i % 10}", "marker": "os^Dv"[i % 5]}
        after, steps, seconds = (
            np.array([[p[key] for p in points] for points in runs.values()])
            for key in ("after", "env_steps", "seconds")
        )
        for axes, x in ((left, steps.mean(0) / 1e6), (right, seconds.mean(0) / 60)):
            label = name if axes is right else None
            axes.plot(x, after.mean(0), markersize=4, label=label, **style)
            axes.fill_between(
                x, after.min(0), after.max(0), color=style["color"], alpha=0.08, linewidth=0
            )
    left.set_xlabel("env steps (millions)")
    left.set_ylabel(f"return on {family}\nafter one inner step, 40 held-out tasks")
    right.set_xlabel("processor time of training (core-minutes)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if "random" in results:  # what falls far below it is off the picture
        floor, top = min(last_returns(results["random"])), left.get_ylim()[1]
        left.set_ylim(floor - 0.1 * (top - floor), top)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=130)


def table(results: Results) -> str:
    rows = [
        "| algorithm | env steps | core-minutes | before | after one step, mean | by seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in sorted(results.items(), key=lambda item: -np.mean(last_returns(item[1]))):
        last = [points[-1] for points in runs.values()]
        before, minutes = (np.mean([p[key] for p in last]) for key in ("before", "seconds"))
        after = last_returns(runs)
        rows.append(
            f"| {name} | {last[0]['env_steps'] / 1e6:.1f}M | {minutes / 60:.1f} | {before:.1f}"
            f" | {np.mean(after):.1f} | {', '.join(f'{a:.1f}' for a in after)} |"
        )
    return "\n".join(rows) + "\n"


def main(arguments: Arguments, ranks: Ranks) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: Results = {}

    def run(name: str, seed: int) -> None:
        folder = arguments.out / f"{name}-{seed}"
        config = run_config(arguments, name, seed)
        metarl.train(config, folder, resume="auto", ranks=ranks)
        points = curve(folder, 0 if find_algorithm(name).observes_task else 1, ranks)
        results.setdefault(name, {})[seed] = points
        if not ranks.is_main:
            return
        print(f"{name}, seed {seed}: {points[-1]['after']:.1f} after one step", flush=True)
        (arguments.out / "table.md").write_text(table(results))
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
        plot(results, arguments.family, arguments.out / "comparison.png")

    for seed in arguments.seeds:
        for name in arguments.algorithms:
            run(name, seed)
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    with joined() as ranks:
        raise SystemExit(exit_code(lambda: main(arguments, ranks)))
