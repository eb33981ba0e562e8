"""Errors of commands: one line with the problem and the remedy, and an exit code.

2: the user can fix it. 130: Ctrl-C. 141: the reader of the output closed it, like `head`. A bug in
the program raises, with its traceback.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable

from metarl.cli.interrupts import is_the_program
from metarl.cli.streams import results, results_apart
from metarl.envs.errors import UserError, raised
from metarl.envs.guard import is_of_user_code

_ROOM = "free some space there, or choose another place"
_RIGHTS = "choose a writable place, or change its permissions"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOENT: "check that its folder still exists",
    errno.ENOTDIR: "a file is in the place of a folder",
    errno.EISDIR: "a folder is in the place of a file",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and return its exit code. Print an error as one line."""
    with results_apart(to_the_end=is_the_program()):
        return _exit_code(command)


def _exit_code(command: Callable[[], int]) -> int:
    try:
        code = command()
        results().flush()
        return code
    except UserError as error:
        return _told(error.command, error)
    except Exception as error:
        told = _out_of_memory(error) or _of_user_code(error) or _of_the_system(error)
        if told is None:
            raise
        return told
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _out_of_memory(error: Exception) -> int | None:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return _told("out of memory: use fewer tasks or episodes, or a smaller network", error)
    return None


def _of_user_code(error: Exception) -> int | None:
    """Print an environment's error. With `python -X dev`, it raises with its traceback."""
    if not is_of_user_code(error) or sys.flags.dev_mode:
        return None
    return _told(": ".join([*getattr(error, "__notes__", ()), raised(error)]), error)


def _of_the_system(error: Exception) -> int | None:
    """Print an error of the operating system."""
    if not isinstance(error, OSError):
        return None
    if isinstance(error, BrokenPipeError) and _reader_left():
        return 141
    if error.filename is None:
        return None
    notes = [_REMEDIES.get(error.errno or 0, ""), *getattr(error, "__notes__", ())]
    return _told(f"{error.filename}: {'; '.join(filter(None, [error.strerror, *notes]))}", error)


def _reader_left() -> bool:
    """Return whether the reader of standard output is gone; if so, silence it from now on."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(results(), 0)  # errors and hang-ups are always reported
    left = bool(poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results().fileno())
    return left


def _told(message: str, error: Exception) -> int:
    if not getattr(error, "elsewhere", False):  # otherwise its own rank prints it
        print(f"error: {message}", file=sys.stderr)
    return 2
