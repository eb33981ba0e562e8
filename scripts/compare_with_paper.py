"""Put evaluations at the icml2017 scale beside the returns that Finn et al. 2017 stored.

    metarl evaluate half-cheetah-dir-icml2017 runs/pretrained runs/oracle --out runs/paper-dir
    python scripts/compare_with_paper.py runs/paper-dir runs/paper-vel --out runs/paper

Writes one table (table.md) and one plot (paper.png, paper.svg).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PUBLISHED = {
    "half-cheetah-dir": {
        "MAML": (-50.7, 293.2, 313.5, 315.7),
        "pretrained": (-43.0, -24.7, -12.9, 19.6),
        "random": (-35.7, 21.8, 62.3, 86.2),
        "oracle": (442.7,),
    },
    "half-cheetah-vel": {
        "MAML": (-129.5, -78.6, -66.6, -60.8),
        "pretrained": (-158.0, -135.4, -128.5, -133.6),
        "random": (-254.8, -254.3, -246.8, -230.8),
        "oracle": (-54.5,),
    },
    "navigation-2d": {
        "MAML": (-40.4, -11.7, -3.3, -3.2),
        "pretrained": (-40.8, -19.7, -11.7, -8.5),
        "random": (-82.7, -58.0, -53.8, -46.8),
        "oracle": (-2.3,),
    },
}
"""Mean returns over 40 held-out tasks after 0, 1, 2 and 3 inner steps: the authors' stored
evaluation (arXiv:1703.03400). An oracle takes no step."""

STYLES = {
    "MAML": ("#0072B2", "o"),
    "pretrained": ("#E69F00", "s"),
    "random": ("#009E73", "^"),
    "oracle": ("#000000", "D"),
}


@dataclass
class Arguments:
    """Put evaluations at the icml2017 scale beside the returns of Finn et al. 2017."""

    evaluations: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that metarl evaluate wrote to, each with the three references."""
    out: Path
    """Folder for table.md, paper.png and paper.svg."""


def rows(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, by the paper's names."""
    others = {r["algorithm"]: r for r in evaluation["references"].values()}
    return {"MAML": evaluation} | {
        name: others[name] for name in ("pretrained", "random", "oracle")
    }


def main(arguments: Arguments) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = [json.loads((f / "evaluation.json").read_text()) for f in arguments.evaluations]
    table = [
        "| task | policy | before | 1 step | 2 steps | 3 steps | step sizes | published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    figure = Figure(figsize=(4.2 * len(found), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, evaluation in zip(panels, found, strict=True):
        family = evaluation["family"]
        for name, row in rows(evaluation).items():
            published = PUBLISHED[family][name]
            colour, marker = STYLES[name]
            shown = 1 if name == "oracle" else 4
            pairs = list(zip(row["returns"], row["ci95"], strict=True))[:shown]
            cells = [f"{mean:.1f} ± {(high - low) / 2:.1f}" for mean, (low, high) in pairs]
            cells += [""] * (4 - shown)
            sizes = ", ".join(f"{size:g}" for size in row["step_sizes"][:3]) or "none"
            paper = " / ".join(f"{value:.1f}" for value in published)
            table.append(f"| {family} | {name} | {' | '.join(cells)} | {sizes} | {paper} |")
            x = range(4)
            measured = [mean for mean, _ in pairs] * (4 if shown == 1 else 1)
            axes.plot(x, measured, color=colour, marker=marker, label=f"{name}, here")
            stored = published * (4 if shown == 1 else 1)
            axes.plot(
                x, stored, color=colour, marker=marker, linestyle=":", markerfacecolor="white",
                label=f"{name}, Finn et al. 2017",
            )  # fmt: skip
        axes.set_title(family)
        axes.set_xlabel("inner steps (20 episodes each)")
        axes.set_xticks(range(4))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("return, mean of 40 held-out tasks")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    for suffix in (".png", ".svg"):
        figure.savefig(arguments.out / f"paper{suffix}", dpi=130)
    text = "\n".join(table) + "\n"
    (arguments.out / "table.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=Arguments.__doc__))
