"""The command line: a table of commands, each imported when it is asked for.

Exit codes: 0 done, 2 the user can fix it, 130 Ctrl-C, 143 SIGTERM, 1 anything else.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import typing
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

from metarl.cli import errors
from metarl.cli.interrupts import interruptible
from metarl.cli.streams import say
from metarl.envs import guard
from metarl.envs.errors import UserError, did_you_mean

COMMANDS = {
    "train": ("training", "Meta-train a policy on a task family."),
    "evaluate": ("result_commands", "Measure how well meta-policies adapt to held-out tasks."),
    "adapt": ("policy_commands", "Adapt a meta-policy to one task; save an ordinary policy."),
    "export": ("policy_commands", "Write a policy as a TorchScript or ONNX file."),
    "plot": ("result_commands", "Draw learning curves of runs, before and after adaptation."),
    "record": (
        "policy_commands",
        "Film a policy on one task before and after adaptation, side by side.",
    ),
    "report": (
        "result_commands",
        "Write one HTML page about a run: returns, pictures, a video, config and versions.",
    ),
    "check": ("listing", "Check a task family, such as your own, and say what is wrong with it."),
    "families": ("listing", "List the task families, their tasks and options."),
    "algorithms": ("listing", "List the algorithms and their papers."),
    "benchmark": ("training", "Measure sampling and training speed against the physics ceiling."),
}
"""Of each command: its module, which has a class of its options and a function, and its help."""

IMPORTS = {
    "train": ("training.run",),
    "evaluate": ("evaluation.evaluate", "plots.figures"),
    "adapt": ("policies.meta_policy",),
    "plot": ("plots.figures",),
    "record": ("plots.video",),
    "report": ("evaluation.evaluate", "plots.report"),
    "benchmark": ("evaluation.benchmark",),
}
"""What commands import first, while Ctrl-C ends the process at once: see `interrupts`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return errors.exit_code(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        say("usage: metarl COMMAND [OPTIONS]\n\nGradient-based meta-reinforcement learning.\n")
        for command, (_, text) in COMMANDS.items():
            say(f"  {command:<12}{text}")
        say("\nmetarl COMMAND --help lists the options of a command.")
        return 0 if arguments else 2
    if name == "--version":
        import metarl

        say(f"metarl {metarl.__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(
            f"no command {name!r}{did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})"
        )
    from metarl.cli.parsing import parse

    kind, function = command_of(name)
    rest = arguments[1:]
    if hasattr(kind, "rewritten"):
        rest = kind.rewritten(rest)
    text = COMMANDS[name][1]
    common = {"prog": f"metarl {name}", "description": text}
    if hasattr(kind, "starting"):
        from metarl.cli.options import given, with_options

        config = kind.starting(rest)
        command = parse(with_options(kind, config), rest, **common)
        command.config = kind.resolved(config, rest, given(command, config, rest))
    else:
        if not {"-h", "--help"}.isdisjoint(rest):
            _join_help_lines(kind)
        command = parse(kind, rest, **common)
    for module in IMPORTS.get(name, ()):
        importlib.import_module(f"metarl.{module}")
    with interruptible(), guard.restored():
        return function(command)


def _join_help_lines(kind: Any) -> None:
    """Make each option's help text one paragraph; tyro would keep the line breaks of the source."""
    from docstring_parser import parse_from_object  # tyro reads docstrings by it

    documented = (parent for parent in kind.__mro__ if dataclasses.is_dataclass(parent))
    texts = {p.arg_name: p.description for c in documented for p in parse_from_object(c).params}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            _join_help_lines(hints[field.name])
        elif text := texts.get(field.name):
            field.metadata = MappingProxyType({"help": " ".join(text.split())})


def command_of(name: str) -> tuple[Any, Callable[[Any], int]]:
    """Return the class of a command's options and the function that runs it."""
    module = importlib.import_module(f"metarl.cli.{COMMANDS[name][0]}")
    return getattr(module, name.capitalize()), getattr(module, name)
