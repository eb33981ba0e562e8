"""Streams of a command: standard output contains only results.

All other output goes to standard error, for instance from a user's environment or a simulator's C++
code. Characters that the output's encoding lacks are replaced by plain letters.
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
    """Print a note to standard error."""
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
    """Let a stream write every character, unless PYTHONIOENCODING is set."""
    if getattr(stream, "errors", "") in ("strict", "surrogateescape", "backslashreplace"):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="metarl.plain")
    return stream


@contextlib.contextmanager
def results_apart(*, to_the_end: bool) -> Iterator[None]:
    """Keep standard output for `say`. Other writes to it go to standard error.

    Args:
        to_the_end: keep the redirection afterwards, for output of user code during shutdown.
    """
    global _results
    before, out = _results, _writable(sys.stdout)
    _writable(sys.stderr)
    with contextlib.ExitStack() as stack:
        if _number(out) == _STANDARD_OUTPUT:
            _results = stack.enter_context(_moved(out, to_the_end))
        else:  # only Python's stream was replaced, as in a notebook
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
    """Yield a stream for results, and redirect descriptor 1 to standard error."""
    out.flush()
    kept = os.dup(_STANDARD_OUTPUT)
    try:
        os.dup2(2, _STANDARD_OUTPUT)
    except OSError:  # no standard error exists
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STANDARD_OUTPUT)
    buffering = out.line_buffering
    with contextlib.suppress(AttributeError, ValueError):
        out.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    stream = open(kept, "w", encoding=out.encoding, errors=out.errors, closefd=False)  # noqa: SIM115
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):  # a closed pipe was already reported
            stream.close()
        if not to_the_end:
            with contextlib.suppress(OSError, ValueError):
                out.flush()
                out.reconfigure(line_buffering=buffering)  # type: ignore[attr-defined]
            os.dup2(kept, _STANDARD_OUTPUT)
            os.close(kept)
