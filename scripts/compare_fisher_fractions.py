"""How few samples will the Fisher products do with? Trains at equal env steps, prints a table.

python scripts/compare_fisher_fractions.py --iterations 25 --out runs/fisher-fractions
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

import metarl
from metarl.running.metrics import read_metrics


@dataclass
class Arguments:
    """Compare fractions of the samples in Fisher products on half-cheetah-dir (icml2017)."""

    out: Path
    """Folder for the runs."""
    fractions: tuple[float, ...] = (1.0, 0.2, 0.1, 0.05)
    """Fractions to compare."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of each."""
    iterations: int = 25
    """Meta-iterations of each run, 320,000 env steps each."""


def main(arguments: Arguments) -> None:
    print("| fraction | seed | env steps | return after one step | update, s an iteration |")
    print("| --- | --- | --- | --- | --- |")
    for fraction in arguments.fractions:
        for seed in arguments.seeds:
            base = metarl.resolve("icml2017", "half-cheetah-dir")
            config = dataclasses.replace(
                base,
                seed=seed,
                iterations=arguments.iterations,
                policy=dataclasses.replace(base.policy, hidden=(64, 64), activation="tanh"),
                advantage=dataclasses.replace(base.advantage, trace=0.95),
                trust_region=dataclasses.replace(base.trust_region, fisher_fraction=fraction),
            )
            folder = arguments.out / f"{fraction:g}-{seed}"
            metarl.train(config, folder)
            rows = read_metrics(folder)
            # The mean of the last five iterations: one batch of tasks alone is noisy.
            final = sum(row["return_post"] for row in rows[-5:]) / len(rows[-5:])
            update = sorted(row["seconds_update"] for row in rows)[len(rows) // 2]
            steps = rows[-1]["env_steps"]
            print(f"| {fraction:g} | {seed} | {steps:,} | {final:.1f} | {update:.2f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=Arguments.__doc__))
