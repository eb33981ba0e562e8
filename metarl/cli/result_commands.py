"""The commands about how runs went and how well policies adapt: evaluate, plot, report."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from metarl.cli.arguments import check_file, check_place
from metarl.cli.policy_commands import film, results_folder
from metarl.cli.streams import say
from metarl.config.options import default_workers
from metarl.envs.errors import UserError
from metarl.evaluation.tables import described
from metarl.plain_json import json_text

if TYPE_CHECKING:
    from metarl.distributed.process_group import ProcessGroup
    from metarl.evaluation.results import EvaluationResult


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how well meta-policies adapt to held-out tasks."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY ...")]
    """Run folders, policy files or names of shipped policies. Runs that differ only in their seed
    make one row; runs of the algorithms pretrained, random and oracle are references."""
    tasks: int = 40
    """Number of held-out tasks."""
    episodes: int = 20
    """Episodes per task, for each inner step and for each measured return."""
    steps: int = 3
    """Number of inner steps."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step of the first policy, the last repeated; by default its own."""
    random_step_sizes: tuple[float, ...] = ()
    """The same for the random initialization; by default its preset's, or the policy's."""
    pretrained_step_sizes: tuple[float, ...] = ()
    """The same for a pretrained policy; by default its preset's, or its own."""
    tune_step_sizes: bool = False
    """Choose the size of the first step for each policy, references included, on validation tasks;
    later steps take half of it."""
    seed: int = 0
    """Seed of episodes, and of drawn tasks."""
    deterministic: bool = False
    """Measure returns with the mean action instead of a sampled one."""
    from_scratch: bool = False
    """Compare with training from scratch on each task by clipped policy gradients, with the env
    steps of adaptation and with ten times as many; and with PPO of stable-baselines3 if it is
    installed."""
    scratch_learning_rate: float = 3e-3
    """Learning rate of the built-in training from scratch."""
    drawn: bool = False
    """Draw the held-out tasks at random, as the papers do, instead of covering the test split
    evenly."""
    threads: int | None = None
    """Threads; by default one per available processor. Results do not depend on their number."""
    workers: int = field(default_factory=default_workers)
    """Worker processes for environments without a native backend; 0 steps them in this process."""
    out: Path | None = None
    """Folder for evaluation.json and the pictures; by default the run folder, or
    runs/NAME-evaluation for a policy file or a shipped policy."""
    per_task: bool = False
    """Print the returns of each task, and what was achieved of its goal."""
    json: bool = False
    """Print the content of evaluation.json instead of tables."""
    rank_timeout: float | None = None
    """Under torchrun: seconds after which a rank that the others wait for is considered dead; by
    default as in training."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw learning curves of runs, before and after adaptation."""

    what: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Run folders; runs that differ only in their seed share a line and a band."""
    against: Literal["env-steps", "time"] = "env-steps"
    """Horizontal axis: env steps, or wall-clock time."""
    smooth: int = 1
    """Iterations that each point is the mean of."""
    out: Path | None = None
    """Picture to write, PNG and SVG; by default learning.png in the first run folder."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run: returns, pictures, a video, config and versions."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY ...")]
    """A run folder, a policy file or the name of a shipped policy, and others to compare it with.
    An existing evaluation is reused unless others are named or it has other settings."""
    tasks: int | None = None
    """Number of held-out tasks; by default that of an existing evaluation, else 40."""
    episodes: int | None = None
    """Episodes per task, for each inner step and for each measured return; by default as in an
    existing evaluation, else 20."""
    steps: int | None = None
    """Number of inner steps; by default that of an existing evaluation, else 3."""
    threads: int | None = None
    """Threads; by default one per available processor. Results do not depend on their number."""
    video: bool = True
    """Record a video if there is none."""
    out: Path | None = None
    """Page to write; by default report.html in the run folder."""


def evaluate(command: Evaluate) -> int:
    """Run `metarl evaluate`."""
    from metarl.distributed.process_group import LIMIT_SECONDS, joined

    limit = LIMIT_SECONDS if command.rank_timeout is None else command.rank_timeout
    with joined(limit) as process_group, process_group.errors_shared():
        found = _evaluate(
            command.what,
            command.out,
            tasks=command.tasks,
            episodes=command.episodes,
            steps=command.steps,
            seed=command.seed,
            step_sizes=command.step_sizes,
            random_step_sizes=command.random_step_sizes,
            pretrained_step_sizes=command.pretrained_step_sizes,
            tune_step_sizes=command.tune_step_sizes,
            deterministic=command.deterministic,
            drawn=command.drawn,
            from_scratch=command.from_scratch,
            scratch_learning_rate=command.scratch_learning_rate,
            threads=command.threads,
            workers=command.workers,
            process_group=process_group,
        )
    if found is None:
        return 0
    result, files = found
    if command.json:
        say(json_text(result.to_json(), indent=2))
        return 0
    setting = result.setting
    options = "".join(f" {k}={v}" for k, v in setting["family_options"].items())
    samples = f"{command.episodes} episodes of {setting.get('horizon')} steps each"
    if "support" in setting:
        samples = f"{setting['support']} examples each to adapt to"
    say(f"{setting['family']}{options}: {described(setting)}, {samples}\n")
    if command.per_task:
        say(f"{result.task_table()}\n")
    say(f"{result.table()}\n\n{result.verdicts()}")
    say(", ".join(map(str, files)))
    return 0


def _evaluate(
    what: Sequence[str], out: Path | None, process_group: ProcessGroup | None = None, **options: Any
) -> tuple[EvaluationResult, list[Path]] | None:
    """Evaluate policies; leave the result and its pictures in the first one's folder, or out.

    None on all ranks but rank 0.
    """
    from metarl.distributed.process_group import ALONE
    from metarl.evaluation.evaluate import evaluate
    from metarl.evaluation.groups import grouped
    from metarl.plots import figures as plots
    from metarl.runs.files import write_atomically
    from metarl.runs.metrics import show_adaptation

    if not what:
        raise UserError("name a run folder, a policy file or a shipped policy to evaluate")
    groups = grouped(what)
    (name, members), *others = groups.items()
    references = {key: list(other.values()) for key, other in others}
    seeds = list(members.values())
    process_group = process_group or ALONE
    if out is not None:
        check_place("--out", out)  # before anything is measured
    result = evaluate(
        seeds, references=references, name=name, process_group=process_group, **options
    )
    if not process_group.is_main:
        return None
    folder = results_folder(next(iter(members)), out)
    files = [folder / "evaluation.json"]
    write_atomically(files[0], json_text(result.to_json(), indent=2).encode())
    files += plots.plot_evaluation(result, folder / "evaluation.png")
    files += plots.plot_tasks(result, folder / "evaluation-tasks.png")
    files += plots.plot_paths(result, folder / "evaluation-paths.png")
    files += plots.plot_functions(result, folder / "evaluation-functions.png")
    if (folder / "config.json").exists():  # a run, which TensorBoard shows
        pictures = {path.stem: path for path in files if path.suffix == ".png"}
        shown = {"curve": "evaluation", "tasks": "evaluation-tasks"}
        images = {k: pictures[v].read_bytes() for k, v in shown.items() if v in pictures}
        show_adaptation(folder / "evaluation", result.curve.returns, images)
    return result, [path for path in files if path.suffix != ".svg"]


def plot(command: Plot) -> int:
    """Run `metarl plot`."""
    from metarl.plots.figures import plot_learning

    if not command.what:
        raise UserError("name a run folder to plot")
    check_file("--out", command.out, (".png", ".svg"))
    out = command.out or command.what[0] / "learning.png"
    paths = plot_learning(command.what, out, against=command.against, smooth=command.smooth)
    say(", ".join(map(str, paths)))
    return 0


def _is_newer(path: Path, what: Path) -> bool:
    """Whether a file is there and no older than a run's newest checkpoint, or a policy's file."""
    from metarl.policies.loading import newest_checkpoint

    source = newest_checkpoint(what) if what.is_dir() else what
    if not path.exists():
        return False
    return not source.exists() or path.stat().st_mtime >= source.stat().st_mtime


def report(command: Report) -> int:
    """Run `metarl report`."""
    from metarl.plots.figures import plot_learning
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
    digest = policy.digest
    folder = results_folder(what)
    named = {"tasks": command.tasks, "episodes": command.episodes, "steps": command.steps}
    asked: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    fresh, usable, seeds = False, False, 1
    notes: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads((folder / "evaluation.json").read_text("utf-8"))
        fresh = found.get("policy") == digest
        has = {"tasks": len(found["tasks"]), "steps": len(found["returns"]) - 1}
        has["episodes"] = found.get("episodes", asked.get("episodes"))
        # One of several seeds together is not this run's own.
        seeds = len(found["seeds"])
        usable = fresh and seeds == 1 and all(has[key] == value for key, value in asked.items())
        # What was not asked for is as it was there.
        kept = has | {key: found[key] for key in ("drawn", "deterministic", "seed")}
        asked = {key: value for key, value in kept.items() if value is not None} | asked
    if seeds > 1:
        path = folder / "evaluation.json"
        notes.append(f"{set_aside(path, path.read_bytes())}: what {seeds} seeds had there")
    if not usable or len(command.what) > 1:
        threads, workers = command.threads, default_workers()
        _evaluate(command.what, folder, threads=threads, workers=workers, **asked)
    if read_metrics(folder):
        plot_learning([folder], folder / "learning.png")
    why = "" if command.video else "None was asked for."
    if command.video and not (fresh and _is_newer(folder / "video.mp4", Path(what))):
        try:
            film(what, ()).save(folder / "video.mp4")
        except UserError as error:
            why = str(error)
            notes.append(why)
    out = command.out or folder / "report.html"
    config = folder / "config.json"
    run = json.loads(config.read_text("utf-8")) if config.exists() else None
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"metarl: {short_name(what)}"
    write_report(folder, out, title, config=policy.config, run=run, no_video=why)
    say("\n".join([*notes, str(out)]))
    return 0
