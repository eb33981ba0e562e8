"""Atomic and append-only file writes.

A failure of the operating system, such as a full disk, is an OSError with the path of the intended
file. `commands.errors` turns it into one line with the remedy.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metarl.envs.errors import UserError, kind_of

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

_WRITE = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)  # Windows translates line ends


def as_path(role: str, value: Any) -> Path:
    """Return a value as a path; raise UserError if it is not a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise UserError(f"{role} must be a path, such as 'runs/mine', got {kind_of(value)}")
    return Path(value)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Set the path of an OSError. Errors of a write or an fsync have no path."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write and fsync a temporary file, then rename it. A crash leaves the old or the new file.

    A symbolic link is kept and its target is written. A device or a pipe is written directly.
    """
    with named(path):
        path = path.resolve()
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            file = os.open(aside, _WRITE | os.O_TRUNC, 0o666)
            try:
                _write(file, data)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(aside, path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
        if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def lock(file: int) -> bool:
    """Lock an open file until it is closed. Return False if another process has locked it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_aside(path: Path) -> bool:
    """Whether this is a run's temporary file that a killed `write_atomically` left behind."""
    kinds = r"(json|jsonl|safetensors|png|svg|html|mp4|gif|set-aside-\d+)"
    return path.is_file() and bool(re.fullmatch(rf"\..+\.{kinds}\.\d+", path.name))


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed `write_atomically` calls. No process may be writing."""
    for path in folder.glob(".*"):
        if is_aside(path):
            path.unlink(missing_ok=True)


def set_aside(path: Path, data: bytes) -> Path:
    """Save data next to the file they came from, under an unused name."""
    names = (path.with_name(f"{path.name}.set-aside-{i}") for i in range(1, 10_000))
    kept = next(name for name in names if not name.exists())
    write_atomically(kept, data)
    return kept


class GrowingFile:
    """A file that grows by whole pieces. A piece that cannot be written leaves no trace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with named(path):
            self._file = os.open(path, _WRITE | os.O_APPEND, 0o666)

    def append(self, data: bytes) -> None:
        """Write a piece, and wait until it is on the disk."""
        end = os.fstat(self._file).st_size
        with named(self._path):
            try:
                _write(self._file, data)
                os.fsync(self._file)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, end)
                raise

    def cut(self, size: int) -> None:
        """Truncate the file to its first `size` bytes."""
        with named(self._path):
            os.ftruncate(self._file, size)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _write(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
