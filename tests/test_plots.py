"""Pictures: nothing clipped, no legend over data, axes named, curves told apart in grey."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from expecting import mentions, refused
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from test_evaluation import navigator

from metarl import evaluate
from metarl.algorithms import find_algorithm
from metarl.evaluation.curves import Curve
from metarl.evaluation.results import EvaluationResult
from metarl.plots import figures as plots
from metarl.plots.learning_curves import plot_learning
from metarl.runs.folder import create_run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        if figure not in figures:  # it is saved in two formats
            figures.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines_of(figure: Figure, *names: object) -> list[Line2D]:
    """The lines of a figure's first panel whose labels have the names."""
    return [line for line in figure.axes[0].lines if mentions(str(line.get_label()), *names)]


def check(figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = figure.get_size_inches()
    drawn = figure.get_tightbbox(renderer)  # inches, of all that is to be seen
    assert drawn.x0 >= -0.01, "something is cut"
    assert drawn.y0 >= -0.01, "something is cut"
    assert drawn.x1 <= width + 0.01, "something is cut"
    assert drawn.y1 <= height + 0.01, "something is cut"
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        for axes in figure.axes:
            assert not box.overlaps(axes.get_window_extent(renderer)), "the legend covers data"
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert all(axes.get_xlabel() for axes in panels)
    assert panels[0].get_ylabel()
    titles = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    for text in figure.texts:  # the title over all panels
        top = text.get_window_extent(renderer)
        assert not any(top.overlaps(title) for title in titles)


def evaluated() -> EvaluationResult:
    found = evaluate(navigator(), tasks=8, episodes=2, steps=2, threads=1, name="a-long-name")
    rng = np.random.default_rng(0)
    others = {
        name: Curve(
            [0.1],
            rng.normal(-10, 3, (seeds, 8, 3)),
            name,
            list(range(seeds)),
            role=find_algorithm(name).role,
        )
        for name, seeds in (("pretrained", 1), ("oracle", 1), ("reptile", 3), ("promp", 1))
    }
    return dataclasses.replace(found, references={**found.references, **others})


def test_an_evaluation_is_drawn(tmp_path, drawn):
    found = evaluated()
    for draw in (plots.plot_evaluation, plots.plot_tasks, plots.plot_paths):
        files = draw(found, tmp_path / "picture.png")
        assert [file.suffix for file in files] == [".png", ".svg"]
        assert files[0].read_bytes()[:4] == b"\x89PNG"
        assert b"</svg>" in files[1].read_bytes()
        once = files[1].read_bytes()
        draw(found, tmp_path / "picture.png")
        assert files[1].read_bytes() == once  # the same numbers, the same file
    for figure in drawn:
        check(figure)
    (legend,) = drawn[0].legends
    texts = [text.get_text() for text in legend.get_texts()]
    order = [["a-long-name"], ["reptile", 3], ["promp"], ["pretrained"], ["random"], ["oracle"]]
    for text, names in zip(texts, order, strict=True):
        assert mentions(text, *names)
    assert mentions(drawn[0].axes[0].get_ylabel(), "return")


def test_curves_differ_in_more_than_colour():
    shapes = [(marker, str(line)) for _, marker, line in plots.STYLES]
    assert len({marker for marker, _ in shapes}) == len({line for _, line in shapes}) == len(shapes)
    # The two colours of before and after differ in luminance, and one is drawn hollow.
    before, after = (
        np.dot(to_rgb(colour), [0.299, 0.587, 0.114]) for colour in (plots.BEFORE, plots.AFTER)
    )
    assert abs(before - after) > 0.1


@pytest.mark.parametrize("name", ["half-cheetah-vel-icml2017", "half-cheetah-dir-icml2017"])
def test_returns_and_achieved_values_are_drawn_against_goals(name, tmp_path, drawn):
    found = evaluate(name, tasks=6, episodes=1, steps=1, threads=1)
    plots.plot_tasks(found, tmp_path / "tasks.png")
    assert plots.plot_paths(found, tmp_path / "paths.png") == []
    (figure,) = drawn
    check(figure)
    returns, achieved = figure.axes
    assert mentions(returns.get_ylabel(), "return")
    assert mentions(achieved.get_ylabel(), "x velocity", "m/s")
    before, after = (dots.get_offsets() for dots in achieved.collections)
    np.testing.assert_allclose(before[:, 1], next(iter(found.curve.achieved.values()))[:, 0])
    np.testing.assert_allclose(after[:, 1], next(iter(found.curve.achieved.values()))[:, 1])
    if "vel" in name:
        assert mentions(achieved.get_xlabel(), "velocity", "m/s")
        np.testing.assert_allclose(before[:, 0], np.array(found.setting["tasks"])[:, 0])
        (line,) = achieved.lines  # as asked
        np.testing.assert_allclose(line.get_xdata(), line.get_ydata())


def run_folder(folder, seed: int, rows: list[tuple[float, float | None, float]], **changes):
    create_run(folder, navigator(**changes, seed=seed).record)
    lines = [
        {
            "iteration": i + 1,
            "env_steps": 1_000_000 * (i + 1),
            "return_pre": pre,
            "return_post": post,
            "seconds_iteration": seconds,
        }
        for i, (pre, post, seconds) in enumerate(rows)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_learning_curves_of_seeds_are_drawn_as_a_band(tmp_path, drawn):
    runs = [
        run_folder(tmp_path / "run-0", 0, [(-4.0, -2.0, 60.0), (-4.0, -1.0, 60.0)]),
        run_folder(tmp_path / "run-1", 1, [(-2.0, 0.0, 30.0), (-2.0, 3.0, 30.0)]),
        run_folder(tmp_path / "other", 0, [(-9.0, None, 1.0)] * 3, algorithm="reptile"),
    ]
    plot_learning(runs, tmp_path / "learning.png")
    plot_learning(runs[:2], tmp_path / "time.png", against="time", smooth=2)
    for figure in drawn:
        check(figure)
    assert len(drawn[0].axes[0].lines) == 3
    assert len(lines_of(drawn[0], "other")) == 1  # Reptile has no return after adaptation
    before, after = lines_of(drawn[0], "run", 2)  # of two seeds
    assert before.get_label() != after.get_label()
    np.testing.assert_allclose(before.get_ydata(), [-3.0, -3.0])
    np.testing.assert_allclose(after.get_xdata(), [1.0, 2.0])
    np.testing.assert_allclose(after.get_ydata(), [-1.0, 1.0])
    bands = [band.get_paths()[0].vertices[:, 1] for band in drawn[0].axes[0].collections]
    reach = [(band.min(), band.max()) for band in bands]
    np.testing.assert_allclose(reach, [(-4.0, -2.0), (-2.0, 3.0)])
    # Against time both are drawn as far as the shorter goes: at 0.5 and 1 minute. The slower one
    # starts at 1 minute, its mean of two iterations at -1.5 comes later.
    _, after = lines_of(drawn[1], "run", 2)
    np.testing.assert_allclose(after.get_xdata(), [0.5, 1.0])
    np.testing.assert_allclose(after.get_ydata(), [(-2.0 + 0.0) / 2, (-2.0 + 1.5) / 2])
    assert mentions(drawn[1].axes[0].get_xlabel(), "minutes")
    empty = run_folder(tmp_path / "empty", 0, [])
    with refused(empty):
        plot_learning([empty], tmp_path / "x.png")
    with refused("smooth", 0):
        plot_learning(runs, tmp_path / "x.png", smooth=0)


@pytest.mark.parametrize("iterations", [1, 2, 40])
def test_a_curve_of_any_length_is_visible(iterations, tmp_path, drawn):
    run = run_folder(tmp_path / "run", 0, [(-4.0, None, 1.0)] * iterations)
    plot_learning([run], tmp_path / "learning.png")
    (figure,) = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    area = figure.axes[0].bbox
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3]
    inside = pixels[int(area.y0) : int(area.y1), int(area.x0) : int(area.x1)]
    colour = 255 * np.array(to_rgb(figure.axes[0].lines[0].get_color()))
    assert (np.abs(inside - colour).max(axis=-1) < 40).any()


def test_names_are_shown_literally(tmp_path, drawn):
    names = ("_first", "a$1$b")
    runs = [
        run_folder(tmp_path / name, 0, [(-4.0, -2.0, 1.0)], tasks=tasks)
        for name, tasks in zip(names, (4, 5), strict=True)
    ]
    plot_learning(runs, tmp_path / "learning.png")
    found = evaluate(navigator(), tasks=2, episodes=1, threads=1, name="a$1$b")
    others = {"_first": found.rows["a$1$b"]}
    plots.plot_evaluation(
        dataclasses.replace(found, references={**found.references, **others}), tmp_path / "e.png"
    )
    for figure in drawn:
        check(figure)
        shown = figure.legends[0].get_texts()
        text = " ".join(t.get_text() for t in shown)
        assert all(name in text for name in names)
        assert not any(t.get_parse_math() for t in shown)


def test_a_skipped_iteration_leaves_the_rest_of_a_curve(tmp_path, drawn):
    rows = [(0.0, value, 1.0) for value in (1.0, 2.0, None, 4.0, 8.0)]
    run = run_folder(tmp_path / "run", 0, rows)
    for smooth in (1, 2):
        plot_learning([run], tmp_path / "learning.png", smooth=smooth)
    (_, alone), (_, smoothed) = (lines_of(figure, "run") for figure in drawn)
    np.testing.assert_allclose(alone.get_ydata(), [1.0, 2.0, np.nan, 4.0, 8.0])
    np.testing.assert_allclose(smoothed.get_ydata(), [1, 1.5, 2, 4, 6])
