"""Ctrl-C during training: the first finishes the iteration, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

from metarl.envs.errors import UserError, raised
from metarl.envs.guard import is_of_user_code


class Stop:
    """Signal handler and context manager: the first signal asks to stop, the second stops at once.

    Args:
        numbers: signals to handle; ignored outside the main thread.
        at_once: function that stops the process or the run; takes the signal's number.
        quiet: do not print anything.
    """

    def __init__(
        self, numbers: Sequence[int], at_once: Callable[[int], object], *, quiet: bool = False
    ) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._numbers = numbers if main else ()
        self._at_once, self._quiet = at_once, quiet
        self.signal: int | None = None
        """First signal received."""

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        pressed = self() or not self._before  # outside the main thread, assume yes
        if isinstance(error, KeyboardInterrupt) and not pressed and is_of_user_code(error):
            where = [*getattr(error, "__notes__", ()), raised(error)]
            raise UserError(": ".join(where)) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._at_once(number)
            return
        self.signal = number
        if not self._quiet:
            print("\nstopping after this iteration; once more leaves at once", file=sys.stderr)


def stop_by_ctrl_c(*, quiet: bool = False) -> Stop:
    """Return a handler of Ctrl-C for a script. The second Ctrl-C raises KeyboardInterrupt.

    A handler that the script installed is kept.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return Stop([signal.SIGINT] if usual else [], _interrupt, quiet=quiet)


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt
