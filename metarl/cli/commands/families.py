"""List the task families, their tasks and options."""

from __future__ import annotations

from dataclasses import dataclass

from metarl.cli.streams import say
from metarl.envs.errors import UserError
from metarl.envs.registry import (
    data_names,
    description,
    family_names,
    make_family,
    option_defaults,
)


@dataclass(frozen=True, kw_only=True)
class Families:
    """Options of `metarl families`."""


def families(command: Families) -> int:
    """Run `metarl families`."""
    for name in family_names():
        try:
            family = make_family(name)
        except UserError as error:  # not installed, or an error of a package
            say(f"{name}\n    not available: {error}")
            continue
        tasks = f"{family.tasks.describe()}; horizon {family.horizon}"
        say(f"{name}\n    {family.description}\n    tasks: {tasks}")
        options = option_defaults(name)
        say("    options: " + ", ".join(f"{k}={v}" for k, v in options.items()))
    say("\nsupervised tasks (docs/tutorials/few-shot.md):\n")
    for name in data_names():
        options = ", ".join(f"{k}={v}" for k, v in option_defaults(name).items())
        say(f"{name}\n    {description(name)}\n    options: {options}")
    say(
        "\nYour own: metarl check my_module:my_family, then train"
        " (see docs/tutorials/own-environment.md)"
    )
    return 0
