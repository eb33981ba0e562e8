"""Tables of an evaluation, from the content of `evaluation.json`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Table with a row per policy or task, and a column per number of inner steps."""

    heads: Sequence[str]
    """Name of the measure, then the number of steps of each column."""
    rows: Sequence[Sequence[str]]
    """Name of a policy, or first component of a task, then the other cells."""
    named: bool = True
    """Whether rows start with a name, which is left-aligned."""


def tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Return the tables of an evaluation.

    The first table contains the measure, the worst task, CVaR and the step sizes. Others follow if
    they have a row: interquartile means over seeds, success rates, shares of the gap that are
    closed.
    """
    curves = {evaluation["name"]: evaluation, **evaluation["references"]}
    steps = len(evaluation["returns"])
    unit = evaluation.get("adapts_in", "step")
    counts = ["pre-adaptation", f"1 {unit}", *(f"{k} {unit}s" for k in range(2, steps))][:steps]
    for name, curve in list(curves.items()):
        if (other := curve.get("adapts_in", "step")) != unit:
            curves = {f"{n}, {other}s" if n == name else n: c for n, c in curves.items()}
    digits = evaluation.get("digits", 1)
    tail = f"CVaR {100.0 * evaluation['cvar_fraction']:g} %"
    first = []
    for name, curve in curves.items():
        cells = _cells(curve["returns"], curve["ci95"], digits)
        lowest = [_number(curve[key][-1], digits) for key in ("worst_task", "cvar")]
        sizes = ", ".join(_without_repeats(curve["step_sizes"])) or "none"
        first.append([name, *cells, *[""] * (steps - len(cells)), *lowest, sizes])
    if best := evaluation.get("optimal_returns"):
        mean = sum(best) / len(best)
        first.append(["optimum", f"{mean:.1f}", *[""] * (steps + 1), "exact"])
    several = [
        [
            f"{name}, seeds {', '.join(map(str, curve['seeds']))}",
            *_cells(curve["iqm"], curve["iqm_ci95"], digits),
        ]
        for name, curve in curves.items()
        if "iqm" in curve
    ]
    told = [
        [name, *(_number(rate and 100.0 * rate, 1) for rate in curve["success"])]
        for name, curve in curves.items()
        if "success" in curve
    ]
    gaps = [
        [name, *_cells(curve["gap_closed"], curve["gap_closed_ci95"], 2)]
        for name, curve in curves.items()
        if "gap_closed" in curve and curve["role"] != "oracle"
    ]
    of_last = [f"{what}, {counts[-1]}" for what in ("worst task", tail)]
    heads = [evaluation.get("measure", "return"), *counts, *of_last, "step sizes"]
    found = [Table(heads, first)]
    for what, rows in (
        ("interquartile mean", several),
        ("success rate, %", told),
        ("gap closed", gaps),
    ):
        if rows:
            found.append(Table([what, *counts], rows))
    return found


def experience_table(evaluation: Mapping[str, Any]) -> Table:
    """Return the table of returns against experience: a row per method.

    A column is a number of episodes on the new task. A method is listed with the last policy that
    it has after at most as many episodes.
    """
    curves = evaluation["experience_curves"]
    own = evaluation["experience"]
    most = max(curve["episodes"][-1] for curve in curves)
    more = (own * n for n in (2, 5, 10) if own * n <= most)
    columns = sorted({0, own, *evaluation["episodes_per_step"], *more})
    digits = evaluation.get("digits", 1)
    rows = []
    for curve in curves:
        cells = _cells(curve["returns"], curve["ci95"], digits)
        at = [bisect_right(curve["episodes"], n) - 1 for n in columns]
        reached = [n <= max(curve["episodes"][-1], own) for n in columns]
        picked = [cells[i] if there else "" for i, there in zip(at, reached, strict=True)]
        rows.append([method_name(curve), *picked])
    for name, level in levels(evaluation).items():
        rows.append([name, f"{level:.{digits}f}"])
    return Table(["return after episodes of experience", *map(str, columns)], rows)


def method_name(curve: Mapping[str, Any]) -> str:
    """Return the name of a method with its number of episodes per inner step."""
    n = curve["episodes_per_step"]
    return curve["method"] + ("" if n is None else f", {n} episode{'s' * (n > 1)} per step")


def levels(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return mean returns that no experience changes, by name: oracles, and the known optimum."""
    curves = {evaluation["name"]: evaluation, **evaluation["references"]}
    found = {
        name: curve["returns"][0] for name, curve in curves.items() if curve["role"] == "oracle"
    }
    if best := evaluation.get("optimal_returns"):
        found["optimum"] = sum(best) / len(best)
    return {name: level for name, level in found.items() if level is not None}


def task_table(evaluation: Mapping[str, Any]) -> Table:
    """Return the table of the evaluated policy by task: its vector, returns and achieved values."""
    digits = evaluation.get("digits", 1)
    measure, steps = evaluation.get("measure", "return"), range(len(evaluation["returns"]))
    achieved = evaluation.get("achieved", {})
    heads = [*evaluation["components"], *(f"{measure} {k}" for k in steps)]
    heads += [f"{name} achieved {k}" for name in achieved for k in steps]
    rows = []
    for t, task in enumerate(evaluation["tasks"]):
        cells = [f"{x:.2f}" for x in task]
        cells += [_number(x, digits) for x in evaluation["per_task"][t]]
        rows.append(cells + [_number(x, 2) for values in achieved.values() for x in values[t]])
    return Table(heads, rows, named=False)


def as_text(found: Sequence[Table]) -> str:
    """Return tables as plain text, one below the other, with aligned columns."""
    lines = [line for table in found for line in (table.heads, *table.rows)]
    columns = range(max(map(len, lines)))
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in columns]

    def text(line: Sequence[str], named: bool) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=False)]
        if named:
            cells[0] = line[0].ljust(widths[0])
        return "  ".join(cells).rstrip()

    return "\n\n".join(
        "\n".join(text(line, table.named) for line in (table.heads, *table.rows)) for table in found
    )


def described(evaluation: Mapping[str, Any]) -> str:
    """Describe the evaluation tasks in words, including repeats of a family's few tasks."""
    tasks = evaluation["tasks"]
    different, outside = len({tuple(task) for task in tasks}), sum(evaluation["outside_training"])
    if evaluation["chosen"]:
        found = f"{len(tasks)} chosen tasks"
    elif different == len(tasks):
        found = f"{different} held-out tasks"
    else:
        found = f"{different} tasks, repeated to {len(tasks)}"
    if outside:
        found += f", {outside} of them outside the training range"
    if changes := evaluation["family_changes"]:
        found += f", with other settings than in training ({'; '.join(changes)})"
    return found


def sampled(evaluation: Mapping[str, Any]) -> str:
    """Describe the samples of an evaluation in words."""
    own = evaluation.get("adapts_in", "step")
    return evaluation["samples"] + (" for each inner step" if own == "step" else " on each task")


def _cells(
    means: Sequence[float | None], intervals: Sequence[Sequence[float | None]], digits: int
) -> list[str]:
    cells = []
    for mean, (low, high) in zip(means, intervals, strict=True):
        half = "" if low is None or high is None else f" ± {(high - low) / 2.0:.{digits}f}"
        cells.append(_number(mean, digits) + half)
    return cells


def _without_repeats(sizes: Sequence[float]) -> list[str]:
    """Return step sizes in the format of options: the last one repeats."""
    said = [f"{size:g}" for size in sizes]
    while len(said) > 1 and said[-1] == said[-2]:
        said.pop()
    return said


def _number(value: float | None, digits: int) -> str:
    return f"{math.nan if value is None else value:.{digits}f}"
