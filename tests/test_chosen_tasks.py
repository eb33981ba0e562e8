"""Evaluation on chosen tasks and on other options of the family."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from expecting import mentions, refused, run
from test_evaluation import navigator

from metarl import MetaPolicy, evaluate
from metarl.envs import Finite, Uniform
from metarl.envs.registry import find_family

FEW = {"episodes": 2, "steps": 1, "threads": 1}


def test_chosen_tasks_are_measured_as_the_same_held_out_ones():
    meta = navigator()
    held_out = evaluate(meta, tasks=4, **FEW)
    chosen = evaluate(meta, tasks=meta.family.tasks.grid(4), **FEW)
    for ours, theirs in zip(held_out.rows.values(), chosen.rows.values(), strict=True):
        assert ours.per_seed.tolist() == theirs.per_seed.tolist()
    assert (held_out.setting["chosen"], chosen.setting["chosen"]) == (False, True)
    assert held_out.setting["outside_training"] == [False] * 4


def test_tasks_outside_the_range_of_training_are_told():
    found = evaluate(navigator(), tasks=[[0.2, 0.3], [2.0, 0.0], [0.0, -7.0]], **FEW)
    assert found.setting["tasks"] == [[0.2, 0.3], [2.0, 0.0], [0.0, -7.0]]
    assert found.to_json()["outside_training"] == [False, True, True]
    near, far, farthest = found.curve.per_task[:, 0]
    assert near > far > farthest  # the goals are farther away


@pytest.mark.parametrize(
    "tasks",
    [
        [], [0.1, 0.2], [[0.1]], [[0.1, 0.2, 0.3]], [[0.1], [0.2, 0.3]], [[0.1, "a"]], "a",
        [[0.1, math.nan]], [[[0.1, 0.2]]], None,
    ],
)  # fmt: skip
def test_tasks_that_are_none_are_refused(tasks):
    with refused("tasks" if tasks != [[0.1, math.nan]] else "task"):
        evaluate(navigator(), tasks=tasks, **FEW)


@pytest.mark.parametrize(("key", "value"), [("drawn", True), ("split", "validation")])
def test_options_that_select_tasks_have_no_effect_on_chosen_ones(key, value):
    with refused(key):
        evaluate(navigator(), tasks=[[0.1, 0.2]], **{key: value}, **FEW)


def test_step_sizes_are_tuned_on_validation_tasks_whatever_is_chosen():
    options = {**FEW, "tune_step_sizes": True}
    tried = [
        evaluate(navigator(), tasks=tasks, **options).setting["tried_step_factors"]
        for tasks in (2, [[3.0, 0.0], [0.0, 3.0]])
    ]
    assert tried[0] == tried[1]


def test_classes_are_chosen_by_number():
    family = find_family("characters", classes=30, drawings=4, queries=2, test_queries=2, size=8)
    tasks = family.tasks
    known = tasks.grid(3)
    assert tasks.contains(known).all()  # their classes are new by design
    with refused("class_0"):
        tasks.vector({**dict(zip(tasks.names, known[0], strict=True)), "class_0": 0.5})


def test_a_distribution_knows_its_training_tasks():
    box = Uniform({"x": (0.0, 1.0)}, test={"x": (1.0, 2.0)})
    assert box.contains(np.array([[0.0], [0.5], [1.0], [1.5]])).tolist() == [
        True,
        True,
        True,
        False,
    ]
    corners = Finite(("x", "y"), [[-1, 1], [1, 1]], test=[[0, 0]])
    tasks = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert corners.contains(tasks).tolist() == [True, False, False]


# Other options of the family -----------------------------------------------------------------


def test_other_options_of_the_family_are_those_of_a_family_made_so(monkeypatch):
    meta = navigator()
    found = evaluate(meta, tasks=3, family_options={"horizon": 7}, **FEW)
    assert found.setting["horizon"] == 7
    assert found.setting["family_options"] == {"horizon": 7}
    assert found.setting["family_overrides"] == {"horizon": 7}
    assert mentions(found.to_json()["family_changes"][0], "horizon", 15, 7)
    setup = dataclasses.replace(meta.setup, family_options={"horizon": 7})
    trained_so = MetaPolicy(meta.params, setup)
    alike = evaluate(trained_so, tasks=3, **FEW)
    assert found.curve.per_task.tolist() == alike.curve.per_task.tolist()
    assert alike.setting["family_changes"] == []
    again = evaluate(meta, tasks=3, family_options={"horizon": 15}, **FEW)
    assert again.setting["family_changes"] == []


def test_tasks_of_another_range_are_compared_with_the_range_of_training():
    name = "half-cheetah-vel-icml2017"
    found = evaluate(name, tasks=4, family_options={"low": 2.0, "high": 4.0}, **FEW)
    assert found.setting["outside_training"] == [True] * 4
    assert mentions(found.setting["family_changes"], "train tasks", "test tasks")


@pytest.mark.parametrize("options", [{"variant": "pearl2019"}, {"hig": 3.0}, "high=3", {1: 2}])
def test_options_that_do_not_fit_the_policy_are_refused(options):
    with refused():
        evaluate("half-cheetah-vel-icml2017", tasks=2, family_options=options, **FEW)


# From a shell --------------------------------------------------------------------------------


def test_tasks_and_options_of_a_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    navigator().save(tmp_path / "policy.safetensors")
    words = ["evaluate", str(tmp_path / "policy.safetensors"), "--out", str(tmp_path / "out")]
    words += ["--episodes", "2", "--steps", "1", "--threads", "1"]
    words += ["--task", "goal_x=0.1", "goal_y=0.2", "goal_y=3", "goal_x=2"]
    csv = tmp_path / "all.csv"
    assert run(*words, "--family-options", "horizon=7", "--csv", str(csv)) == 0
    said = capsys.readouterr().out
    assert mentions(said, 2, 1, 7)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tasks"] == [[0.1, 0.2], [2.0, 3.0]]
    assert (found["horizon"], found["outside_training"]) == (7, [False, True])
    assert len(csv.read_text().splitlines()) == 1 + 2 * 2 * 2 * 2  # rows, tasks, steps, episodes
    # A report of it has the same tasks and options, also if it evaluates again.
    folder = tmp_path / "runs" / "policy-evaluation"
    (tmp_path / "out").rename(folder.parent.mkdir() or folder)
    assert run("report", words[1], "--episodes", "3", "--no-video", "--threads", "1") == 0
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["episodes"] == 3
    for key in ("tasks", "horizon", "outside_training", "chosen", "family_overrides"):
        assert again[key] == found[key]


@pytest.mark.parametrize(
    "words",
    [
        ["--task", "goal_x=0.1"],
        ["--task", "goal_x=0.1", "goal_x=0.2"],
        ["--task", "goal_x=0.1", "goal_z=0.2"],
        ["--task", "goal_x=0.1", "goal_y=0.2", "goal_x=1"],
        ["--task", "goal_x=0.1", "goal_y=0.2", "--tasks", "3"],
        ["--task", "goal_x=0.1", "goal_y=0.2", "--drawn"],
        ["--csv", "all.json"],
        ["--family-options", "horizo=3"],
    ],
)
def test_what_does_not_fit_on_a_command_line_is_refused(words, tmp_path):
    navigator().save(tmp_path / "policy.safetensors")
    assert run("evaluate", str(tmp_path / "policy.safetensors"), *words) == 2
