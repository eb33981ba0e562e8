"""Pictures, drawn without a display: each as PNG and SVG.

Colours are Okabe and Ito's, told apart with any colour vision; markers and lines tell curves apart
in grey.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from metarl.envs.errors import UserError, check_one_of
from metarl.evaluation.curves import ACCURACY
from metarl.evaluation.results import EvaluationResult
from metarl.evaluation.statistics import Floats
from metarl.runs.files import write_atomically
from metarl.runs.folder import alike, group_names, run_config
from metarl.runs.metrics import measure_of, read_metrics

STYLES = [
    ("#0072B2", "o", "-"),
    ("#E69F00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", (0, (1, 1))),
    ("#56B4E9", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#D55E00", "P", (0, (8, 2))),
]
"""Colour, marker and line style of each curve."""
_LABELS = {
    "random": "random initialization",
    "pretrained": "pretrained on all tasks",
    "oracle": "oracle, told its task",
}
BEFORE, AFTER = "#D55E00", "#0072B2"
"""Colours of what is before and after adaptation."""
_SEVERAL = 6  # values of a task component, shared by tasks, that stand side by side

Against = Literal["env-steps", "time"]


def _style(i: int) -> dict[str, Any]:
    colour, marker, line = STYLES[i % len(STYLES)]
    return {"color": colour, "marker": marker, "linestyle": line}


def _figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Figure:
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write PNG and SVG beside each other; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name's dollars are no formula
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with mpl.rc_context({"svg.hashsalt": "metarl"}):
        for file in paths:
            picture = io.BytesIO()
            kind = file.suffix[1:]
            undated = {"Date": None} if kind == "svg" else None
            figure.savefig(picture, format=kind, dpi=150, metadata=undated)
            write_atomically(file, picture.getvalue())
    return paths


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Put the legend below the axes, where no data are."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _label(name: str) -> str:
    """Return a name as a label; legends leave out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _title(setting: Mapping[str, Any]) -> str:
    scale = setting["family_options"].get("scale")
    return f"{setting['family']}{f' at the {scale} scale' if scale else ''}"


def _after(steps: int) -> str:
    return "before adaptation" if not steps else f"after {steps} step{'s' if steps > 1 else ''}"


def _with_unit(name: str, setting: Mapping[str, Any]) -> str:
    unit = setting["units"].get(name)
    return f"{name.replace('_', ' ')}{f' ({unit})' if unit else ''}"


def plot_evaluation(result: EvaluationResult, path: Path) -> list[Path]:
    """Draw return against inner steps, a line a policy with its 95 % interval over tasks."""
    setting = result.setting
    figure = _figure(6.4, 4.8)
    axes = figure.add_subplot()
    rows = result.rows
    for i, (name, curve) in enumerate(rows.items()):
        style = _style(i)
        label = _LABELS.get(name, _label(name))
        if len(curve.seeds) > 1:
            label += f" ({len(curve.seeds)} seeds)"
        steps = np.arange(len(curve.returns))
        if curve.role == "oracle" and len(rows) > 1:
            mean = float(np.mean(curve.returns))
            axes.axhline(mean, color="black", linestyle=style["linestyle"], label=label)
            continue
        low, high = np.array(curve.ci95).T
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.plot(steps, curve.returns, label=label, **style)
    axes.set_title(_title(setting))
    supervised = "support" in setting
    each = (
        f"{setting['support']} examples" if supervised else f"{setting['episodes']} episodes each"
    )
    axes.set_xlabel(f"inner steps ({each})")
    axes.set_ylabel(f"{_measured(result)}\nmean of {len(setting['tasks'])} tasks, 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _legend(figure, axes, 2)
    return _save(figure, path)


def _measured(result: EvaluationResult) -> str:
    """Return what a result measures, in words for an axis."""
    if "horizon" in result.setting:
        return f"return (sum of {result.setting['horizon']} rewards)"
    return result.curve.measure.name


def plot_functions(result: EvaluationResult, path: Path) -> list[Path]:
    """Draw the first tasks' functions: true, before and after adaptation; and other predictors'.

    As figure 2 of Finn et al. 2017. Nothing is drawn, and no path returned, where there are none.
    """
    rows = {name: c for name, c in result.rows.items() if c.functions is not None}
    if "functions" not in result.setting or not rows:
        return []
    known = {key: np.array(value) for key, value in result.setting["functions"].items()}
    shown = {n: c for i, (n, c) in enumerate(rows.items()) if i == 0 or c.role == "pretrained"}
    tasks = min(2, len(known["truth"]))
    figure = _figure(4.2 * tasks, 3.6 * len(shown))
    panels = figure.subplots(len(shown), tasks, squeeze=False, sharex=True, sharey="col")
    for line, (name, curve) in zip(panels, shown.items(), strict=True):
        assert curve.functions is not None
        last = curve.functions.shape[1] - 1
        for t, axes in enumerate(line):
            axes.plot(known["x"], known["truth"][t], color="black", label="truth")
            for i, steps in enumerate(sorted({0, min(1, last), last})):
                axes.plot(
                    known["x"], curve.functions[t, steps], color=STYLES[i][0],
                    linestyle=(":", "--", "-")[i], label=_after(steps), linewidth=1.8,
                )  # fmt: skip
            axes.plot(
                known["support_x"][t], known["support_y"][t], "^", color=BEFORE, markersize=8,
                label="examples",
            )  # fmt: skip
            axes.grid(alpha=0.3)
        line[0].set_ylabel(_LABELS.get(name, name))
    for t, axes in enumerate(panels[0]):
        goal = zip(result.setting["components"], result.setting["tasks"][t], strict=True)
        axes.set_title(", ".join(f"{name} {value:.2f}" for name, value in goal))
    for axes in panels[-1]:
        axes.set_xlabel("x")
    figure.suptitle(_title(result.setting))
    _legend(figure, panels[0][0], 3)
    return _save(figure, path)


def plot_tasks(result: EvaluationResult, path: Path) -> list[Path]:
    """Draw each task's return before and after adaptation against its goal.

    Where the family says what comes of a task's component, that is drawn against it too. Of tasks
    that are classes nothing is drawn.
    """
    setting, curve = result.setting, result.curve
    goals, names = np.array(setting["tasks"]), setting["components"]
    shown = sorted({0, min(1, len(curve.returns) - 1)})
    if curve.measure is ACCURACY:
        return []
    if len(names) == 2:
        return _save(_returns_in_the_plane(result, goals, shown), path)
    achieved = {n: v for n, v in curve.achieved.items() if n == names[0]}
    figure = _figure(6.0 * (1 + len(achieved)), 4.6)
    panels = figure.subplots(1, 1 + len(achieved), squeeze=False)[0]
    _against_goal(panels[0], goals[:, 0], curve.per_task[:, shown], shown)
    mean = "" if "support" in setting else f"\nmean of {setting['episodes']} episodes"
    panels[0].set_ylabel(_measured(result) + mean)
    for axes, (name, values) in zip(panels[1:], achieved.items(), strict=True):
        key = setting["achieved_by"][name]
        _against_goal(axes, goals[:, 0], values[:, shown], shown)
        if setting["units"].get(name) and setting["units"].get(name) == setting["units"].get(key):
            ends = [goals[:, 0].min(), goals[:, 0].max()]
            axes.plot(ends, ends, color="black", linewidth=1, label="as asked")
        axes.set_ylabel(f"achieved {_with_unit(key, setting)}\nmean over steps and episodes")
    for axes in panels:
        axes.set_xlabel(f"{_with_unit(names[0], setting)} asked")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{_title(setting)}: {result.name}")
    _legend(figure, panels[-1], 3)
    return _save(figure, path)


def _against_goal(axes: Axes, goals: Floats, values: Floats, shown: Sequence[int]) -> None:
    """Scatter values [tasks, shown] over goals; few distinct goals are drawn side by side."""
    distinct, which = np.unique(goals, return_inverse=True)
    several = len(distinct) <= min(_SEVERAL, len(goals) - 1)
    for i, steps in enumerate(shown):
        x = goals
        if several:
            rank = np.zeros(len(goals))
            for value in range(len(distinct)):
                same = which == value
                rank[same] = np.linspace(-0.1, 0.1, int(same.sum()))
            x = which + rank + 0.3 * (i - 0.5 * (len(shown) - 1))
        axes.scatter(
            x, values[:, i], s=28, label=_after(steps), alpha=0.8,
            marker="s" if i == 0 else "o", color=BEFORE if i == 0 else AFTER,
            facecolors="none" if i == 0 else AFTER,
        )  # fmt: skip
    if several:
        axes.set_xticks(range(len(distinct)), [f"{value:g}" for value in distinct])
        axes.set_xlim(-0.6, len(distinct) - 0.4)


def _returns_in_the_plane(result: EvaluationResult, goals: Floats, shown: Sequence[int]) -> Figure:
    setting, curve = result.setting, result.curve
    figure = _figure(4.4 * len(shown) + 1.4, 5.2, "compressed")
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    values = curve.per_task[:, shown]
    dots = None
    for axes, column, steps in zip(panels, values.T, shown, strict=True):
        dots = axes.scatter(
            goals[:, 0], goals[:, 1], c=column, cmap="cividis", s=90, edgecolors="black",
            linewidths=0.6, vmin=np.nanmin(values), vmax=np.nanmax(values),
        )  # fmt: skip
        axes.set_title(_after(steps))
        axes.set_xlabel(_with_unit(setting["components"][0], setting))
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(_with_unit(setting["components"][1], setting))
    assert dots is not None
    measured = _measured(result).replace("sum of", "sum of up to")
    figure.colorbar(dots, ax=list(panels), label=measured)
    figure.suptitle(f"{_title(setting)}: {curve.measure.name} at each goal")
    return figure


def plot_paths(result: EvaluationResult, path: Path) -> list[Path]:
    """Draw where one episode of the first tasks leads, before and after adaptation.

    Nothing is drawn, and no path returned, for a family whose tasks are not places.
    """
    setting, paths = result.setting, result.curve.paths
    if len(paths) != 2:
        return []
    last = len(result.curve.returns) - 1
    shown = sorted({0, min(1, last), last})
    figure = _figure(4.2 * len(shown), 5.4, "compressed")
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    (x_name, x), (y_name, y) = paths.items()
    goals = np.array(setting["tasks"])[:, [setting["components"].index(n) for n in paths]]
    for axes, steps in zip(panels, shown, strict=True):
        for i in range(len(x)):
            colour = STYLES[i % len(STYLES)][0]
            axes.plot(
                x[i, steps], y[i, steps], color=colour, linewidth=1.0,
                label="one episode's path" if not i else None,
            )  # fmt: skip
            axes.plot(
                *goals[i], color=colour, marker="*", markersize=17, markeredgecolor="black",
                linestyle="none", label="its goal" if not i else None,
            )  # fmt: skip
            axes.annotate(
                str(i + 1), goals[i], textcoords="offset points", xytext=(9, 6), weight="bold"
            )
            axes.plot(
                x[i, steps][np.isfinite(x[i, steps])][-1:],
                y[i, steps][np.isfinite(y[i, steps])][-1:],
                color=colour, marker="o", markersize=7, markeredgecolor="black",
                linestyle="none", label="its end" if not i else None,
            )  # fmt: skip
        axes.set_title(_after(steps))
        axes.set_xlabel(_with_unit(setting["achieved_by"][x_name], setting))
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(_with_unit(setting["achieved_by"][y_name], setting))
    figure.suptitle(f"{_title(setting)}: {result.name}")
    _legend(figure, panels[0], 3)
    return _save(figure, path)


def plot_learning(
    runs: Sequence[Path], path: Path, *, against: Against = "env-steps", smooth: int = 1
) -> list[Path]:
    """Draw return before and after adaptation along training, a band over seeds.

    Args:
        runs: run folders; those that differ by their seed only share a line.
        path: of the picture, its suffix replaced.
        against: env steps, or wall-clock time of training.
        smooth: iterations that a point is the mean of.

    Raises:
        UserError: a folder is no run, or has no iteration yet.
    """
    check_one_of("against", against, get_args(Against))
    if smooth < 1:
        raise UserError(f"smooth must be at least 1, got {smooth}")
    groups = _alike(runs)
    families = sorted({run_config(members[0]).family for members in groups.values()})
    still = {name for name, members in groups.items() if not run_config(members[0]).inner.steps}
    traces = {name: [_trace(run, against, smooth) for run in m] for name, m in groups.items()}
    longest = max(trace["x"][-1] for several in traces.values() for trace in several)
    measures = {measure_of(read_metrics(run)[0]) for run in runs}
    if len(measures) > 1:
        raise UserError("losses and returns do not share a picture: plot the runs apart")
    losses = "loss" in measures
    sampled = "examples" if losses else "env steps"
    unit, label = (1e6, f"{sampled} (millions)")
    if against == "time":
        hours = longest > 3 * 3600
        unit, label = (3600.0, "hours") if hours else (60.0, "minutes")
        label = f"wall-clock time of training ({label})"
    elif longest < 1e5:
        unit, label = (1.0, sampled)
    figure = _figure(7.2, 4.9)
    axes = figure.add_subplot()
    for i, (name, several) in enumerate(traces.items()):
        style = _style(i)
        common = min((trace["x"] for trace in several), key=lambda x: x[-1])
        # A share of the curve's length, of which one iteration has none.
        marked = (0.05 * (i % 3), 0.15) if len(common) > 20 else None
        seeds = f" ({len(several)} seeds)" if len(several) > 1 else ""
        for kind in ("pre", "post"):
            curves = np.array([np.interp(common, t["x"], t[kind]) for t in several])
            if not np.isfinite(curves).any():
                continue  # Reptile samples nothing with its adapted parameters
            after = kind == "post"
            if not after and name in still:
                continue  # one curve says it all
            when = "no" if name in still else "after" if after else "before"
            axes.plot(
                common / unit, curves.mean(axis=0), color=style["color"], marker=style["marker"],
                markevery=marked, markersize=5, linewidth=2.0 if after else 1.2,
                linestyle="-" if after else "--", markerfacecolor=None if after else "white",
                label=f"{_label(name)}, {when} adaptation{seeds}",
            )  # fmt: skip
            if len(several) > 1:
                low, high = curves.min(axis=0), curves.max(axis=0)
                axes.fill_between(
                    common / unit, low, high, color=style["color"], alpha=0.2, linewidth=0
                )
    axes.set_xlabel(label)
    mean = f"\nmean of {smooth} iterations" if smooth > 1 else ""
    bands = "\nband: range of seeds" if any(len(m) > 1 for m in traces.values()) else ""
    measured = "loss on training tasks" if losses else "return on training tasks (sum of rewards)"
    axes.set_ylabel(f"{measured}{mean}{bands}")
    axes.set_title(", ".join(families))
    axes.grid(alpha=0.3)
    _legend(figure, axes, 2)
    return _save(figure, path)


def _alike(runs: Sequence[Path]) -> dict[str, list[Path]]:
    groups = [[runs[i] for i in group] for group in alike([run_config(run) for run in runs])]
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
        known = np.isfinite(values)  # a skipped iteration may have none
        first = np.maximum(np.arange(len(values)) + 1 - smooth, 0)
        sums, counts = (
            np.cumsum(np.insert(x, 0, 0.0)) for x in (np.where(known, values, 0.0), known)
        )
        with np.errstate(invalid="ignore"):
            trace[kind] = (sums[1:] - sums[first]) / (counts[1:] - counts[first])
    return trace
