"""Film a policy on one task before and after adaptation, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from metarl.cli.adaptation import Adaptation, film, one_of
from metarl.cli.arguments import check_file
from metarl.cli.results import results_folder
from metarl.cli.streams import say

IMPORTS = ("metarl.plots.video",)


@dataclass(frozen=True, kw_only=True)
class Record(Adaptation):
    """Film a policy on one task before and after adaptation, side by side."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    """A run folder, a policy file (also an adapted one) or the name of a shipped policy."""
    task: tuple[str, ...] = ()
    """The task, as component=value for each component; by default one of the test tasks."""
    deterministic: bool = False
    """Take the mean action instead of a sample."""
    speed: float = 1.0
    """Speed of playback; 1 is real time."""
    tensorboard: bool = False
    """Also show the video in the run's TensorBoard."""
    out: Path | None = None
    """Video to write, as MP4 and GIF; by default video.mp4 in the run folder, or in
    runs/NAME-evaluation for a policy file or a shipped policy."""


def record(command: Record) -> int:
    """Run `metarl record`."""
    what = one_of(command.what)
    check_file("--out", command.out, (".mp4", ".gif"))
    video = film(
        what,
        command.task,
        steps=command.steps,
        deterministic=command.deterministic,
        speed=command.speed,
        **command.options(),
    )
    out = command.out or results_folder(what) / "video.mp4"
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_suffix(suffix) for suffix in (".mp4", ".gif")]
    for path in paths:
        video.save(path)
    if command.tensorboard:
        from metarl.runs.metrics import show_adaptation

        gif = {"video": paths[1].read_bytes()}
        show_adaptation(results_folder(what) / "video", [], gif)
    say(", ".join(map(str, paths)))
    return 0
