"""What a run records: `metrics.jsonl`, and TensorBoard events derived from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

# TensorBoard names in the style of stable-baselines3; the x-axis is env steps.
_TENSORBOARD = {
    "return_pre": "rollout/ep_rew_mean_pre",
    "return_post": "rollout/ep_rew_mean_post",
    "gain": "rollout/adaptation_gain",
    "diverged_episodes": "rollout/diverged_episodes",
    "kl": "train/approx_kl",
    "surrogate_before": "train/surrogate_before",
    "surrogate_after": "train/surrogate_after",
    "line_search_steps": "train/line_search_steps",
    "gradient_norm": "train/gradient_norm",
    "gradient_agreement": "train/gradient_agreement",
    "inner_kl": "train/inner_kl",
    "step_size": "train/step_size",
    "policy_std": "train/std",
    "skipped_updates": "train/skipped_updates",
    "env_steps_per_second": "time/fps",
    "iteration": "time/iterations",
    "seconds_rollout": "time/seconds_rollout",
    "seconds_update": "time/seconds_update",
}


def measured_time(name: str) -> bool:
    """Whether a metric depends on the machine's speed."""
    return name.startswith("seconds_") or name.endswith(("_per_second", "_memory_bytes"))


class MetricsLog:
    """Appends one JSON object an iteration; resumed, it forgets what came after a checkpoint."""

    def __init__(self, folder: Path, iteration: int = 0, text: str = "") -> None:
        # Imported here: it takes seconds, and only training needs it.
        from torch.utils.tensorboard.writer import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["iteration"] <= iteration]
        path.write_text("".join(_line(row) for row in kept))
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
        self._file = open(path, "a")  # noqa: SIM115  (closed by close)
        self._board = SummaryWriter(str(folder))
        self._board.add_text("config", f"```json\n{text}\n```", 0)
        self._show_hyperparameters(json.loads(text) if text else {})
        for row in kept:
            self._show(row)

    def write(self, row: dict[str, Any]) -> None:
        """Record an iteration; numbers that are not finite are written as null."""
        self._file.write(_line(row))
        self._file.flush()
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        for name, tag in _TENSORBOARD.items():
            if row.get(name) is not None:
                self._board.add_scalar(tag, row[name], row["env_steps"])

    def _show_hyperparameters(self, config: dict[str, Any]) -> None:
        # In this run's own file; SummaryWriter.add_hparams would make another run of them.
        from torch.utils.tensorboard.summary import hparams

        flat = {}
        for key, value in config.items():
            parts = value if isinstance(value, dict) else {"": value}
            flat |= {f"{key}.{name}".rstrip("."): part for name, part in parts.items()}
        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flat.items()
        }
        if plain and self._board.file_writer is not None:
            shown = {_TENSORBOARD[name]: 0.0 for name in ("return_pre", "return_post", "gain")}
            for summary in hparams(plain, shown):
                self._board.file_writer.add_summary(summary)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def show_adaptation(folder: Path, returns: Sequence[float], images: Mapping[str, bytes]) -> None:
    """Put an adaptation curve into TensorBoard, as a run of its own in the folder.

    Args:
        returns: after 0 ... K inner steps, the x-axis.
        images: PNG, or GIF for a video (torch's add_video needs another package), by name.
    """
    from tensorboard.compat.proto.summary_pb2 import (
        Summary,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from torch.utils.tensorboard.writer import FileWriter

    folder.mkdir(parents=True, exist_ok=True)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()
    writer = FileWriter(str(folder))
    for k, value in enumerate(returns):
        scalar = Summary.Value(tag="adaptation/return_after_steps", simple_value=value)
        writer.add_summary(Summary(value=[scalar]), k)
    for name, data in images.items():
        image = Summary.Image(encoded_image_string=data, colorspace=3)
        value = Summary.Value(tag=f"adaptation/{name}", image=image)
        writer.add_summary(Summary(value=[value]), 0)
    writer.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics; a last line cut short by a crash is left out."""
    rows = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite) + "\n"
