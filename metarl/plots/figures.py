"""Figures of an evaluation, each as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from metarl.evaluation.curves import ACCURACY, Curve
from metarl.evaluation.results import EvaluationResult
from metarl.evaluation.statistics import Floats
from metarl.evaluation.tables import levels, method_name
from metarl.plots.drawing import (
    AFTER,
    BEFORE,
    STYLES,
    add_legend,
    label_of,
    new_figure,
    save,
    style_of,
)

_REFERENCES = {
    "untrained": "random initialization",
    "pretrained": "pretrained on all tasks",
    "oracle": "oracle (observes the task)",
}
"""Labels of references by role."""
_SEVERAL = 6  # values of a task component, shared by tasks, that stand side by side


def _title(setting: Mapping[str, Any]) -> str:
    variant = setting["family_options"].get("variant")
    return f"{setting['family']}{f' ({variant})' if variant else ''}"


def _label(name: str, curve: Curve) -> str:
    """Return the label of a row: a reference's role, unless the row has another name."""
    named = name != curve.algorithm
    return label_of(name) if named else _REFERENCES.get(curve.role, label_of(name))


def _after(steps: int) -> str:
    return f"{steps} inner step{'s' if steps > 1 else ''}" if steps else "pre-adaptation"


def _with_unit(name: str, setting: Mapping[str, Any]) -> str:
    unit = setting["units"].get(name)
    return f"{name.replace('_', ' ')}{f' ({unit})' if unit else ''}"


def plot_evaluation(result: EvaluationResult, path: Path) -> list[Path]:
    """Plot return against inner steps: a line per policy with its 95 % interval over tasks."""
    setting = result.setting
    figure = new_figure(6.4, 4.8)
    axes = figure.add_subplot()
    rows = result.rows
    for i, (name, curve) in enumerate(rows.items()):
        style = style_of(i)
        label = _label(name, curve)
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
    unit = result.curve.unit
    own = "inner steps" if unit == "inner step" else f"{unit}s of experience"
    axes.set_xlabel(f"{own} ({setting['samples']})")
    axes.set_ylabel(f"{_measured(result)}\nmean of {len(setting['tasks'])} tasks, 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    add_legend(figure, axes, 2)
    return save(figure, path)


def plot_experience(result: EvaluationResult, path: Path) -> list[Path]:
    """Plot return against experience on the task: episodes on the left, env steps on the right.

    A line per method and number of episodes per inner step, each with its 95 % interval over tasks.
    It is level until the next inner step or update. Both axes are logarithmic, and linear near 0.
    Nothing is drawn if experience was not measured.
    """
    if not result.experience:
        return []
    setting = result.setting
    figure = new_figure(10.0, 5.6)
    panels = figure.subplots(1, 2, sharey=True)
    methods = list(dict.fromkeys(one.method for one in result.experience))
    shades = setting["episodes_per_step"]
    for i, one in enumerate(result.experience):
        n = one.episodes_per_step
        style = style_of(methods.index(one.method)) | {"marker": style_of(i)["marker"]}
        if n is not None:  # few episodes are light, many dark
            style["color"] = _lighter(style["color"], 0.55 * _share(n, shades))
        low, high = np.array(one.curve.ci95).T
        label = label_of(method_name(one.to_json()))
        for axes, x in zip(panels, vars(one.experience).values(), strict=True):
            axes.fill_between(
                x, low, high, color=style["color"], alpha=0.12, linewidth=0, step="post"
            )
            axes.plot(
                x, one.curve.returns, label=label, markersize=5, drawstyle="steps-post", **style
            )
    for i, (name, level) in enumerate(levels(result.to_json()).items()):
        for axes in panels:
            axes.axhline(
                level, color="black", linestyle=("--", ":", "-.")[i % 3], label=label_of(name)
            )
    for axes, what, parts in zip(panels, ("episodes", "env_steps"), ((1, 2, 5), (1,)), strict=True):
        used = [x for one in result.experience for x in getattr(one.experience, what) if x > 0.0]
        axes.set_xscale("symlog", linthresh=min(used), linscale=0.4)
        axes.set_xlim(0.0, 1.1 * max(used))
        ticks = [part * 10**i for i in range(10) for part in parts]
        ticks = [0, *(tick for tick in ticks if min(used) <= tick <= max(used))]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"{what.replace('_', ' ')} of experience on the new task")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(
        f"{_measured(result)}\nmean of {len(setting['tasks'])} tasks, 95 % interval"
    )
    figure.suptitle(_title(setting))
    add_legend(figure, panels[0], 2)
    return save(figure, path)


def _share(n: int, numbers: Sequence[int]) -> float:
    """Return the share of larger numbers, 0 for the largest."""
    return sum(other > n for other in numbers) / max(1, len(numbers) - 1)


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    """Return a mixture of a colour with white."""
    return tuple(share + (1.0 - share) * part for part in to_rgb(colour))


def _measured(result: EvaluationResult) -> str:
    """Return the measure of a result as an axis label."""
    if "horizon" in result.setting:
        return f"return (sum of {result.setting['horizon']} rewards)"
    return result.curve.measure.name


def plot_functions(result: EvaluationResult, path: Path) -> list[Path]:
    """Plot the first tasks' functions: true, before and after adaptation, and references.

    The figure follows figure 2 of Finn et al. 2017. Nothing is drawn if the tasks are not
    functions.
    """
    rows = {name: c for name, c in result.rows.items() if c.functions is not None}
    if "functions" not in result.setting or not rows:
        return []
    known = {key: np.array(value) for key, value in result.setting["functions"].items()}
    shown = {n: c for i, (n, c) in enumerate(rows.items()) if i == 0 or c.role == "pretrained"}
    tasks = min(2, len(known["truth"]))
    figure = new_figure(4.2 * tasks, 3.6 * len(shown))
    panels = figure.subplots(len(shown), tasks, squeeze=False, sharex=True, sharey="col")
    for line, (name, curve) in zip(panels, shown.items(), strict=True):
        assert curve.functions is not None
        last = curve.functions.shape[1] - 1
        for t, axes in enumerate(line):
            axes.plot(known["x"], known["truth"][t], color="black", label="true function")
            for i, steps in enumerate(sorted({0, min(1, last), last})):
                axes.plot(
                    known["x"], curve.functions[t, steps], color=STYLES[i][0],
                    linestyle=(":", "--", "-")[i], label=_after(steps), linewidth=1.8,
                )  # fmt: skip
            axes.plot(
                known["support_x"][t], known["support_y"][t], "^", color=BEFORE, markersize=8,
                label="support",
            )  # fmt: skip
            axes.grid(alpha=0.3)
        line[0].set_ylabel(_label(name, curve))
    for t, axes in enumerate(panels[0]):
        goal = zip(result.setting["components"], result.setting["tasks"][t], strict=True)
        axes.set_title(", ".join(f"{name} {value:.2f}" for name, value in goal))
    for axes in panels[-1]:
        axes.set_xlabel("x")
    figure.suptitle(_title(result.setting))
    add_legend(figure, panels[0][0], 3)
    return save(figure, path)


def plot_tasks(result: EvaluationResult, path: Path) -> list[Path]:
    """Plot each task's return before and after adaptation against its goal.

    If the family reports the achieved value of a task component, it is plotted against the goal
    too. Nothing is drawn for classification tasks.
    """
    setting, curve = result.setting, result.curve
    goals, names = np.array(setting["tasks"]), setting["components"]
    shown = sorted({0, min(1, len(curve.returns) - 1)})
    if curve.measure is ACCURACY:
        return []
    if len(names) == 2:
        return save(_returns_in_the_plane(result, goals, shown), path)
    achieved = {n: v for n, v in curve.achieved.items() if n == names[0]}
    figure = new_figure(6.0 * (1 + len(achieved)), 4.6)
    panels = figure.subplots(1, 1 + len(achieved), squeeze=False)[0]
    _against_goal(panels[0], goals[:, 0], curve.per_task[:, shown], shown)
    mean = f"\nmean of {setting['episodes']} episodes" if "episodes" in setting else ""
    panels[0].set_ylabel(_measured(result) + mean)
    for axes, (name, values) in zip(panels[1:], achieved.items(), strict=True):
        key = setting["achieved_by"][name]
        _against_goal(axes, goals[:, 0], values[:, shown], shown)
        if setting["units"].get(name) and setting["units"].get(name) == setting["units"].get(key):
            ends = [goals[:, 0].min(), goals[:, 0].max()]
            axes.plot(ends, ends, color="black", linewidth=1, label="achieved = task")
        axes.set_ylabel(f"achieved {_with_unit(key, setting)}\nmean over steps and episodes")
    for axes in panels:
        axes.set_xlabel(f"task: {_with_unit(names[0], setting)}")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{_title(setting)}: {result.name}")
    add_legend(figure, panels[-1], 3)
    return save(figure, path)


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
    figure = new_figure(4.4 * len(shown) + 1.4, 5.2, "compressed")
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
    """Plot the path of one episode of the first tasks, before and after adaptation.

    If tasks are not positions, nothing is drawn and no file path is returned.
    """
    setting, paths = result.setting, result.curve.paths
    if len(paths) != 2:
        return []
    last = len(result.curve.returns) - 1
    shown = sorted({0, min(1, last), last})
    figure = new_figure(4.2 * len(shown), 5.4, "compressed")
    panels = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    (x_name, x), (y_name, y) = paths.items()
    goals = np.array(setting["tasks"])[:, [setting["components"].index(n) for n in paths]]
    for axes, steps in zip(panels, shown, strict=True):
        for i in range(len(x)):
            colour = STYLES[i % len(STYLES)][0]
            axes.plot(
                x[i, steps], y[i, steps], color=colour, linewidth=1.0,
                label="path of one episode" if not i else None,
            )  # fmt: skip
            axes.plot(
                *goals[i], color=colour, marker="*", markersize=17, markeredgecolor="black",
                linestyle="none", label="goal" if not i else None,
            )  # fmt: skip
            axes.annotate(
                str(i + 1), goals[i], textcoords="offset points", xytext=(9, 6), weight="bold"
            )
            axes.plot(
                x[i, steps][np.isfinite(x[i, steps])][-1:],
                y[i, steps][np.isfinite(y[i, steps])][-1:],
                color=colour, marker="o", markersize=7, markeredgecolor="black",
                linestyle="none", label="end of the path" if not i else None,
            )  # fmt: skip
        axes.set_title(_after(steps))
        axes.set_xlabel(_with_unit(setting["achieved_by"][x_name], setting))
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(_with_unit(setting["achieved_by"][y_name], setting))
    figure.suptitle(f"{_title(setting)}: {result.name}")
    add_legend(figure, panels[0], 3)
    return save(figure, path)
