"""Protection of process-wide settings from user code, which shares the process.

An environment may change the current folder, replace standard output or set NumPy's error state.
Each change is undone when user code returns and is restored when it runs again. User code and
metarl therefore both keep their own settings. Signal handlers always stay metarl's, so Ctrl-C
keeps its meaning. Changed environment variables are kept, because they configure libraries.

`metarl.models` registers the settings of torch.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from metarl.envs.errors import UserError, is_ours, raised

X = TypeVar("X")
_log = logging.getLogger(__name__)


class ExitError(UserError):
    """User code would have ended the process, for example by `sys.exit`."""


@dataclass(frozen=True)
class Setting:
    """One process-wide setting that user code may change."""

    read: Callable[[], Any]
    """Return the value."""
    write: Callable[[Any], object]
    """Restore a value."""
    each_step: bool = False
    """The setting matters between two steps of an environment, and reading it is fast."""
    returned: bool = True
    """User code gets its own value back when it runs again."""
    always: bool = False
    """Restore the value even if it looks unchanged, because C code may have changed it."""


SETTINGS: dict[str, Setting] = {}
"""All settings by name; see `register`."""
_quick: dict[str, Setting] = {}
_theirs: dict[str, Any] = {}  # values that user code left
_running = False  # nested calls of user code are not guarded again


def register(name: str, setting: Setting) -> None:
    """Protect one more setting.

    User code that is running keeps its initial list of settings: it may import the module that
    registers more.
    """
    global SETTINGS, _quick
    SETTINGS = {**SETTINGS, name: setting}
    if setting.each_step:
        _quick = {**_quick, name: setting}


class _Guard:
    """Context manager for one call of user code."""

    __slots__ = ("_before", "_kept", "_outermost")

    def __init__(self, kept: dict[str, Setting]) -> None:
        self._kept = kept

    def __enter__(self) -> None:
        global _running
        self._outermost = not _running
        if self._outermost:
            self._before = [setting.read() for setting in self._kept.values()]
            for name in _theirs:
                if name in self._kept:
                    _write(self._kept[name], _theirs[name])
            _running = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        global _running
        if self._outermost:
            _running = False
            self._leave()
        if error is not None:
            _mark(error)

    def _leave(self) -> None:
        after = [setting.read() for setting in self._kept.values()]
        if self._kept is _quick and not _theirs and after == self._before:
            return
        for (name, setting), old, new in zip(self._kept.items(), self._before, after, strict=True):
            if old == new:
                _theirs.pop(name, None)
            _put_back(name, setting, old, new)


def user_code() -> contextlib.AbstractContextManager[None]:
    """Return a context for user code, such as an import or an environment's reset."""
    return _Guard(SETTINGS)


def user_step() -> contextlib.AbstractContextManager[None]:
    """Return a context for one short call; `restored` handles settings that are slow to read."""
    return _Guard(_quick)


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore all settings at the end of a block with several calls of `user_step`."""
    if _running:
        yield
        return
    before = {name: setting.read() for name, setting in SETTINGS.items()}
    try:
        yield
    finally:
        for name, old in before.items():
            _put_back(name, SETTINGS[name], old, SETTINGS[name].read())


def _mark(error: BaseException) -> None:
    """Mark an error as raised by user code; one that would end the process becomes ExitError."""
    if isinstance(error, Exception | KeyboardInterrupt | GeneratorExit):
        error.of_user_code = True  # type: ignore[union-attr]
        return
    notes = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    raise ExitError(
        f"{notes}user code must not end the process, but raised {raised(error)}"
    ) from error


def is_of_user_code(error: BaseException) -> bool:
    """Return whether user code, or code that it called, raised an error."""
    return getattr(error, "of_user_code", False) and not is_ours(error)


@contextlib.contextmanager
def opened(make: Callable[[], X]) -> Iterator[X]:
    """Make an environment, and close it afterwards."""
    with user_code():
        env = make()
    try:
        yield env
    finally:
        close(env)


def close(env: Any) -> None:
    """Close an environment. A failure is only a warning, because its work is done."""
    try:
        with user_code():
            env.close()
    except Exception as error:
        notes = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        _log.warning("%san environment cannot be closed: %s", notes, raised(error))


def _put_back(name: str, setting: Setting, old: Any, new: Any) -> None:
    if old != new and setting.returned:
        _theirs[name] = new
    if old != new or setting.always:
        _write(setting, old)


def _write(setting: Setting, value: Any) -> None:
    with contextlib.suppress(OSError, ValueError, locale.Error):  # such as a deleted folder
        setting.write(value)


# The settings of Python and NumPy -----------------------------------------------------------------


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _go(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


# signal.getsignal searches the members of an enum, which takes 10 us.
_handler = getattr(sys.modules.get("_signal"), "getsignal", signal.getsignal)


def _handle(number: int, handler: Any) -> None:
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def _set_filters(value: tuple[Any, ...]) -> None:
    filters, show = value
    warnings.resetwarnings()  # forgets which warnings were shown under other filters
    warnings.filters.extend(filters)  # type: ignore[attr-defined]
    warnings.showwarning = show


@functools.lru_cache(1)
def _loggers(count: int) -> list[logging.Logger]:
    """Return the root logger and metarl's loggers; `count` is the key of the cache."""
    known = logging.root.manager.loggerDict.items()
    own = [logger for name, logger in known if name.partition(".")[0] == "metarl"]
    return [logging.root, *(logger for logger in own if isinstance(logger, logging.Logger))]


def _logging() -> tuple[Any, ...]:
    states = [
        (x, x.level, x.disabled, x.propagate, tuple(x.handlers), tuple(x.filters))
        for x in _loggers(len(logging.root.manager.loggerDict))
    ]
    return logging.root.manager.disable, states


def _set_logging(value: tuple[Any, ...]) -> None:
    disable, states = value
    logging.disable(disable)
    for logger, level, disabled, propagate, handlers, filters in states:
        logger.setLevel(level)
        logger.disabled, logger.propagate = disabled, propagate
        logger.handlers[:], logger.filters[:] = handlers, filters


def _set_streams(value: tuple[Any, ...]) -> None:
    sys.stdin, sys.stdout, sys.stderr, sys.excepthook = value


for _number in (signal.SIGINT, signal.SIGTERM):
    register(
        _number.name,
        Setting(
            functools.partial(_handler, _number),
            functools.partial(_handle, _number),
            each_step=True,
            returned=False,
            always=True,
        ),
    )
if hasattr(signal, "pthread_sigmask"):
    register(
        "blocked signals",
        Setting(
            lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []),
            lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
            returned=False,
        ),
    )
register("numpy errors", Setting(np.geterr, lambda value: np.seterr(**value)))
register(
    "numpy printing",
    Setting(np.get_printoptions, lambda value: np.set_printoptions(**value)),
)
register("folder", Setting(_folder, _go))
register("warnings", Setting(lambda: (tuple(warnings.filters), warnings.showwarning), _set_filters))
register("logging", Setting(_logging, _set_logging))
register(
    "streams",
    Setting(lambda: (sys.stdin, sys.stdout, sys.stderr, sys.excepthook), _set_streams),
)
register(
    "locale",
    Setting(
        lambda: locale.setlocale(locale.LC_ALL),
        lambda value: locale.setlocale(locale.LC_ALL, value),
    ),
)
register("garbage", Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()))
register("recursion", Setting(sys.getrecursionlimit, sys.setrecursionlimit))
