"""What a run records: `metrics.jsonl`, and TensorBoard events derived from it.

`metrics.jsonl` only grows, by one line for each iteration, which is on the disk before its
checkpoint is. A resumed run cuts off what came after its checkpoint, so each iteration is there
once. A line that is no row of metrics is named, the file as it was is kept beside, and the other
rows stay. Events are written again from the rows; if that fails, it is said once and training goes
on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarl.plain_json import json_text
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
"""Numbers that a row is drawn by, besides its measure before and after adaptation; null where there
is none."""


def measure_of(row: Mapping[str, Any]) -> str:
    """Return what a row measures adaptation by: return, or loss."""
    return "loss" if "loss_pre" in row else "return"


def measured_time(name: str) -> bool:
    """Whether a metric depends on the machine's speed."""
    return name.startswith("seconds_") or name.endswith(("_per_second", "_memory_bytes"))


class MetricsLog:
    """Appends one JSON object an iteration; resumed, it forgets what came after a checkpoint."""

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
        """Leave the kept rows in the file, and what else it held beside it."""
        later = sorted({line.number for line in content.rows} - {line.number for line in kept})
        first = [line.number for line in kept] == list(range(1, len(kept) + 1))
        if content.damage or len(later) > 1 or not first:  # one row may come before its checkpoint
            aside = set_aside(path, content.data)
            write_atomically(path, b"".join(_line(line.row) for line in kept))
            told = list(content.damage)
            if later:
                told.append(f"line {_ranges(later)} comes after iteration {iteration}")
            _log.warning("%s: %s; the file as it was is kept as %s", path, "; ".join(told), aside)
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
        """Record iterations; numbers that are not finite are written as null.

        Raises:
            OSError: they cannot be written; then no part of them is.
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
    """A TensorBoard run in a folder, instead of what it held; a fault is told once, not raised.

    torch's own writer writes it, since other programs watch that one: Weights & Biases, with
    `sync_tensorboard`, records what goes through it and nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._stack = contextlib.ExitStack()
        with self._told_once():
            # Imported where it is needed: it takes seconds, and only training needs it.
            from torch.utils.tensorboard import FileWriter

            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
            self._stack.enter_context(_quiet_writers())
            self._writer = FileWriter(str(folder))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers by their tags."""
        from tensorboard.compat.proto.summary_pb2 import (
            Summary,  # pyright: ignore[reportAttributeAccessIssue]
        )

        self.add(
            Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()]), step
        )

    def add_image(self, tag: str, data: bytes) -> None:
        """Add a PNG, or a GIF for a video."""
        from tensorboard.compat.proto.summary_pb2 import (
            Summary,  # pyright: ignore[reportAttributeAccessIssue]
        )

        image = Summary.Image(encoded_image_string=data, colorspace=3)
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), 0)

    def add_config(self, text: str) -> None:
        """Add a config, JSON, as text and as hyper-parameters."""
        # In this run's own file; SummaryWriter.add_hparams would make another run of them.
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
        except Exception as error:  # tensorboard's file systems have errors of their own
            _log.warning(
                "%s: %s; TensorBoard shows no more of it, all else goes on",
                self._folder, getattr(error, "strerror", None) or error,
            )  # fmt: skip
            self._end()

    def _end(self) -> None:
        writer, self._writer = self._writer, None
        with self._stack, contextlib.suppress(Exception):  # it was told
            if writer is not None:
                writer.close()

    def close(self) -> None:
        """Write what was added, and close the file."""
        self.flush()
        self._end()


@contextlib.contextmanager
def _quiet_writers() -> Iterator[None]:
    """Keep the threads that write events from printing their faults: `Events` tells them."""
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
    """Put an adaptation curve into TensorBoard, as a run of its own in the folder.

    Args:
        returns: after 0 ... K inner steps, the x-axis.
        images: PNG, or GIF for a video (torch's add_video needs another package), by name.
    """
    events = Events(folder)
    for k, value in enumerate(returns):
        events.add_scalars({"adaptation/return_after_steps": value}, k)
    for name, data in images.items():
        events.add_image(f"adaptation/{name}", data)
    events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.

    A last line cut short by a crash is left out; so is a damaged one, with a warning.
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
    """Bytes of the file up to its end."""


@dataclass(frozen=True)
class _Content:
    """What is in a file of metrics."""

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
            if end < len(data) or text.endswith(b"\n"):  # no last line that a crash cut short
                damage[number] = str(error) if type(error) is ValueError else "no JSON"
        else:
            rows.append(_Line(row, number, end))
    by_iteration: dict[int, _Line] = {}
    for line in rows:
        iteration = line.row["iteration"]
        if iteration in by_iteration:
            damage[line.number] = f"iteration {iteration} for the second time"
        else:
            by_iteration[iteration] = line
    texts = [f"line {number} is damaged ({why})" for number, why in sorted(damage.items())]
    return _Content(data, [line for _, line in sorted(by_iteration.items())], texts)


def _check(row: Any) -> None:
    """Raise ValueError unless this can be a row."""
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
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
    """Return "2, 5-7" of 2, 5, 6, 7."""
    texts: list[str] = []
    for i in numbers:
        first = i
        if texts and int(texts[-1].split("-")[-1]) == i - 1:
            first = int(texts.pop().split("-")[0])
        texts.append(f"{first}-{i}" if first < i else str(i))
    return ", ".join(texts)


def _line(row: dict[str, Any]) -> bytes:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return (json_text(finite) + "\n").encode()
