"""Ctrl-C: one line and exit code 130 from the first import on.

Imported before all else, and so without anything heavy.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType


def is_the_program() -> bool:
    """Whether this process is the command `metarl`, or `python -m metarl`, not a user's script."""
    options = sys.orig_argv[1:]
    if options[:1] == ["-u"]:  # as torchrun starts it
        options = options[1:]
    return os.path.basename(sys.argv[0]) == "metarl" or options[:2] == ["-m", "metarl"]


def end_at_once() -> None:
    """From here on Ctrl-C ends the process in a line.

    For imports: there is nothing to clean up yet, and a KeyboardInterrupt within an import comes
    out as some other error, or not at all. The same where the interpreter shuts down.
    """
    signal.signal(signal.SIGINT, _end)


def ignore_at_the_end() -> None:
    """Let Ctrl-C change nothing any more once all is done and Python takes itself apart.

    It gives up its handlers then, and the exit code of a finished command would be lost. For the
    program's first lines: what is registered first is called last.
    """
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    # Imports start processes too (glfw asks one for its version); each would have its last words.
    for tasks in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(tasks, encoding="utf-8") as children:
            for child in children.read().split():
                os.kill(int(child), signal.SIGKILL)
    os._exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt, so that what was begun is cleaned up."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_at_once()
