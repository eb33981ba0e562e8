"""Reproduce rows of the table in docs/results.md: train, choose, evaluate, write.

    python scripts/reproduce.py navigation-2d-icml2017 --seeds 0 1 2 3 4 --jobs 2

Each seed is a run of `metarl train` whose checkpoint is chosen on validation tasks; all seeds are
evaluated on the same held-out tasks. With --references, a pretrained policy and an oracle are
trained on as many env steps, and compared with step sizes that one procedure chooses for all of
them on validation tasks. Runs, choices and evaluations lie in --out: stopped anywhere, the same
command goes on where it was. Started by torchrun on machines that share --out, each rank trains
some of the runs. A row's figures are stored in docs/records/ROW.json, and the table in
docs/results.md is written from these files alone; without a row, that is all it does. With
--repeat NAME, on another machine say, the figures are stored beside the record's, in
docs/records/ROW.NAME.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from trainings import train

import metarl
from metarl import MetaPolicy
from metarl.commands.errors import exit_code
from metarl.envs.errors import UserError
from metarl.envs.registry import parse_options
from metarl.learning.ranks import Ranks, joined
from metarl.running.checkpoints import machine, versions, write_atomically
from metarl.running.metrics import read_metrics
from metarl.running.results import EvaluationResult
from metarl.running.statistics import interquartile_mean

DOCS = Path(__file__).parents[1] / "docs"
TRAINED = Path(__file__).parents[1] / "metarl" / "trained"
LONGEST = 30 * 24 * 3600.0  # seconds that ranks wait for the trainings of the others
BEGIN, END = "<!-- records: written by scripts/reproduce.py -->", "<!-- end of records -->"


@dataclass(frozen=True)
class Row:
    """One row of the table: what is trained, for how long, and what it stands beside."""

    family: str
    scale: str
    env_steps: float
    """Budget of each seed."""
    published: Sequence[float | None] = (None, None, None)
    """Returns after 1, 2 and 3 inner steps, of the scale's paper (FINN, PROMP) or another's."""
    source: str = ""
    options: Sequence[str] = ()
    """Further options of the family."""
    flags: Sequence[str] = ()
    """Further options of the trainings."""
    kept: int = 20
    """Checkpoints that a run keeps, about."""


REFERENCES = ("pretrained", "oracle")
FINN, PROMP = "Finn et al. 2017", "Rothfuss et al. 2019"
ROWS = {
    "make-train": Row("half-cheetah-dir", "icml2017", 6.4e6, (293.2, 313.5, 315.7), FINN),
    # Without a cosine a long run on direction falls again (docs/results.md).
    "half-cheetah-dir-icml2017": Row(
        "half-cheetah-dir", "icml2017", 24e6, (293.2, 313.5, 315.7), FINN, (), ("--meta.cosine",)
    ),
    "half-cheetah-vel-icml2017": Row(
        "half-cheetah-vel", "icml2017", 32e6, (-78.6, -66.6, -60.8), FINN
    ),
    "navigation-2d-icml2017": Row("navigation-2d", "icml2017", 8e6, (-11.7, -3.3, -3.2), FINN),
    "half-cheetah-dir-promp2019": Row(
        "half-cheetah-dir", "promp2019", 9.6e6, (310.0, None, 405.0), f"{PROMP}; learn2learn"
    ),
    # The published figure is of goals of up to 2 m/s; the scale's code has 3. A larger least step
    # goes farther there than the preset's (docs/results.md).
    "half-cheetah-vel-promp2019": Row(
        "half-cheetah-vel",
        "promp2019",
        9.6e6,
        (-31.1, None, None),
        PROMP,
        options=("high=2",),
        flags=("--inner.step-sizes", "0.05", "0.025"),
    ),
    "half-cheetah-dir-pearl2019": Row(
        "half-cheetah-dir", "pearl2019", 40e6, flags=("--meta.cosine",)
    ),
    "half-cheetah-vel-pearl2019": Row("half-cheetah-vel", "pearl2019", 16e6),
    # Episodes that end early take fewer env steps than the budget.
    "ant-dir-icml2017": Row("ant-dir", "icml2017", 17.6e6, (499.2, 500.7, 499.1), FINN, kept=36),
    "ant-vel-icml2017": Row("ant-vel", "icml2017", 17.6e6, (96.7, 100.1, 101.4), FINN, kept=36),
}


@dataclass
class Arguments:
    """Reproduce rows of the table in docs/results.md: train, choose, evaluate, write."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of rows; none writes the table from what is recorded."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    jobs: int = 1
    """Trainings at a time; they share the processors."""
    preset: str = "metarl2026"
    """Preset of the trainings. With another than the default nothing is recorded in docs."""
    env_steps: float | None = None
    """Budget of each seed; by default the row's. Another one is not recorded in docs."""
    last: int = 5
    """Newest checkpoints among which one is chosen on validation tasks."""
    ship: bool = False
    """Put the median seed's policy into metarl/trained, by the name of its row."""
    references: bool = False
    """Also train the references pretrained and oracle, on the first of the seeds."""
    repeat: str = ""
    """Store the figures as a repetition of the record, by this name: of another machine, say."""
    out: Path = field(default_factory=lambda: Path("runs/reproduce"))
    """Folder for runs, chosen policies and evaluations."""


def flags_of(row: Row, arguments: Arguments, algorithm: str = "maml-trpo") -> list[str]:
    """Options of `metarl train` but for seed, threads and folder."""
    options = [] if row.family == "navigation-2d" else [f"scale={row.scale}", *row.options]
    base = metarl.resolve(arguments.preset, row.family, algorithm)
    horizon = metarl.envs.make_family(row.family, **parse_options(options)).horizon
    batches = 1 if algorithm in REFERENCES else base.inner.steps + 1
    iteration = base.tasks * base.episodes * batches * horizon
    count = round((arguments.env_steps or row.env_steps) / iteration)
    keep = max(1, count // row.kept)
    return [
        row.family, "--preset", arguments.preset,
        *(["--family-options", *options] if options else []),
        "--iterations", str(count), "--checkpoint-every", str(keep),
        *row.flags,
        *(["--algorithm", algorithm] if algorithm in REFERENCES else []),
    ]  # fmt: skip


def choose(folder: Path, last: int) -> dict[str, Any]:
    """Return the best of the newest checkpoints by its return on validation tasks."""
    store = folder / "chosen.json"
    if not store.exists():
        found = []
        for path in sorted((folder / "checkpoints").glob("*.safetensors"))[-last:]:
            result = metarl.evaluate(path, tasks=20, steps=1, split="validation")
            found.append({"checkpoint": path.name, "return": result.curve.returns[1]})
        best = max(found, key=lambda one: one["return"]) | {"compared": found}
        write_atomically(store, json.dumps(best, indent=2).encode())
    best = json.loads(store.read_text())
    # A name alone: runs may be moved, and read from another working directory.
    return best | {"checkpoint": str(folder / "checkpoints" / Path(best["checkpoint"]).name)}


def record(
    name: str, row: Row, folders: Sequence[Path], references: Sequence[Path], arguments: Arguments
) -> dict[str, Any]:
    """Evaluate the chosen checkpoints and return the row's figures."""
    chosen = [choose(folder, arguments.last) for folder in folders]
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
    name: str, policies: Sequence[MetaPolicy], references: Sequence[Path]
) -> dict[str, Any]:
    """Return the returns of chosen checkpoints beside the references', by tuned step sizes."""
    others = {path.name: [path] for path in references}
    result = metarl.evaluate(policies, references=others, tune_step_sizes=True, name=name)
    return {
        key: {
            "returns": curve.returns,
            "half_interval": [(high - low) / 2 for low, high in curve.ci95],
            "step_sizes": curve.step_sizes,
        }
        for key, curve in {"MAML": result.curve, **result.references}.items()
    }


def summary(result: EvaluationResult) -> dict[str, Any]:
    """Returns after 0 ... 3 steps: by seed, their interquartile mean, and the worst seed."""
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


def draw(name: str, found: dict[str, Any], path: Path) -> None:
    """Draw every seed's return after one step during training."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (seed, curve) in enumerate(zip(found["seeds"], found["curves"], strict=True)):
        steps = np.arange(1, len(curve) + 1) * found["env_steps"] / len(curve) / 1e6
        axes.plot(steps, curve, color=f"C{i % 10}", linewidth=1.2, label=f"seed {seed}")
    published = ROWS[name].published[0]
    if published is not None:
        axes.axhline(published, color="black", linestyle=":", linewidth=1, label="published")
    axes.set_xlabel("env steps (millions)")
    axes.set_ylabel("return after one inner step,\ntraining tasks")
    axes.set_title(name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def table(records: Sequence[dict[str, Any]], repeats: Mapping[str, dict[str, Any]]) -> str:
    """Return the table of all rows in Markdown.

    Args:
        records: of the rows.
        repeats: further records of these rows, by "ROW.NAME".
    """
    lines = [
        "| row | env steps | seeds | before | 1 step | 2 steps | 3 steps | worst seed, 1 step"
        " | published, 1 / 2 / 3 steps | core-minutes per seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in records:
        row = ROWS[one["row"]]
        # The published figures are plain means, which a few hard tasks may carry far.
        plain = np.mean(one["even"]["by_seed"], axis=0)
        pairs = zip(one["even"]["interquartile_mean"], plain, strict=True)
        means = " | ".join(f"{robust:.1f} ({mean:.1f})" for robust, mean in pairs)
        published = " / ".join("none" if x is None else f"{x:g}" for x in row.published)
        minutes = sum(one["core_minutes"]) / len(one["core_minutes"])
        worst = one["even"]["worst"][1]
        lines.append(
            f"| `{one['row']}` | {one['env_steps'] / 1e6:.1f}M | {len(one['seeds'])} | {means}"
            f" | {worst:.1f} | {published} {row.source and f'({row.source})'} | {minutes:.0f} |"
        )
    lines += ["", "Returns after one step by seed, and on tasks drawn as in the papers:", ""]
    lines += [
        "| row | by seed, evenly spread tasks | drawn tasks, 0 / 1 / 2 / 3 steps | step sizes |",
        "| --- | --- | --- | --- |",
    ]
    for one in records:
        drawn = " / ".join(f"{x:.1f}" for x in one["drawn"]["interquartile_mean"])
        sizes = ", ".join(f"{size:.3g}" for size in one["even"]["step_sizes"])
        lines.append(f"| `{one['row']}` | {by_seed(one)} | {drawn} | {sizes} |")
    compared = [one for one in records if "references" in one]
    if compared:
        lines += [
            "",
            "Beside the references, with step sizes that one procedure chose for each of them on"
            " validation tasks; ± half of a 95 % interval over tasks:",
            "",
            "| row | policy | before | 1 step | 2 steps | 3 steps | step sizes |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
    for one in compared:
        for key, curve in one["references"].items():
            pairs = zip(curve["returns"], curve["half_interval"], strict=True)
            cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in pairs]
            sizes = ", ".join(f"{size:.3g}" for size in curve["step_sizes"]) or "none"
            row = [f"`{one['row']}`", key, *cells, *[""] * (4 - len(cells)), sizes]
            lines.append(f"| {' | '.join(row)} |")
    lines += repeated(records, repeats)
    lines += ["", "Each row's command, machine and versions:", ""]
    for one in records:
        where = one["machine"]
        made = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
        lines += [
            f"- `{one['command']}`; {where['processor']}, {where['cores']} cores"
            f" ({where['torch_cpu']}); {made}"
        ]
    return "\n".join(lines)


def by_seed(found: dict[str, Any]) -> str:
    """Return each seed's return after one step, on evenly spread tasks."""
    pairs = zip(found["seeds"], found["even"]["by_seed"], strict=True)
    return ", ".join(f"{seed}: {scores[1]:.1f}" for seed, scores in pairs)


def repeated(records: Sequence[dict[str, Any]], repeats: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the table of repetitions, each beside its record; no lines, if there are none."""
    if not repeats:
        return []
    lines = [
        "",
        "Repeated; plain means over tasks, and in the last column over seeds too:",
        "",
        "| row | machine | by seed, 1 step | 0 / 1 / 2 / 3 steps |",
        "| --- | --- | --- | --- |",
    ]
    for one in records:
        own = {key: again for key, again in repeats.items() if again["row"] == one["row"]}
        if not own:
            continue
        for name, found in {"the record": one, **own}.items():
            means = " / ".join(f"{mean:.1f}" for mean in np.mean(found["even"]["by_seed"], axis=0))
            where = name.removeprefix(f"{one['row']}.")
            lines.append(f"| `{one['row']}` | {where} | {by_seed(found)} | {means} |")
    return lines


def write_docs(docs: Path = DOCS) -> str:
    """Write the table of all records into docs/results.md and return the page."""
    stored = [docs / "records" / f"{name}.json" for name in ROWS]
    records = [json.loads(path.read_text()) for path in stored if path.exists()]
    again = sorted((docs / "records").glob("*.*.json"))
    repeats = {path.stem: json.loads(path.read_text()) for path in again}
    page = docs / "results.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n\n{table(records, repeats)}\n\n{END}{after}"
    write_atomically(page, text.encode())
    return text


def main(arguments: Arguments, ranks: Ranks) -> int:
    for name in arguments.rows:
        if name not in ROWS:
            raise UserError(f"no row {name!r} (rows: {', '.join(ROWS)})")
    if arguments.ship and arguments.repeat:
        raise UserError("--ship is of a record, and --repeat of another run of it: leave one out")
    recorded = arguments.env_steps is None and arguments.preset == Arguments.preset
    for name in arguments.rows:
        row = ROWS[name]
        place = arguments.out / name
        place.mkdir(parents=True, exist_ok=True)
        folders = [place / f"seed-{seed}" for seed in arguments.seeds]
        references = [place / key for key in REFERENCES] if arguments.references else []
        wanted = {
            folder: [*flags_of(row, arguments), "--seed", str(seed)]
            for folder, seed in zip(folders, arguments.seeds, strict=True)
        }
        for folder in references:
            flags = flags_of(row, arguments, folder.name)
            wanted[folder] = [*flags, "--seed", str(arguments.seeds[0])]
        own = list(wanted.items())[ranks.rank :: ranks.size]
        with ranks.agreeing(), ThreadPoolExecutor(arguments.jobs) as pool:
            trainings = [pool.submit(train, folder, flags, arguments.jobs) for folder, flags in own]
            for training in trainings:
                training.result()
        if not ranks.is_main:
            continue
        found = record(name, row, folders, references, arguments)
        text = json.dumps(found, indent=1).encode()
        write_atomically(place / "record.json", text)
        draw(name, found, place / "curves.png")
        print(table([found], {}))
        if recorded:
            (DOCS / "records").mkdir(exist_ok=True)
            stem = f"{name}.{arguments.repeat}" if arguments.repeat else name
            write_atomically(DOCS / "records" / f"{stem}.json", text)
            if not arguments.repeat:
                draw(name, found, DOCS / "records" / f"{name}.png")
        if arguments.ship:
            middle = folders[arguments.seeds.index(found["median_seed"])]
            median = metarl.load(choose(middle, arguments.last)["checkpoint"])
            median.save(TRAINED / f"{name}.safetensors")
    if recorded and ranks.is_main:
        write_docs()
    return 0


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    with joined(LONGEST) as ranks:
        raise SystemExit(exit_code(lambda: main(arguments, ranks)))
