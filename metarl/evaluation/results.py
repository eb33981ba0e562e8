"""Result of an evaluation: its rows, the gap closed, sentences, tables, JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metarl.envs.errors import UserError
from metarl.evaluation.curves import ROLES, Curve, difference, known
from metarl.evaluation.experience import ExperienceCurve
from metarl.evaluation.frames import Columns, columns, experience_columns, to_frame, write_csv
from metarl.evaluation.statistics import CVAR, FEWEST, Floats, bootstrap_interval
from metarl.evaluation.tables import as_text, experience_table, tables, task_table
from metarl.plain_json import finite, plain


@dataclass(frozen=True)
class EvaluationResult:
    """Curve of an evaluated policy, curves of references on the same tasks, and the setting."""

    curve: Curve
    """Curve of the evaluated policy."""
    references: Mapping[str, Curve]
    """Curves of the random initialization and other references, by name."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """Family, tasks and other settings of the evaluation."""
    name: str = "this policy"
    """Name of the policy in tables and figures."""
    experience: Sequence[ExperienceCurve] = ()
    """Returns against experience on the tasks, if they were measured."""

    @property
    def rows(self) -> dict[str, Curve]:
        """All curves by name: the policy, other policies, then references."""

        names = sorted(self.references, key=lambda name: ROLES.index(self.references[name].role))
        return {self.name: self.curve, **{name: self.references[name] for name in names}}

    def gap_closed(self, curve: Curve) -> list[tuple[float, float, float]] | None:
        """Return the share of the gap between random and oracle that a policy closes.

        (adapted - random) / (oracle - random) after each number of steps, from means over tasks,
        each with its interval. `random` is the initialization before any step. None without an
        oracle, or if the oracle's mean is not above random.
        """
        oracle = next((c for c in self.rows.values() if c.role == "oracle"), None)
        random = next((c for c in self.rows.values() if c.role == "untrained"), None)
        if oracle is None or random is None:
            return None
        sign = curve.measure.sign
        floor, ceiling = sign * random.per_task[:, 0], sign * oracle.per_task.mean(axis=1)
        if not np.nanmean(ceiling) > np.nanmean(floor):
            return None

        def share(samples: Floats) -> Floats:
            adapted, low, high = np.moveaxis(samples.mean(axis=1), -1, 0)
            with np.errstate(divide="ignore"):
                return (adapted - low) / (high - low)

        result = []
        for adapted in sign * curve.per_task.T:
            scores = known(np.stack([adapted, floor, ceiling], axis=1))
            interval = bootstrap_interval(scores, share)
            result.append((float(share(scores[None])[0]), *interval))
        return result

    def verdict(self) -> str:
        """Return sentences on the gain of adaptation, and on the part due to meta-training."""
        return " ".join([self.curve.verdict(), *self._worth(self.curve)])

    def _worth(self, curve: Curve) -> list[str]:
        """Return sentences on meta-training's part of the gain, from values paired by task."""
        others = {name: c for name, c in self.rows.items() if c.reference}
        if len(curve.returns) < 2 or curve.reference:
            return []
        said = []
        measure, gains = curve.measure, curve.gains()
        for name, other in others.items():
            enough = np.isfinite(gains).sum() >= FEWEST
            if not enough or len(other.returns) < 2:
                continue
            if other.role == "untrained":
                own = other.gains()
                more = difference(gains, own, measure)
                earned = (
                    f"the gain of meta-training beyond that is not significant, {more}"
                    if more.low <= 0.0 <= more.high
                    else f"meta-training adds {more} to that"
                )
                said.append(
                    f"The random initialization gains {measure.number(np.nanmean(own))}; {earned}."
                )
                said.append(f"Pre-adaptation, meta-training adds {curve.lead(other, 0)}.")
            if other.role == "from-scratch":
                said.append(
                    f"After one inner step its lead over training {name} is {curve.lead(other)}."
                )
        return said

    def verdicts(self) -> str:
        """Return the verdict of each policy except references, one per line."""
        said = {n: c for n, c in self.rows.items() if not c.reference}
        if len(said) < 2:
            return self.verdict()
        return "\n".join(
            " ".join([f"{name}: {curve.verdict()}", *self._worth(curve)])
            for name, curve in said.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`."""
        rows = {}
        for name, curve in self.rows.items():
            rows[name] = curve.to_json()
            gaps = self.gap_closed(curve)
            if gaps is not None:
                rows[name]["gap_closed"] = finite([gap[0] for gap in gaps])
                rows[name]["gap_closed_ci95"] = finite([list(gap[1:]) for gap in gaps])
        own = rows.pop(self.name)
        against = [curve.to_json() for curve in self.experience]
        return {
            **plain(self.setting), "name": self.name, "cvar_fraction": CVAR, **own,
            "references": rows, "verdict": self.verdict(),
            **({"experience_curves": against} if against else {}),
        }  # fmt: skip

    def to_csv(self, path: str | Path) -> None:
        """Write every episode's return as CSV, in long format.

        A row is one episode. Its columns are `policy` and `algorithm`, `task` (an index) and
        `task_NAME` for each component, `outside_training`, `step` (the number of inner steps),
        `seed` (of the training), `episode`, `return`, and `success` (0 or 1). For a data set, a row
        is one task, with `loss` or `accuracy` instead of `return` and no `episode`. Columns without
        any value are omitted.

        Raises:
            OSError: the file cannot be written.
        """
        write_csv(columns(self.rows, self.setting), path)

    def to_frame(self) -> Any:
        """Return every episode's return as a `pandas.DataFrame` in long format.

        The columns are the same as in `to_csv`.

        Raises:
            UserError: pandas is not installed.
        """
        return to_frame(columns(self.rows, self.setting))

    def experience_to_csv(self, path: str | Path) -> None:
        """Write returns against experience as CSV; see `frames.experience_columns`.

        Raises:
            UserError: they were not measured.
            OSError: the file cannot be written.
        """
        write_csv(self._experience_columns(), path)

    def experience_to_frame(self) -> Any:
        """Return returns against experience as a `pandas.DataFrame` in long format.

        Raises:
            UserError: they were not measured, or pandas is not installed.
        """
        return to_frame(self._experience_columns())

    def _experience_columns(self) -> Columns:
        if not self.experience:
            raise UserError("experience was not measured: evaluate with experience=40, for example")
        return experience_columns(self.experience, self.setting)

    def experience_table(self) -> str:
        """Return a plain-text table with a row per method, a column per number of episodes."""
        return as_text([experience_table(self.to_json())])

    def table(self) -> str:
        """Return plain-text tables with a row per policy and a column per number of inner steps."""
        return as_text(tables(self.to_json()))

    def task_table(self) -> str:
        """Return a plain-text table of the policy: a row per task, a column per step count."""
        return as_text([task_table(self.to_json())])
