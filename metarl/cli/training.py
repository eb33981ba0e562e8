"""Training commands: train, benchmark."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import tyro

from metarl.algorithms import Algorithm, find_algorithm
from metarl.cli.arguments import peek
from metarl.cli.options import with_options
from metarl.cli.parsing import first_name, flags_of
from metarl.cli.streams import note, say
from metarl.config.options import CHOICES, Config, default_workers
from metarl.config.resolve import resolve, usual_preset
from metarl.distributed.process_group import LIMIT_SECONDS, ProcessGroup, joined
from metarl.envs.errors import UserError
from metarl.envs.registry import (
    data_names,
    is_built_in,
    make_family,
    option_defaults,
    parse_options,
)
from metarl.plain_json import json_text
from metarl.runs.stopping import Stop

_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of `metarl train`; `with_options` adds the options of the config."""

    out: Path | None = None
    """New run folder; by default runs/FAMILY-PRESET-ALGORITHM-SEED."""
    resume: Path | None = None
    """Run folder to continue, up to --iterations; other options come from the run. auto: continue
    the run in --out if it exists, else start it, for jobs that may be restarted."""
    start: Annotated[int | None, tyro.conf.arg(name="from")] = None
    """With --resume: iteration of the checkpoint to continue from; by default the newest."""
    init: str | None = None
    """Policy to start from: the name of a shipped one, a run folder or a policy file. Tasks and
    settings may differ; the network must be the same."""
    callback: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Callback as module:attribute, such as metarl:EarlyStopping."""
    log: Annotated[tuple[Literal["wandb", "mlflow"], ...], tyro.conf.UseAppendAction] = ()
    """Also record metrics with Weights & Biases or MLflow."""
    rank_timeout: float = LIMIT_SECONDS
    """Under torchrun: seconds of waiting for a rank after which it is considered dead."""

    @staticmethod
    def rewritten(arguments: Sequence[str]) -> list[str]:
        """Return the words, with options of a supervised family rewritten as `--family-options`."""
        return _family_flags(arguments)

    @staticmethod
    def starting(arguments: Sequence[str]) -> Config:
        """Return the config that the flags modify: of a preset, or of the run to continue."""
        folder = peek(arguments, "--resume")
        if folder not in (None, _AUTO):
            from metarl.runs.folder import run_config

            return run_config(Path(folder))
        return _starting_config(arguments, family="")

    @staticmethod
    def resolved(config: Config, arguments: Sequence[str], said: Mapping[str, Any]) -> Config:
        """Return the config that results from the given options."""
        if peek(arguments, "--resume") in (None, _AUTO):
            return _resolved(config, said)
        _check_same(config, said)
        options = {**config.family_options, **said.get("family_options", {})}
        config = dataclasses.replace(config, family_options=options)
        values = {k: v for k, v in said.items() if k in config.options()}
        return config.with_options(values)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Options of `metarl benchmark`; `with_options` adds the options of the config."""

    repeats: int = 3
    """Measured iterations, after one warm-up iteration."""
    json: bool = False
    """Print one JSON object."""
    rank_timeout: float = LIMIT_SECONDS
    """Under torchrun: seconds of waiting for a rank after which it is considered dead."""

    @staticmethod
    def starting(arguments: Sequence[str]) -> Config:
        """Return the config that the flags modify: a preset's."""
        family = _family_named(arguments)
        if family in data_names():
            make_family(family)  # raises: no simulation to measure
        preset = "pearl2019" if not family or is_built_in(family) else ""
        return _starting_config(arguments, family="half-cheetah-dir", preset=preset)

    @staticmethod
    def resolved(config: Config, arguments: Sequence[str], said: Mapping[str, Any]) -> Config:
        """Return the config that results from the given options."""
        for key in ("iterations", "checkpoint_every"):
            if key in said:
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"{flag} has no effect: --repeats sets the number of iterations")
        return _resolved(config, said)


def _family_flags(arguments: Sequence[str]) -> list[str]:
    """Return `--shots 10` as `--family-options shots=10` if shots is an option of the family.

    This applies to families of supervised tasks. Flags of the command have precedence.
    """
    family = _family_named(arguments)
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


def _check_same(config: Config, said: Mapping[str, Any]) -> None:
    """Raise UserError if the words name another family, preset or algorithm than the run's."""
    own = {
        "family": config.family, "preset": config.preset, "algorithm": config.algorithm.source,
    }  # fmt: skip
    for key, value in own.items():
        if said.get(key, value) != value:
            raise UserError(
                f"the run to resume has the {key} {value}, not {said[key]}: remove that, or"
                " start a new run"
            )


def _family_named(arguments: Sequence[str]) -> str:
    """Return the family that a command line names, at any position; "" for none."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    config = Config(algorithm=_algorithm_named(arguments))
    for name, word in _chosen(arguments).items():
        with contextlib.suppress(UserError):  # a network of data sets; parsing reports errors
            config = config.with_options({name: word})
    flags = flags_of(with_options(Train, config)) | flags_of(Benchmark)
    return first_name(arguments, [name for name, flag in flags.items() if flag.kind is bool])


def _algorithm_named(arguments: Sequence[str]) -> Algorithm:
    return find_algorithm(peek(arguments, "--algorithm") or "maml-trpo")


def _chosen(arguments: Sequence[str]) -> dict[str, str]:
    """Return the parts that a command line chooses, by option."""
    words = {name: peek(arguments, f"--{name}") for name in CHOICES}
    return {name: word for name, word in words.items() if word is not None}


def _family_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the family options of a command line. Parsing refuses invalid ones."""
    words = list(arguments)
    if "--family-options" not in words:
        return {}
    rest = words[words.index("--family-options") + 1 :]
    given = itertools.takewhile(lambda word: "=" in word and not word.startswith("--"), rest)
    return parse_options(given)


def _starting_config(arguments: Sequence[str], *, family: str, preset: str = "") -> Config:
    family = _family_named(arguments) or family
    algorithm = _algorithm_named(arguments)
    named = peek(arguments, "--preset") or preset or usual_preset(family)
    values: dict[str, Any] = {**_chosen(arguments), "family_options": _family_options(arguments)}
    config = resolve(None if named == "None" else named, family, algorithm, values)
    return dataclasses.replace(config, workers=default_workers())


def _resolved(start: Config, said: Mapping[str, Any]) -> Config:
    """Return the config with the given values and the values that follow from them."""
    apart = ("family", "preset", "algorithm")
    values = {key: value for key, value in said.items() if key not in apart}
    if "workers" in start.options():
        values.setdefault("workers", start.workers)
    return resolve(start.preset, start.family, start.algorithm.source, values)


def train(command: Any) -> int:
    """Run `metarl train`."""
    config = command.config
    if not config.family:
        raise UserError("name a task family: metarl train FAMILY (metarl families lists them)")
    auto = command.resume == Path(_AUTO)
    resume = None if auto else command.resume
    if resume is not None and command.out not in (None, resume):
        raise UserError(f"--resume continues in {resume}; remove --out")
    if resume is not None and command.init is not None:
        raise UserError(
            f"--init {command.init} starts a new run, but --resume continues {resume}:"
            " remove one of them"
        )
    if resume is None and command.start is not None:
        raise UserError(f"--from {command.start} needs the run: --resume FOLDER")
    name = config.family.replace(":", "-")
    algorithm = re.sub(r"[^\w.+-]+", "-", config.algorithm.name)
    parts = (name, config.preset or "default", algorithm, str(config.seed))
    folder = resume or command.out or Path("runs") / "-".join(parts)
    with joined(command.rank_timeout) as process_group:
        return _train(command, folder, "auto" if auto else resume is not None, process_group)


def _train(
    command: Any, folder: Path, resume: bool | Literal["auto"], process_group: ProcessGroup
) -> int:
    from metarl.training.callbacks import find_callback
    from metarl.training.loggers import LOGGERS
    from metarl.training.progress import ProgressBar
    from metarl.training.run import train as train_in

    config = command.config
    callbacks = [find_callback(name) for name in command.callback]
    callbacks += [LOGGERS[name]() for name in dict.fromkeys(command.log)]
    bar = ProgressBar(config)

    def tell(line: str, show: Callable[[str], object] = say) -> None:
        if process_group.is_main:
            show(line)

    def started() -> None:
        preset = f", preset {config.preset}," if config.preset else ""
        tell(f"{config.algorithm.name} on {config.family}{preset} in {folder}", note)
        usual = find_algorithm(config.algorithm.source or config.algorithm).outer.name
        if config.outer.name != usual:
            tell(f"the outer optimizer is {config.outer.name} instead of {usual}", note)

    signals = (signal.SIGINT, signal.SIGTERM)
    with Stop(signals, _leave, quiet=not process_group.is_main) as stop:
        try:
            meta = train_in(
                config,
                folder,
                resume=resume,
                init=command.init,
                callbacks=callbacks,
                display=bar,
                stop=stop,
                notice=note,
                start=command.start,
                started=started,
                process_group=process_group,
            )
        finally:
            bar.close()
    done, reason = meta.provenance["iteration"], meta.provenance.get("stopped")
    if reason:
        tell(f"stopped after iteration {done}: {reason}")
    elif done < config.iterations:
        again = f"metarl train --resume {quote(str(folder))}"
        tell(f"stopped after iteration {done}; continue with: {again}")
        return 128 + (stop.signal or signal.SIGTERM)  # on another rank, if not on this one
    elif process_group.is_main and not bar.shown:
        tell(f"nothing to do: {folder} has its {done} iterations; set more with --iterations")
        return 0
    tell(f"done: {done} iterations, {meta.provenance['env_steps']:,} {config.domain.unit}")
    tell(f"next: metarl evaluate {quote(str(folder))}")
    return 0


def _leave(number: int) -> None:
    os._exit(128 + number)


def benchmark(command: Any) -> int:
    """Run `metarl benchmark`."""
    from metarl.evaluation import benchmark as measuring

    with joined(command.rank_timeout) as process_group:
        result = measuring.benchmark(command.config, command.repeats, process_group)
        if process_group.is_main:
            say(json_text(result, indent=2) if command.json else measuring.table(result))
    return 0
