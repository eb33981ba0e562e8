"""Tables and figures of the records, generated from docs/records/*.json alone.

`reproduce.py` writes these files. A page in docs/results or docs/experiments has a table between
two comments: `<!-- records: KIND ROW ... -->` and `<!-- end of records -->`. KIND is a key of
`TABLES`, ROW a pattern such as `ant-*`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from record_figures import draw_adaptation, draw_overview, draw_record
from record_rows import ROWS, published_of

from metarl.runs.checkpoints import write_atomically

DOCS = Path(__file__).parents[1] / "docs"
FOLDERS = ("results", "experiments")
BLOCK = re.compile(r"(<!-- records: (\w+) (.+?) -->\n).*?(<!-- end of records -->)", re.S)
PICTURED = (
    "half-cheetah-dir-icml2017",
    "half-cheetah-vel-icml2017",
    "navigation-2d-icml2017",
    "ant-dir-icml2017",
    "ant-vel-icml2017",
)
STEPS = ("pre-adaptation", "1 step", "2 steps", "3 steps")


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table with one row per record: returns, gap closed, published values."""
    lines = header(
        "row",
        "pre-adaptation",
        "1 step",
        "published, 1 step",
        "gap closed",
        "gap closed, published",
    )
    for one in records:
        row = ROWS[one["row"]]
        before, after, *_ = plain_means(one["even"])
        here, there = "none", "none"
        if "references" in one:
            here = gap_closed({key: c["returns"] for key, c in one["references"].items()})
            known = {key: published_of(row, key) for key in one["references"]}
            there = gap_closed(known) if all(known.values()) else "none"
        lines.append(
            line(
                f"`{one['row']}`",
                number(before),
                number(after),
                number(published_of(row, "MAML")[1]),
                here,
                there,
            )
        )
    return lines


def returns(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of mean returns; also on drawn tasks, as published returns are.

    The interval over tasks comes from the comparison with references, which tunes the step sizes.
    It is shown if that comparison has the same first step size.
    """
    lines = header(
        "row",
        "env steps",
        "seeds",
        *STEPS,
        "worst seed, 1 step",
        "published, 1 / 2 / 3 steps",
        "core-minutes",
    )
    for one, name in zip(records, short_names(records), strict=True):
        known = published_of(ROWS[one["row"]], "MAML")[1:]
        published = " / ".join(map(number, known)) if any(known) else "none"
        means = [number(mean) for mean in plain_means(one["even"])]
        tuned = one.get("references", {}).get("MAML")
        if tuned and tuned["step_sizes"][0] == one["even"]["step_sizes"][0]:
            means[1] += f" ± {tuned['half_interval'][1]:.1f}"
        lines.append(
            line(
                name,
                millions(one),
                len(one["seeds"]),
                *means,
                number(one["even"]["worst"][1]),
                published,
                f"{np.mean(one['core_minutes']):.0f}",
            )
        )
        if any(known) and one["drawn"]["by_seed"] != one["even"]["by_seed"]:
            drawn = map(number, plain_means(one["drawn"]))
            lines.append(line("drawn tasks", "", "", *drawn, "", "", ""))
    return lines


def references(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of references with tuned step sizes, and MAML's lead over each."""
    lines = header("row", "reference", "pre-adaptation", "1 step", "MAML's lead, 1 step")
    for one, row in zip(records, short_names(records), strict=True):
        compared = {key: curve for key, curve in one["references"].items() if "lead" in curve}
        for i, (key, curve) in enumerate(compared.items()):
            name = f"{key}, {curve['seeds']} seeds" if curve["seeds"] > 1 else key
            before, after, *_ = map(number, curve["returns"])
            lead = "{} [{}, {}]".format(*map(number, curve["lead"]))
            half = f"{curve['half_interval'][1]:.1f}"
            lines.append(line("" if i else row, name, before, f"{after} ± {half}", lead))
    return lines


def repetitions(
    records: Sequence[dict[str, Any]], repeats: Mapping[str, dict[str, Any]]
) -> list[str]:
    """Return the table of repetitions, each below its record."""
    lines = header("row", "run", "seeds", "1 / 2 / 3 steps", "worst seed, 1 step")
    for one in records:
        own = {key: again for key, again in repeats.items() if again["row"] == one["row"]}
        for name, found in {"record": one, **own}.items():
            where = name.removeprefix(f"{one['row']}.")
            means = " / ".join(map(number, plain_means(found["even"])[1:]))
            lines.append(
                line(
                    "" if name in own else f"`{one['row']}`",
                    where,
                    len(found["seeds"]),
                    means,
                    number(found["even"]["worst"][1]),
                )
            )
    return lines


def commands(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a block of the commands that write the rows."""
    lines = ["```bash"]
    for one in records:
        words = f"python scripts/reproduce.py {one['row']} --seeds {listed(one['seeds'])}"
        if "references" in one:
            words += " --references"
            count = one["references"]["pretrained"]["seeds"]
            if count > 1:
                words += f" --reference-seeds {listed(range(count))}"
        lines.append(words)
    return [*lines, "```"]


TABLES: Mapping[str, Callable[..., list[str]]] = {
    "summary": summary,
    "returns": returns,
    "references": references,
    "repetitions": repetitions,
    "commands": commands,
}


def short_names(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the variants of rows of one family, or the families of several."""
    rows = [ROWS[one["row"]] for one in records]
    if len({row.family for row in rows}) > 1:
        return [row.family for row in rows]
    made = "make-train"
    return [
        made if one["row"] == made else row.variant for one, row in zip(records, rows, strict=True)
    ]


def gap_closed(returns: Mapping[str, Sequence[float]]) -> str:
    """Return (adapted - random) / (oracle - random) after one step, from mean returns by policy.

    Random is the return before any step. The oracle takes no steps; its mean over all is used.
    """
    floor, ceiling = returns["random"][0], float(np.mean(returns["oracle"]))
    return f"{(returns['MAML'][1] - floor) / (ceiling - floor):.2f}"


def plain_means(found: Mapping[str, Any]) -> list[float]:
    """Return plain means over seeds and tasks, after 0, 1, 2 and 3 steps."""
    return np.mean(found["by_seed"], axis=0).tolist()


def header(*names: str) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [line(*names), line(*["---"] * len(names))]


def line(*cells: Any) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def number(value: float | None) -> str:
    """Return a value with one decimal and a minus sign; "none" if unknown."""
    return "none" if value is None else f"{value:.1f}".replace("-", "\N{MINUS SIGN}")


def millions(record: Mapping[str, Any]) -> str:
    return f"{record['env_steps'] / 1e6:.1f}M"


def listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def load(docs: Path = DOCS) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the records by row, and their repetitions by "ROW.NAME"."""
    stored = [docs / "records" / f"{name}.json" for name in ROWS]
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in stored if path.exists()}
    again = sorted((docs / "records").glob("*.*.json"))
    return found, {path.stem: json.loads(path.read_text("utf-8")) for path in again}


def write_docs(docs: Path = DOCS) -> dict[str, str]:
    """Write all generated tables and figures, and return the pages' texts by path below docs."""
    found, repeats = load(docs)

    def generated(block: re.Match[str]) -> str:
        begin, kind, names, end = block.groups()
        records = [found[name] for name in found if any(map(partial(fnmatch, name), names.split()))]
        extra = (repeats,) if kind == "repetitions" else ()
        return "\n".join([begin, *TABLES[kind](records, *extra), "", end])

    pages = {}
    for path in sorted(path for folder in FOLDERS for path in (docs / folder).glob("*.md")):
        text = BLOCK.sub(generated, path.read_text("utf-8"))
        write_atomically(path, text.encode())
        pages[str(path.relative_to(docs))] = text
    for name, one in found.items():
        draw_record(one, docs / "records" / f"{name}.png")
    compared = [found[name] for name in PICTURED if "references" in found.get(name, {})]
    if compared:
        draw_overview(compared, docs / "records" / "references.png")
        draw_adaptation(compared[0], docs / "half-cheetah-dir.png")
    return pages
