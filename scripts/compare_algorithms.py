"""Train algorithms with an equal budget of env steps; write a table and a plot.

    python scripts/compare_algorithms.py navigation-2d --env-steps 5000000 --out runs/compare

Each algorithm has the preset's options for it, which scripts/tune.py finds with equal effort. The
last checkpoint of each run is evaluated on the same held-out tasks after one inner step. The
oracle, which observes its task, is evaluated before any step. The plot shows training tasks; for
pretrained, it shows the return before any step.

Each run uses one thread, and the plot shows processor time. Several of these scripts may therefore
share a machine and an output folder, each with some of the algorithms. An existing run is resumed,
and existing evaluations are reused. The same command therefore continues an interrupted
comparison, and a command with all algorithms joins the parts. Under torchrun, the ranks share the
tasks of each run and of each evaluation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import metarl
from metarl.algorithms import algorithms
from metarl.cli.errors import exit_code
from metarl.config.options import Config
from metarl.distributed.process_group import ProcessGroup, joined
from metarl.envs.registry import parse_options
from metarl.runs.metrics import read_metrics

Run = dict[str, Any]
Results = dict[str, dict[int, Run]]  # by algorithm and seed
OF_POLICIES = [name for name, found in algorithms().items() if found.head == "meta"]
"""Algorithms for policies. The others support only few-shot classification."""


@dataclass
class Arguments:
    """Train algorithms with an equal budget of env steps; write a table and a plot."""

    family: Annotated[str, tyro.conf.Positional]
    """Task family."""
    out: Path
    """Folder for the runs, table.md, results.json and comparison.png."""
    preset: str | None = "metarl2026"
    """Preset of all runs."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""
    algorithms: tuple[str, ...] = field(default_factory=lambda: tuple(OF_POLICIES))
    """Algorithms to compare."""
    tasks: int | None = None
    """Tasks per meta-iteration; by default the preset's."""
    env_steps: int = 5_000_000
    """Budget of each run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each algorithm's runs."""


def run_config(arguments: Arguments, name: str, seed: int) -> Config:
    said: dict[str, Any] = {"seed": seed, "threads": 1}
    said["family_options"] = parse_options(arguments.family_options)
    if arguments.tasks is not None:
        said["tasks"] = arguments.tasks
    base = metarl.resolve(arguments.preset, arguments.family, name, said)
    algorithm, run = base.setup.algorithm, base.run
    rollouts = algorithm.inner.steps + algorithm.meta.needs_query
    horizon = metarl.MetaPolicy({}, base.setup).family.horizon
    iterations = max(1, arguments.env_steps // (rollouts * run.tasks * run.episodes * horizon))
    if not algorithm.outer.learns:
        iterations = 1  # training changes nothing
    return base.with_options({"iterations": iterations, "checkpoint_every": iterations})


def measured(folder: Path, steps: int, process_group: ProcessGroup) -> Run:
    """Return a run's curve on training tasks, and its last checkpoint's held-out returns."""
    rows = read_metrics(folder)
    store = folder / "comparison.json"
    known = process_group.from_main(json.loads(store.read_text("utf-8")) if store.exists() else {})
    if known.get("iterations") == len(rows):
        return known
    result = metarl.evaluate(folder, steps=steps, threads=1, process_group=process_group)
    found: Run = {
        "iterations": len(rows),
        "env_steps": [row["env_steps"] for row in rows],
        "minutes": (np.cumsum([row["seconds_processor"] for row in rows]) / 60).tolist(),
        # The first of several inner steps; without inner steps, the return before any.
        "returns": [np.nan if r is None else r for r in (row["returns"][:2][-1] for row in rows)],
        "before": result.curve.returns[0],
        "after": result.curve.returns[-1],
    }
    if process_group.is_main:
        store.write_text(json.dumps(found), "utf-8")
    return found


def plot(results: Results, family: str, path: Path) -> None:
    """Plot means over seeds and five iterations, with a band from the worst to the best seed."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    lines = ["-", "--", "-.", ":"]
    for i, (name, runs) in enumerate(results.items()):
        steps, minutes, returns = (
            np.array([run[key] for run in runs.values()])
            for key in ("env_steps", "minutes", "returns")
        )
        width = min(5, returns.shape[1])
        smooth = np.apply_along_axis(np.convolve, 1, returns, np.ones(width) / width, "valid")
        style = {"linestyle": lines[i // 5 % 4], "color": f"C{i % 10}", "linewidth": 1.3}
        if smooth.shape[1] == 1:
            style["marker"] = "o"
        for axes, x in ((left, steps / 1e6), (right, minutes)):
            x = x.mean(0)[width - 1 :]
            label = name if axes is right else None
            axes.plot(x, smooth.mean(0), label=label, **style)
            band = {"color": style["color"], "alpha": 0.08, "linewidth": 0}
            axes.fill_between(x, smooth.min(0), smooth.max(0), **band)
    left.set_xlabel("env steps (millions)")
    left.set_ylabel(f"return on {family} after 1 inner step,\ntraining tasks")
    right.set_xlabel("processor time (core-minutes)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=130)


def table(results: Results) -> str:
    rows = [
        "| algorithm | env steps | core-minutes | pre-adaptation | 1 step | by seed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    means = {
        name: {
            "steps": np.mean([run["env_steps"][-1] for run in runs.values()]) / 1e6,
            "minutes": np.mean([run["minutes"][-1] for run in runs.values()]),
            "before": np.mean([run["before"] for run in runs.values()]),
            "after": np.mean([run["after"] for run in runs.values()]),
        }
        for name, runs in results.items()
    }
    for name, mean in sorted(means.items(), key=lambda item: -item[1]["after"]):
        seeds = ", ".join(f"{run['after']:.1f}" for run in results[name].values())
        rows.append(
            f"| {name} | {mean['steps']:.1f}M | {mean['minutes']:.1f} | {mean['before']:.1f}"
            f" | {mean['after']:.1f} | {seeds} |"
        )
    return "\n".join(rows) + "\n"


def main(arguments: Arguments, process_group: ProcessGroup) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: Results = {}

    def run(name: str, seed: int) -> None:
        folder = arguments.out / f"{name}-{seed}"
        config = run_config(arguments, name, seed)
        metarl.train(config, folder, resume="auto", process_group=process_group)
        found = measured(folder, 0 if algorithms()[name].task_conditioned else 1, process_group)
        results.setdefault(name, {})[seed] = found
        if not process_group.is_main:
            return
        print(f"{name}, seed {seed}: {found['after']:.1f} after one step", flush=True)
        (arguments.out / "table.md").write_text(table(results), "utf-8")
        (arguments.out / "results.json").write_text(json.dumps(results, indent=2), "utf-8")
        plot(results, arguments.family, arguments.out / "comparison.png")

    for seed in arguments.seeds:
        for name in arguments.algorithms:
            run(name, seed)
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    with joined() as process_group:
        raise SystemExit(exit_code(lambda: main(arguments, process_group)))
