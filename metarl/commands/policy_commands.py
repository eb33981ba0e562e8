"""The commands about trained policies: evaluate, adapt, export, plot, record, report."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily, make_family
from metarl.running.config import default_workers


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how well meta-policies adapt to held-out tasks."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, policy files or names of shipped policies. Those that differ only by their seed
    are one row; those of the algorithms pretrained, random and oracle are references."""
    tasks: int = 40
    """Held-out tasks."""
    episodes: int = 20
    """Episodes a task, for each inner step and for each return."""
    steps: int = 3
    """Inner steps."""
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
    """Show training from scratch on each task beside it, by clipped policy gradients: with the env
    steps of adaptation, and with ten times as many."""
    scratch_learning_rate: float = 3e-3
    """Learning rate of that training."""
    drawn: bool = False
    """Draw the tasks at random, as the papers do, instead of covering the test split evenly."""
    threads: int | None = None
    """Threads; results do not depend on it."""
    workers: int = field(default_factory=default_workers)
    """Worker processes for environments without a native backend; 0 steps them in this process."""
    out: Path | None = None
    """Folder for evaluation.json and the pictures; by default the run folder."""
    per_task: bool = False
    """Print each task's returns, and what was achieved of what it asks for."""
    json: bool = False
    """Print the content of evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Adapt a meta-policy to one task; save an ordinary policy."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A run folder, a policy file or the name of a shipped policy."""
    task: tuple[str, ...] = ()
    """The task, as component=value for each component (metarl families lists them)."""
    steps: int = 1
    """Inner steps."""
    episodes: int = 20
    """Episodes for each inner step, and for the returns that are printed."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step, the last repeated; by default the policy's own."""
    seed: int = 0
    """Seed of the episodes."""
    save: Path | None = None
    """File to write the adapted policy to."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw learning curves of runs, before and after adaptation."""

    what: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; those that differ only by their seed share a line and a band."""
    against: Literal["env-steps", "time"] = "env-steps"
    """What to draw against; time is wall-clock."""
    smooth: int = 1
    """Iterations that each point averages."""
    out: Path | None = None
    """Picture to write, PNG and SVG; by default learning.png in the first run folder."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Film a policy on one task before and after adaptation, side by side."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A run folder, a policy file (adapted ones too) or the name of a shipped policy."""
    task: tuple[str, ...] = ()
    """The task, as component=value for each component; by default one of the test tasks."""
    steps: int = 1
    """Inner steps."""
    episodes: int = 20
    """Episodes for each inner step."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step, the last repeated; by default the policy's own."""
    seed: int = 0
    """Seed of the episodes."""
    deterministic: bool = False
    """Film the mean action instead of a sampled one."""
    speed: float = 1.0
    """Speed of playback; 1 is real time."""
    tensorboard: bool = False
    """Show the video in the run's TensorBoard too."""
    out: Path | None = None
    """Video to write, MP4 and GIF; by default video.mp4 in the run folder."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a policy to a file that other programs run (TorchScript or ONNX)."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A policy file that `metarl adapt` wrote; or a run folder, a policy file or the name of a
    shipped policy, exported as it is or, with --task, adapted first."""
    format: Literal["torchscript", "onnx"] = "torchscript"
    """onnx needs the package onnx (the extra `onnx`)."""
    task: tuple[str, ...] = ()
    """Task to adapt an initialization to, as component=value for each component."""
    steps: int = 1
    """Inner steps."""
    episodes: int = 20
    """Episodes for each inner step."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step, the last repeated; by default the policy's own."""
    seed: int = 0
    """Seed of the episodes."""
    out: Path | None = None
    """File to write; by default the policy's name with .pt or .onnx."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run: returns, pictures, a video, config and versions."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A run folder, a policy file or the name of a shipped policy; further ones stand beside it.
    An existing evaluation is used, unless further policies are named."""
    tasks: int = 40
    """Held-out tasks of the evaluation."""
    episodes: int = 20
    """Episodes a task, for each inner step and for each return."""
    steps: int = 3
    """Inner steps."""
    threads: int | None = None
    """Threads; results do not depend on it."""
    video: bool = True
    """Film a video if there is none."""
    out: Path | None = None
    """Page to write; by default report.html in the run folder."""


def results_folder(what: str, out: Path | None = None) -> Path:
    """Make and return the folder for what is found out about a policy: its run's, if it has one."""
    source = Path(what)
    folder = out or (source if source.is_dir() else Path("runs") / f"{source.stem}-evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def _one(what: Sequence[str]) -> str:
    if len(what) != 1:
        raise UserError(
            f"name one run folder, policy file or shipped policy, got {' '.join(what) or 'none'}"
        )
    return what[0]


def parse_task(family: TaskFamily, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the task vector of ("velocity=1.7",).

    Raises:
        UserError: a text is no component=value, or a component is unknown or missing.
    """
    components = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            components[name] = float(value)
        except ValueError as error:
            raise UserError(f"a task is written component=value, got {text!r}") from error
    return family.tasks.vector(components)


def evaluate(command: Evaluate) -> int:
    """Run `metarl evaluate`."""
    result, files = _evaluate(
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
    )
    if command.json:
        print(json.dumps(result.to_json(), indent=2))
        return 0
    setting = result.setting
    options = "".join(f" {k}={v}" for k, v in setting["family_options"].items())
    print(
        f"{setting['family']}{options}: {command.tasks} held-out tasks, {command.episodes}"
        f" episodes of {setting['horizon']} steps each\n"
    )
    if command.per_task:
        print(f"{result.task_table()}\n")
    print(f"{result.table()}\n\n{result.verdicts()}")
    print(", ".join(map(str, files)))
    return 0


def _evaluate(what: Sequence[str], out: Path | None, **options: Any) -> tuple[Any, list[Path]]:
    """Evaluate policies; leave the result and its pictures in the first one's folder, or out."""
    from metarl.running import evaluation
    from metarl.running.files import write_atomically
    from metarl.running.metrics import show_adaptation
    from metarl.showing import plots

    if not what:
        raise UserError("name a run folder, a policy file or a shipped policy to evaluate")
    groups = evaluation.grouped(what)
    (name, members), *others = groups.items()
    references = {key: list(other.values()) for key, other in others}
    seeds = list(members.values())
    result = evaluation.evaluate(seeds, references=references, name=name, **options)
    folder = results_folder(next(iter(members)), out)
    files = [folder / "evaluation.json"]
    write_atomically(files[0], json.dumps(result.to_json(), indent=2).encode())
    files += plots.plot_evaluation(result, folder / "evaluation.png")
    files += plots.plot_tasks(result, folder / "evaluation-tasks.png")
    files += plots.plot_paths(result, folder / "evaluation-paths.png")
    if (folder / "config.json").exists():  # a run, which TensorBoard shows
        images = {"curve": files[1].read_bytes(), "tasks": files[3].read_bytes()}
        show_adaptation(folder / "evaluation", result.curve.returns, images)
    return result, [path for path in files if path.suffix != ".svg"]


def adapt(command: Adapt) -> int:
    """Run `metarl adapt`."""
    from metarl.running.meta_policy import load

    what = _one(command.what)
    meta = load(what)
    if not command.task:
        names = " ".join(f"{name}=..." for name in meta.family.tasks.names)
        raise UserError(f"name the task: --task {names}")
    task = parse_task(meta.family, command.task)
    options: dict[str, Any] = {"episodes": command.episodes, "seed": command.seed}
    options["step_sizes"] = command.step_sizes or None
    before, after = (meta.adapt(task, steps=steps, **options) for steps in (0, command.steps))
    seeds = range(command.seed, command.seed + command.episodes)
    with contextlib.closing(meta.family.make(task)) as env:
        returns = [np.mean([p.play(env, seed=seed) for seed in seeds]) for p in (before, after)]
    print(
        f"{what} on {' '.join(command.task)}: return {returns[0]:.1f} -> {returns[1]:.1f} after"
        f" {_steps(command.steps)} of {command.episodes} episodes each"
    )
    if command.save is not None:
        after.save(command.save)
        print(f"saved {command.save}; next: metarl record {command.save}")
    return 0


def export(command: Export) -> int:
    """Run `metarl export`."""
    from metarl.running import checkpoints
    from metarl.running.export import CHECKED, SUFFIXES
    from metarl.running.export import export as write
    from metarl.running.meta_policy import load, load_policy

    what = _one(command.what)
    adapted = Path(what).is_file() and checkpoints.load(Path(what))[1].get("kind") == "adapted"
    if adapted:
        if command.task:
            raise UserError(f"{what} is adapted already: leave --task out")
        policy = load_policy(what)
        family = make_family(policy.config.family, **policy.config.family_options)
    else:
        meta = load(what)
        family = meta.family
        task = parse_task(family, command.task) if command.task else family.tasks.grid(1)[0]
        policy = meta.adapt(
            task,
            steps=command.steps if command.task else 0,
            episodes=command.episodes,
            seed=command.seed,
            step_sizes=command.step_sizes or None,
        )
    with contextlib.closing(family.make()) as env:
        space = env.observation_space
    source = Path(what)
    folder = source if source.is_dir() else source.parent
    out = command.out or (folder / source.stem).with_suffix(SUFFIXES[command.format])
    out.parent.mkdir(parents=True, exist_ok=True)
    gap = write(policy, out, command.format, space)
    seen = " x ".join(map(str, policy.policy.observation_shape))
    print(
        f"{out}: observations [n, {seen}] to the most likely actions;"
        f" equal to the policy's on {CHECKED} observations, to {gap:.1g}"
    )
    return 0


def plot(command: Plot) -> int:
    """Run `metarl plot`."""
    from metarl.showing.plots import plot_learning

    if not command.what:
        raise UserError("name a run folder to plot")
    out = command.out or command.what[0] / "learning.png"
    paths = plot_learning(command.what, out, against=command.against, smooth=command.smooth)
    print(", ".join(map(str, paths)))
    return 0


def record(command: Record) -> int:
    """Run `metarl record`."""
    what = _one(command.what)
    video = _film(
        what,
        command.task,
        steps=command.steps,
        episodes=command.episodes,
        step_sizes=command.step_sizes or None,
        seed=command.seed,
        deterministic=command.deterministic,
        speed=command.speed,
    )
    out = command.out or results_folder(what) / "video.mp4"
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_suffix(suffix) for suffix in (".mp4", ".gif")]
    for path in paths:
        video.save(path)
    if command.tensorboard:
        from metarl.running.metrics import show_adaptation

        gif = {"video": paths[1].read_bytes()}
        show_adaptation(results_folder(what) / "video", [], gif)
    print(", ".join(map(str, paths)))
    return 0


def _film(
    what: str,
    texts: Sequence[str],
    *,
    steps: int = 1,
    episodes: int = 20,
    step_sizes: Sequence[float] | None = None,
    seed: int = 0,
    deterministic: bool = False,
    speed: float = 1.0,
) -> Any:
    """Return a video of a meta-policy before and after adaptation, or of an adapted policy."""
    from metarl.running import checkpoints
    from metarl.running.meta_policy import load, load_policy
    from metarl.showing import videos

    videos.prepare()
    if Path(what).is_file() and checkpoints.load(Path(what))[1].get("kind") == "adapted":
        policy = load_policy(what)
        family = make_family(policy.config.family, **policy.config.family_options)
        task = policy.record["task"] if not texts else parse_task(family, texts)
        if task is None:
            raise UserError(f"{what} does not know its task: give it with --task")
        policies = {f"after {_steps(policy.record['steps'])}": policy}
    else:
        meta = load(what)
        family = meta.family
        # Not the first task of the grid: in the middle of the plane there is nothing to see.
        task = parse_task(family, texts) if texts else family.tasks.grid(4)[-1]
        options: dict[str, Any] = {"episodes": episodes, "seed": seed, "step_sizes": step_sizes}
        policies = {
            "before adaptation": meta.adapt(task, steps=0, **options),
            f"after {_steps(steps)}": meta.adapt(task, steps=steps, **options),
        }
    return videos.record(
        policies, family, np.asarray(task), seed=seed, deterministic=deterministic, speed=speed
    )


def report(command: Report) -> int:
    """Run `metarl report`."""
    from metarl.running.meta_policy import load
    from metarl.running.metrics import read_metrics
    from metarl.showing.plots import plot_learning
    from metarl.showing.report import write_report

    if not command.what:
        raise UserError("name a run folder, a policy file or a shipped policy to report on")
    what = command.what[0]
    trained = dict(load(what).record)
    folder = results_folder(what)
    try:
        fresh = json.loads((folder / "evaluation.json").read_text())["trained"] == trained
    except (OSError, ValueError, KeyError):
        fresh = False
    if not fresh or len(command.what) > 1:
        options: dict[str, Any] = {"tasks": command.tasks, "episodes": command.episodes}
        options["workers"] = default_workers()
        _evaluate(command.what, folder, **options, steps=command.steps, threads=command.threads)
    if read_metrics(folder):
        plot_learning([folder], folder / "learning.png")
    why = "" if command.video else "None was asked for."
    if command.video and (not (folder / "video.mp4").exists() or not fresh):
        try:
            _film(what, ()).save(folder / "video.mp4")
        except UserError as error:
            why = str(error)
            print(why)
    out = command.out or folder / "report.html"
    config = folder / "config.json"
    run = json.loads(config.read_text()) if config.exists() else None
    write_report(folder, out, f"metarl: {Path(what).name}", run=run, no_video=why)
    print(out)
    return 0
