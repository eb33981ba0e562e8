"""Signals and process groups of worker processes.

Windows has neither: there, a worker's own child processes can outlive it, a hung worker leaves no
traceback, and a worker that stopped reading can block this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C while a worker starts; the worker inherits this until it ignores Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # its start would unblock Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def limit_waits(channel: Connection, seconds: float) -> None:
    """Let a channel raise OSError after a time, so that a stopped process cannot block this one."""
    if sys.platform == "win32":
        return
    limit = struct.pack("ll", int(seconds) + 1, 0)
    with socket.socket(fileno=os.dup(channel.fileno())) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, limit)


def leave_tracebacks(dump: Connection) -> None:
    """Let this process write a traceback when it crashes or is asked to by `traceback_of`."""
    if hasattr(faulthandler, "register"):  # written without the interpreter
        faulthandler.enable(dump.fileno(), all_threads=False)
        faulthandler.register(signal.SIGUSR1, dump.fileno(), all_threads=False)


def traceback_of(process: BaseProcess, dump: Connection, *, hung: bool) -> str:
    """Return what a worker wrote with `leave_tracebacks`; ask a hung one first."""
    if not hasattr(faulthandler, "register"):
        return ""
    if hung:
        with contextlib.suppress(OSError):
            os.kill(process.pid or 0, signal.SIGUSR1)
    trace = b""
    with contextlib.suppress(OSError):
        while dump.poll(0.3) and (part := os.read(dump.fileno(), 1 << 16)):
            trace += part
    return trace.decode(errors="replace")


def kill_group(process: BaseProcess) -> None:
    """Kill a worker and the processes that its environments started."""
    if process.pid is None:
        return
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # not yet a process group, or gone
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def end_with_parent(exactly: bool) -> None:
    """End this process and its children with the parent, even while an environment hangs.

    Args:
        exactly: the main thread of the parent started this process.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in a terminal does not reach workers or their child processes
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if exactly and sys.platform == "linux" and hasattr(signal, "SIGKILL"):
        # The thread above needs the interpreter's lock, which an environment may hold forever.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
