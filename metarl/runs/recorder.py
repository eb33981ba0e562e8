"""Recorder of a run in progress: each iteration's metrics, then its checkpoint.

A thread writes both while the next iteration samples. It writes the iterations in order, each after
the previous one is on the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from metarl.plain_json import json_text
from metarl.runs.folder import State, save_checkpoint
from metarl.runs.metrics import MetricsLog

SAVE_SECONDS = 5.0
"""Seconds between checkpoints of a run on a data set. An iteration is faster than its write."""

_log = logging.getLogger(__name__)


class Recorder:
    """Write metrics and checkpoints. As a context manager, wait for the last iteration's files.

    Args:
        folder: run folder, locked.
        record: config and family of the run, see `create_run`.
        state: state that the run continues from; metrics of later iterations are removed.
        check: function that raises if the folder was moved or deleted.
        between: minimum seconds between two checkpoints; kept checkpoints are always written.
    """

    def __init__(
        self,
        folder: Path,
        record: Mapping[str, Any],
        state: State,
        check: Callable[[], None],
        between: float = 0.0,
    ) -> None:
        self._folder, self._record, self._check = folder, record, check
        self._between, self._saved = between, time.monotonic()
        self._rows: list[dict[str, Any]] = []  # not written yet
        self._state = state
        text = json_text(record["config"], indent=2)
        self._metrics = MetricsLog(folder, state.iteration, text)
        self._thread = ThreadPoolExecutor(1, "metarl-recorder")
        self._writing: Future[None] | None = None

    def record(self, row: dict[str, Any], state: State) -> None:
        """Start to write an iteration after the previous one is written.

        Raises:
            RunError: the folder was moved before the previous iteration was written.
            OSError: the previous iteration cannot be written. No part of it is written.
        """
        self._rows.append(row)
        self._state = replace(state)
        kept = state.iteration % self._record["config"]["options"]["checkpoint_every"] == 0
        if kept or time.monotonic() - self._saved >= self._between:
            self._begin()

    def _begin(self) -> None:
        """Start to write the recorded iterations after the previous write finishes."""
        self._join()
        rows, self._rows, self._saved = self._rows, [], time.monotonic()
        self._writing = self._thread.submit(self._write, rows, self._state)

    def _write(self, rows: list[dict[str, Any]], state: State) -> None:
        self._check()
        try:
            self._metrics.write(*rows)
            # After the metrics: a crash in between repeats the iterations and their rows.
            save_checkpoint(self._folder, self._record, state)
        except OSError:
            self._check()  # reports a folder that was removed meanwhile
            raise

    def wait(self) -> None:
        """Wait until all recorded iterations are on the disk. Raises the errors of `record`."""
        self._join()
        if self._rows:
            self._begin()
            self._join()

    def _join(self) -> None:
        if self._writing is None:
            return
        try:
            self._writing.result()
        except Exception:
            self._writing, self._rows = None, []  # rows after a gap cannot be resumed from
            raise
        self._writing = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as other:
            if error is None:
                raise
            _log.warning("the last iteration is not saved: %s", other)
        finally:
            self._thread.shutdown()
            self._metrics.close()
