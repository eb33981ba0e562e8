"""Memory that is free, and what copies of an environment take of it."""

from __future__ import annotations

import os
from pathlib import Path

from metarl.envs.errors import UserError

_LEAST = 1 << 20  # bytes of a copy, below which the growth is noise


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
                if line.startswith("inactive_file "):  # a cache of files, which gives way
                    used -= int(line.split()[1])
            free.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(free, default=None)


def resident() -> int | None:
    """Return the bytes of memory that this process takes; None if the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


_sharers = 1


def share_with(processes: int) -> None:
    """Let `Copies` know that so many processes, this one included, make as many at the same time.

    It is a fact about this process, and families of others need not hand it on.
    """
    global _sharers
    _sharers = processes


class Copies:
    """Watches the memory of the first copies of an environment, and refuses what cannot fit.

    The first copy is left out: it imports modules and loads files for all.

    Args:
        name: of the family.
        tasks: of this process.
        episodes: of each task; a copy of the environment each.
    """

    def __init__(self, name: str, tasks: int, episodes: int) -> None:
        self.name, self.tasks, self.episodes = name, tasks, episodes
        self.sharers = _sharers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun
        self._made, self._start = 0, None

    def one_more(self) -> None:
        """Note that one more copy was made, or began its first episode.

        Raises:
            UserError: the others would take more memory than is free.
        """
        self._made += 1
        if self._made == 1:
            self._start = resident()
        # At powers of two, so that it costs nothing.
        if self._start is None or self._made < 2 or self._made & (self._made - 1):
            return
        grown = (resident() or 0) - self._start
        each = grown / (self._made - 1)
        count = self.tasks * self.episodes
        needed = self.sharers * max(count - self._made, 0) * each
        free = available()
        # One copy alone says little.
        margin = 2.0 if self._made == 2 else 1.0
        if free is None or each < _LEAST or needed <= margin * free:
            return
        total = self.sharers * count
        raise UserError(
            f"{self.name}: {total} copies of the environment, one for each of"
            f" {self.sharers * self.tasks} tasks x {self.episodes} episodes, need about"
            f" {total * each / 1e9:.1f} GB of memory ({each / 1e6:.0f} MB each), and"
            f" {free / 1e9:.1f} GB are free: take fewer tasks (--tasks) or episodes (--episodes)"
        )
