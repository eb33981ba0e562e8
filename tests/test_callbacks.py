"""Callbacks of `metarl.train`: what they are told of is on the disk."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from expecting import run

from metarl import load, resolve, train
from metarl.running import recording
from metarl.running.config import Config
from metarl.running.metrics import measured_time, read_metrics


def small(family: str = "navigation-2d", **overrides: Any) -> Config:
    values = {"tasks": 3, "iterations": 3, "policy.hidden": (4,), "threads": 1}
    if family == "navigation-2d":
        values |= {"family_options": {"horizon": 8}, "episodes": 3}
    return resolve(None, family, overrides={**values, **overrides})


@pytest.mark.parametrize("family", ["navigation-2d", "sinusoid"])
def test_a_callback_finds_its_iteration_on_the_disk(tmp_path, family):
    folder, seen = tmp_path / "run", []

    def look(row: dict[str, Any]) -> None:
        provenance = load(folder).provenance
        seen.append((row["iteration"], provenance["iteration"], read_metrics(folder)[-1]))
        assert seen[-1][2]["env_steps"] == row["env_steps"] == provenance["env_steps"]

    train(small(family), folder, progress=look)
    assert [i for i, _, _ in seen] == [1, 2, 3]
    assert all(i == saved == row["iteration"] for i, saved, row in seen)


def test_a_run_that_a_callback_stops_has_that_iteration_and_no_other(tmp_path):
    folder, seen = tmp_path / "run", []
    train(small(), folder, progress=seen.append, stop=lambda: len(seen) == 2)
    assert load(folder).provenance["iteration"] == len(read_metrics(folder)) == 2


def test_a_callback_that_raises_leaves_its_iteration_saved(tmp_path):
    class MineError(Exception):
        pass

    def fail(row: dict[str, Any]) -> None:
        raise MineError

    with pytest.raises(MineError):
        train(small(), tmp_path / "run", progress=fail)
    assert load(tmp_path / "run").provenance["iteration"] == 1


def test_a_callback_does_not_change_a_run(tmp_path):
    for name, options in (("with", {"progress": lambda row: None}), ("without", {})):
        train(small(), tmp_path / name, **options)
    one, other = (
        [{k: v for k, v in row.items() if not measured_time(k)} for row in read_metrics(folder)]
        for folder in (tmp_path / "with", tmp_path / "without")
    )
    assert one == other


def test_a_row_is_displayed_before_the_disk_is_written(tmp_path, monkeypatch):
    shown = threading.Event()
    save = recording.save_checkpoint

    def save_once_shown(folder: Path, *args: Any, **options: Any) -> None:
        assert shown.wait(60)
        save(folder, *args, **options)

    monkeypatch.setattr(recording, "save_checkpoint", save_once_shown)
    train(small(iterations=1), tmp_path / "run", display=lambda row: shown.set())
    assert load(tmp_path / "run").provenance["iteration"] == 1


def test_the_command_shows_a_progress_bar(tmp_path, capsys):
    flags = "--family-options horizon=8 --tasks 3 --episodes 3 --iterations 2 --threads 1"
    assert run("train", "navigation-2d", *flags.split(), "--out", str(tmp_path / "run")) == 0
    assert "2/2" in capsys.readouterr().err
