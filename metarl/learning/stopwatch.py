"""Seconds by phase."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds from lap to lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, or the start."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last
