"""What is written while a run goes on: each iteration's metrics, and then its checkpoint.

Both are written on a thread, while the next iteration samples; one iteration after the other, each
once the one before is on the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from metarl.config.options import Config
from metarl.plain_json import json_text
from metarl.runs.fingerprint import Fingerprint
from metarl.runs.folder import State, save_checkpoint
from metarl.runs.metrics import MetricsLog

SAVE_SECONDS = 5.0
"""Between checkpoints of a run on a data set: an iteration takes less time than to write it."""

_log = logging.getLogger(__name__)


class Recorder:
    """Writes what a run has learned. As a context manager it waits for the last iteration's files.

    Args:
        folder: the run's, locked.
        config: of the run.
        state: that it goes on from; metrics of later iterations are forgotten.
        check: raises where the folder is no longer at its place.
        between: seconds that pass between two checkpoints, but for those that are kept.
        family: what identifies the family, stored in checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        state: State,
        check: Callable[[], None],
        between: float = 0.0,
        family: Fingerprint | None = None,
    ) -> None:
        self._folder, self._config, self._check = folder, config, check
        self._family = family
        self._between, self._saved = between, time.monotonic()
        self._rows: list[dict[str, Any]] = []  # that are not written yet
        self._state = state
        text = json_text(config.to_json(), indent=2)
        self._metrics = MetricsLog(folder, state.iteration, text)
        self._thread = ThreadPoolExecutor(1, "metarl-recorder")
        self._writing: Future[None] | None = None

    def record(self, row: dict[str, Any], state: State) -> None:
        """Begin to write an iteration, once the one before is written.

        Raises:
            RunError: the folder was moved, by the time the iteration before was to be written.
            OSError: the iteration before cannot be written; no part of it is.
        """
        self._rows.append(row)
        self._state = replace(state)
        kept = state.iteration % self._config.checkpoint_every == 0
        if kept or time.monotonic() - self._saved >= self._between:
            self._begin()

    def _begin(self) -> None:
        """Begin to write what was recorded, once the iteration before is written."""
        self._join()
        rows, self._rows, self._saved = self._rows, [], time.monotonic()
        self._writing = self._thread.submit(self._write, rows, self._state)

    def _write(self, rows: list[dict[str, Any]], state: State) -> None:
        self._check()
        try:
            self._metrics.write(*rows)
            # After the metrics: a crash in between repeats iterations, and their rows.
            save_checkpoint(self._folder, self._config, state, self._family)
        except OSError:
            self._check()  # a folder that went meanwhile is told as such
            raise

    def wait(self) -> None:
        """Wait until all that was recorded is on the disk; raises as `record` does."""
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
            self._writing, self._rows = None, []  # after a gap they could not be gone on from
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
