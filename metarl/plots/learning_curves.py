"""Learning curves of runs, before and after adaptation, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from metarl.domains.lookup import DOMAINS
from metarl.envs.errors import UserError, check_one_of
from metarl.evaluation.statistics import Floats
from metarl.plots.drawing import add_legend, label_of, new_figure, save, style_of
from metarl.runs.folder import alike, but_seed, flat, group_names, read_record
from metarl.runs.metrics import measure_of, read_metrics

Against = Literal["env-steps", "time"]


def plot_learning(
    runs: Sequence[Path], path: Path, *, against: Against = "env-steps", smooth: int = 1
) -> list[Path]:
    """Plot return before and after adaptation during training, with a band over seeds.

    Args:
        runs: run folders; runs that differ only in their seed share a line.
        path: path of the figure; its suffix is replaced.
        against: env steps, or wall-clock time of training.
        smooth: number of iterations in the moving mean.

    Raises:
        UserError: a folder does not contain a run, or has no iteration yet.
    """
    check_one_of("against", against, get_args(Against))
    if smooth < 1:
        raise UserError(f"smooth must be at least 1, got {smooth}")
    groups = _alike(runs)
    # Values, not a Config: a user's algorithm need not be imported.
    configs = {name: flat(_config(members[0])) for name, members in groups.items()}
    still = {name for name, config in configs.items() if not config.get("inner.steps")}
    traces = {name: [_trace(run, against, smooth) for run in m] for name, m in groups.items()}
    longest = max(trace["x"][-1] for several in traces.values() for trace in several)
    measures = {measure_of(read_metrics(run)[0]) for run in runs}
    if len(measures) > 1:
        raise UserError("losses and returns cannot share a figure: plot these runs separately")
    (domain,) = (one for one in DOMAINS.values() if one.measure in measures)
    unit, label = _axis(longest, against, domain.unit)
    figure = new_figure(7.2, 4.9)
    axes = figure.add_subplot()
    for i, (name, several) in enumerate(traces.items()):
        style = style_of(i)
        common = min((trace["x"] for trace in several), key=lambda x: x[-1])
        # A fraction of the curve's length; a single iteration has none.
        marked = (0.05 * (i % 3), 0.15) if len(common) > 20 else None
        seeds = f" ({len(several)} seeds)" if len(several) > 1 else ""
        for kind in ("pre", "post"):
            curves = np.array([np.interp(common, t["x"], t[kind]) for t in several])
            if not np.isfinite(curves).any():
                continue  # Reptile samples nothing with its adapted parameters
            after = kind == "post"
            if not after and name in still:
                continue  # one curve is enough
            when = "no adaptation" if name in still else f"{kind}-adaptation"
            axes.plot(
                common / unit, curves.mean(axis=0), color=style["color"], marker=style["marker"],
                markevery=marked, markersize=5, linewidth=2.0 if after else 1.2,
                linestyle="-" if after else "--", markerfacecolor=None if after else "white",
                label=f"{label_of(name)}, {when}{seeds}",
            )  # fmt: skip
            if len(several) > 1:
                low, high = curves.min(axis=0), curves.max(axis=0)
                axes.fill_between(
                    common / unit, low, high, color=style["color"], alpha=0.2, linewidth=0
                )
    axes.set_xlabel(label)
    mean = f"\nmean of {smooth} iterations" if smooth > 1 else ""
    bands = "\nband: range of seeds" if any(len(m) > 1 for m in traces.values()) else ""
    axes.set_ylabel(f"{domain.measure} on training tasks{mean}{bands}")
    axes.set_title(", ".join(sorted({config["family"] for config in configs.values()})))
    axes.grid(alpha=0.3)
    add_legend(figure, axes, 2)
    return save(figure, path)


def _axis(longest: float, against: Against, unit: str) -> tuple[float, str]:
    """Return the scale of the horizontal axis, and its label."""
    if against == "time":
        scale, name = (3600.0, "hours") if longest > 3 * 3600 else (60.0, "minutes")
        return scale, f"wall-clock time of training ({name})"
    return (1.0, unit) if longest < 1e5 else (1e6, f"{unit} (millions)")


def _config(run: Path) -> dict[str, Any]:
    return read_record(run)["config"]


def _alike(runs: Sequence[Path]) -> dict[str, list[Path]]:
    configs = [_config(run) for run in runs]
    same = alike(list(map(but_seed, configs)), [config["options"]["seed"] for config in configs])
    groups = [[runs[i] for i in group] for group in same]
    names = group_names([[str(run) for run in group] for group in groups])
    return dict(zip(names, groups, strict=True))


def _trace(run: Path, against: Against, smooth: int) -> dict[str, Floats]:
    """Return x, and the measure before (pre) and after (post) adaptation, [iterations] each."""
    rows = read_metrics(run)
    if not rows:
        raise UserError(f"{run} has no iteration to draw yet")
    if against == "time":
        x = np.cumsum([row["seconds_iteration"] for row in rows])
    else:
        x = np.array([row["env_steps"] for row in rows], np.float64)
    trace = {"x": x}
    measure = measure_of(rows[0])
    for kind in ("pre", "post"):
        found = [row[f"{measure}_{kind}"] for row in rows]
        values = np.array([np.nan if value is None else value for value in found], np.float64)
        known = np.isfinite(values)  # a skipped iteration may have no value
        first = np.maximum(np.arange(len(values)) + 1 - smooth, 0)
        sums, counts = (
            np.cumsum(np.insert(x, 0, 0.0)) for x in (np.where(known, values, 0.0), known)
        )
        with np.errstate(invalid="ignore"):
            trace[kind] = (sums[1:] - sums[first]) / (counts[1:] - counts[first])
    return trace
