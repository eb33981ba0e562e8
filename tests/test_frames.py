"""An evaluation in long format: CSV and pandas."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
from expecting import refused
from test_evaluation import navigator

from metarl import evaluate
from metarl.evaluation.curves import SQUARED_ERROR, Curve
from metarl.evaluation.results import EvaluationResult


@pytest.fixture(scope="module")
def found() -> EvaluationResult:
    seeds = [navigator(seed=1), navigator(seed=4)]
    tasks = [[0.1, 0.2], [2.0, 0.0], [0.3, 0.3]]
    return evaluate(seeds, tasks=tasks, episodes=4, steps=2, threads=1, from_scratch=True)


def test_the_rows_of_a_frame_are_the_episodes(found):
    pytest.importorskip("pandas")
    frame = found.to_frame()
    assert list(frame.columns) == [
        "policy", "algorithm", "task", "task_goal_x", "task_goal_y", "outside_training", "step",
        "seed", "episode", "return",
    ]  # fmt: skip
    for name, curve in found.rows.items():
        rows = frame[frame.policy == name]
        assert len(rows) == curve.per_seed.size * 4
        for k in range(3):
            means = rows[rows.step == k].groupby(["seed", "task"])["return"].mean()
            assert means.to_numpy() == pytest.approx(curve.per_seed[:, :, k].ravel())
    ours = frame[frame.policy == found.name]
    assert sorted(set(ours.seed)) == [1, 4]
    of_task = ours[["task", "task_goal_x", "task_goal_y", "outside_training"]]
    assert set(map(tuple, of_task.values)) == {
        (0, 0.1, 0.2, False), (1, 2.0, 0.0, True), (2, 0.3, 0.3, False),
    }  # fmt: skip


def test_csv_has_the_cells_of_the_frame(found, tmp_path):
    pd = pytest.importorskip("pandas")
    found.to_csv(tmp_path / "all.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "all.csv"), found.to_frame())


def test_a_diverged_episode_is_an_empty_cell_and_success_is_1_or_0(tmp_path):
    returns = np.array([[[[1.5, np.nan]]]])
    curve = Curve([], returns[..., 0], per_episode=returns, episode_success=0.0 * returns + 1.0)
    setting = {"components": ["x"], "tasks": [[0.5]], "outside_training": [False]}
    EvaluationResult(curve, {}, setting).to_csv(tmp_path / "all.csv")
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert [(row["return"], row["success"]) for row in rows] == [("1.5", "1.0"), ("", "")]


def test_a_data_set_has_losses_and_no_episodes(tmp_path):
    curve = Curve([0.1], np.array([[[2.0, 1.0]]]), measure=SQUARED_ERROR)
    setting = {"components": ["x"], "tasks": [[0.5]], "outside_training": [False]}
    EvaluationResult(curve, {}, setting).to_csv(tmp_path / "all.csv")
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert [row["loss"] for row in rows] == ["2.0", "1.0"]
    assert not {"episode", "success", "return"} & rows[0].keys()


def test_without_pandas_the_error_names_the_extra(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with refused("pandas"):
        found.to_frame()
