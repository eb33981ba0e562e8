"""Metrics for Weights & Biases and MLflow, with small fakes of both; the real ones if installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import small, timeless
from expecting import mentions, refused, run

from metarl import resolve, train
from metarl.training.loggers import LOGGERS, MLflow, WeightsAndBiases


class FakeRun:
    def __init__(self, name: str) -> None:
        self.id, self.info = name, types.SimpleNamespace(run_id=name)
        self.rows: dict[int, dict[str, Any]] = {}
        self.ended: Any = None

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows[step] = row

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.run: FakeRun | None = None
        self.made: list[FakeRun] = []
        self.options: list[dict[str, Any]] = []

    def init(self, **options: Any) -> FakeRun:
        self.options.append(options)
        self.made.append(FakeRun(options.get("id", f"id-{len(self.made)}")))
        return self.made[-1]


class FakeMlflow(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.active: FakeRun | None = None
        self.made: list[FakeRun] = []
        self.options: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []

    def active_run(self) -> FakeRun | None:
        return self.active

    def start_run(self, **options: Any) -> FakeRun:
        self.options.append(options)
        self.made.append(FakeRun(options.get("run_id", f"id-{len(self.made)}")))
        return self.made[-1]

    def log_params(self, params: dict[str, Any]) -> None:
        self.params.append(params)

    def log_metrics(self, row: dict[str, Any], step: int, run_id: str) -> None:
        found = self.active or self.made[-1]
        assert found.id == run_id
        found.log(row, step)

    def end_run(self, status: str) -> None:
        self.made[-1].ended = status


@pytest.fixture
def fake_wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def fake_mlflow(monkeypatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def test_weights_and_biases_gets_the_numbers_and_the_config(tmp_path, fake_wandb):
    folder = tmp_path / "run"
    train(small(iterations=2), folder, callbacks=[WeightsAndBiases(project="mine")])
    (made,) = fake_wandb.made
    (options,) = fake_wandb.options
    assert (options["project"], options["name"], options["dir"]) == ("mine", "run", str(folder))
    assert options["config"]["inner.steps"] == 1
    assert options["config"]["algorithm"] == "maml-trpo"
    rows = timeless(folder)
    assert [made.rows[i]["return_post"] for i in (1, 2)] == [row["return_post"] for row in rows]
    assert "returns" not in made.rows[1]
    assert made.ended == 0


@pytest.mark.parametrize("name", list(LOGGERS))
def test_a_resumed_run_continues_its_record(tmp_path, fake_wandb, fake_mlflow, name):
    fake = fake_wandb if name == "wandb" else fake_mlflow
    folder, logger = tmp_path / "run", LOGGERS[name]
    train(small(iterations=1), folder, callbacks=[logger()])
    train(small(iterations=2), folder, resume=True)  # nothing is missing without it
    train(small(iterations=3), folder, resume=True, callbacks=[logger()])
    assert [made.id for made in fake.made] == ["id-0", "id-0"]
    assert set(fake.made[1].rows) == {3}


def test_mlflow_gets_the_numbers_and_the_params_once(tmp_path, fake_mlflow):
    for iterations in (1, 2):
        config = small(iterations=iterations)
        train(config, tmp_path / "run", resume="auto", callbacks=[MLflow(experiment_id="7")])
    assert fake_mlflow.options[0] == {"run_name": "run", "experiment_id": "7"}
    (params,) = fake_mlflow.params
    assert params["outer.max_kl"] == 0.01
    assert [made.ended for made in fake_mlflow.made] == ["FINISHED"] * 2


def test_an_error_is_told(tmp_path, fake_wandb, fake_mlflow):
    def fail(iteration: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(small(), tmp_path / "run", callbacks=[WeightsAndBiases(), MLflow(), fail])
    assert (fake_wandb.made[0].ended, fake_mlflow.made[0].ended) == (1, "FAILED")


def test_an_active_run_is_used_and_left_open(tmp_path, fake_wandb, fake_mlflow):
    fake_wandb.run, fake_mlflow.active = FakeRun("mine"), FakeRun("mine")
    callbacks = [WeightsAndBiases(), MLflow()]
    train(small(iterations=1), tmp_path / "run", callbacks=callbacks)
    assert not fake_wandb.made + fake_mlflow.made
    for found in (fake_wandb.run, fake_mlflow.active):
        assert set(found.rows) == {1}
        assert found.ended is None


def test_the_command_logs(tmp_path, fake_wandb, fake_mlflow, capsys):
    command = ["train", "sinusoid", "--iterations", "3", "--threads", "1", "--out"]
    logs = ["--log", "wandb", "--log", "mlflow"]
    assert run(*command, str(tmp_path / "run"), *logs) == 0
    assert set(fake_wandb.made[0].rows) == set(fake_mlflow.made[0].rows) == {1, 2, 3}
    assert "loss_post" in fake_wandb.made[0].rows[1]
    assert run(*command, str(tmp_path / "other"), "--log", "wand") == 2
    assert mentions(capsys.readouterr().err, "--log", "wand", "wandb")


@pytest.mark.parametrize("name", list(LOGGERS))
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    with refused(f"metarl-gradient[{name}]"):
        LOGGERS[name]()
    assert run("train", "navigation-2d", "--log", name, "--out", str(tmp_path / "run")) == 2
    assert mentions(capsys.readouterr().err, f"metarl-gradient[{name}]")
    assert not (tmp_path / "run").exists()


def test_the_id_is_in_the_run_folder(tmp_path, fake_wandb):
    train(small(iterations=1), tmp_path / "run", callbacks=[WeightsAndBiases()])
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": "id-0"}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


CONFIG = {"iterations": 2, "tasks": 2, "episodes": 2, "threads": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not _installed("wandb"), reason="wandb is not installed")
def test_the_real_wandb_records_offline(tmp_path):
    folder = tmp_path / "run"
    for iterations in (1, 2):
        config = resolve(None, "navigation-2d", overrides={**CONFIG, "iterations": iterations})
        train(config, folder, resume="auto", callbacks=[WeightsAndBiases(mode="offline")])
    name = json.loads((folder / "wandb.json").read_text())["id"]
    records = sorted(Path(folder / "wandb").glob(f"offline-run-*-{name}"))
    assert records
    assert list(records[0].glob("*.wandb"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not _installed("mlflow"), reason="mlflow is not installed")
def test_the_real_mlflow_records(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "run"
    for iterations in (1, 2):
        config = resolve(None, "navigation-2d", overrides={**CONFIG, "iterations": iterations})
        train(config, folder, resume="auto", callbacks=[MLflow()])
    name = json.loads((folder / "mlflow.json").read_text())["id"]
    history = mlflow.MlflowClient().get_metric_history(name, "return_post")
    rows = timeless(folder)
    assert [point.value for point in history] == [row["return_post"] for row in rows]
