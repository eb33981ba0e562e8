"""The command line: `metarl train | evaluate | check | families | algorithms | benchmark`.

Exit codes: 0 done, 2 the user can mend it, 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from envs.errors import UserError
from envs.family import did_you_mean, family_names, make_family, parse_options
from metarl.config import Config, available_threads
from metarl.presets import preset_config


@dataclass(frozen=True, kw_only=True)
class Train:
    """Meta-train a policy on a task family."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """Run folder to make; by default runs/FAMILY-PRESET-ALGORITHM-SEED."""
    resume: Path | None = None
    """Run folder to continue up to --iterations; its other options hold and may be left out."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value (metarl families lists them)."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how well a meta-policy adapts to held-out tasks."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A run folder, a policy file or the name of a shipped policy; further ones are references."""
    tasks: int = 40
    """Held-out tasks."""
    episodes: int = 20
    """Episodes a task, for each inner step and for each return."""
    steps: int = 3
    """Inner steps."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step, the last repeated; by default the policy's own."""
    random_step_sizes: tuple[float, ...] = ()
    """The same for the random initialization; by default as --step-sizes."""
    seed: int = 0
    """Seed of episodes, and of drawn tasks."""
    deterministic: bool = False
    """Take returns with the mean action instead of a sampled one."""
    drawn: bool = False
    """Draw the tasks at random, as the papers do, instead of covering the test split evenly."""
    threads: int | None = None
    """Threads; results do not depend on it."""
    workers: int = field(default_factory=lambda: _default_workers())
    """Worker processes for environments without a native backend; 0 steps them in this process."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.png; by default the run folder."""
    json: bool = False
    """Print the content of evaluation.json."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say what is wrong with a task family, your own for instance."""

    family: Annotated[str, tyro.conf.Positional] = ""
    """Task family: a name that `metarl families` lists, or module:attribute of your own."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""


@dataclass(frozen=True, kw_only=True)
class Families:
    """List the task families, their tasks and options."""


@dataclass(frozen=True, kw_only=True)
class Algorithms:
    """List the algorithms and their papers."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure sampling and training speed against the physics ceiling."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    repeats: int = 3
    """Measured iterations, after one to warm up."""
    json: bool = False
    """Print one JSON object."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    commands: dict[str, tuple[type, Callable[[Any], int]]] = {
        "train": (Train, _train),
        "evaluate": (Evaluate, _evaluate),
        "check": (Check, _check),
        "families": (Families, _families),
        "algorithms": (Algorithms, _algorithms),
        "benchmark": (Benchmark, _benchmark),
    }
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: metarl COMMAND [OPTIONS]\n\nGradient-based meta-reinforcement learning.\n")
        for command, (kind, _) in commands.items():
            print(f"  {command:<12}{kind.__doc__}")
        print("\nmetarl COMMAND --help lists the options of a command.")
        return 0 if arguments else 2
    if name == "--version":
        from metarl.checkpoints import DISTRIBUTION, versions

        print(f"metarl {versions()[DISTRIBUTION]}")
        return 0
    if name not in commands:
        raise UserError(
            f"no command {name!r}{did_you_mean(name, commands)} (commands: {', '.join(commands)})"
        )
    kind, function = commands[name]
    rest = arguments[1:]
    default: Any = tyro.MISSING_NONPROP
    if kind is Train:
        default = Train(config=_starting_config(rest))
    elif kind is Benchmark:
        family, preset = "half-cheetah-dir", _peek(rest, "--preset") or "pearl2019"
        family = next((a for a in rest[:1] if a[:1] != "-"), family)
        config = preset_config(preset, family, _peek(rest, "--algorithm") or "maml-trpo")
        default = Benchmark(config=dataclasses.replace(config, workers=_default_workers()))
    command = tyro.cli(
        kind,
        args=rest,
        default=default,
        prog=f"metarl {name}",
        description=kind.__doc__,
    )
    return function(command)


def _peek(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag before the command line is parsed as a whole."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _starting_config(arguments: Sequence[str]) -> Config:
    """Return what the flags change: the resumed run's config, or the preset's for the family."""
    resume = _peek(arguments, "--resume")
    if resume is not None:
        from metarl.runs import run_config

        return run_config(Path(resume))
    family = next((a for a in arguments[:1] if not a.startswith("-")), "")
    if family and family not in family_names() and ":" not in family:
        make_family(family)  # raises, with the nearest name
    algorithm = _peek(arguments, "--algorithm") or "maml-trpo"
    config = preset_config(_peek(arguments, "--preset"), family, algorithm)
    return dataclasses.replace(config, workers=_default_workers())


def _default_workers() -> int:
    """Return the processors there are, 0 for one: here, unlike in a script, workers can start."""
    processors = available_threads()
    return processors if processors > 1 else 0


def _with_options(config: Config, texts: Sequence[str]) -> Config:
    options = {**config.family_options, **parse_options(texts)}
    return dataclasses.replace(config, family_options=options)


class _Stop:
    """Ctrl-C or SIGTERM: the first asks to stop after the iteration, the second leaves at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> _Stop:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        print("\nstopping after this iteration; once more leaves at once", file=sys.stderr)


def _train(command: Train) -> int:
    from tqdm import tqdm

    from metarl.trainer import train

    config = _with_options(command.config, command.family_options)
    if not config.family:
        raise UserError("name a task family: metarl train FAMILY (metarl families lists them)")
    if command.resume is not None and command.out not in (None, command.resume):
        raise UserError(f"--resume continues in {command.resume}; leave --out out")
    name = config.family.replace(":", "-")
    parts = (name, config.preset or "default", config.algorithm, str(config.seed))
    folder = command.resume or command.out or Path("runs") / "-".join(parts)
    bar: Any = None

    def show(row: dict[str, Any]) -> None:
        nonlocal bar
        if bar is None:
            first = row["iteration"] - 1
            bar = tqdm(total=config.iterations, initial=first, unit="it", desc=name, smoothing=0.1)
        returns = [f"{r:.1f}" if r is not None else "none" for r in row["returns"]]
        bar.set_postfix_str(f"return {' -> '.join(returns)}", False)
        if "skipped" in row:
            bar.write(f"iteration {row['iteration']}: update skipped, {row['skipped']}")
        bar.update()

    print(f"{config.algorithm} on {config.family} in {folder}", file=sys.stderr)
    with _Stop() as stop:
        try:
            meta = train(
                config, folder, resume=command.resume is not None, progress=show, stop=stop
            )
        finally:
            if bar is not None:
                bar.close()
    done = meta.record["iteration"]
    if bar is None and stop.signal is None:
        print(f"nothing to do: {folder} has its {done} iterations; give more with --iterations")
        return 0
    if done < config.iterations and stop.signal is not None:
        print(f"stopped after iteration {done}; continue with: metarl train --resume {folder}")
        return 128 + stop.signal
    print(f"done: {done} iterations, {meta.record['env_steps']:,} env steps")
    print(f"next: metarl evaluate {folder}")
    return 0


def _evaluate(command: Evaluate) -> int:
    from metarl.checkpoints import write_atomically
    from metarl.evaluation import evaluate
    from metarl.meta_policy import load
    from metarl.plots import plot_evaluation

    if not command.what:
        raise UserError("name a run folder, a policy file or a shipped policy to evaluate")
    first, *others = command.what
    result = evaluate(
        load(first),
        tasks=command.tasks,
        episodes=command.episodes,
        steps=command.steps,
        seed=command.seed,
        step_sizes=command.step_sizes,
        random_step_sizes=command.random_step_sizes,
        references={Path(other).stem: load(other) for other in others},
        deterministic=command.deterministic,
        drawn=command.drawn,
        threads=command.threads,
        workers=command.workers,
    )
    folder = command.out
    if folder is None:
        source = Path(first)
        folder = source if source.is_dir() else Path("runs") / f"{source.stem}-evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_json(), indent=2)
    write_atomically(folder / "evaluation.json", text.encode())
    plot_evaluation(result, folder / "evaluation.png")
    if command.json:
        print(text)
        return 0
    setting = result.setting
    options = "".join(f" {k}={v}" for k, v in setting["family_options"].items())
    sizes = ", ".join(f"{size:g}" for size in result.curve.step_sizes) or "none"
    print(
        f"{setting['family']}{options}: {command.tasks} held-out tasks, {command.episodes}"
        f" episodes of {setting['horizon']} steps each, step sizes {sizes}\n"
    )
    print(result.table())
    print(f"\n{result.verdict()}\n{folder / 'evaluation.json'}, {folder / 'evaluation.png'}")
    return 0


def _check(command: Check) -> int:
    from envs.checker import CHECKS, check_task_family

    if not command.family:
        raise UserError("name a task family: metarl check FAMILY (metarl families lists them)")
    family = make_family(command.family, **parse_options(command.family_options))
    print(f"{command.family}: {family.tasks.describe()}; horizon {family.horizon}")
    findings = check_task_family(family)
    names = list(CHECKS)
    reached = names.index(findings[0].check) if findings else len(names)
    for name in names[:reached]:
        print(f"  ok     {name:<12} {CHECKS[name][0]}")
    for finding in findings:
        print(f"  FAULT  {finding.check:<12} {finding.message}")
    if rest := names[reached + 1 :]:
        print(f"  not reached: {', '.join(rest)}")
    return 2 if findings else 0


def _families(command: Families) -> int:
    from envs.family import option_defaults

    for name in family_names():
        try:
            family = make_family(name)
        except UserError as error:  # not installed, or a package's fault
            print(f"{name}\n    error: {error}")
            continue
        tasks = f"{family.tasks.describe()}; horizon {family.horizon}"
        print(f"{name}\n    {family.description}\n    tasks: {tasks}")
        options = option_defaults(name)
        print("    options: " + ", ".join(f"{k}={v}" for k, v in options.items()))
    print("\nYour own: metarl check my_module:my_family, then train (see the README)")
    return 0


def _algorithms(command: Algorithms) -> int:
    from metarl.algorithms import ALGORITHMS

    for row in ALGORITHMS.values():
        print(f"{row.name:<18}{row.description}\n{'':<18}{row.source}")
    return 0


def _benchmark(command: Benchmark) -> int:
    from metarl.benchmark import benchmark, table

    result = benchmark(_with_options(command.config, command.family_options), command.repeats)
    print(json.dumps(result, indent=2) if command.json else table(result))
    return 0
