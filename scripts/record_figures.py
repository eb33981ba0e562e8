"""Figures of records: returns against inner steps, and training curves."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from record_rows import FINN, ROWS, published_of

STYLES = {
    "MAML": ("#0072B2", "o"),
    "pretrained": ("#E69F00", "s"),
    "random": ("#009E73", "^"),
    "oracle": ("#000000", "D"),
}
LABELS = {
    "pretrained": "pretrained on all tasks",
    "random": "random initialization",
    "oracle": "oracle (observes the task)",
}
DPI = 120


def draw_record(record: dict[str, Any], path: Path) -> None:
    """Plot returns against inner steps if the record has references, and the training curves."""
    compared = "references" in record
    figure = new_figure(11 if compared else 7, 5.4 if compared else 4.4)
    panels = figure.subplots(1, 1 + compared, squeeze=False)[0]
    figure.suptitle(title_of(record))
    if compared:
        plot_adaptation(panels[0], record)
        panels[0].set_title("adaptation to held-out tasks", fontsize="medium")
        panels[1].set_title("meta-training", fontsize="medium")
        legend_below(figure, panels[0], 4)
    plot_training(panels[-1], record)
    panels[-1].legend(frameon=False, fontsize="small", ncols=2)
    figure.savefig(path, dpi=DPI)


def draw_adaptation(record: dict[str, Any], path: Path) -> None:
    """Plot returns against inner steps, with the published returns of MAML alone."""
    figure = new_figure(7, 4.8)
    axes = figure.subplots()
    plot_adaptation(axes, record, ("MAML",))
    axes.set_title(title_of(record))
    legend_below(figure, axes, 2)
    figure.savefig(path, dpi=DPI)


def draw_overview(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot returns against inner steps, one panel per record."""
    columns = min(3, len(records))
    rows = math.ceil(len(records) / columns)
    figure = new_figure(4.2 * columns, 0.8 + 3.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(records) :]:
        axes.axis("off")
    for axes, record in zip(panels.flat, records, strict=False):
        plot_adaptation(axes, record)
        axes.set_title(ROWS[record["row"]].family)
        axes.set_ylabel("")
    for axes in panels[:, 0]:
        axes.set_ylabel("return, mean of 40 held-out tasks")
    legend_below(figure, panels[0, 0], 4)
    figure.savefig(path, dpi=DPI)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Add the legend of one panel below all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that needs no display. Sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title_of(record: dict[str, Any]) -> str:
    """Return the family and the variant of a record."""
    row = ROWS[record["row"]]
    title = row.family if row.family == "navigation-2d" else f"{row.family} ({row.variant})"
    return f"make train: {title}" if record["row"] == "make-train" else title


def plot_adaptation(
    axes: Axes, record: dict[str, Any], published: Collection[str] = tuple(STYLES)
) -> None:
    """Plot the returns of policies and references, and published returns with dotted lines."""
    row = ROWS[record["row"]]
    for name, (colour, marker) in STYLES.items():
        label = LABELS.get(name, name)
        style = {"color": colour, "marker": marker}
        axes.plot(record["references"][name]["returns"], label=label, **style)
        there = published_of(row, name)
        if name in published and any(value is not None for value in there):
            values = np.array(there * 4 if len(there) == 1 else there, np.float64)
            style |= {"linestyle": ":", "markerfacecolor": "white"}
            source = FINN if row.variant == "icml2017" else row.source
            axes.plot(values, label=f"{name}, {source}", **style)
    axes.set_xlabel("inner steps (20 episodes each)")
    axes.set_ylabel("return, mean of 40 held-out tasks")
    axes.set_xticks(range(4))
    axes.grid(alpha=0.3)


def plot_training(axes: Axes, record: dict[str, Any]) -> None:
    """Plot every seed's post-adaptation return during meta-training."""
    for i, (seed, curve) in enumerate(zip(record["seeds"], record["curves"], strict=True)):
        steps = np.arange(1, len(curve) + 1) * record["env_steps"] / len(curve) / 1e6
        axes.plot(steps, curve, color=f"C{i % 10}", linewidth=1.2, label=f"seed {seed}")
    published = published_of(ROWS[record["row"]], "MAML")[1]
    if published is not None:
        axes.axhline(published, color="black", linestyle=":", linewidth=1, label="published")
    axes.set_xlabel("env steps (millions)")
    axes.set_ylabel("return after 1 inner step, training tasks")
    axes.grid(alpha=0.3)
