"""The commands that train: train, benchmark."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import tyro

from metarl.cli.arguments import peek, said
from metarl.cli.streams import note, say
from metarl.config.options import Config, config_keys, default_workers
from metarl.config.resolve import resolve, usual_preset
from metarl.distributed.process_group import LIMIT_SECONDS, Ranks, joined
from metarl.envs.errors import UserError
from metarl.envs.registry import (
    data_names,
    is_supervised,
    make_family,
    option_defaults,
    parse_options,
)
from metarl.runs.plain_json import json_text
from metarl.runs.stopping import Stop

_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of `metarl train`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """New run folder; by default runs/FAMILY-PRESET-ALGORITHM-SEED."""
    resume: Path | None = None
    """Run folder to continue, up to --iterations; other options are taken from the run. auto:
    continue the run in --out if there is one, else start it, for jobs that may be restarted."""
    start: Annotated[int | None, tyro.conf.arg(name="from")] = None
    """With --resume: iteration of the checkpoint to continue from; by default the newest."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value (metarl families lists them)."""
    rank_timeout: float = LIMIT_SECONDS
    """Under torchrun: seconds after which a rank that the others wait for is considered dead."""

    @staticmethod
    def rewritten(arguments: Sequence[str]) -> list[str]:
        """Return the words with flags that are options of a supervised family as such."""
        return _family_flags(arguments)

    @staticmethod
    def starting(arguments: Sequence[str]) -> Train:
        """Return what the flags change: a preset's values, or those of the run that goes on."""
        folder = peek(arguments, "--resume")
        if folder not in (None, _AUTO):
            from metarl.runs.folder import run_config

            return Train(config=run_config(Path(folder)))
        return Train(config=_starting_config(arguments, family=""))

    def resolved(self, arguments: Sequence[str]) -> Train:
        """Return the command with a config that follows from what was said."""
        options = parse_options(self.family_options)
        if self.resume is None or self.resume == Path(_AUTO):
            config = self.config
            if not said(arguments, ("preset",)):  # the family may come after other words
                config = dataclasses.replace(config, preset=usual_preset(config.family))
            config = _resolved(config, arguments, options)
        else:
            options = {**self.config.family_options, **options}
            config = dataclasses.replace(self.config, family_options=options)
        return dataclasses.replace(self, config=config)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Options of `metarl benchmark`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    repeats: int = 3
    """Iterations to measure, after one to warm up."""
    json: bool = False
    """Print one JSON object."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""
    rank_timeout: float = LIMIT_SECONDS
    """Under torchrun: seconds after which a rank that the others wait for is considered dead."""

    @staticmethod
    def starting(arguments: Sequence[str]) -> Benchmark:
        """Return what the flags change: a preset's values."""
        if arguments and arguments[0] in data_names():
            make_family(arguments[0])  # raises: there is no simulation to measure
        config = _starting_config(arguments, family="half-cheetah-dir", preset="pearl2019")
        return Benchmark(config=config)

    def resolved(self, arguments: Sequence[str]) -> Benchmark:
        """Return the command with a config that follows from what was said."""
        for key in said(arguments, ("iterations", "checkpoint_every")):
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{flag} changes nothing here: --repeats says how many are measured")
        config = _resolved(self.config, arguments, parse_options(self.family_options))
        return dataclasses.replace(self, config=config)


def _family_flags(arguments: Sequence[str]) -> list[str]:
    """Return `--shots 10` as `--family-options shots=10`, where shots is the family's option.

    Of a family of supervised tasks; a flag of the command itself is the command's.
    """
    family = next((a for a in arguments[:1] if not a.startswith("-")), "")
    options = option_defaults(family) if family in data_names() else {}
    names = {f"--{name.replace('_', '-')}" for name in options} - {"--family-options"}
    words, found = [], []
    rest = iter(arguments)
    for word in rest:
        flag, equals, value = word.partition("=")
        if equals and flag == "--family-options":
            words += [flag, value]
        elif flag not in names:
            words.append(word)
        else:
            given = value if equals else next(rest, "--")
            if given.startswith("--"):
                raise UserError(f"{flag} needs a value")
            found.append(f"{flag[2:]}={given}")
    if not found:
        return words
    if "--family-options" in words:
        place = words.index("--family-options") + 1
        return [*words[:place], *found, *words[place:]]
    return [*words, "--family-options", *found]


def _starting_config(arguments: Sequence[str], *, family: str, preset: str = "") -> Config:
    family = next((a for a in arguments[:1] if not a.startswith("-")), family)
    algorithm = peek(arguments, "--algorithm") or "maml-trpo"
    named = peek(arguments, "--preset") or preset or usual_preset(family)
    return resolve(
        None if named == "None" else named, family, algorithm, {"workers": default_workers()}
    )


def _resolved(parsed: Config, arguments: Sequence[str], options: Mapping[str, Any]) -> Config:
    """Return the config of the values that were given, and what follows from them."""
    apart = ("family", "preset", "algorithm", "family_options")
    free = [key for key in config_keys(parsed) if key not in apart]
    values: dict[str, Any] = {"workers": parsed.workers, "family_options": options}
    for key in said(arguments, free):
        section, dot, name = key.rpartition(".")
        values[key] = getattr(getattr(parsed, section) if dot else parsed, name)
    return resolve(parsed.preset, parsed.family, parsed.algorithm, values)


def train(command: Train) -> int:
    """Run `metarl train`."""
    config = command.config
    if not config.family:
        raise UserError("name a task family: metarl train FAMILY (metarl families lists them)")
    auto = command.resume == Path(_AUTO)
    resume = None if auto else command.resume
    if resume is not None and command.out not in (None, resume):
        raise UserError(f"--resume continues in {resume}; leave --out out")
    if resume is None and command.start is not None:
        raise UserError(f"--from {command.start} needs the run: --resume FOLDER")
    name = config.family.replace(":", "-")
    parts = (name, config.preset or "default", config.algorithm, str(config.seed))
    folder = resume or command.out or Path("runs") / "-".join(parts)
    with joined(command.rank_timeout) as ranks:
        return _train(command, folder, "auto" if auto else resume is not None, ranks)


def _train(command: Train, folder: Path, resume: bool | Literal["auto"], ranks: Ranks) -> int:
    from tqdm import tqdm

    from metarl.algorithms.table import find_algorithm
    from metarl.training import trainer

    config = command.config
    name = config.family.replace(":", "-")
    bar: Any = None

    def show(row: dict[str, Any]) -> None:
        nonlocal bar
        if bar is None:
            first = row["iteration"] - 1
            bar = tqdm(total=config.iterations, initial=first, unit="it", desc=name, smoothing=0.1)
        if "returns" in row:
            returns = [f"{r:.1f}" if r is not None else "none" for r in row["returns"]]
            bar.set_postfix_str(f"return {' -> '.join(returns)}", False)
        else:
            bar.set_postfix_str(f"loss {row['loss_pre']:.3g} -> {row['loss_post']:.3g}", False)
        if "skipped" in row:
            bar.write(f"iteration {row['iteration']}: update skipped, {row['skipped']}")
        bar.update()

    def tell(line: str, show: Callable[[str], object] = say) -> None:
        if ranks.is_main:
            show(line)

    supervised = is_supervised(config.family, config.family_options)

    def started() -> None:
        preset = f", preset {config.preset}," if config.preset else ""
        tell(f"{config.algorithm} on {config.family}{preset} in {folder}", note)
        bounded = find_algorithm(config.algorithm).outer == "trust-region"
        if bounded and supervised:
            tell("the outer step is Adam's: a trust region is a policy's", note)

    signals = (signal.SIGINT, signal.SIGTERM)
    with Stop(signals, _leave, quiet=not ranks.is_main) as stop:
        try:
            meta = trainer.train(
                config,
                folder,
                resume=resume,
                display=show,
                stop=stop,
                notice=note,
                start=command.start,
                started=started,
                ranks=ranks,
            )
        finally:
            if bar is not None:
                bar.close()
    done = meta.provenance["iteration"]
    if done < config.iterations:
        again = f"metarl train --resume {quote(str(folder))}"
        tell(f"stopped after iteration {done}; continue with: {again}")
        return 128 + (stop.signal or signal.SIGTERM)  # on another rank, if not on this one
    if ranks.is_main and bar is None:
        tell(f"nothing to do: {folder} has its {done} iterations; give more with --iterations")
        return 0
    sampled = "examples" if supervised else "env steps"
    tell(f"done: {done} iterations, {meta.provenance['env_steps']:,} {sampled}")
    tell(f"next: metarl evaluate {quote(str(folder))}")
    return 0


def _leave(number: int) -> None:
    os._exit(128 + number)


def benchmark(command: Benchmark) -> int:
    """Run `metarl benchmark`."""
    from metarl.evaluation import benchmark as measuring

    with joined(command.rank_timeout) as ranks:
        result = measuring.benchmark(command.config, command.repeats, ranks)
        if ranks.is_main:
            say(json_text(result, indent=2) if command.json else measuring.table(result))
    return 0
