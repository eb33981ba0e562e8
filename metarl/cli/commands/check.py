"""Check a task family, such as your own, and report its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from metarl.cli.streams import say
from metarl.envs import guard
from metarl.envs.checks.checker import CHECKS, checks
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.gymnasium.family import GymnasiumFamily
from metarl.envs.registry import make_family, parse_options


@dataclass(frozen=True, kw_only=True)
class Check:
    """Options of `metarl check`."""

    family: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[FAMILY]")] = ""
    """Task family: a name that `metarl families` lists, or module:attribute."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""


def check(command: Check) -> int:
    """Run `metarl check`."""
    if not command.family:
        raise UserError("name a task family: metarl check FAMILY (metarl families lists them)")
    family = make_family(command.family, **parse_options(command.family_options))
    say(f"{command.family}: {family.tasks.describe()}; horizon {family.horizon}")
    labels = {"fault": "FAULT", "warning": "warn"}
    faults = 0
    for checked in checks(family):
        said = [(labels[found.severity], found.message) for found in checked.findings]
        if checked.left_out is not None:
            said = [("-", f"skipped because of the fault of {checked.left_out}")]
        for label, message in said or [("ok", CHECKS[checked.name].words)]:
            say(f"  {label:<6} {checked.name:<12} {message}")
        sound = all(found.severity != "fault" for found in checked.findings)
        if checked.name == "spaces" and checked.left_out is None and sound:
            _print_columns(family)
        faults += any(found.severity == "fault" for found in checked.findings)
    return 2 if faults else 0


def _print_columns(family: Family) -> None:
    """Print the columns of the flat observation for each component of a Dict or Tuple."""
    if not isinstance(family, GymnasiumFamily):
        return
    with guard.user_code():
        found = family.columns()
    for name, start, end in found:
        columns = f"column {start}" if end == start + 1 else f"columns {start} to {end - 1}"
        say(f"         {'':<12} observation: {columns} = {name}")
