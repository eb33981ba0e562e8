"""The command line, a table of commands; those about trained policies are in `policy_commands`.

Exit codes: 0 done, 2 the user can mend it, 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from metarl.commands import policy_commands
from metarl.envs.errors import UserError
from metarl.envs.family import did_you_mean, family_names, make_family, parse_options
from metarl.running.config import Config, default_workers
from metarl.running.presets import preset_config


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
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: metarl COMMAND [OPTIONS]\n\nGradient-based meta-reinforcement learning.\n")
        for command, (kind, _) in COMMANDS.items():
            print(f"  {command:<12}{kind.__doc__}")
        print("\nmetarl COMMAND --help lists the options of a command.")
        return 0 if arguments else 2
    if name == "--version":
        from metarl.running.checkpoints import DISTRIBUTION, versions

        print(f"metarl {versions()[DISTRIBUTION]}")
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"no command {name!r}{did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})"
        )
    kind, function = COMMANDS[name]
    rest = _names_first(arguments[1:], kind)
    default: Any = tyro.MISSING_NONPROP
    if kind is Train:
        default = Train(config=_starting_config(rest))
    elif kind is Benchmark:
        family, preset = "half-cheetah-dir", _peek(rest, "--preset") or "pearl2019"
        family = next((a for a in rest[:1] if a[:1] != "-"), family)
        config = preset_config(preset, family, _peek(rest, "--algorithm") or "maml-trpo")
        default = Benchmark(config=dataclasses.replace(config, workers=default_workers()))
    command = tyro.cli(
        kind,
        args=rest,
        default=default,
        prog=f"metarl {name}",
        description=kind.__doc__,
    )
    return function(command)


def _names_first(arguments: Sequence[str], kind: type) -> list[str]:
    """Move the names that a command takes before its flags, where tyro looks for them."""
    types = typing.get_type_hints(kind)
    if "what" not in types:
        return list(arguments)
    names, flags = [], []
    wanted: Callable[[str], bool] | None = None  # whether a word is the last flag's value
    for word in arguments:
        if word.startswith("--"):
            key, equals, _ = word[2:].partition("=")
            flag = types.get(key.replace("-", "_"), bool)
            wanted = None
            if not equals and typing.get_origin(flag) is tuple:
                wanted = _is_number if float in typing.get_args(flag) else lambda x: "=" in x
            elif not equals and flag is not bool:
                wanted = _once()
            flags.append(word)
        elif word == "-h" or (wanted is not None and wanted(word)):
            flags.append(word)
        else:
            names.append(word)
    return names + flags


def _once() -> Callable[[str], bool]:
    left = iter([True])
    return lambda word: next(left, False)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


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
        from metarl.running.runs import run_config

        return run_config(Path(resume))
    family = next((a for a in arguments[:1] if not a.startswith("-")), "")
    if family and family not in family_names() and ":" not in family:
        make_family(family)  # raises, with the nearest name
    algorithm = _peek(arguments, "--algorithm") or "maml-trpo"
    config = preset_config(_peek(arguments, "--preset"), family, algorithm)
    return dataclasses.replace(config, workers=default_workers())


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

    from metarl.running.trainer import train

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


def _check(command: Check) -> int:
    from metarl.envs.checker import CHECKS, checks

    if not command.family:
        raise UserError("name a task family: metarl check FAMILY (metarl families lists them)")
    family = make_family(command.family, **parse_options(command.family_options))
    print(f"{command.family}: {family.tasks.describe()}; horizon {family.horizon}")
    labels = {"fault": "FAULT", "warning": "warn"}
    faults = 0
    for checked in checks(family):
        said = [(labels[found.severity], found.message) for found in checked.findings]
        if checked.left_out is not None:
            said = [("-", f"left out for the fault of {checked.left_out}")]
        for label, message in said or [("ok", CHECKS[checked.name].words)]:
            print(f"  {label:<6} {checked.name:<12} {message}", flush=True)
        faults += any(found.severity == "fault" for found in checked.findings)
    return 2 if faults else 0


def _families(command: Families) -> int:
    from metarl.envs.family import option_defaults

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
    from metarl.learning.algorithms import ALGORITHMS

    for row in ALGORITHMS.values():
        print(f"{row.name:<18}{row.description}\n{'':<18}{row.source}")
    return 0


def _benchmark(command: Benchmark) -> int:
    from metarl.running.benchmark import benchmark, table

    result = benchmark(_with_options(command.config, command.family_options), command.repeats)
    print(json.dumps(result, indent=2) if command.json else table(result))
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (Train, _train),
    "evaluate": (policy_commands.Evaluate, policy_commands.evaluate),
    "adapt": (policy_commands.Adapt, policy_commands.adapt),
    "export": (policy_commands.Export, policy_commands.export),
    "plot": (policy_commands.Plot, policy_commands.plot),
    "record": (policy_commands.Record, policy_commands.record),
    "report": (policy_commands.Report, policy_commands.report),
    "check": (Check, _check),
    "families": (Families, _families),
    "algorithms": (Algorithms, _algorithms),
    "benchmark": (Benchmark, _benchmark),
}
