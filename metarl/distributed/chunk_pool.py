"""Pool of threads that computes chunks of tasks, with one intra-op thread each.

torch's own intra-op threads spin at barriers and collapse on a shared machine. Here each thread
processes whole chunks. Their number and shape do not depend on the number of threads, and sums over
chunks are computed in order. Results are therefore bit-identical for any number of threads. With
several ranks, each rank has a pool for its own tasks, and its process group combines the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.envs.errors import UserError

X = TypeVar("X")
Y = TypeVar("Y")


class ChunkPool:
    """Pool that maps a function over chunks on `threads` threads (1: in the calling thread)."""

    def __init__(self, threads: int = 1, process_group: ProcessGroup = ALONE) -> None:
        if threads < 1:
            raise UserError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self.process_group = process_group
        self._executor = (
            ThreadPoolExecutor(threads, "metarl", initializer=torch.set_num_threads, initargs=(1,))
            if threads > 1
            else None
        )

    def map(self, function: Callable[[X], Y], chunks: Iterable[X]) -> list[Y]:
        """Return the function's results in the order of the chunks."""
        if self._executor is None:
            return [function(chunk) for chunk in chunks]
        futures = [self._executor.submit(function, chunk) for chunk in chunks]
        try:
            return [future.result() for future in futures]
        finally:  # after an error or Ctrl-C, no resource is closed while a thread uses it
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """Wait for the threads and end them."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> ChunkPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def slices(total: int, size: int) -> list[slice]:
    """Return consecutive slices of at most `size` that cover range(total)."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
