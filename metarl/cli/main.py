"""Command line: find a command, parse its options and run it.

Exit codes: 0 done, 2 an error that the user can fix, 130 Ctrl-C, 143 SIGTERM, 1 other errors.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from metarl.cli import errors
from metarl.cli.interrupts import interruptible
from metarl.cli.streams import say
from metarl.envs import guard
from metarl.envs.errors import UserError, did_you_mean

_COMMANDS = "metarl.cli.commands"


@cache
def commands() -> dict[str, str]:
    """Return the help of each command by name, from the docstrings, without imports."""
    files = {file.name: file for file in resources.files(_COMMANDS).iterdir()}
    return {
        name.removesuffix(".py"): ast.get_docstring(ast.parse(files[name].read_text("utf-8"))) or ""
        for name in sorted(files)
        if name.endswith(".py") and not name.startswith("_")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return errors.exit_code(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        say("usage: metarl COMMAND [OPTIONS]\n\nGradient-based meta-reinforcement learning.\n")
        for command, text in commands().items():
            say(f"  {command:<12}{text}")
        say("\nmetarl COMMAND --help lists the options of a command.")
        return 0 if arguments else 2
    if name == "--version":
        import metarl

        say(f"metarl {metarl.__version__}")
        return 0
    if name not in (known := commands()):
        raise UserError(
            f"unknown command {name!r}{did_you_mean(name, known)} (commands: {', '.join(known)})"
        )
    from metarl.cli.parsing import parse

    kind, function = command_of(name)
    rest = arguments[1:]
    if hasattr(kind, "rewritten"):
        rest = kind.rewritten(rest)
    common: dict[str, Any] = {"prog": f"metarl {name}", "description": commands()[name]}
    if hasattr(kind, "usual"):
        from metarl.cli.options import configured

        command = configured(kind, rest, **common)
    else:
        if not {"-h", "--help"}.isdisjoint(rest):
            _join_help_lines(kind)
        command = parse(kind, rest, **common)
    for module in getattr(_module(name), "IMPORTS", ()):
        importlib.import_module(module)
    with interruptible(), guard.restored():
        return function(command)


def _join_help_lines(kind: Any) -> None:
    """Make each option's help text one paragraph; tyro would keep the line breaks of the source."""
    from metarl.cli.parsing import help_texts

    texts = help_texts(kind)
    for field in dataclasses.fields(kind):
        if text := texts.get(field.name):
            field.metadata = MappingProxyType({"help": text})


def command_of(name: str) -> tuple[Any, Callable[[Any], int]]:
    """Return the class of a command's options and the function that runs it."""
    module = _module(name)
    return getattr(module, name.capitalize()), getattr(module, name)


def _module(name: str) -> Any:
    return importlib.import_module(f"{_COMMANDS}.{name}")
