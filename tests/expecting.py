"""Expect errors by their type, the names in them and the exit code; their wording is free."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from metarl.cli.main import main
from metarl.envs.errors import UserError


def mentions(text: str, *names: object) -> bool:
    """Return whether a text has each name as a word of its own, such as an option, value or file.

    An option may be written as a key or as a flag: `inner.step_sizes` or `--inner.step-sizes`.
    """

    def plain(words: object) -> str:
        return str(words).replace("--", "").replace("-", "_")

    return all(re.search(rf"(?<!\w){re.escape(plain(name))}(?!\w)", plain(text)) for name in names)


@contextmanager
def refused(
    *names: object, error: type[BaseException] = UserError
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error of a type whose message has each of the names; see `mentions`.

    Name what a user needs to find the mistake: the option, its value, the nearest known name.
    """
    with pytest.raises(error) as caught:
        yield caught
    assert mentions(str(caught.value), *names), f"{names} not all in: {caught.value}"


def run(*arguments: str) -> int:
    """Run a command line in this process and return its exit code."""
    try:
        return main(arguments)
    except SystemExit as exit:  # tyro leaves this way
        return int(exit.code or 0)
