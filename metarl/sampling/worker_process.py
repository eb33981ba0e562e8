"""Worker process: it steps the environments of some tasks and runs their episodes on request.

A worker is configured by a `Share` and answers with a `Reply`. It writes samples to memory that it
shares with its parent (`workers`). It ignores Ctrl-C and SIGTERM, and ends with its parent.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from metarl.envs import TaskVectorEnv, guard
from metarl.envs.checks.start import start_findings
from metarl.envs.errors import UserError
from metarl.envs.memory import share_with
from metarl.envs.processes import Parcel, unpack
from metarl.models.policies import PolicyModel
from metarl.models.settings import plain_attention
from metarl.sampling.rollouts import RolloutBuffer, collect_into
from metarl.sampling.signals import end_with_parent, leave_tracebacks
from metarl.sampling.spaces import ActionMode, check_spaces


@dataclass(frozen=True)
class Share:
    """Configuration of a worker, sent to it once."""

    index: int
    family: Parcel
    policy: PolicyModel
    tasks: int
    """Number of tasks of all workers."""
    episodes: int
    horizon: int
    mode: ActionMode
    info_keys: tuple[str, ...]
    """Entries of the environments' info to keep."""
    where: slice
    """Slice of the worker's tasks."""
    memory: list[Any]
    """Arrays of a `RolloutBuffer` of all tasks."""
    progress: Any
    """`TaskVectorEnv.progress`"""
    check: bool = False
    """Check the environments first and reply with the findings."""


@dataclass(frozen=True)
class Reply:
    """Reply of a worker, or a finding about it."""

    kind: str
    """found, ready, done; refused (a UserError), raised; was killed, ended, hung."""
    text: str = ""
    trace: str = ""


def work(share: Share, channel: Connection, dump: Connection, with_parent: bool) -> None:
    """Serve collect orders until the order None or the end of the parent process."""
    end_with_parent(with_parent)
    leave_tracebacks(dump)
    torch.set_num_threads(1)
    try:
        with plain_attention(), _restored(share, channel) as (env, memory):
            channel.send(Reply("ready"))
            while (order := channel.recv()) is not None:
                params, tasks, key, deterministic = order
                for array in memory.arrays().values():
                    array[share.where] = 0
                stacked = {name: torch.from_numpy(p) for name, p in params.items()}
                with guard.restored():
                    collect_into(
                        memory, share.where, env, share.policy, stacked, tasks, key,
                        share.mode, deterministic,
                    )  # fmt: skip
                channel.send(Reply("done"))
        channel.send(Reply("done"))
    except (EOFError, BrokenPipeError) as error:
        if guard.is_of_user_code(error):  # the simulator's pipe broke; otherwise the parent is gone
            channel.send(_raised(error))
    except guard.ExitError as error:  # a repeat may succeed
        channel.send(_raised(error))
    except UserError as error:
        channel.send(Reply("refused", str(error)))
    except BaseException as error:  # an environment may call sys.exit
        channel.send(_raised(error))


def _raised(error: BaseException) -> Reply:
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return Reply("raised", text, traceback.format_exc())


@contextlib.contextmanager
def _restored(share: Share, channel: Connection) -> Iterator[tuple[TaskVectorEnv, RolloutBuffer]]:
    """Yield a worker's vector environment and shared memory; close the environment afterwards."""
    family = unpack(share.family)
    if family.horizon != share.horizon:
        raise UserError(
            f"{family.name}: created again by name, it has horizon {family.horizon}, not"
            f" {share.horizon}; create the changed family in a function, as module:attribute"
        )
    if share.check:
        for finding in start_findings(family, share.progress):
            channel.send(Reply("found", finding))
        share.progress[:] = [0, 0, -1]
    tasks = share.where.stop - share.where.start
    share_with(-(-share.tasks // tasks))
    with guard.user_code():
        env = family.make_vec(tasks, share.episodes, autoreset_mode=AutoresetMode.DISABLED)
    env.progress = share.progress
    arrays = iter(share.memory)

    def attach(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
        return np.frombuffer(next(arrays), dtype).reshape(shape)

    check_spaces(env, share.policy, family.name)
    yield (
        env,
        RolloutBuffer(
            share.policy, share.tasks, share.episodes, share.horizon, share.info_keys, attach
        ),
    )
    with guard.user_code():
        env.close()
