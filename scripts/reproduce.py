"""Reproduce rows of the tables in docs/results: train, choose, evaluate, write.

    python scripts/reproduce.py navigation-2d-icml2017 --seeds 0 1 2 3 4 --jobs 2

Each seed is a run of `metarl train`. Its checkpoint is chosen on validation tasks. All seeds are
evaluated on the same held-out tasks. With --references, pretrained policies and an oracle are
trained on the same number of env steps. The comparison uses step sizes that one procedure chooses
for all policies on validation tasks.

Runs, choices and evaluations are in --out. After an interruption, the same command continues. Under
torchrun on machines that share --out, each rank trains some of the runs.

The measured values of a row are stored in docs/records/ROW.json. The tables in docs/results and
docs/experiments and the figures are generated from these files alone. Without a row, only this is
done. With --repeat NAME, for instance on another machine, the values are stored next to the record,
in docs/records/ROW.NAME.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from choose_policy import validation_return
from record_figures import draw_record
from record_rows import ROWS, Row
from records import DOCS, TABLES, write_docs
from trainings import train_all

import metarl
from metarl import MetaPolicy
from metarl.cli.errors import exit_code
from metarl.distributed.process_group import ProcessGroup, joined
from metarl.envs.errors import UserError
from metarl.envs.registry import parse_options
from metarl.evaluation.results import EvaluationResult
from metarl.evaluation.statistics import interquartile_mean
from metarl.runs.checkpoints import machine, versions, write_atomically
from metarl.runs.metrics import read_metrics

TRAINED = Path(__file__).parents[1] / "metarl" / "trained"
REFERENCES = ("pretrained", "oracle")
LONGEST = 30 * 24 * 3600.0  # seconds to wait for the trainings of other ranks


@dataclass
class Arguments:
    """Reproduce rows of the tables in docs/results: train, choose, evaluate, write."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of rows; without a name, only write the tables from the records."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    jobs: int = 1
    """Number of parallel trainings; they share the processors."""
    preset: str = "metarl2026"
    """Preset of the trainings. Only results of the default preset are recorded in docs."""
    env_steps: float | None = None
    """Budget of each seed; by default the row's. Results of another budget are not recorded in
    docs."""
    ship: bool = False
    """Copy the median seed's policy to metarl/trained, with the name of its row."""
    references: bool = False
    """Also train the references pretrained and oracle."""
    reference_seeds: tuple[int, ...] = (0,)
    """Seeds of the pretrained policies; the oracle uses the first one."""
    repeat: str = ""
    """Store the figures as a repetition of the record with this name, for instance of a machine."""
    out: Path = field(default_factory=lambda: Path("runs/reproduce"))
    """Folder for runs, chosen policies and evaluations."""


def flags_of(row: Row, arguments: Arguments, algorithm: str = "maml-trpo") -> list[str]:
    """Return the options of `metarl train`, except seed, threads and folder."""
    options = [] if row.family == "navigation-2d" else [f"variant={row.variant}", *row.options]
    base = metarl.resolve(arguments.preset, row.family, algorithm)
    horizon = metarl.envs.make_family(row.family, **parse_options(options)).horizon
    batches = 1 if algorithm in REFERENCES else base.setup.algorithm.inner.steps + 1
    iteration = base.run.tasks * base.run.episodes * batches * horizon
    count = round((arguments.env_steps or row.env_steps) / iteration)
    keep = max(1, count // row.kept)
    return [
        row.family, "--preset", arguments.preset,
        *(["--family-options", *options] if options else []),
        "--iterations", str(count), "--checkpoint-every", str(keep),
        *row.flags,
        *(["--algorithm", algorithm] if algorithm in REFERENCES else []),
    ]  # fmt: skip


def choose(folder: Path, row: Row) -> dict[str, Any]:
    """Return the best of the newest checkpoints by its return on validation tasks."""
    store = folder / "chosen.json"
    newest = sorted((folder / "checkpoints").glob("*.safetensors"))[-row.last :]
    known = json.loads(store.read_text("utf-8")) if store.exists() else {}
    names = [Path(one["checkpoint"]).name for one in known.get("compared", [])]
    how = {"steps": row.judged_after, "tasks": row.judged_on}
    if names != [path.name for path in newest] or any(known.get(k) != v for k, v in how.items()):
        found = [
            {"checkpoint": path.name, "return": validation_return(path, **how)} for path in newest
        ]
        best = max(found, key=lambda one: one["return"]) | how | {"compared": found}
        write_atomically(store, json.dumps(best, indent=2).encode())
    best = json.loads(store.read_text("utf-8"))
    # Only the name: runs may be moved, and read from another working directory.
    return best | {"checkpoint": str(folder / "checkpoints" / Path(best["checkpoint"]).name)}


def check_kept(path: Path, arguments: Arguments) -> None:
    """Raise UserError if a new record would lack seeds or references of the existing record."""
    if not path.exists():
        return
    found = json.loads(path.read_text("utf-8"))
    lost = sorted(set(found["seeds"]) - set(arguments.seeds))
    if lost:
        raise UserError(f"{path} also has seeds {lost}: add them to --seeds, or remove it first")
    if "references" in found and not arguments.references:
        raise UserError(f"{path} has references: use --references, or remove it first")


def record(
    name: str,
    row: Row,
    folders: Sequence[Path],
    references: Mapping[str, Sequence[Path]],
    arguments: Arguments,
) -> dict[str, Any]:
    """Evaluate the chosen checkpoints and return the row's figures."""
    chosen = [choose(folder, row) for folder in folders]
    policies = [metarl.load(one["checkpoint"]) for one in chosen]
    even, drawn = (metarl.evaluate(policies, name=name, drawn=drawn) for drawn in (False, True))
    metrics = [read_metrics(folder) for folder in folders]
    middle = sorted(range(len(chosen)), key=lambda i: chosen[i]["return"])[(len(chosen) - 1) // 2]
    return {
        "row": name,
        "command": " ".join(["metarl train", *flags_of(row, arguments), "--seed SEED"]),
        "env_steps": metrics[0][-1]["env_steps"],
        "core_minutes": [sum(m["seconds_processor"] for m in rows) / 60 for rows in metrics],
        "seeds": list(arguments.seeds),
        "chosen": [Path(one["checkpoint"]).stem for one in chosen],
        "validation": [one["return"] for one in chosen],
        "median_seed": arguments.seeds[middle],
        "even": summary(even),
        "drawn": summary(drawn),
        "curves": [[r["return_post"] for r in rows] for rows in metrics],
        "machine": machine(),
        "versions": versions(),
        **({"references": compare(name, policies, references)} if references else {}),
    }


def compare(
    name: str, policies: Sequence[MetaPolicy], references: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """Return the returns of chosen checkpoints and of the references, with tuned step sizes.

    Include MAML's lead over each after one step, paired by task, and its 95 % interval.
    """
    result = metarl.evaluate(policies, references=references, tune_step_sizes=True, name=name)
    found = {
        key: {
            "seeds": len(curve.per_seed),
            "returns": curve.returns,
            "half_interval": [(high - low) / 2 for low, high in curve.ci95],
            "step_sizes": curve.step_sizes,
        }
        for key, curve in {"MAML": result.curve, **result.references}.items()
    }
    for key, curve in result.references.items():
        lead = result.curve.lead(curve)
        found[key]["lead"] = (lead.mean, lead.low, lead.high)
    return found


def summary(result: EvaluationResult) -> dict[str, Any]:
    """Return values after 0 ... 3 steps: by seed, their interquartile mean, and the worst seed."""
    scores = result.curve.per_seed  # [seeds, tasks, steps + 1]
    by_seed = np.nanmean(scores, axis=1)
    flat = scores.reshape(-1, scores.shape[-1])
    return {
        "step_sizes": result.curve.step_sizes,
        "by_seed": by_seed.tolist(),
        "interquartile_mean": interquartile_mean(flat.T).tolist(),
        "worst": by_seed.min(axis=0).tolist(),
        "random": {key: curve.returns for key, curve in result.references.items()},
    }


def main(arguments: Arguments, process_group: ProcessGroup) -> int:
    for name in arguments.rows:
        if name not in ROWS:
            raise UserError(f"unknown row {name!r} (rows: {', '.join(ROWS)})")
    if arguments.ship and arguments.repeat:
        raise UserError("--ship needs a record, but --repeat is another run of it: remove one")
    recorded = arguments.env_steps is None and arguments.preset == Arguments.preset
    for name in arguments.rows:
        row = ROWS[name]
        stem = f"{name}.{arguments.repeat}" if arguments.repeat else name
        stored = DOCS / "records" / f"{stem}.json"
        if recorded:
            check_kept(stored, arguments)
        place = arguments.out / name
        place.mkdir(parents=True, exist_ok=True)
        folders = [place / f"seed-{seed}" for seed in arguments.seeds]
        seeds = {"pretrained": arguments.reference_seeds, "oracle": arguments.reference_seeds[:1]}
        references = {
            key: [place / f"{key}-{seed}" for seed in seeds[key]]
            for key in REFERENCES
            if arguments.references
        }
        wanted = {
            folder: [*flags_of(row, arguments), "--seed", str(seed)]
            for folder, seed in zip(folders, arguments.seeds, strict=True)
        }
        for key, paths in references.items():
            flags = flags_of(row, arguments, key)
            wanted |= {
                folder: [*flags, "--seed", str(seed)]
                for folder, seed in zip(paths, seeds[key], strict=True)
            }
        own = list(wanted.items())[process_group.rank :: process_group.size]
        with process_group.errors_shared():
            train_all(dict(own), arguments.jobs)
        if not process_group.is_main:
            continue
        found = record(name, row, folders, references, arguments)
        text = json.dumps(found, indent=1).encode()
        write_atomically(place / "record.json", text)
        draw_record(found, place / "record.png")
        for kind in ("returns", "references") if references else ("returns",):
            print("\n".join(TABLES[kind]([found])), end="\n\n")
        if recorded:
            stored.parent.mkdir(exist_ok=True)
            write_atomically(stored, text)
        if arguments.ship:
            middle = folders[arguments.seeds.index(found["median_seed"])]
            median = metarl.load(choose(middle, row)["checkpoint"])
            median.save(TRAINED / f"{name}.safetensors")
    if recorded and process_group.is_main:
        write_docs()
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    with joined(LONGEST) as process_group:
        raise SystemExit(exit_code(lambda: main(arguments, process_group)))
