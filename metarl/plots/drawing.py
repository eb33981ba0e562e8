"""Common parts of all figures: styles, axes and files. No display is needed.

Colours are from Okabe and Ito and can be distinguished with any colour vision. In grey, markers and
lines distinguish the curves.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from metarl.runs.files import write_atomically

STYLES = [
    ("#0072B2", "o", "-"),
    ("#E69F00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", (0, (1, 1))),
    ("#56B4E9", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#D55E00", "P", (0, (8, 2))),
]
"""Colour, marker and line style of each curve."""
BEFORE, AFTER = "#D55E00", "#0072B2"
"""Colours of values before and after adaptation."""


def style_of(i: int) -> dict[str, Any]:
    colour, marker, line = STYLES[i % len(STYLES)]
    return {"color": colour, "marker": marker, "linestyle": line}


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write PNG and SVG files. Equal figures give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # dollar signs in a name are not a formula
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with mpl.rc_context({"svg.hashsalt": "metarl"}):
        for file in paths:
            picture = io.BytesIO()
            kind = file.suffix[1:]
            undated = {"Date": None} if kind == "svg" else None
            figure.savefig(picture, format=kind, dpi=150, metadata=undated)
            write_atomically(file, picture.getvalue())
    return paths


def add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Put the legend below the axes, clear of the data."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def label_of(name: str) -> str:
    """Return a name as a label. Legends omit names that start with an underscore."""
    return f" {name}" if name.startswith("_") else name
