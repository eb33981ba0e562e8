"""Draw learning curves of runs, before and after adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from metarl.cli.arguments import check_file
from metarl.cli.streams import say
from metarl.envs.errors import UserError

IMPORTS = ("metarl.plots.learning_curves",)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw learning curves of runs, before and after adaptation."""

    what: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Run folders; runs that differ only in their seed share a line and a band."""
    against: Literal["env-steps", "time"] = "env-steps"
    """Horizontal axis: env steps, or wall-clock time."""
    smooth: int = 1
    """Number of iterations in the moving mean."""
    out: Path | None = None
    """Figure to write, PNG and SVG; by default learning.png in the first run folder."""


def plot(command: Plot) -> int:
    """Run `metarl plot`."""
    from metarl.plots.learning_curves import plot_learning

    if not command.what:
        raise UserError("name a run folder to plot")
    check_file("--out", command.out, (".png", ".svg"))
    out = command.out or command.what[0] / "learning.png"
    paths = plot_learning(command.what, out, against=command.against, smooth=command.smooth)
    say(", ".join(map(str, paths)))
    return 0
