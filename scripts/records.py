"""Rows of the records in docs/results.md, and the page and figures that are generated from them.

`reproduce.py` writes docs/records/ROW.json. Everything here is generated from these files alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metarl.runs.checkpoints import write_atomically

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- records: written by scripts/reproduce.py -->", "<!-- end of records -->"


@dataclass(frozen=True)
class Row:
    """A row of the table: its training, budget and reference values."""

    family: str
    variant: str
    env_steps: float
    """Env steps of each seed."""
    published: Sequence[float | None] = (None, None, None)
    """Returns after 1, 2 and 3 inner steps if the variant is not icml2017, see `published_of`."""
    source: str = ""
    options: Sequence[str] = ()
    """Additional options of the family."""
    flags: Sequence[str] = ()
    """Additional options of the trainings."""
    kept: int = 20
    """Approximate number of checkpoints that a run keeps."""
    last: int = 5
    """Number of the newest checkpoints to choose from on validation tasks."""
    judged_after: int = 1
    """Number of inner steps before the compared returns."""
    judged_on: int = 20
    """Number of validation tasks for the comparison."""


FINN, PROMP = "Finn et al. 2017", "Rothfuss et al. 2019"
PUBLISHED = {
    "half-cheetah-dir": {
        "MAML": (-50.7, 293.2, 313.5, 315.7),
        "pretrained": (-43.0, -24.7, -12.9, 19.6),
        "oracle": (442.7,),
        "random": (-35.7, 21.8, 62.3, 86.2),
    },
    "half-cheetah-vel": {
        "MAML": (-129.5, -78.6, -66.6, -60.8),
        "pretrained": (-158.0, -135.4, -128.5, -133.6),
        "oracle": (-54.5,),
        "random": (-254.8, -254.3, -246.8, -230.8),
    },
    "navigation-2d": {
        "MAML": (-40.4, -11.7, -3.3, -3.2),
        "pretrained": (-40.8, -19.7, -11.7, -8.5),
        "oracle": (-2.3,),
        "random": (-82.7, -58.0, -53.8, -46.8),
    },
    "ant-dir": {
        "MAML": (8.7, 499.2, 500.7, 499.1),
        "pretrained": (3.2, 1.3, 6.5, 6.9),
        "oracle": (524.8,),
        "random": (3.1, 9.3, 16.0, 26.1),
    },
    "ant-vel": {
        "MAML": (30.6, 96.7, 100.1, 101.4),
        "pretrained": (-1.8, 6.1, 8.5, 9.5),
        "oracle": (107.9,),
        "random": (-78.6, -62.8, -48.6, -35.6),
    },
}
"""Mean returns over 40 held-out tasks after 0, 1, 2 and 3 inner steps, variant icml2017: the stored
evaluation of the authors of arXiv:1703.03400. An oracle takes no step."""


ROWS = {
    # `make train` produces the last iterate.
    "make-train": Row("half-cheetah-dir", "icml2017", 6.4e6, last=1),
    # Without a cosine schedule, a long run on direction deteriorates again (docs/results.md).
    "half-cheetah-dir-icml2017": Row(
        "half-cheetah-dir", "icml2017", 24e6, flags=("--outer.schedule", "cosine")
    ),
    "half-cheetah-vel-icml2017": Row("half-cheetah-vel", "icml2017", 32e6),
    # Episodes that end early take fewer env steps than the budget: 8M here, less on the ants. The
    # checkpoints differ in the gain of the second step, hardly in that of the first. These
    # differences are smaller than the ones between two choices of 20 tasks.
    "navigation-2d-icml2017": Row(
        "navigation-2d", "icml2017", 8.64e6, judged_after=2, judged_on=80
    ),
    "half-cheetah-dir-promp2019": Row(
        "half-cheetah-dir", "promp2019", 9.6e6, (310.0, None, 405.0), f"{PROMP}; learn2learn"
    ),
    # The published figure is for goals of up to 2 m/s; the authors' code has 3. A larger least step
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
        "half-cheetah-dir", "pearl2019", 40e6, flags=("--outer.schedule", "cosine")
    ),
    "half-cheetah-vel-pearl2019": Row("half-cheetah-vel", "pearl2019", 16e6),
    "ant-dir-icml2017": Row("ant-dir", "icml2017", 17.6e6, kept=36),
    "ant-vel-icml2017": Row("ant-vel", "icml2017", 17.6e6, kept=36),
}
PICTURED = (
    "half-cheetah-dir-icml2017",
    "half-cheetah-vel-icml2017",
    "navigation-2d-icml2017",
    "ant-dir-icml2017",
    "ant-vel-icml2017",
)


def draw_training(name: str, found: dict[str, Any], path: Path) -> None:
    """Plot every seed's return after one step during training."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (seed, curve) in enumerate(zip(found["seeds"], found["curves"], strict=True)):
        steps = np.arange(1, len(curve) + 1) * found["env_steps"] / len(curve) / 1e6
        axes.plot(steps, curve, color=f"C{i % 10}", linewidth=1.2, label=f"seed {seed}")
    published = published_of(ROWS[name], "MAML")[1]
    if published is not None:
        axes.axhline(published, color="black", linestyle=":", linewidth=1, label="published")
    axes.set_xlabel("env steps (millions)")
    axes.set_ylabel("return after one inner step,\ntraining tasks")
    axes.set_title(name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


STYLES = {
    "MAML": ("#0072B2", "o"),
    "pretrained": ("#E69F00", "s"),
    "random": ("#009E73", "^"),
    "oracle": ("#000000", "D"),
}


def draw_references(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot policies and references against inner steps, together with Finn et al. 2017."""
    columns = min(3, len(records))
    rows = math.ceil(len(records) / columns)
    figure = Figure(figsize=(4.2 * columns, 0.8 + 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(records) :]:
        axes.axis("off")
    for axes, one in zip(panels.flat, records, strict=False):
        family = ROWS[one["row"]].family
        for name, (colour, marker) in STYLES.items():
            here, there = one["references"][name]["returns"], PUBLISHED[family][name]
            style = {"color": colour, "marker": marker}
            axes.plot(here, label=f"{name}, here", **style)
            style |= {"linestyle": ":", "markerfacecolor": "white"}
            there = there * 4 if len(there) == 1 else there
            axes.plot(there, label=f"{name}, {FINN}", **style)
        axes.set_title(family)
        axes.set_xlabel("inner steps (20 episodes each)")
        axes.set_xticks(range(4))
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("return, mean of 40 held-out tasks")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def table(records: Sequence[dict[str, Any]], repeats: Mapping[str, dict[str, Any]]) -> str:
    """Return the tables of all rows in Markdown.

    Args:
        records: records of the rows.
        repeats: further records of these rows, by "ROW.NAME".
    """
    compared = [one for one in records if "references" in one]
    parts = (
        returns_of_rows(records),
        seeds_and_draws(records),
        beside_references(compared),
        gaps_closed(compared),
        repeated(records, repeats),
        commands(records),
    )
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def returns_of_rows(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the main table."""
    lines = [
        "| row | env steps | seeds | before | 1 step | 2 steps | 3 steps | worst seed, 1 step"
        " | published, 1 / 2 / 3 steps | core-minutes per seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in records:
        row = ROWS[one["row"]]
        paper = FINN if row.variant == "icml2017" else row.source
        means = " | ".join(both_means(one["even"]))
        there = published_of(row, "MAML")[1:]
        published = " / ".join("none" if x is None else f"{x:g}" for x in there)
        minutes = sum(one["core_minutes"]) / len(one["core_minutes"])
        worst = one["even"]["worst"][1]
        lines.append(
            f"| `{one['row']}` | {one['env_steps'] / 1e6:.1f}M | {len(one['seeds'])} | {means}"
            f" | {worst:.1f} | {published} {paper and f'({paper})'} | {minutes:.0f} |"
        )
    return lines


def seeds_and_draws(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of single seeds, drawn tasks and step sizes."""
    lines = [
        "Returns after one step by seed, and on drawn tasks in place of evenly spread ones (each"
        " direction is equally often among both, so that there the evaluation is the same):",
        "",
        "| row | by seed, evenly spread tasks | drawn tasks, 0 / 1 / 2 / 3 steps | step sizes |",
        "| --- | --- | --- | --- |",
    ]
    for one in records:
        same = one["drawn"]["by_seed"] == one["even"]["by_seed"]
        drawn = "the same" if same else " / ".join(both_means(one["drawn"]))
        sizes = ", ".join(f"{size:.3g}" for size in one["even"]["step_sizes"])
        lines.append(f"| `{one['row']}` | {by_seed(one)} | {drawn} | {sizes} |")
    return lines


def beside_references(compared: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of policies and references with tuned step sizes; empty without rows."""
    if not compared:
        return []
    lines = [
        "Beside the references, with step sizes that one procedure chose for each of them, MAML"
        " too, on validation tasks; ± half of a 95 % interval over tasks. MAML's lead is its return"
        " after one step minus the reference's, with a 95 % interval over tasks, paired; it"
        " says nothing of how seeds differ.",
        "",
        "| row | policy | seeds | before | 1 step | 2 steps | 3 steps | MAML's lead"
        " | step sizes | published, 0 / 1 / 2 / 3 steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in compared:
        for key, curve in one["references"].items():
            pairs = zip(curve["returns"], curve["half_interval"], strict=True)
            there = published_of(ROWS[one["row"]], key)
            known = any(value is not None for value in there)
            paper = " / ".join("none" if x is None else f"{x:.1f}" for x in there if known)
            cells = [
                f"`{one['row']}`",
                key,
                str(curve["seeds"]),
                *(f"{mean:.1f} ± {half:.1f}" for mean, half in pairs),
                "{:.1f} [{:.1f}, {:.1f}]".format(*curve["lead"]) if "lead" in curve else "",
                ", ".join(f"{size:.3g}" for size in curve["step_sizes"]) or "none",
                paper or "none",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def gaps_closed(compared: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the gap that policies close; empty without rows."""
    if not compared:
        return []
    lines = [
        "Gap closed: the share of the way from random before any step to the oracle that MAML goes"
        " in one step. It is 1 for a policy as good as one that is told its task:",
        "",
        "| row | here | published |",
        "| --- | --- | --- |",
    ]
    for one in compared:
        here = {key: curve["returns"] for key, curve in one["references"].items()}
        there = {key: published_of(ROWS[one["row"]], key) for key in here}
        paper = gap_closed(there) if all(there.values()) else "none"
        lines.append(f"| `{one['row']}` | {gap_closed(here)} | {paper} |")
    return lines


def gap_closed(returns: Mapping[str, Sequence[float]]) -> str:
    """Return (adapted - random) / (oracle - random) after one step, from mean returns by policy.

    Random is the return before any step. The oracle takes no steps; its mean over all is used.
    """
    floor, ceiling = returns["random"][0], float(np.mean(returns["oracle"]))
    return f"{(returns['MAML'][1] - floor) / (ceiling - floor):.2f}"


def commands(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a list of the commands that write the rows, and of the trainings that they start."""
    lines = ["Each row's command, and that of its trainings:", ""]
    places: dict[str, list[str]] = {}
    for one in records:
        name, seeds = one["row"], " ".join(map(str, one["seeds"]))
        words = f"python scripts/reproduce.py {name} --seeds {seeds}"
        if "references" in one:
            words += " --references"
            count = one["references"]["pretrained"]["seeds"]
            if count > 1:
                words += f" --reference-seeds {' '.join(map(str, range(count)))}"
        lines.append(f"- `{words}`: `{one['command']}`")
        made = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
        place = f"{processor(one)}, {one['machine']['cores']} cores; {made}"
        places.setdefault(place, []).append(f"`{name}`")
    for place, names in places.items():
        lines += ["", f"{', '.join(names) if len(places) > 1 else 'All'} on: {place}."]
    return lines


def processor(found: Mapping[str, Any]) -> str:
    """Return a record's processor and the instructions that torch used."""
    where = found["machine"]
    return f"{where['processor']} ({where['torch_cpu']})"


def both_means(found: Mapping[str, Any]) -> list[str]:
    """Return interquartile means after 0, 1, 2 and 3 steps, and plain means in brackets.

    The published figures are plain means, which a few hard tasks may dominate.
    """
    plain = np.mean(found["by_seed"], axis=0)
    pairs = zip(found["interquartile_mean"], plain, strict=True)
    return [f"{robust:.1f} ({mean:.1f})" for robust, mean in pairs]


def published_of(row: Row, policy: str) -> Sequence[float | None]:
    """Return a policy's published returns after 0, 1, 2 and 3 steps; None or fewer if unknown."""
    if row.variant == "icml2017":
        return PUBLISHED[row.family][policy]
    return (None, *row.published) if policy == "MAML" else ()


def by_seed(found: dict[str, Any]) -> str:
    """Return each seed's return after one step, on evenly spread tasks."""
    pairs = zip(found["seeds"], found["even"]["by_seed"], strict=True)
    return ", ".join(f"{seed}: {scores[1]:.1f}" for seed, scores in pairs)


def repeated(records: Sequence[dict[str, Any]], repeats: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the table of repetitions, each next to its record; empty without repetitions."""
    if not repeats:
        return []
    lines = [
        "Repeated on another machine or with other instructions; plain means over tasks, and in the"
        " last column over seeds too:",
        "",
        "| row | run | processor | by seed, 1 step | 0 / 1 / 2 / 3 steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in records:
        own = {key: again for key, again in repeats.items() if again["row"] == one["row"]}
        if not own:
            continue
        for name, found in {"the record": one, **own}.items():
            means = " / ".join(f"{mean:.1f}" for mean in np.mean(found["even"]["by_seed"], axis=0))
            where = name.removeprefix(f"{one['row']}.")
            cells = [f"`{one['row']}`", where, processor(found), by_seed(found), means]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_docs(docs: Path = DOCS) -> str:
    """Write all records' tables into docs/results.md, draw the figures, and return the page."""
    stored = [docs / "records" / f"{name}.json" for name in ROWS]
    records = [json.loads(path.read_text("utf-8")) for path in stored if path.exists()]
    again = sorted((docs / "records").glob("*.*.json"))
    repeats = {path.stem: json.loads(path.read_text("utf-8")) for path in again}
    for one in records:
        draw_training(one["row"], one, docs / "records" / f"{one['row']}.png")
    compared = [one for one in records if one["row"] in PICTURED and "references" in one]
    if compared:
        draw_references(compared, docs / "records" / "references.png")
    page = docs / "results.md"
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n\n{table(records, repeats)}\n\n{END}{after}"
    write_atomically(page, text.encode())
    return text
