"""Rollouts in worker processes (`worker_process`), for environments without a native backend.

Each worker has the environments of its share of the tasks. A collect sends it the stacked
parameters of its share. It runs whole episodes and writes them to memory that it shares with this
process. No data cross a process boundary per step. Every random number is a function of its key, so
results are bit-identical for any number of workers, and equal to `Collector`'s.

- A worker counts its environment calls in shared memory and records where it is. A worker
  that starts no call for `timeout` seconds hangs.
- A worker that died, hangs or raised is replaced, and its share is repeated exactly. If it keeps
  failing, a `WorkerError` names worker and task and includes the environment's traceback.
- Workers end with this process in any case. Shared memory has no name that could outlive it.
- Workers ignore Ctrl-C and SIGTERM: this process handles interruptions.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import multiprocessing
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import util
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.envs import TaskFamily
from metarl.envs.checks.start import log_finding, warn_at_start
from metarl.envs.errors import UserError
from metarl.envs.processes import pack
from metarl.envs.vector import describe_progress
from metarl.models.networks import Params
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import Collector, RandomKey, RolloutBuffer, clear_after_the_end
from metarl.sampling.signals import interrupts_blocked, kill_group, limit_waits, traceback_of
from metarl.sampling.spaces import ActionMode
from metarl.sampling.trajectories import Rollout
from metarl.sampling.worker_process import Reply, Share, work

REPEATS = {"was killed": 2, "ended": 1, "hung": 1, "raised": 1}
"""Maximum number of repeats of a share in one collect, for each kind of failure."""

START_SECONDS = 300.0
"""Maximum time to import modules and create the environments."""

CLOSE_SECONDS = 5.0
"""Maximum time to close one environment."""

_NO_GUARD = 78  # exit code: a worker imported a script without a __main__ guard
_GUARD = """worker processes import the script that starts them; put the code that it runs under

    if __name__ == "__main__":
        ...

or use workers=0, to step the environments in this process"""

_context = multiprocessing.get_context("spawn")
_log = logging.getLogger(__name__)


class WorkerError(UserError):
    """Workers keep failing. The message names worker and task and includes the traceback."""


class _Worker:
    """One worker process and its current work."""

    def __init__(self, share: Share, timeout: float) -> None:
        self.share, self.timeout = share, timeout
        self.order: Any = None
        self.tasks = np.empty((0, 0))
        self.found: list[str] = []
        """Findings of the check of the environments."""
        self.start()

    def start(self) -> None:
        """Start a process. Its first reply is that it is ready."""
        self.share.progress[:] = [0, 0, -1]
        self.channel, theirs = _context.Pipe()
        self.dump, their_dump = _context.Pipe(duplex=False)
        limit_waits(self.channel, self.timeout)
        main = threading.current_thread() is threading.main_thread()
        self.process: BaseProcess = _context.Process(
            target=work,
            args=(self.share, theirs, their_dump, main),
            name=f"metarl worker {self.share.index}",
        )
        try:
            with interrupts_blocked():
                self.process.start()
        finally:
            theirs.close()
            their_dump.close()
        self.ready, self.busy = False, True
        self._seen, self._silent, self._looked = 0, 0.0, time.monotonic()

    def submit(self, order: Any, tasks: NDArray) -> None:
        """Send an order as soon as the worker is ready. `poll` reports its end."""
        self.order, self.tasks, self.busy = order, tasks, True
        self._silent, self._looked = 0.0, time.monotonic()
        if self.ready:
            self.share.progress[1:] = [0, -1]
            with contextlib.suppress(OSError):  # dead or stopped; `poll` detects it
                self.channel.send(order)

    def poll(self) -> Reply | None:
        """Return a reply or a fault, or None while the worker is busy."""
        try:
            if self.channel.poll():
                return self._heard(self.channel.recv())
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.join(1.0)
            return self._fault()
        if not self.process.is_alive() and not self.channel.poll():
            return self._fault()
        now = time.monotonic()
        # This process may have been suspended: each poll counts for at most two seconds.
        self._silent += min(now - self._looked, 2.0)
        self._looked = now
        if self._seen != self.share.progress[0]:
            self._seen, self._silent = self.share.progress[0], 0.0
        return self._fault(hung=True) if self._silent > self.limit else None

    @property
    def limit(self) -> float:
        """Seconds without an environment call after which the worker counts as hung."""
        calls = self.ready or self.share.progress[1] != 0
        return self.timeout if calls else max(self.timeout, START_SECONDS)

    def _heard(self, reply: Reply) -> Reply | None:
        if reply.kind == "found":
            self.found.append(reply.text)
            return None
        if reply.kind == "ready":
            self.ready = True
            if self.order is not None:
                self.submit(self.order, self.tasks)
                return None
        self.busy = False
        if reply.kind == "raised":
            return Reply("raised", f"{self._name('raised')}: {reply.text}", reply.trace)
        return reply

    def _fault(self, hung: bool = False) -> Reply:
        code = self.process.exitcode
        kind, what = "ended", f"exit code {code}"
        if hung:
            kind, what = "hung", f"no step ended for {self.limit:g} s"
        elif code == _NO_GUARD and not self.ready:
            return Reply("refused", _GUARD)
        elif code is not None and code < 0:
            kind, what = "was killed", signal.Signals(-code).name
        text = f"{self._name(kind)}: {what}"
        return Reply(kind, text, traceback_of(self.process, self.dump, hung=hung))

    def _name(self, verb: str) -> str:
        tasks = np.repeat(self.tasks, self.share.episodes, axis=0)
        where = describe_progress(list(self.share.progress), tasks)
        return f"worker {self.share.index} {verb} {where}"

    def kill(self) -> None:
        """Kill the process and the processes that its environments started."""
        kill_group(self.process)
        self.channel.close()
        self.dump.close()

    def restart(self) -> None:
        """Start a new process with the last order, without checks."""
        self.kill()
        self.share = dataclasses.replace(self.share, check=False)
        self.start()


class WorkerCollector:
    """Sampler of rollouts in worker processes, equivalent to `Collector`.

    Args:
        family: family, created again in each worker.
        policy: policy network.
        num_tasks: number of tasks T, split evenly.
        episodes: episodes per task.
        info_keys: entries of the environments' info to keep.
        workers: number of processes, at most the number of tasks.
        timeout: maximum seconds of one reset, step or close of an environment.
        check: let the first worker check the environments, and warn of its findings.

    Raises:
        UserError: the family cannot be created in a worker, its environments do not fit the policy,
            or the script has no __main__ guard.
        WorkerError: the environments cannot be created.
    """

    def __init__(
        self,
        family: TaskFamily,
        policy: PolicyModel,
        num_tasks: int,
        episodes: int,
        mode: ActionMode = "clip",
        info_keys: Sequence[str] = (),
        *,
        workers: int,
        timeout: float = 60.0,
        check: bool = False,
    ) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit(_NO_GUARD)  # a worker is importing the script that started it
        self.family, self.policy = family, policy
        self.num_tasks, self.episodes = num_tasks, episodes
        self._info_keys = tuple(info_keys)
        raws: list[Any] = []

        def share_out(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
            raws.append(_context.RawArray(ctypes.c_byte, int(np.prod(shape)) * dtype.itemsize))
            return np.frombuffer(raws[-1], dtype).reshape(shape)

        self._shared = RolloutBuffer(
            policy, num_tasks, episodes, family.horizon, self._info_keys, share_out
        )
        packed = pack(family)
        _check_sendable(policy)
        self._workers: list[_Worker] = []
        # Runs before multiprocessing waits for its children at exit, also if close is forgotten.
        self._finalizer = util.Finalize(self, _kill, (self._workers,), exitpriority=10)
        try:
            for i, where in enumerate(slices(num_tasks, -(-num_tasks // workers))):
                share = Share(
                    index=i,
                    family=packed,
                    policy=policy,
                    tasks=num_tasks,
                    episodes=episodes,
                    horizon=family.horizon,
                    mode=mode,
                    info_keys=self._info_keys,
                    where=where,
                    memory=raws,
                    progress=_context.RawArray(ctypes.c_longlong, 3),
                    check=check and i == 0,
                )
                self._workers.append(_Worker(share, timeout))
            self._finish()
            for finding in self._workers[0].found:
                log_finding(family, finding)
        except BaseException:
            self._finalizer()
            raise

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the workers, in task order; empty after `close`."""
        return [worker.process.pid for worker in self._workers]

    def collect(
        self, params: Params, tasks: NDArray, key: RandomKey, *, deterministic: bool = False
    ) -> Rollout:
        """Sample every episode of every task once; see `Collector.collect`.

        Raises:
            UserError: an environment returns an invalid value.
            WorkerError: a worker keeps failing.
        """
        if not self._workers:
            raise UserError("this collector is closed")
        detached = {name: p.detach() for name, p in params.items()}
        for worker in self._workers:
            if worker.busy:  # from an interrupted collect
                worker.restart()
            where = worker.share.where
            stacked = {name: p[where].numpy() for name, p in detached.items()}
            worker.submit((stacked, tasks[where], key, deterministic), tasks[where])
        self._finish()
        memory = RolloutBuffer(
            self.policy, self.num_tasks, self.episodes, self.family.horizon, self._info_keys
        )
        shared = self._shared.arrays()
        for name, array in memory.arrays().items():
            np.copyto(array, shared[name])
        clear_after_the_end(memory)
        return memory.rollout(self.policy, detached, tasks)

    def _finish(self) -> None:
        """Wait until every worker has finished its order; replace the ones that fail."""
        faults: Counter[tuple[int, str]] = Counter()
        for worker, reply in _replies(self._workers):
            if reply.kind in ("ready", "done"):
                continue
            worker.busy = True  # no further order is sent
            if not worker.share.check or worker.ready or reply.kind == "refused":
                fault = worker.share.index, reply.kind
                faults[fault] += 1
                self._judge(reply, faults[fault], worker.ready)
            worker.restart()  # without a check: its environments may have failed

    def _judge(self, reply: Reply, times: int, started: bool) -> None:
        """Raise if a fault is permanent; otherwise log it before a new worker repeats the share."""
        if reply.kind == "refused":
            raise UserError(reply.text)
        message = f"{self.family.name}: {reply.text}"
        trace = f"\n\n{reply.trace.rstrip()}" if reply.trace else ""
        # A worker that fails on its own during the start would fail again.
        if (not started and reply.kind != "was killed") or times > REPEATS[reply.kind]:
            if reply.kind == "hung":
                message += "; give a longer worker_timeout if its steps take that long"
            again = f" ({times} times in a row)" if times > 1 else ""
            raise WorkerError(f"{message}{again}{trace}")
        _log.warning("%s; another worker repeats its tasks%s", message, trace)

    def close(self) -> None:
        """Close the environments and end the workers. Can be called at any time and repeatedly."""
        closing = [worker for worker in self._workers if worker.ready and not worker.busy]
        try:
            for worker in closing:
                worker.timeout = min(worker.timeout, CLOSE_SECONDS)
                worker.submit(None, worker.tasks)
            for worker, reply in _replies(closing):
                worker.busy = False
                if reply.kind != "done":
                    _log.warning("%s: %s%s", self.family.name, reply.text, _where(reply))
        finally:
            self._finalizer()


def _check_sendable(policy: PolicyModel) -> None:
    """Raise UserError if a policy cannot be sent to another process."""
    try:
        pickle.dumps(policy)
    except Exception as error:  # whatever a user's objects raise
        raise UserError(
            "policy.network or policy.distribution cannot be sent to a worker process"
            f" ({type(error).__name__}: {error}): define it at the top of a module and name it"
            " module:attribute, or use workers=0"
        ) from error


def _where(reply: Reply) -> str:
    """Return the innermost place of a reply's traceback as a part of a line."""
    places = [line.strip() for line in reply.trace.splitlines() if line.lstrip().startswith("File")]
    if not places:
        return ""
    return f" ({places[0 if reply.kind == 'hung' else -1]})"  # a dump starts with the innermost


def _replies(workers: Sequence[_Worker]) -> Iterator[tuple[_Worker, Reply]]:
    """Yield each reply or fault until no worker is busy."""
    while busy := [worker for worker in workers if worker.busy]:
        # Until a worker replies or ends, or until the next check of their progress.
        tick = min(0.5, min(worker.limit for worker in busy) / 4.0)
        wait([x for w in busy for x in (w.channel, w.process.sentinel)], tick)
        for worker in busy:
            if (reply := worker.poll()) is not None:
                yield worker, reply


def _kill(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


AnyCollector = Collector | WorkerCollector


def make_collector(
    family: TaskFamily,
    policy: PolicyModel,
    num_tasks: int,
    episodes: int,
    pool: ChunkPool,
    mode: ActionMode = "clip",
    info_keys: Sequence[str] = (),
    *,
    workers: int = 0,
    timeout: float = 60.0,
    check: bool = False,
) -> AnyCollector:
    """Return a sampler of a family's episodes: in threads, worker processes or this process.

    Families that run in parallel threads never need processes. With `check`, the environments are
    checked first, in the process that will step them; findings are logged.
    """
    if family.parallel or workers == 0:
        if check:
            warn_at_start(family)
        return Collector(family, policy, num_tasks, episodes, pool, mode, info_keys)
    return WorkerCollector(
        family, policy, num_tasks, episodes, mode, info_keys, workers=workers, timeout=timeout,
        check=check,
    )  # fmt: skip
