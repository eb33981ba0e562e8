"""Command line parsing: check every word, then let tyro create the command.

tyro also prints the help. Errors are found before tyro sees them, so that the message is one line
with the flag, its value and the remedy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import tyro

from metarl.cli.streams import results
from metarl.envs.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Flag:
    """Flag of a command, with its accepted values."""

    name: str
    """Name with its dashes."""
    kind: type
    """bool, int, float, str or Path."""
    choices: tuple[str, ...] = ()
    several: bool = False
    optional: bool = False
    """Whether it accepts None."""

    @property
    def switch_off(self) -> str:
        """The flag that turns a switch off: --policy.no-normalize for --policy.normalize."""
        section, dot, name = self.name.removeprefix("--").rpartition(".")
        return f"--{section}{dot}no-{name}"

    def check(self, word: str) -> None:
        """Raise UserError if a word is not a value of the flag."""
        if self.optional and word == "None":
            return
        if self.choices:
            if word not in self.choices:
                hint = did_you_mean(word, self.choices)
                raise UserError(
                    f"{self.name} must be one of {', '.join(self.choices)}, got {word!r}{hint}"
                )
            return
        if self.several and self.kind is str and "=" not in word:
            raise UserError(f"{self.name} takes name=value, got {word!r}")
        wanted = {int: "a whole number", float: "a number"}.get(self.kind)
        if wanted is None:
            return
        try:
            self.kind(word)
        except ValueError as error:
            several = "; separate several values by spaces, as in 0.1 0.05" if self.several else ""
            raise UserError(f"{self.name} must be {wanted}, got {word!r}{several}") from error


def parse(
    kind: type,
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    hint: Callable[[str], str] = lambda name: "",
) -> Any:
    """Parse a command line into a command.

    Args:
        kind: dataclass of the command's options, without nested dataclasses.
        hint: returns what is known about an unknown option, "" if nothing.

    Raises:
        UserError: a word is not understood.
        SystemExit: help was requested and is printed.
    """
    words = list(arguments)
    if {"-h", "--help"}.isdisjoint(words):
        try:
            words = _checked(words, flags_of(kind), _names(kind), hint)
        except UserError as error:
            raise UserError(f"{error} ({prog} --help lists the options)") from error
    with contextlib.redirect_stdout(results()):
        return tyro.cli(kind, args=words, prog=prog, description=description)


def first_name(words: Sequence[str], switches: Collection[str]) -> str:
    """Return the first word that is neither a flag nor a flag's value; "" without one.

    Args:
        switches: flags without a value. All others take one value, or several numbers or
            name=value.
    """
    after_flag = False
    for word in words:
        if word.startswith("--"):
            after_flag = "=" not in word and word not in switches
        elif after_flag:
            after_flag = False
        elif word != "-h" and "=" not in word and not _is_number(word):
            return word
    return ""


def flags_of(kind: type) -> dict[str, Flag]:
    """Return the flags of a command's dataclass by name, including the negated switches."""
    found: dict[str, Flag] = {}
    for flag in flags_by_field(kind).values():
        found[flag.name] = flag
        if flag.kind is bool:
            found[flag.switch_off] = flag
    return found


def flags_by_field(kind: type) -> dict[str, Flag]:
    """Return the flag of each field of a command's dataclass, without the command's names."""
    return {
        name: _flag(_flag_name(name, hint), hint)
        for name, hint in _hints(kind).items()
        if not any(marker is tyro.conf.Positional for marker in _markers(hint))
    }


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _markers(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()


def _flag_name(name: str, hint: Any) -> str:
    given = [getattr(marker, "name", None) for marker in _markers(hint)]
    return f"--{next((g for g in given if g), name)}".replace("_", "-")


def _flag(name: str, hint: Any) -> Flag:
    kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if typing.get_origin(kind) is typing.Annotated:
        return _flag(name, kind)
    optional = several = False
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        optional = type(None) in typing.get_args(kind)
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        # A repeatable flag takes one value each time.
        several = tyro.conf.UseAppendAction not in _markers(hint)
        kind = typing.get_args(kind)[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(kind) is typing.Literal:
        choices, kind = typing.get_args(kind), str
    return Flag(name, kind, choices, several, optional)


def _names(kind: type) -> int | None:
    """Return the number of names that the command takes before its flags; None: any number."""
    found = 0
    for hint in _hints(kind).values():
        if any(marker is tyro.conf.Positional for marker in _markers(hint)):
            if _flag("", hint).several:
                return None
            found += 1
    return found


def _checked(
    words: Sequence[str], flags: dict[str, Flag], names: int | None, hint: Callable[[str], str]
) -> list[str]:
    """Check all words and return them with the names first."""
    found: list[str] = []
    rest: list[str] = []
    given: dict[str, list[str]] = {}  # values by flag
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--"):
            if names is not None and len(found) >= names:
                raise UserError(f"{word!r} is not expected here{_switch_hint(word, flags)}")
            found.append(word)
            continue
        name, equals, value = word.partition("=")
        flag = flags.get(name.replace("_", "-"))
        if flag is None:
            # A section's switch is turned off by --section.no-name.
            section, _, last = name.removeprefix("--no-").rpartition(".")
            near = f"--{section}.no-{last}" if name.startswith("--no-") and section else name
            raise UserError(f"unknown option {name!r}{hint(name) or did_you_mean(near, flags)}")
        values = [value] if equals else []
        if flag.kind is bool and not flag.choices:
            if equals:
                raise UserError(f"{name} is a switch; turn it off with {flag.switch_off}")
            rest.append(word)
            continue
        while not equals and i < len(words) and not words[i].startswith("--"):
            if values and not (flag.several and _fits(flag, words[i])):
                break
            values.append(words[i])
            i += 1
        if flag.several and flag.name in given:
            together = " ".join([flag.name, *given[flag.name], *values])
            raise UserError(f"{flag.name} is given twice: put all values after one, {together}")
        given[flag.name] = values
        if not values and not flag.several:
            raise UserError(f"{name} needs a value")
        if not values and flag.several and flag.kind is not int:
            raise UserError(f"{name} needs values, such as {_example(flag)}")
        for one in values:
            flag.check(one)
        rest += [name, *values]
    return found + rest


def _fits(flag: Flag, word: str) -> bool:
    """Return whether a word is another value of a flag with several values, not a name."""
    if flag.kind is str and not flag.choices:
        return "=" in word
    return flag.kind not in (int, float) or _is_number(word)


def _is_number(word: str) -> bool:
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return False


def _example(flag: Flag) -> str:
    if flag.kind is float:
        return "0.1 0.05"
    return "goal_x=0.3" if flag.name == "--task" else "name=value"


def _switch_hint(word: str, flags: dict[str, Flag]) -> str:
    if word.lower() not in ("true", "false"):
        return ""
    switch = next((f.switch_off for f in flags.values() if f.kind is bool), "--no-NAME")
    return f": a switch is turned off as in {switch}"


@cache
def help_texts(kind: type) -> Mapping[str, str]:
    """Return the documentation of a dataclass's fields by name, each as one paragraph."""
    from docstring_parser import parse, parse_from_object

    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        found = []
        if optimizer := parent.__dict__.get("optimizer"):
            found += parse(optimizer.__doc__ or "").params
        if dataclasses.is_dataclass(parent):
            found += parse_from_object(parent).params
        for entry in found:
            # torch also writes the default, and tyro adds it again.
            text = re.sub(r"\(default: .*\)$", "", " ".join((entry.description or "").split()))
            texts[entry.arg_name] = text.strip()
    return texts
