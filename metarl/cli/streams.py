"""Standard output is for results. All else that is written while a command runs, by a user's
environment or a simulator's C++ code for instance, goes to standard error.

A character that the output's encoding lacks is written in plain letters.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_PLAIN = {"±": "+-", "×": "x", "→": "->", "…": "...", "–": "-", "−": "-"}  # noqa: RUF001

_STANDARD_OUTPUT = 1
_results: TextIO | None = None


def say(*words: Any) -> None:
    """Print a result."""
    print(*words, file=_results or sys.stdout, flush=True)


def note(line: str) -> None:
    """Print what is no result."""
    print(line, file=sys.stderr)


def results() -> TextIO:
    """Return the stream of a command's results."""
    return _results or sys.stdout


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if not all(character in _PLAIN for character in text):
        return codecs.backslashreplace_errors(error)
    return "".join(map(_PLAIN.__getitem__, text)), error.end


codecs.register_error("metarl.plain", _plainly)


def _writable(stream: Any) -> Any:
    """Let a stream write every character, unless its user has said how (PYTHONIOENCODING)."""
    if getattr(stream, "errors", "") in ("strict", "surrogateescape", "backslashreplace"):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="metarl.plain")
    return stream


@contextlib.contextmanager
def results_apart(*, to_the_end: bool) -> Iterator[None]:
    """Keep standard output for `say`; what else is written to it goes to standard error.

    Args:
        to_the_end: leave it so afterwards, for what user code prints while Python ends.
    """
    global _results
    before, out = _results, _writable(sys.stdout)
    _writable(sys.stderr)
    with contextlib.ExitStack() as stack:
        if _number(out) == _STANDARD_OUTPUT:
            _results = stack.enter_context(_moved(out, to_the_end))
        else:  # Python's own alone was replaced, as in a notebook
            _results = out
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            _results = before


def _number(stream: Any) -> int:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return -1


@contextlib.contextmanager
def _moved(out: TextIO, to_the_end: bool) -> Iterator[TextIO]:
    """Give a stream of results, and let descriptor 1 be standard error's."""
    out.flush()
    kept = os.dup(_STANDARD_OUTPUT)
    try:
        os.dup2(2, _STANDARD_OUTPUT)
    except OSError:  # there is no standard error
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STANDARD_OUTPUT)
    buffering = out.line_buffering
    with contextlib.suppress(AttributeError, ValueError):
        out.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    stream = open(kept, "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):  # a reader that left was told of by then
            stream.close()
        if not to_the_end:
            with contextlib.suppress(OSError, ValueError):
                out.flush()
                out.reconfigure(line_buffering=buffering)  # type: ignore[attr-defined]
            os.dup2(kept, _STANDARD_OUTPUT)
            os.close(kept)
