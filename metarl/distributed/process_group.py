"""Process group of one run: each process has its own tasks, and all take every step together.

`ProcessGroup` is a group of one process. `TorchProcessGroup` is a group of the processes that
torchrun starts, on torch.distributed's gloo. Results are bit-identical for any number of ranks:
tasks are split into contiguous blocks of whole chunks, and sums over chunks are added in task
order.

No rank waits for a failed one. At the start of each collective, every rank sends a short message to
every other. The message states the rank's next operation, or an error. After an error, all ranks
raise the error of the first rank that has one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions use the group at the time of this import as a default argument. Optimizers also
# import it. If that import came first, the group would outlive its end, and Python could end while
# a gloo thread drops its last tensor: "terminate called without an active exception".
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)

from metarl.envs.errors import UserError

X = TypeVar("X")

CHUNK = 4
"""Number of tasks computed at once; their working set fits into the cache."""

LIMIT_SECONDS = 900.0
"""Maximum time to wait for the other ranks."""


class ProcessGroupError(UserError):
    """The ranks cannot continue together: one was lost, or did not answer in time."""


@dataclass
class Traffic:
    """Cost of a rank's collectives so far."""

    calls: int = 0
    bytes: int = 0
    """Number of sent bytes."""
    seconds: float = 0.0
    """Duration, including waiting for the others."""


class ProcessGroup:
    """Group of one process; collectives return this process's values."""

    rank = 0
    size = 1
    limit = float("inf")
    """Maximum seconds to wait for the others."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and prints output."""
        return self.rank == 0

    def block(self, tasks: int) -> slice:
        """Return the slice of this rank's tasks: contiguous, whole chunks.

        Raises:
            UserError: fewer chunks than ranks.
        """
        chunks = -(-tasks // CHUNK)
        if chunks < self.size:
            raise UserError(
                f"{tasks} tasks are {chunks} chunks of {CHUNK}, too few for {self.size} ranks:"
                f" start {chunks}, or use more tasks"
            )
        first, last = (chunks * r // self.size for r in (self.rank, self.rank + 1))
        return slice(first * CHUNK, min(last * CHUNK, tasks))

    def total(self, count: int) -> int:
        """Return the sum of a count over ranks."""
        return count

    def largest(self, count: int) -> int:
        """Return the maximum of a count over ranks."""
        return count

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank."""
        return flag

    def sum_in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum of all ranks' tensors of one shape, added in rank order."""
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of all ranks, [t, ...] each, in rank order, [T, ...]."""
        return values

    def from_main(self, value: X) -> X:
        """Return the value of rank 0; the values of other ranks are ignored."""
        return value

    def check_same(self, vector: Tensor) -> None:
        """Raise ProcessGroupError on all ranks if the bits of any rank differ from rank 0's."""

    @contextlib.contextmanager
    def errors_shared(self) -> Iterator[None]:
        """Raise an exception of one rank on all ranks, at their next collective.

        The end of the context is also a collective. If there are several errors, all ranks raise
        the error of the first rank. On other ranks, it has the attribute `elsewhere`.
        """
        yield


ALONE = ProcessGroup()
"""Group of only this process, for values that are not shared."""


class _Step(IntEnum):
    """Next operation of a rank, as announced to the others."""

    FAULT = 0
    END = 1
    COUNT = 2
    SUM = 3
    GATHER = 4
    SEND = 5
    CHECK = 6


class TorchProcessGroup(ProcessGroup):
    """Processes of torch.distributed's default group, which must use gloo.

    Args:
        limit: maximum seconds to wait for the others in a collective.
    """

    def __init__(self, limit: float = LIMIT_SECONDS) -> None:
        super().__init__()
        self.rank, self.size, self.limit = dist.get_rank(), dist.get_world_size(), limit
        self._agreed: BaseException | None = None

    def total(self, count: int) -> int:
        return sum(self._meet(_Step.COUNT, count))

    def largest(self, count: int) -> int:
        return max(self._meet(_Step.COUNT, count))

    def any(self, flag: bool) -> bool:
        return any(self._meet(_Step.COUNT, int(flag)))

    def sum_in_order(self, parts: Sequence[Tensor]) -> Tensor:
        # Each rank adds one range of coordinates over all parts, in order, and sends it to the
        # others: the bits equal those in one process, and the traffic does not grow with the number
        # of ranks.
        own = torch.stack(list(parts)).flatten(1)
        counts = self._meet(_Step.SUM, len(own))
        ends = [own.shape[1] * (r + 1) // self.size for r in range(self.size)]
        widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        width = widths[self.rank]
        given = torch.cat([part.flatten() for part in own.split(widths, dim=1)])
        rows = self._exchange(
            given, [len(own) * w for w in widths], [count * width for count in counts]
        ).view(sum(counts), width)
        total = super().sum_in_order(rows.unbind())
        everywhere = self._exchange(total.repeat(self.size), [width] * self.size, widths)
        return everywhere.view_as(parts[0])

    def gather(self, values: Tensor) -> Tensor:
        counts = self._meet(_Step.GATHER, len(values))
        flat = values.contiguous().flatten()
        width = values[:1].numel()
        found = self._exchange(
            flat.repeat(self.size), [len(flat)] * self.size, [count * width for count in counts]
        )
        return found.view(sum(counts), *values.shape[1:])

    def from_main(self, value: X) -> X:
        self._meet(_Step.SEND)
        return self._send(value, 0)

    def check_same(self, vector: Tensor) -> None:
        self._meet(_Step.CHECK)
        sent = vector.clone()
        with self._collective(vector.nbytes if self.is_main else 0):
            self._wait(dist.broadcast(sent, 0, async_op=True))
        same = self._meet(_Step.COUNT, int(sent.numpy().tobytes() == vector.numpy().tobytes()))
        if not all(same):
            raise ProcessGroupError(
                f"rank {same.index(0)} has other parameters than rank 0: are their processors and"
                " versions the same?"
            )

    @contextlib.contextmanager
    def errors_shared(self) -> Iterator[None]:
        try:
            yield
        except ProcessGroupError:
            raise  # all have it, or no other rank is left
        except Exception as error:
            if error is not self._agreed:
                self._meet(_Step.FAULT, error=error)
            raise
        self._meet(_Step.END)

    def _meet(self, step: _Step, count: int = 0, error: Exception | None = None) -> list[int]:
        """Return every rank's count, after all announced the same operation.

        Raises:
            Exception: the error of the first rank that has one. On that rank, it is not raised
                here.
        """
        message = torch.tensor([step, count] * self.size)
        told = self._exchange(message).view(-1, 2).tolist()
        steps = [step for step, _ in told]
        if _Step.FAULT in steps:
            first = steps.index(_Step.FAULT)
            found = self._send(_portable(error), first)
            if first == self.rank:
                self._agreed = error
                return []
            self._agreed = found
            found.elsewhere = True
            raise found
        if len(set(steps)) > 1:
            names = ", ".join(f"{r}: {_Step(s).name}" for r, s in enumerate(steps))
            raise ProcessGroupError(f"the ranks took different steps ({names})")
        return [count for _, count in told]

    def _exchange(
        self, given: Tensor, sizes: Sequence[int] = (), sizes_back: Sequence[int] = ()
    ) -> Tensor:
        """Send a part of a vector to each rank, and return the received parts in rank order."""
        back = given.new_empty(sum(sizes_back) if sizes_back else len(given))
        own = sizes[self.rank] if sizes else len(given) // self.size
        with self._collective((len(given) - own) * given.element_size()):
            work = dist.all_to_all_single(
                back, given, list(sizes_back) or None, list(sizes) or None, async_op=True
            )
            self._wait(work)
        return back

    def _send(self, value: Any, source: int) -> Any:
        box = [value]
        with self._collective(0):
            dist.broadcast_object_list(box, source)
        return box[0]

    @staticmethod
    def _wait(work: Any) -> None:
        """Wait for a collective, and handle signals meanwhile."""
        while True:
            try:
                work.wait(timedelta(seconds=0.5))
                return
            except RuntimeError as error:
                if work.is_completed() or "Operation timed out" not in str(error):
                    raise

    @contextlib.contextmanager
    def _collective(self, sent: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            waited = time.perf_counter() - start
            who = f"rank {self.rank} of {self.size}"
            if waited >= 0.9 * self.limit:
                raise ProcessGroupError(
                    f"{who} waited {self.limit:g} s for the others, one of which hangs; set a"
                    " longer --rank-timeout if they take that long"
                ) from error
            raise ProcessGroupError(
                f"{who} lost another, which has ended or cannot be reached"
            ) from error
        finally:
            self.traffic.calls += 1
            self.traffic.bytes += sent
            self.traffic.seconds += time.perf_counter() - start


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that can be sent: itself, or one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def local_ranks() -> int:
    """Return the number of ranks on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_of(device: str) -> str:
    """Return the device of this rank: "cuda" is one GPU per rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and local_ranks() > 1 else device


@contextlib.contextmanager
def joined(limit: float = LIMIT_SECONDS) -> Iterator[ProcessGroup]:
    """Yield the group of torchrun's ranks, or a group of only this process.

    Args:
        limit: maximum seconds to wait for the others in a collective.

    Raises:
        ProcessGroupError: some ranks did not connect.
    """
    if not (limit > 0.0 and limit < float("inf")):
        raise UserError(f"rank_timeout must be positive, got {limit}")
    rank, size = (int(os.environ.get(name, "1")) for name in ("RANK", "WORLD_SIZE"))
    if size == 1:
        yield ProcessGroup()
        return
    try:
        wait = timedelta(seconds=limit)
        store, rank, size = next(rendezvous("env://", timeout=wait))
        store = PrefixStore(_attempt(store, rank, size, limit), store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ProcessGroupError(
            f"rank {rank} of {size} did not find the others: {reason}"
        ) from error
    try:
        yield TorchProcessGroup(limit)
    finally:
        dist.destroy_process_group()


def _attempt(store: Store, rank: int, size: int, limit: float) -> str:
    """Return a name that is common to all ranks of this start, and different from earlier starts.

    torchrun keeps its store when it restarts the ranks, including the addresses of earlier ranks.
    Therefore rank 0 sends a call. Each rank answers it with its own word. If rank 0 repeats that
    word, the rank knows that the call is not from an earlier start.
    """
    end = time.monotonic() + limit
    word = secrets.token_hex(8)

    def heard(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank == 0:
        store.set("call", word)
        waiting = set(range(1, size))
        while waiting:
            for other in list(waiting):
                answer = heard(f"answer {other}")
                if answer.startswith(word):
                    store.set(f"echo {other}", answer)
                    waiting.remove(other)
            _pause(end)
        return word
    while True:
        call = heard("call")
        store.set(f"answer {rank}", call + word)
        if heard(f"echo {rank}") == call + word:
            return call
        _pause(end)


def _pause(end: float) -> None:
    if time.monotonic() > end:
        raise RuntimeError("not all of them were started")
    time.sleep(0.02)
