"""Train settings over several seeds and compare them at equal env steps and time.

    python scripts/compare_settings.py half-cheetah-vel \
        --settings preset outer.fisher_fraction=0.3 --iterations 60 --out runs/settings

A setting is a list of options of `metarl train` joined by commas, or `preset` for none. Runs are in
--out. After an interruption, the same command continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from trainings import train_all

from metarl.cli.errors import exit_code
from metarl.runs.metrics import read_metrics

LAST = 5
"""Number of iterations in a mean: a single batch of tasks is noisy."""


@dataclass
class Arguments:
    """Compare settings over seeds, by the return after one inner step on training tasks."""

    family: Annotated[str, tyro.conf.Positional]
    """Task family."""
    out: Path
    """Folder for the runs."""
    settings: tuple[str, ...]
    """Settings, such as `preset outer.max_kl=0.02 tasks=40,episodes=10 stratified=False`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each setting."""
    iterations: int = 40
    """Meta-iterations of each run."""
    preset: str = "metarl2026"
    """Preset of all runs."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as in `metarl train`."""
    jobs: int = 1
    """Number of parallel trainings; they share the processors."""


def flags_of(setting: str, seed: int, arguments: Arguments) -> list[str]:
    """Return the options of `metarl train`, except threads and folder."""
    flags = [arguments.family, "--preset", arguments.preset, "--seed", str(seed)]
    flags += ["--iterations", str(arguments.iterations)]
    if arguments.family_options:
        flags += ["--family-options", *arguments.family_options]
    for pair in [] if setting == "preset" else setting.split(","):
        key, _, value = pair.partition("=")
        if value == "False":  # a switch
            section, dot, name = key.rpartition(".")
            key = f"{section}{dot}no_{name}"
        words = [] if value in ("True", "False") else value.split()
        flags += [f"--{key.replace('_', '-')}", *words]
    return flags


def score(rows: Sequence[Mapping[str, Any]], minutes: float) -> float:
    """Return a run's return after one inner step at the given processor time."""
    taken = np.cumsum([row["seconds_processor"] for row in rows]) / 60.0
    end = max(int(np.searchsorted(taken, minutes, side="right")), LAST)
    found = [row["return_post"] for row in rows[:end][-LAST:]]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else np.nan


def main(arguments: Arguments) -> int:
    folders = {
        setting: [arguments.out / f"{setting}-{seed}" for seed in arguments.seeds]
        for setting in arguments.settings
    }
    # Seeds in the outer loop: an interrupted comparison lacks seeds, not settings.
    wanted = {
        folders[setting][i]: flags_of(setting, seed, arguments)
        for i, seed in enumerate(arguments.seeds)
        for setting in arguments.settings
    }
    train_all(wanted, arguments.jobs)
    runs = {setting: [read_metrics(f) for f in folders[setting]] for setting in folders}
    minutes = {
        setting: [sum(row["seconds_processor"] for row in rows) / 60.0 for rows in seeds]
        for setting, seeds in runs.items()
    }
    shortest = min(map(min, minutes.values()))
    steps = min(rows[-1]["env_steps"] for seeds in runs.values() for rows in seeds)
    print(
        f"| setting | core-minutes for {steps / 1e6:.1f}M env steps | return then, by seed | median"
        f" | worst | after {shortest:.1f} core-minutes, by seed | median | worst |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for setting, seeds in runs.items():
        within = [[row for row in rows if row["env_steps"] <= steps] for rows in seeds]
        full = [score(rows, np.inf) for rows in within]
        equal = [score(rows, shortest) for rows in seeds]
        cells = [
            f"`{setting}`", f"{np.mean(minutes[setting]):.1f}",
            ", ".join(f"{x:.1f}" for x in full), f"{np.median(full):.1f}", f"{min(full):.1f}",
            ", ".join(f"{x:.1f}" for x in equal), f"{np.median(equal):.1f}", f"{min(equal):.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    given = tyro.cli(Arguments, description=Arguments.__doc__)
    raise SystemExit(exit_code(lambda: main(given)))
