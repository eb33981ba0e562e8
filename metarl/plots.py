"""Pictures, drawn without a display."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarl.evaluation import EvaluationResult

# Okabe & Ito's palette: told apart with any colour vision; markers tell them apart in grey.
_STYLES = [
    ("#0072B2", "o", "-"),
    ("#E69F00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#56B4E9", "v", "--"),
]


def plot_evaluation(result: EvaluationResult, path: Path) -> None:
    """Draw return against inner steps, a line a policy with its 95 % interval over tasks."""
    setting = result.setting
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = {"meta-trained": result.curve, **result.references}
    labels = {"random": "random initialization"}
    for i, (name, curve) in enumerate(curves.items()):
        colour, marker, line = _STYLES[i % len(_STYLES)]
        steps = np.arange(len(curve.returns))
        low, high = np.array(curve.ci95).T
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            steps, curve.returns, color=colour, marker=marker, linestyle=line,
            label=labels.get(name, name),
        )  # fmt: skip
    scale = setting["family_options"].get("scale")
    axes.set_title(f"{setting['family']}{f' at the {scale} scale' if scale else ''}")
    axes.set_xlabel(f"inner steps ({setting['episodes']} episodes each)")
    axes.set_ylabel(f"return of {setting['horizon']} steps, mean of {len(setting['tasks'])} tasks")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, dpi=150)
