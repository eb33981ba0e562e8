"""Adapt a meta-policy to one task; save an ordinary policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from metarl.cli.adaptation import Adaptation, one_of, parse_task, steps_of
from metarl.cli.arguments import check_file
from metarl.cli.streams import say
from metarl.envs.errors import UserError

IMPORTS = ("metarl.evaluation.evaluate",)


@dataclass(frozen=True, kw_only=True)
class Adapt(Adaptation):
    """Adapt a meta-policy to one task; save an ordinary policy."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    """A run folder, a policy file or the name of a shipped policy."""
    task: tuple[str, ...] = ()
    """The task, as component=value for each component (metarl families lists them)."""
    save: Path | None = None
    """File to write the adapted policy to."""


def adapt(command: Adapt) -> int:
    """Run `metarl adapt`."""
    from metarl.evaluation.evaluate import EVALUATORS
    from metarl.policies.loading import load

    what = one_of(command.what)
    check_file("--save", command.save)
    if command.save is not None and not command.save.absolute().parent.is_dir():
        raise UserError(f"--save {command.save}: folder {command.save.parent} does not exist")
    meta = load(what)
    if not command.task:
        names = " ".join(f"{name}=..." for name in meta.source.tasks.names)
        raise UserError(f"name the task: --task {names}")
    task = parse_task(meta.source, command.task)
    evaluator = EVALUATORS[meta.source.domain]
    found = evaluator.on_one_task(meta, task, steps=command.steps, **command.options())
    if command.save is not None:
        if found.policy is None:
            raise UserError(
                "--save does not save predictors: adapt them in Python, with MetaPolicy.adapt_to"
            )
        found.policy.save(command.save)
    before, after = (found.measure.number(value, signed=False) for value in found.values)
    say(
        f"{what} on {' '.join(command.task)}: {found.measure.name} {before} -> {after} after"
        f" {steps_of(found.steps, found.unit)} {found.samples}"
    )
    if command.save is not None:
        say(f"saved {command.save}; next: metarl record {quote(str(command.save))}")
    return 0
