"""Evaluation in long format: a row for each policy, task, number of steps, seed and episode."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metarl.envs.errors import UserError
from metarl.evaluation.curves import Curve
from metarl.evaluation.experience import ExperienceCurve
from metarl.runs.files import as_path, write_atomically

Columns = Mapping[str, Sequence[Any]]


def columns(rows: Mapping[str, Curve], setting: Mapping[str, Any]) -> Columns:
    """Return the columns of an evaluation by name, with equal lengths; None is a missing value.

    `EvaluationResult.to_csv` describes them. `episode` and `success` are omitted if no row has a
    value.

    Args:
        rows: curves by name.
        setting: `components`, `tasks` and `outside_training`, as in `EvaluationResult`.
    """
    measure = next(iter(rows.values())).measure.key
    names = [f"task_{name}" for name in setting["components"]]
    heads = ["policy", "algorithm", "task", *names, "outside_training", "step", "seed", "episode"]
    found: dict[str, list[Any]] = {head: [] for head in (*heads, measure, "success")}
    for name, curve in rows.items():
        values, success = _values(curve)
        seeds, tasks, steps, episodes = (index.ravel() for index in np.indices(values.shape))
        own = {
            "policy": [name] * values.size,
            "algorithm": [curve.algorithm] * values.size,
            "task": tasks.tolist(),
            "outside_training": np.array(setting["outside_training"])[tasks].tolist(),
            "step": steps.tolist(),
            "seed": np.array(curve.seeds)[seeds].tolist(),
            "episode": [None] * values.size if curve.per_episode is None else episodes.tolist(),
            measure: _known(values),
            "success": [None] * values.size if success is None else _known(success),
            **dict(zip(names, np.array(setting["tasks"])[tasks].T.tolist(), strict=True)),
        }
        for head, cells in own.items():
            found[head] += cells
    for head in ("episode", "success"):
        if all(cell is None for cell in found[head]):
            del found[head]
    return found


def experience_columns(curves: Sequence[ExperienceCurve], setting: Mapping[str, Any]) -> Columns:
    """Return the columns of returns against experience: a row for each curve, task, point, seed.

    `method`, `algorithm`, `episodes_per_step` (missing for a method without inner steps), `task`,
    `task_NAME` for each component, `outside_training`, `seed`; `episodes` and `env_steps` of
    experience, means over tasks; `return`, the mean over episodes.

    Args:
        setting: as in `columns`.
    """
    names = [f"task_{name}" for name in setting["components"]]
    heads = ["method", "algorithm", "episodes_per_step", "task", *names, "outside_training", "seed"]
    found: dict[str, list[Any]] = {head: [] for head in (*heads, "episodes", "env_steps", "return")}
    for one in curves:
        values = one.curve.per_seed
        seeds, tasks, points = (index.ravel() for index in np.indices(values.shape))
        own = {
            "method": [one.method] * values.size,
            "algorithm": [one.curve.algorithm] * values.size,
            "episodes_per_step": [one.episodes_per_step] * values.size,
            "task": tasks.tolist(),
            "outside_training": np.array(setting["outside_training"])[tasks].tolist(),
            "seed": np.array(one.curve.seeds)[seeds].tolist(),
            "episodes": np.array(one.experience.episodes)[points].tolist(),
            "env_steps": np.array(one.experience.env_steps)[points].tolist(),
            "return": _known(values),
            **dict(zip(names, np.array(setting["tasks"])[tasks].T.tolist(), strict=True)),
        }
        for head, cells in own.items():
            found[head] += cells
    return found


def _values(curve: Curve) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a curve's values, [seeds, tasks, K + 1, episodes], and their successes."""
    if curve.per_episode is None:
        return curve.per_seed[..., None], None
    return curve.per_episode, curve.episode_success


def _known(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.ravel().tolist()]


def write_csv(found: Columns, path: str | Path) -> None:
    """Write columns as CSV. A missing value is an empty cell.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(found)
    writer.writerows(zip(*found.values(), strict=True))
    write_atomically(as_path("the CSV file", path), text.getvalue().encode())


def to_frame(found: Columns) -> Any:
    """Return columns as a `pandas.DataFrame`.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas as pd  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise UserError(
            "to_frame needs pandas: pip install 'metarl-gradient[pandas]'; to_csv works without it"
        ) from error
    return pd.DataFrame(found)
