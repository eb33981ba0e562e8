"""Metrics of a run: `metrics.jsonl`, and TensorBoard events derived from it.

`metrics.jsonl` is append-only, with one line per iteration. The line is on the disk before the
checkpoint of its iteration. Resume removes the lines after the checkpoint, so each iteration
appears once. If a line is not a row of metrics, a warning names it, the original file is kept next
to the new one, and the other rows stay. Events are written again from the rows. If that fails, one
warning is logged and training continues.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarl.plain_json import finite, json_text
from metarl.runs.files import GrowingFile, set_aside, write_atomically

_log = logging.getLogger(__name__)

# TensorBoard names in the style of stable-baselines3; the x-axis is env steps.
_TENSORBOARD = {
    "return_pre": "rollout/ep_rew_mean_pre",
    "return_post": "rollout/ep_rew_mean_post",
    "gain": "rollout/adaptation_gain",
    "loss_pre": "rollout/loss_pre",
    "loss_post": "rollout/loss_post",
    "diverged_episodes": "rollout/diverged_episodes",
    "kl": "train/approx_kl",
    "surrogate_before": "train/surrogate_before",
    "surrogate_after": "train/surrogate_after",
    "line_search_steps": "train/line_search_steps",
    "gradient_norm": "train/gradient_norm",
    "gradient_agreement": "train/gradient_agreement",
    "inner_kl": "train/inner_kl",
    "step_size": "train/step_size",
    "inner_gradient_cosine": "train/inner_gradient_cosine",
    "clip_fraction": "rollout/clip_fraction",
    "bounded_gradients": "train/bounded_gradients",
    "policy_std": "train/std",
    "skipped_updates": "train/skipped_updates",
    "env_steps_per_second": "time/fps",
    "iteration": "time/iterations",
    "seconds_rollout": "time/seconds_rollout",
    "seconds_update": "time/seconds_update",
}

_NEEDED = ("iteration", "env_steps", "seconds_iteration")
"""Required columns, besides the measure before and after adaptation; null without a value."""


def measure_of(row: Mapping[str, Any]) -> str:
    """Return the adaptation measure of a row: return or loss."""
    return "loss" if "loss_pre" in row else "return"


def measured_time(name: str) -> bool:
    """Whether a metric depends on the speed of the machine."""
    return name.startswith("seconds_") or name.endswith(("_per_second", "_memory_bytes"))


class MetricsLog:
    """Append one JSON object per iteration. On resume, remove the rows after the checkpoint."""

    def __init__(self, folder: Path, iteration: int = 0, text: str = "") -> None:
        path = folder / "metrics.jsonl"
        content = _read(path)
        kept = [line for line in content.rows if line.row["iteration"] <= iteration]
        self._recover(path, content, kept, iteration)
        self._file = GrowingFile(path)
        self._events = Events(folder)
        self._events.add_config(text)
        for line in kept:
            self._show(line.row)
        self._events.flush()

    def _recover(
        self, path: Path, content: _Content, kept: Sequence[_Line], iteration: int
    ) -> None:
        """Keep the valid rows in the file and save the original file next to it."""
        later = sorted({line.number for line in content.rows} - {line.number for line in kept})
        first = [line.number for line in kept] == list(range(1, len(kept) + 1))
        if content.damage or len(later) > 1 or not first:  # one row may precede its checkpoint
            aside = set_aside(path, content.data)
            write_atomically(path, b"".join(_line(line.row) for line in kept))
            told = list(content.damage)
            if later:
                told.append(f"line {_ranges(later)} comes after iteration {iteration}")
            _log.warning("%s: %s; the original file is kept as %s", path, "; ".join(told), aside)
        elif content.data:
            file = GrowingFile(path)
            file.cut(kept[-1].end if kept else 0)
            if kept and not content.data[: kept[-1].end].endswith(b"\n"):
                file.append(b"\n")
            file.close()
        there = {line.row["iteration"] for line in kept}
        if missing := [i for i in range(1, iteration + 1) if i not in there]:
            _log.warning("%s has no row of iteration %s", path, _ranges(missing))

    def write(self, *rows: dict[str, Any]) -> None:
        """Record iterations. Numbers that are not finite are written as null.

        Raises:
            OSError: the rows cannot be written. No part of them is written.
        """
        self._file.append(b"".join(_line(row) for row in rows))
        for row in rows:
            self._show(row)
        self._events.flush()

    def _show(self, row: dict[str, Any]) -> None:
        shown = {tag: row[name] for name, tag in _TENSORBOARD.items() if row.get(name) is not None}
        self._events.add_scalars(shown, row["env_steps"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()


class Events:
    """Writer of TensorBoard events. It replaces the folder's events and logs its first error only.

    Events go through torch's own writer because other programs watch it. With `sync_tensorboard`,
    Weights & Biases records only what passes through it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._stack = contextlib.ExitStack()
        with self._told_once():
            # Imported here because it takes seconds, and only training needs it.
            from torch.utils.tensorboard import FileWriter

            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
            self._stack.enter_context(_quiet_writers())
            self._writer = FileWriter(str(folder))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars by tag."""
        self._add_values(*({"tag": t, "simple_value": v} for t, v in values.items()), step=step)

    def add_image(self, tag: str, data: bytes) -> None:
        """Add a PNG image, or a GIF for a video."""
        self._add_values({"tag": tag, "image": {"encoded_image_string": data, "colorspace": 3}})

    def _add_values(self, *values: dict[str, Any], step: int = 0) -> None:
        from tensorboard.compat.proto.summary_pb2 import (
            Summary,  # pyright: ignore[reportAttributeAccessIssue]
        )

        self.add(Summary(value=list(values)), step)

    def add_config(self, text: str) -> None:
        """Add a config, given as JSON, as text and as hyperparameters."""
        # In this run's own file: SummaryWriter.add_hparams would create another run.
        from torch.utils.tensorboard import summary

        self.add(summary.text("config", f"```json\n{text}\n```"), 0)
        config = json.loads(text) if text else {}
        flat = config.pop("options", {})
        for key, value in config.items():
            parts = value if isinstance(value, dict) else {"": value}
            flat |= {f"{key}.{name}".rstrip("."): part for name, part in parts.items()}
        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flat.items()
        }
        if plain:
            shown = {_TENSORBOARD[name]: 0.0 for name in ("return_pre", "return_post", "gain")}
            for part in summary.hparams(plain, shown):
                self.add(part, 0)

    def add(self, summary: Any, step: int) -> None:
        """Add a summary."""
        with self._told_once():
            if self._writer is not None:
                self._writer.add_summary(summary, step)

    def flush(self) -> None:
        """Write what was added."""
        with self._told_once():
            if self._writer is not None:
                self._writer.flush()

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorboard's file systems raise their own errors
            _log.warning(
                "%s: %s; no more TensorBoard events are written, training continues",
                self._folder, getattr(error, "strerror", None) or error,
            )  # fmt: skip
            self._end()

    def _end(self) -> None:
        writer, self._writer = self._writer, None
        with self._stack, contextlib.suppress(Exception):  # already logged
            if writer is not None:
                writer.close()

    def close(self) -> None:
        """Write what was added, and close the file."""
        self.flush()
        self._end()


@contextlib.contextmanager
def _quiet_writers() -> Iterator[None]:
    """Suppress the tracebacks of the event writers' threads. `Events` logs these errors."""
    from tensorboard.summary.writer import event_file_writer

    before = threading.excepthook

    def hook(fault: threading.ExceptHookArgs) -> None:
        if type(fault.thread).__module__ != event_file_writer.__name__:
            before(fault)

    threading.excepthook = hook
    try:
        yield
    finally:
        if threading.excepthook is hook:
            threading.excepthook = before


def show_adaptation(folder: Path, returns: Sequence[float], images: Mapping[str, bytes]) -> None:
    """Add an adaptation curve to TensorBoard as a separate run in the folder.

    Args:
        returns: return after 0 ... K inner steps, the x-axis.
        images: PNG by name, or GIF for a video (torch's add_video needs another package).
    """
    events = Events(folder)
    for k, value in enumerate(returns):
        events.add_scalars({"adaptation/return_after_steps": value}, k)
    for name, data in images.items():
        events.add_image(f"adaptation/{name}", data)
    events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.

    A truncated last line is skipped. A damaged line is skipped with a warning.
    """
    path = folder / "metrics.jsonl"
    content = _read(path)
    if content.damage:
        _log.warning("%s: %s", path, "; ".join(content.damage))
    return [line.row for line in content.rows]


@dataclass(frozen=True)
class _Line:
    row: dict[str, Any]
    number: int
    end: int
    """Offset of the line's end in the file, in bytes."""


@dataclass(frozen=True)
class _Content:
    """Parsed content of a metrics file."""

    data: bytes
    rows: list[_Line]
    damage: list[str]


def _read(path: Path) -> _Content:
    data = path.read_bytes() if path.exists() else b""
    rows: list[_Line] = []
    damage = {}
    end = 0
    for number, text in enumerate(data.splitlines(keepends=True), 1):
        end += len(text)
        try:
            row = json.loads(text)
            _check(row)
        except ValueError as error:
            if end < len(data) or text.endswith(b"\n"):  # not a last line that a crash truncated
                damage[number] = str(error) if type(error) is ValueError else "no JSON"
        else:
            rows.append(_Line(row, number, end))
    by_iteration: dict[int, _Line] = {}
    for line in rows:
        iteration = line.row["iteration"]
        if iteration in by_iteration:
            damage[line.number] = f"iteration {iteration} appears a second time"
        else:
            by_iteration[iteration] = line
    texts = [f"line {number} is damaged ({why})" for number, why in sorted(damage.items())]
    return _Content(data, [line for _, line in sorted(by_iteration.items())], texts)


def _check(row: Any) -> None:
    """Raise ValueError if a value cannot be a row."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    measure = measure_of(row)
    for name in (*_NEEDED, f"{measure}_pre", f"{measure}_post"):
        value = row.get(name, "missing")
        if isinstance(value, bool | str | list | dict):
            raise ValueError(f"{name} is {value}")
    if type(row["iteration"]) is not int or type(row["env_steps"]) is not int:
        raise ValueError("iteration and env_steps must be whole numbers")
    if row["iteration"] < 1:
        raise ValueError(f"iteration is {row['iteration']}")


def _ranges(numbers: Sequence[int]) -> str:
    """Return "2, 5-7" for 2, 5, 6, 7."""
    texts: list[str] = []
    for i in numbers:
        first = i
        if texts and int(texts[-1].split("-")[-1]) == i - 1:
            first = int(texts.pop().split("-")[0])
        texts.append(f"{first}-{i}" if first < i else str(i))
    return ", ".join(texts)


def _line(row: dict[str, Any]) -> bytes:
    return (json_text(finite(row)) + "\n").encode()
