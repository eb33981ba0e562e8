"""The commands that make one policy of a meta-policy, or show it: adapt, export, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from metarl.cli.arguments import check_file, check_place
from metarl.cli.streams import note, say
from metarl.envs import guard
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.registry import make_family
from metarl.envs.supervised.family import SupervisedFamily


@dataclass(frozen=True, kw_only=True)
class _Adaptation:
    """How a policy is adapted to a task."""

    steps: int = 1
    """Number of inner steps."""
    episodes: int = 20
    """Episodes for each inner step."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step, the last repeated; by default the policy's own."""
    seed: int = 0
    """Seed of the episodes."""

    def options(self) -> dict[str, Any]:
        """Return the arguments of `MetaPolicy.adapt`, but for the task and the steps."""
        sizes = self.step_sizes or None
        return {"episodes": self.episodes, "seed": self.seed, "step_sizes": sizes}


@dataclass(frozen=True, kw_only=True)
class Adapt(_Adaptation):
    """Adapt a meta-policy to one task; save an ordinary policy."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    """A run folder, a policy file or the name of a shipped policy."""
    task: tuple[str, ...] = ()
    """The task, as component=value for each component (metarl families lists them)."""
    save: Path | None = None
    """File to write the adapted policy to."""


@dataclass(frozen=True, kw_only=True)
class Record(_Adaptation):
    """Film a policy on one task before and after adaptation, side by side."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    """A run folder, a policy file (also an adapted one) or the name of a shipped policy."""
    task: tuple[str, ...] = ()
    """The task, as component=value for each component; by default one of the test tasks."""
    deterministic: bool = False
    """Take the mean action instead of a sampled one."""
    speed: float = 1.0
    """Speed of playback; 1 is real time."""
    tensorboard: bool = False
    """Also show the video in the run's TensorBoard."""
    out: Path | None = None
    """Video to write, as MP4 and GIF; by default video.mp4 in the run folder, or in
    runs/NAME-evaluation for a policy file or a shipped policy."""


@dataclass(frozen=True, kw_only=True)
class Export(_Adaptation):
    """Write a policy to a file that other programs run (TorchScript or ONNX)."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    """A policy file that `metarl adapt` wrote; or a run folder, a policy file or the name of a
    shipped policy, which --task adapts first and which is exported as it is otherwise."""
    format: Literal["torchscript", "onnx"] | None = None
    """File format; by default that of the suffix of --out, else torchscript. onnx needs the package
    onnx (the extra `onnx`)."""
    task: tuple[str, ...] = ()
    """Task to adapt an initialization to, as component=value for each component."""
    out: Path | None = None
    """File to write; by default NAME.pt or NAME.onnx beside the policy."""


def results_folder(what: str, out: Path | None = None) -> Path:
    """Make and return the folder for what is found out about a policy: its run's, if it has one."""
    from metarl.runs.folder import short_name

    source = Path(what)
    named = Path("runs") / f"{short_name(what)}-evaluation"
    folder = out or (source if source.is_dir() else named)
    check_place("--out", folder)
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


def parse_task(family: Family, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the task vector of ("velocity=1.7",); say where it is outside the range of training.

    Raises:
        UserError: a text is no component=value, or a component is unknown, missing or repeated.
    """
    components: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in components:
            raise UserError(f"task component {name!r} is given twice")
        try:
            components[name] = float(value)
        except ValueError as error:
            raise UserError(f"a task is written component=value, got {text!r}") from error
    task = family.tasks.vector(components)
    for name, value, low, high in zip(
        family.tasks.names, task, *family.tasks.bounds(), strict=True
    ):
        if not low <= value <= high:
            outside = f"{name}={value:g} is outside the tasks of training, [{low:g}, {high:g}]"
            note(f"note: {outside}")
    return task


def adapt(command: Adapt) -> int:
    """Run `metarl adapt`."""
    from metarl.policies.loading import load

    what = _one(command.what)
    check_file("--save", command.save)
    if command.save is not None and not command.save.absolute().parent.is_dir():
        raise UserError(f"--save {command.save}: there is no folder {command.save.parent}")
    meta = load(what)
    if not command.task:
        names = " ".join(f"{name}=..." for name in meta.source.tasks.names)
        raise UserError(f"name the task: --task {names}")
    task = parse_task(meta.source, command.task)
    if isinstance(meta.source, SupervisedFamily):
        return _adapt_to_examples(command, what, meta, meta.source, task)
    before, after = (
        meta.adapt(task, steps=steps, **command.options()) for steps in (0, command.steps)
    )
    seeds = range(command.seed, command.seed + command.episodes)
    with guard.opened(lambda: meta.family.make(task)) as env:
        returns = [np.mean([p.play(env, seed=seed) for seed in seeds]) for p in (before, after)]
    if command.save is not None:
        after.save(command.save)
    say(
        f"{what} on {' '.join(command.task)}: return {returns[0]:.1f} -> {returns[1]:.1f} after"
        f" {_steps(after.provenance['steps'])} of {command.episodes} episodes each"
    )
    if command.save is not None:
        say(f"saved {command.save}; next: metarl record {quote(str(command.save))}")
    return 0


def _adapt_to_examples(
    command: Adapt, what: str, meta: Any, family: SupervisedFamily, task: NDArray[np.float64]
) -> int:
    """Adapt to examples of a supervised task, and say how well that does on others."""
    if command.save is not None:
        raise UserError(
            "--save writes policies: a predictor is adapted where it is used (adapt_to)"
        )
    if command.episodes != Adapt.episodes:
        raise UserError(f"--episodes has no effect on the supervised tasks of {family.name}")
    rng = np.random.default_rng(command.seed)
    drawn = family.draw(task[None], rng, supports=1, queries=family.test_queries)
    (x, y), (query_x, truth) = ((d.inputs[d.valid], d.targets[d.valid]) for d in drawn)
    said = []
    for steps in (0, command.steps):
        sizes = command.step_sizes or None
        found = meta.adapt_to(x, y, steps=steps, step_sizes=sizes).predict(query_x)
        classes = family.kind == "classification"
        said.append(
            f"{100.0 * (found == truth).mean():.1f} %" if classes
            else f"{np.square(found - truth).sum(axis=-1).mean():.3f}"
        )  # fmt: skip
    name = "accuracy" if family.kind == "classification" else "mean squared error"
    say(
        f"{what} on {' '.join(command.task)}: {name} {' -> '.join(said)} after"
        f" {_steps(command.steps)} on {len(x)} examples"
    )
    return 0


def export(command: Export) -> int:
    """Run `metarl export`."""
    from metarl.policies.export import CHECKED, SUFFIXES, Format
    from metarl.policies.export import export as write
    from metarl.policies.loading import load, load_policy
    from metarl.runs import checkpoints

    what = _one(command.what)
    check_file("--out", command.out, tuple(SUFFIXES.values()))
    formats: dict[str, Format] = {suffix: name for name, suffix in SUFFIXES.items()}
    said = formats.get(command.out.suffix) if command.out is not None else None
    if command.format and said and command.format != said:
        raise UserError(f"--out {command.out} is a name for {said}, and --format {command.format}")
    kind = command.format or said or "torchscript"
    adapted = Path(what).is_file() and checkpoints.load(Path(what))[1].get("kind") == "adapted"
    if adapted:
        if command.task:
            raise UserError(f"{what} is adapted already: leave --task out")
        policy = load_policy(what)
        family = make_family(policy.config.family, **policy.config.family_options)
    else:
        meta = load(what)
        family = meta.family
        usual = Export(what=command.what)
        adapts = (command.steps, command.options()) != (usual.steps, usual.options())
        told = meta.algorithm.task_conditioned
        if (adapts or told) and not command.task:
            names = " ".join(f"{name}=..." for name in family.tasks.names)
            why = "an oracle is told its task;" if told else "to adapt before it is exported,"
            raise UserError(f"{why} name the task: --task {names}")
        task = parse_task(family, command.task) if command.task else family.tasks.grid(1)[0]
        steps = command.steps if command.task else 0
        policy = meta.adapt(task, steps=steps, **command.options())
    with guard.opened(family.make) as env:
        space = env.observation_space
    source = Path(what)
    folder = source if source.is_dir() else source.parent
    stem = source.resolve().name.removesuffix(".safetensors")
    out = command.out or folder / f"{stem}{SUFFIXES[kind]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    gap = write(policy, out, kind, space)
    seen = " x ".join(map(str, policy.policy.observation_shape))
    say(
        f"{out}: observations [n, {seen}] to the most likely actions;"
        f" equal to the policy's on {CHECKED} observations, to {gap:.1g}"
    )
    return 0


def record(command: Record) -> int:
    """Run `metarl record`."""
    what = _one(command.what)
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


def film(
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
    from metarl.plots import video as videos
    from metarl.policies.loading import load, load_policy
    from metarl.runs import checkpoints

    videos.prepare()
    if Path(what).is_file() and checkpoints.load(Path(what))[1].get("kind") == "adapted":
        policy = load_policy(what)
        family = make_family(policy.config.family, **policy.config.family_options)
        task = policy.provenance["task"] if not texts else parse_task(family, texts)
        if task is None:
            raise UserError(f"{what} does not know its task: give it with --task")
        policies = {f"after {_steps(policy.provenance['steps'])}": policy}
    else:
        meta = load(what)
        family = meta.family
        # Not the first task of the grid: in the middle of the plane there is nothing to see.
        task = parse_task(family, texts) if texts else family.tasks.grid(4)[-1]
        options: dict[str, Any] = {"episodes": episodes, "seed": seed, "step_sizes": step_sizes}

        def after(steps: int) -> Any:
            return meta.adapt(task, steps=steps, **options)

        if meta.algorithm.task_conditioned:
            policies = {"told its task": after(0)}
        else:
            policies = {"before adaptation": after(0), f"after {_steps(steps)}": after(steps)}
    return videos.record(
        policies, family, np.asarray(task), seed=seed, deterministic=deterministic, speed=speed
    )
