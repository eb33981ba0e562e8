"""Free memory, and the memory that copies of an environment need."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from metarl.envs.errors import UserError

_LEAST = 1 << 20  # bytes of a copy; smaller growth is noise


def available() -> int | None:
    """Return the bytes that this process may still take, container limits included."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text("utf-8").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text("utf-8"))
            for line in (group / "memory.stat").read_text("utf-8").splitlines():
                if line.startswith("inactive_file "):  # the page cache, which the kernel can free
                    used -= int(line.split()[1])
            free.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(free, default=None)


def resident() -> int | None:
    """Return the resident memory of this process in bytes, or None if it is unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * mmap.PAGESIZE


_sharers = 1


def share_with(processes: int) -> None:
    """Set how many processes make copies at the same time, this one included.

    The number is a property of this process, so families do not need to pass it on.
    """
    global _sharers
    _sharers = processes


class Copies:
    """Measures the memory of the first copies of an environment and refuses too many copies.

    The first copy does not count, because it imports modules and loads files for all copies.

    Args:
        name: name of the family.
        tasks: number of tasks in this process.
        episodes: episodes of each task; each has a copy of the environment.
    """

    def __init__(self, name: str, tasks: int, episodes: int) -> None:
        self.name, self.tasks, self.episodes = name, tasks, episodes
        self.sharers = _sharers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun
        self._made, self._start = 0, None

    def one_more(self) -> None:
        """Record that one more copy was made, or started its first episode.

        Raises:
            UserError: the remaining copies would need more memory than is free.
        """
        self._made += 1
        if self._made == 1:
            self._start = resident()
        # Only at powers of two, to keep the cost negligible.
        if self._start is None or self._made < 2 or self._made & (self._made - 1):
            return
        grown = (resident() or 0) - self._start
        each = grown / (self._made - 1)
        count = self.tasks * self.episodes
        needed = self.sharers * max(count - self._made, 0) * each
        free = available()
        # One measured copy is weak evidence.
        margin = 2.0 if self._made == 2 else 1.0
        if free is None or each < _LEAST or needed <= margin * free:
            return
        total = self.sharers * count
        raise UserError(
            f"{self.name}: {total} copies of the environment"
            f" ({self.sharers * self.tasks} tasks x {self.episodes} episodes) need about"
            f" {total * each / 1e9:.1f} GB of memory ({each / 1e6:.0f} MB each), but only"
            f" {free / 1e9:.1f} GB are free. Use fewer tasks (--tasks) or episodes (--episodes)"
        )
