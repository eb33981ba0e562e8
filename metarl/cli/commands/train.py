"""Meta-train a policy on a task family."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import tyro

from metarl.algorithms import find_algorithm
from metarl.cli.options import AUTO, family_named
from metarl.cli.streams import note, say
from metarl.config.options import Config
from metarl.distributed.process_group import LIMIT_SECONDS, ProcessGroup, joined
from metarl.envs.errors import UserError
from metarl.envs.registry import data_names, option_defaults
from metarl.runs.stopping import Stop

IMPORTS = ("metarl.training.run",)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of `metarl train`; `command_type` adds the options of the config."""

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
    def usual(family: str) -> tuple[str, str]:
        """Return the family and the preset if none are given."""
        return family, ""


def train(command: Any) -> int:
    """Run `metarl train`."""
    setup, run = command.config.setup, command.config.run
    if not setup.family:
        raise UserError("name a task family: metarl train FAMILY (metarl families lists them)")
    auto = command.resume == Path(AUTO)
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
    name = setup.family.replace(":", "-")
    algorithm = re.sub(r"[^\w.+-]+", "-", setup.algorithm.name)
    parts = (name, setup.preset or "default", algorithm, str(run.seed))
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

    config: Config = command.config
    setup, algorithm, iterations = config.setup, config.setup.algorithm, config.run.iterations
    callbacks = [find_callback(name) for name in command.callback]
    callbacks += [LOGGERS[name]() for name in dict.fromkeys(command.log)]
    bar = ProgressBar(setup.family, iterations)

    def tell(line: str, show: Callable[[str], object] = say) -> None:
        if process_group.is_main:
            show(line)

    def started() -> None:
        preset = f", preset {setup.preset}," if setup.preset else ""
        tell(f"{algorithm.name} on {setup.family}{preset} in {folder}", note)
        usual = find_algorithm(algorithm.source or algorithm).outer.name
        if algorithm.outer.name != usual:
            tell(f"the outer optimizer is {algorithm.outer.name} instead of {usual}", note)

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
    elif done < iterations:
        again = f"metarl train --resume {quote(str(folder))}"
        tell(f"stopped after iteration {done}; continue with: {again}")
        return 128 + (stop.signal or signal.SIGTERM)  # on another rank, if not on this one
    elif process_group.is_main and not bar.shown:
        tell(f"nothing to do: {folder} has its {done} iterations; set more with --iterations")
        return 0
    tell(f"done: {done} iterations, {meta.provenance['env_steps']:,} {setup.domain.unit}")
    tell(f"next: metarl evaluate {quote(str(folder))}")
    return 0


def _leave(number: int) -> None:
    os._exit(128 + number)


def _family_flags(arguments: Sequence[str]) -> list[str]:
    """Return `--shots 10` as `--family-options shots=10` if shots is an option of the family.

    This applies to families of supervised tasks. Flags of the command have precedence.
    """
    family = family_named(Train, arguments)
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
