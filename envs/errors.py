"""The error that a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any


class UserError(ValueError):
    """Bad input. The message names what is wrong, its value and the remedy; it is shown as is."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise UserError unless a value is one of the choices."""
    if value not in (known := tuple(choices)):
        raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise UserError unless a value is a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
