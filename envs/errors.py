"""Errors that a user can fix."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable
from numbers import Integral
from typing import Any


class UserError(ValueError):
    """Bad input. The message names the fault, the value and the remedy, and is shown unchanged.

    Args:
        message: message in Python.
        command: message of a command, if the remedy is a flag there.
    """

    def __init__(self, message: str = "", command: str = "") -> None:
        super().__init__(message)
        self.command = command or message


class UnexpectedKeyword(UserError, TypeError):
    """An unknown keyword argument.

    It is a TypeError too, with Python's words in its message: programs such as TorchRL repeat the
    call without the keyword then.
    """

    @classmethod
    def of(cls, called: str, keyword: str, known: Iterable[str]) -> UnexpectedKeyword:
        """Return the error for a keyword, with the nearest known one."""
        options = tuple(known)
        hint = did_you_mean(keyword, options)
        hint += f" (options: {', '.join(options)})" if options else " (it has no options)"
        return cls(
            f"{called} got an unexpected keyword argument {keyword!r}{hint}",
            f"{called} has no option {keyword!r}{hint}",
        )


class NonFiniteError(UserError):
    """A sampled reward, observation or action, or an adapted parameter, is NaN or infinite."""


def raised(error: BaseException) -> str:
    """Describe an error and where it was raised, in the innermost file outside of libraries."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    frame = ([f for f in frames if not _is_installed(f.filename)] or frames)[-1]
    return f"{text} ({os.path.basename(frame.filename)}:{frame.lineno}, in {frame.name})"


def add_note(error: BaseException, note: str) -> None:
    """Do what `BaseException.add_note` does, also on Python 3.10."""
    error.__notes__ = [*getattr(error, "__notes__", ()), note]


def is_ours(error: BaseException) -> bool:
    """Return whether a line of this package raised an error, and not code that it calls."""
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or any(place in frames[-1].filename for place in _OURS)


_HERE = os.path.dirname(os.path.abspath(__file__))
_OURS = (_HERE, os.path.join(os.path.dirname(_HERE), "metarl") + os.sep)
if os.path.basename(os.path.dirname(_HERE)) == "metarl":  # installed, envs is inside metarl
    _OURS = (os.path.dirname(_HERE) + os.sep,)


def _is_installed(file: str) -> bool:
    """Return whether a file is part of this package, another package or Python."""
    places = ("-packages", os.path.dirname(os.__file__), "<frozen", *_OURS)
    return any(place in file for place in places)


_SYNONYMS = {
    "lr": ("learning_rate", "step_sizes"),
    "learning_rate": ("step_sizes",),
    "step_size": ("step_sizes", "learning_rate"),
    "gamma": ("discount",),
    "lambda": ("gae_lambda",),
    "num_steps": ("steps",),
    "hidden_sizes": ("hidden",),
    "batch_size": ("tasks",),
    "epochs": ("iterations",),
}
"""Names that other packages give to options."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or an empty string."""
    names = {n.strip("-").replace("-", "_"): n for n in known}
    section, dot, last = str(name).strip("-").replace("-", "_").rpartition(".")
    others = _SYNONYMS.get(last, ())
    close = [names[key] for other in others if (key := f"{section}{dot}{other}") in names]
    if not section:
        close += [n for other in others for key, n in names.items() if key.endswith(f".{other}")]
    close = close or difflib.get_close_matches(str(name), names.values(), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def kind_of(value: Any) -> str:
    """Describe a value of a wrong kind, such as "a Box" or "the family 'mine'"."""
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    name = getattr(value, "name", None)
    kind = type(value).__name__
    return f"the {kind} {name!r}" if isinstance(name, str) else f"a {kind}"


def check_name(role: str, value: Any, such_as: str) -> None:
    """Raise UserError unless a value is a name."""
    if not isinstance(value, str):
        raise UserError(f"{role} must be a name, {such_as}, got {kind_of(value)}")


def check_one_of(name: str, value: Any, choices: Iterable[str | bool]) -> None:
    """Raise UserError unless a value is one of the choices."""
    known = tuple(choices)
    if not any(type(value) is type(choice) and value == choice for choice in known):
        raise UserError(
            f"{name} must be one of {', '.join(map(str, known))}, got {value!r}"
            f"{did_you_mean(value, map(str, known))}"
        )


def check_whole(name: str, value: Any, least: int) -> int:
    """Return a value as an int; raise UserError unless it is whole and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
    return int(value)
