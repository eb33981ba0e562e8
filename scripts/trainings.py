"""Trainings that scripts start, one process each. A stopped training is continued."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metarl.config.options import available_threads
from metarl.envs.errors import UserError
from metarl.runs.metrics import read_metrics


def train(folder: Path, flags: Sequence[str], jobs: int) -> None:
    """Run `metarl train` in a folder, or continue the run there; save its output next to it.

    Args:
        flags: options of the run including --iterations, but without its folder and threads.
        jobs: number of trainings that share the processors.

    Raises:
        UserError: the training failed; or the existing run has other options, or is longer.
    """
    threads = max(1, available_threads() // jobs)
    where = ["--out", str(folder), "--resume", "auto", "--threads", str(threads)]
    command = [sys.executable, "-m", "metarl", "train", *flags, *where]
    # A rank's script starts processes that are not ranks.
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        if subprocess.run(command, stdout=file, stderr=file, env=alone).returncode:
            raise UserError(f"{' '.join(command)} failed; see {log}")
    wanted, done = int(flags[flags.index("--iterations") + 1]), len(read_metrics(folder))
    if done > wanted:
        raise UserError(f"{folder} has {done} iterations, not {wanted}: choose another --out")


def train_all(wanted: Mapping[Path, Sequence[str]], jobs: int) -> None:
    """Train in each folder with its flags, at most `jobs` at a time; see `train`.

    Raises:
        UserError: one failed. Running trainings finish first, and no further one starts.
    """
    failed = threading.Event()

    def one(folder: Path, flags: Sequence[str]) -> None:
        if failed.is_set():
            return
        try:
            train(folder, flags, jobs)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, wanted.keys(), wanted.values()))
