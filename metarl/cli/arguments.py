"""Checks of command line words before full parsing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from metarl.envs.errors import UserError


def check_file(flag: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Raise UserError if a file cannot be written, or its suffix means another format."""
    if path is None or path.is_char_device() or path.is_fifo():
        return
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")
    if suffixes and path.suffix and path.suffix not in suffixes:
        raise UserError(f"{flag} {path} must end in {' or '.join(suffixes)}")
    check_place(flag, path.parent)


def check_place(flag: str, folder: Path) -> None:
    """Raise UserError if a folder is not writable, or if it or a parent is a file."""
    for path in (folder, *folder.parents):
        if path.is_file():
            raise UserError(f"{path} is a file, but results need a folder: name one with {flag}")
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"{path} is not writable: name another folder with {flag}")
        if path.is_dir():
            return


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag before the command line is fully parsed."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def said(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the keys whose flags are given, "inner.step_sizes" for `--inner.step-sizes 0.5`."""
    flags = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word[:2] == "--"}
    return [key for key in keys if key in flags or _negated(key) in flags]


def _negated(key: str) -> str:
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}no_{name}"
