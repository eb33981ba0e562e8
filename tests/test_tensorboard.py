"""TensorBoard events: other programs see them, and their faults cost nothing else."""

from __future__ import annotations

import errno
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.tensorboard.writer as torch_writer
from expecting import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from metarl import resolve, train
from metarl.config.options import Config
from metarl.runs.metrics import read_metrics, show_adaptation

TAG = "rollout/ep_rew_mean_post"


def small(**overrides: Any) -> Config:
    values = {
        "family_options": {"horizon": 8}, "tasks": 3, "episodes": 3, "iterations": 3,
        "policy.hidden": (4,), "threads": 1,
    }  # fmt: skip
    return resolve(None, "navigation-2d", overrides={**values, **overrides})


def scalars(folder: Path) -> list[tuple[int, float]]:
    points = EventAccumulator(str(folder)).Reload().Scalars(TAG)
    return [(point.step, point.value) for point in points]


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let only so many writes to events succeed."""
    open_file, left = io.open, [after]

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if b"tfevents" in file if isinstance(file, bytes) else "tfevents" in str(file):
            if "r" not in mode:
                left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", file)
        return open_file(file, mode, *args, **options)

    monkeypatch.setattr(io, "open", opened)


def test_what_watches_event_writers_sees_a_run(tmp_path, monkeypatch):
    """As Weights & Biases does, with `sync_tensorboard`: put classes of its own in their place."""
    folders, events = [], []

    for module in (event_file_writer, torch_writer):

        class Watched(module.EventFileWriter):  # type: ignore[name-defined]
            def __init__(self, logdir: str, *args: Any, **options: Any) -> None:
                folders.append(Path(logdir))
                super().__init__(logdir, *args, **options)

            def add_event(self, event: Any) -> None:
                events.append(event)
                super().add_event(event)

        monkeypatch.setattr(module, "EventFileWriter", Watched)
    train(small(), tmp_path / "run")
    assert set(folders) == {tmp_path / "run"}
    found = [e.step for e in events for value in e.summary.value if value.tag == TAG]
    assert found == [row["env_steps"] for row in read_metrics(tmp_path / "run")]


def test_events_can_be_read_while_the_run_goes_on(tmp_path):
    lengths = []
    train(
        small(),
        tmp_path / "run",
        callbacks=[lambda _: lengths.append(len(scalars(tmp_path / "run")))],
    )
    assert lengths == [1, 2, 3]


def test_a_resumed_run_has_each_iteration_once_in_one_file(tmp_path):
    folder = tmp_path / "run"
    train(small(checkpoint_every=1), folder)
    train(small(checkpoint_every=1, iterations=4), folder, resume=True, start=1)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    rows = read_metrics(folder)
    assert scalars(folder) == [
        (row["env_steps"], pytest.approx(row["return_post"], rel=1e-6)) for row in rows
    ]


def test_the_config_is_in_the_same_file_as_hyper_parameters(tmp_path):
    train(small(iterations=1), tmp_path / "run")
    plugins = EventAccumulator(str(tmp_path / "run")).Reload().PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(plugins)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["checkpoints"]


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_full_disk_costs_the_events_alone_and_is_told_once(
    tmp_path, monkeypatch, caplog, capsys, after
):
    hook = threading.excepthook
    whole = train(small(), tmp_path / "whole")
    full_disk(monkeypatch, after)
    meta = train(small(), tmp_path / "run")
    assert all(torch.equal(meta.params[name], p) for name, p in whole.params.items())
    assert len(read_metrics(tmp_path / "run")) == 3
    (message,) = caplog.messages
    assert str(tmp_path / "run") in message
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is hook


def test_a_command_tells_it_in_one_line(tmp_path, monkeypatch, capfd, caplog):
    full_disk(monkeypatch, 2)
    flags = "--family-options horizon=8 --tasks 3 --episodes 3 --iterations 2 --threads 1"
    assert run("train", "navigation-2d", *flags.split(), "--out", str(tmp_path / "run")) == 0
    assert len(caplog.messages) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_results_whose_events_cannot_be_written_are_told_once(tmp_path, monkeypatch, caplog):
    full_disk(monkeypatch, 1)
    show_adaptation(tmp_path / "evaluation", [1.0, 2.0], {})
    assert len(caplog.messages) == 1
