"""Take from Python what Windows lacks; every process with this folder on PYTHONPATH imports it."""

import faulthandler
import fcntl
import os
import runpy
import select
import signal
import subprocess  # noqa: F401  (it would take msvcrt for Windows)
import sys
import types
from functools import partial
from pathlib import Path

_flock = fcntl.flock  # for a stand-in of Windows' msvcrt
sys.modules["msvcrt"] = types.SimpleNamespace(  # type: ignore[assignment]
    LK_NBLCK=2,
    locking=lambda file, mode, count: _flock(file, 4 | mode),  # LOCK_NB | LOCK_EX
)
for _module in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[_module] = None  # type: ignore[assignment]

for _holder, _names in {
    faulthandler: ("register", "unregister"),
    os: (
        "O_DIRECTORY", "O_NOFOLLOW", "fchmod", "fork", "forkpty", "getegid", "geteuid", "getgid",
        "getpgid", "getpgrp", "getuid", "killpg", "lockf", "mkfifo", "sched_getaffinity",
        "sched_setaffinity", "setpgid", "setpgrp", "setsid", "sysconf",
    ),
    select: ("epoll", "poll"),
    signal: (
        "SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2",
        "alarm", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt", "sigwait",
    ),
}.items():  # fmt: skip
    for _name in filter(partial(hasattr, _holder), _names):
        delattr(_holder, _name)

import multiprocessing  # noqa: E402
from multiprocessing import popen_fork  # noqa: E402

multiprocessing.set_start_method("spawn")
# What Python itself needs of them on the system that this runs on.
popen_fork.Popen.kill = lambda self: self._send_signal(9)  # type: ignore[attr-defined]

runpy.run_path(str(Path(__file__).parents[1] / "sitecustomize.py"))  # for `make noise`
