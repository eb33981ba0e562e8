"""Write one HTML page about a run: returns, figures, a video, config and versions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from metarl.cli.adaptation import film
from metarl.cli.arguments import check_file
from metarl.cli.results import evaluate_into, results_folder
from metarl.cli.streams import say
from metarl.config.options import default_workers
from metarl.envs.errors import UserError

IMPORTS = ("metarl.evaluation.evaluate", "metarl.plots.report")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run: returns, figures, a video, config and versions."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY ...")]
    """A run folder, a policy file or the name of a shipped policy, and others for comparison. An
    existing evaluation is reused unless policies or settings differ."""
    tasks: int | None = None
    """Number of held-out tasks; by default as in an existing evaluation, else 40."""
    episodes: int | None = None
    """Episodes per task, for each inner step and for each measured return; by default as in an
    existing evaluation, else 20."""
    steps: int | None = None
    """Number of inner steps; by default as in an existing evaluation, else 3."""
    experience: int | None = None
    """Episodes of experience on each task, up to which returns are measured; by default as in an
    existing evaluation, else none."""
    episodes_per_step: tuple[int, ...] = ()
    """Numbers of episodes per inner step, each with its own curve against experience. By default as
    in an existing evaluation; else 1, 5, 10 and 20, up to the experience."""
    from_scratch: bool = False
    """Compare with training from scratch, as in `metarl evaluate`."""
    threads: int | None = None
    """Threads; by default one per available processor. Results do not depend on their number."""
    video: bool = True
    """Record a video if the folder has none."""
    out: Path | None = None
    """Page to write; by default report.html in the run folder."""


def _is_newer(path: Path, what: Path) -> bool:
    """Whether a file is at least as new as a run's newest checkpoint, or a policy's file."""
    from metarl.policies.loading import newest_checkpoint

    source = newest_checkpoint(what) if what.is_dir() else what
    if not path.exists():
        return False
    return not source.exists() or path.stat().st_mtime >= source.stat().st_mtime


@dataclass
class _Earlier:
    """Existing evaluation in the folder."""

    fresh: bool = False
    """Whether it evaluates this policy."""
    seeds: int = 1
    """Number of evaluated seeds; an evaluation of several seeds is not of this policy alone."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `evaluate` that produced it."""

    @staticmethod
    def of(folder: Path, digest: str) -> _Earlier:
        earlier = _Earlier()
        # A damaged evaluation, or one of an older version, is ignored.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads((folder / "evaluation.json").read_text("utf-8"))
            earlier.fresh = found.get("policy") == digest
            earlier.seeds = len(found["seeds"])
            earlier.options = {
                "tasks": found["tasks"] if found["chosen"] else len(found["tasks"]),
                "steps": len(found["returns"]) - 1,
                "family_options": found["family_overrides"],
                **{key: found[key] for key in ("drawn", "deterministic", "seed")},
            }
            earlier.options["from_scratch"] = any(
                reference["role"] == "from-scratch" for reference in found["references"].values()
            )
            for key in {"experience", "episodes_per_step"} & found.keys():
                earlier.options[key] = found[key]
            if "episodes" in found:
                earlier.options["episodes"] = found["episodes"]
        return earlier

    def serves(self, asked: Mapping[str, Any]) -> bool:
        """Whether it has the requested settings."""
        same = bool(self.options) and all(self.options.get(k, v) == v for k, v in asked.items())
        return self.fresh and self.seeds == 1 and same


def report(command: Report) -> int:
    """Run `metarl report`."""
    from metarl.plots.learning_curves import plot_learning
    from metarl.plots.report import write_report
    from metarl.policies.loading import load
    from metarl.runs.files import set_aside
    from metarl.runs.folder import short_name
    from metarl.runs.metrics import read_metrics

    if not command.what:
        raise UserError("name a run folder, a policy file or a shipped policy to report on")
    check_file("--out", command.out, (".html", ".htm"))
    what = command.what[0]
    policy = load(what)
    folder = results_folder(what)
    named = {key: getattr(command, key) for key in ("tasks", "episodes", "steps", "experience")}
    asked = {key: value for key, value in named.items() if value is not None}
    if command.episodes_per_step:
        asked["episodes_per_step"] = list(command.episodes_per_step)
    if command.from_scratch:
        asked["from_scratch"] = True
    earlier = _Earlier.of(folder, policy.digest)
    notes: list[str] = []
    if earlier.seeds > 1:
        path = folder / "evaluation.json"
        notes.append(f"{set_aside(path, path.read_bytes())}: evaluation of {earlier.seeds} seeds")
    if not earlier.serves(asked) or len(command.what) > 1:
        # Options that are not given keep their earlier values.
        options = {"workers": default_workers(), **earlier.options, **asked}
        evaluate_into(command.what, folder, threads=command.threads, **options)
    if read_metrics(folder):
        plot_learning([folder], folder / "learning.png")
    why = "" if command.video else "No video was requested."
    if command.video and not (earlier.fresh and _is_newer(folder / "video.mp4", Path(what))):
        try:
            film(what, ()).save(folder / "video.mp4")
        except UserError as error:
            why = str(error)
            notes.append(why)
    out = command.out or folder / "report.html"
    config = folder / "config.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        folder,
        out,
        f"metarl: {short_name(what)}",
        adapts=policy.algorithm.inner.steps > 0,
        stratified=policy.run_options.stratified,
        run=json.loads(config.read_text("utf-8")) if config.exists() else None,
        no_video=why,
    )
    say("\n".join([*notes, str(out)]))
    return 0
