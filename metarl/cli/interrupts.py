"""Ctrl-C: one line and exit code 130, from the first import.

Imported before all other modules, so it imports nothing heavy.
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
    """Whether this process is the command `metarl` or `python -m metarl`, not a user's script."""
    options = sys.orig_argv[1:]
    if options[:1] == ["-u"]:  # torchrun adds this option
        options = options[1:]
    return os.path.basename(sys.argv[0]) == "metarl" or options[:2] == ["-m", "metarl"]


def end_at_once() -> None:
    """Let Ctrl-C end the process with one line from now on.

    For imports: no cleanup is needed yet, and a KeyboardInterrupt inside an import may become
    another error or be lost. The same holds during interpreter shutdown.
    """
    signal.signal(signal.SIGINT, _end)


def ignore_at_the_end() -> None:
    """Ignore Ctrl-C after the command is done, during interpreter shutdown.

    Python removes its handlers then, and the exit code of a finished command would be lost.
    Register this in the first lines of the program: what is registered first is called last.
    """
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    # Imports also start processes (glfw asks one for its version). Each would print the line.
    for tasks in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(tasks, encoding="utf-8") as children:
            for child in children.read().split():
                os.kill(int(child), signal.SIGKILL)
    os._exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside this context, so that cleanup runs."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_at_once()
