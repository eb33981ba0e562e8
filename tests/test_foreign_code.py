"""User code changes the process, fails or would end it: commands do as they would without."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import foreign_envs
import pytest
import torch
from conftest import mostly_slow
from expecting import mentions, refused, run

import metarl
from metarl.envs import check_task_family, guard
from metarl.envs.errors import UserError
from metarl.models.settings import own_settings
from metarl.runs.metrics import read_metrics

TESTS = Path(__file__).parent
SMALL = ["--tasks", "2", "--episodes", "2", "--threads", "1", "--iterations", "2"]
MEASURE = ["--tasks", "2", "--episodes", "2", "--steps", "1", "--threads", "1", "--json"]


@pytest.fixture(autouse=True)
def _each_test_as_in_a_new_process():
    guard._theirs.clear()
    yield
    guard._theirs.clear()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Work in a folder of one's own, and import the families again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))  # of workers
    monkeypatch.delitem(sys.modules, "foreign_envs")
    return tmp_path


def numbers(folder: Path) -> list[dict]:
    """Return a run's metrics but for what depends on time."""
    timed = ("seconds", "env_steps_per_second")
    return [
        {key: value for key, value in row.items() if not key.startswith(timed)}
        for row in read_metrics(folder)
    ]


def family_for(place: str) -> str:
    return "foreign_envs:paid" if place == "reward" else "foreign_envs:put_in"


def train(place: str, workers: str = "0") -> int:
    return run("train", family_for(place), *SMALL, "--workers", workers, "--out", "run")


def outcome(place: str, workers: str, capsys) -> tuple:
    """Train, evaluate and adapt here; return the metrics, the results, what adapt says."""
    assert train(place, workers) == 0
    capsys.readouterr()
    assert run("evaluate", "run", *MEASURE, "--workers", workers) == 0
    returns = json.loads(capsys.readouterr().out)["returns"]
    flags = ["--task", "goal=0.5", "--episodes", "2", "--save", "kept.safetensors"]
    assert run("adapt", "run", *flags) == 0
    assert sorted(p.name for p in Path().iterdir()) == ["kept.safetensors", "run"]
    return numbers(Path("run")), returns, capsys.readouterr().out


@pytest.mark.parametrize("place", mostly_slow(foreign_envs.PLACES, "step"))
def test_commands_do_the_same_wherever_user_code_changes_the_process(
    fresh, monkeypatch, capsys, place
):
    plain = outcome(place, "0", capsys)
    monkeypatch.setenv("MEDDLE", place)
    monkeypatch.delitem(sys.modules, "foreign_envs")
    (fresh / "other").mkdir()
    monkeypatch.chdir(fresh / "other")
    assert outcome(place, "0", capsys) == plain


def test_workers_do_the_same_though_user_code_changes_them(fresh, monkeypatch, capsys):
    plain = outcome("everywhere", "0", capsys)
    monkeypatch.setenv("MEDDLE", "everywhere")
    (fresh / "other").mkdir()
    monkeypatch.chdir(fresh / "other")
    assert outcome("everywhere", "2", capsys) == plain


def test_check_tells_its_results_though_user_code_changes_the_process(fresh, monkeypatch, capsys):
    monkeypatch.setenv("MEDDLE", "everywhere")
    assert run("check", "foreign_envs:put_in") == 0
    assert mentions(capsys.readouterr().out, "tasks", "seeding", "worker")


def settings() -> dict:
    found = {name: setting.read() for name, setting in guard.SETTINGS.items()}
    del found["logging"], found["warnings"]  # modules that are imported late add to them
    logger = logging.getLogger("metarl.sampling.workers")
    logs = logger.isEnabledFor(logging.WARNING) and not logger.disabled
    return {**found, "logs": logs, "errors": foreign_envs.FILTER in warnings.filters}


def test_user_code_may_be_the_first_to_import_what_has_settings():
    script = "from metarl.envs import guard\nwith guard.user_code():\n    import metarl.models"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("place", mostly_slow(foreign_envs.PLACES[1:], "step"))
def test_a_script_finds_the_process_as_it_left_it(tmp_path, monkeypatch, place):
    env = foreign_envs.paid.make([0.5])
    before = settings()
    monkeypatch.setenv("MEDDLE", place)
    monkeypatch.chdir(tmp_path)
    before["folder"] = str(tmp_path)
    family = family_for(place)
    config = small_config(family)
    meta = metarl.train(config, "run")
    assert settings() == before
    metarl.evaluate(meta, tasks=2, episodes=2, steps=1, threads=1)
    assert settings() == before
    meta.adapt([0.5], episodes=2).play(env)
    assert settings() == before
    check_task_family(meta.family)
    assert settings() == before
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def small_config(family: str = "foreign_envs:put_in", **values):
    small = {"tasks": 2, "episodes": 2, "iterations": 2, "threads": 1, "workers": 0}
    return metarl.resolve(None, family, "maml-trpo", {**small, **values})


def test_user_code_finds_its_own_folder_again(tmp_path, monkeypatch):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    monkeypatch.chdir(ours)
    with guard.user_code():
        os.chdir(theirs)
    assert Path.cwd() == ours
    with guard.user_code():
        assert Path.cwd() == theirs
        os.chdir(ours)
    with guard.user_code():
        assert Path.cwd() == ours


def test_what_a_step_changes_is_put_back_at_the_end_of_the_rollout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with guard.restored():
        with guard.user_step():
            os.chdir("/")
            torch.set_default_dtype(torch.float64)
        assert torch.get_default_dtype() == torch.float32
    assert Path.cwd() == tmp_path


def test_a_scripts_own_settings_of_torch_do_not_reach_a_run(tmp_path):
    usual = numbers_of(tmp_path / "usual")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.no_grad(), torch.inference_mode():
            assert numbers_of(tmp_path / "changed") == usual
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


def numbers_of(folder: Path) -> list[dict]:
    metarl.train(small_config(), folder)
    return numbers(folder)


def test_own_settings_give_the_callers_back():
    with torch.no_grad():
        with own_settings():
            assert torch.is_grad_enabled()
            assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()


# Errors -------------------------------------------------------------------------------------------


def error_of(capsys) -> str:
    """Return the one line of standard error that says what is wrong."""
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "how",
    mostly_slow(["raise", "missing", "pipe", "exit", "base", "interrupt"], "raise", "interrupt"),
)
def test_whatever_a_step_raises_is_one_line_and_the_run_can_be_resumed(
    fresh, monkeypatch, capsys, how
):
    assert train("step") == 0
    monkeypatch.setenv("OFFEND", f"{how} step")
    assert run("train", "--resume", "run", "--iterations", "3") == 2
    assert mentions(error_of(capsys), "put_in", "step", "foreign_envs.py")
    assert len(read_metrics(Path("run"))) == 2
    monkeypatch.delenv("OFFEND")
    assert run("train", "--resume", "run", "--iterations", "3") == 0


@pytest.mark.parametrize(
    "how", mostly_slow(["raise", "pipe", "exit", "interrupt", "leave"], "raise", "leave")
)
def test_whatever_a_workers_step_does_is_told(fresh, monkeypatch, capsys, how):
    monkeypatch.setenv("OFFEND", f"{how} step")
    assert train("step", "2") == 2
    said = capsys.readouterr().err
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
    assert mentions(said, "put_in", "step", *(["foreign_envs.py"] if how != "leave" else []))
    assert not Path("run").exists()


@pytest.mark.parametrize("how", ["raise", "missing", "exit"])
@pytest.mark.parametrize(
    "place", mostly_slow(("import", "make", "set_task", "reset", "reward"), "import", "reset")
)
def test_an_error_anywhere_in_user_code_names_its_file(fresh, monkeypatch, capsys, place, how):
    monkeypatch.setenv("OFFEND", f"{how} {place}")
    assert train(place) == 2
    assert mentions(error_of(capsys), "foreign_envs.py")
    assert not Path("run").exists()


@pytest.mark.parametrize("workers", mostly_slow(["0", "2"], "0"))
def test_results_outlive_an_environment_that_cannot_be_closed(
    fresh, monkeypatch, capsys, caplog, workers
):
    for how in ("raise", "exit") if workers == "0" else ("raise",):
        monkeypatch.setenv("OFFEND", f"{how} close")
        assert run("train", "foreign_envs:put_in", *SMALL, "--workers", workers, "--out", how) == 0
        capsys.readouterr()
        assert run("evaluate", how, *MEASURE, "--workers", workers) == 0
        assert json.loads(capsys.readouterr().out)["returns"]
        if workers == "0":  # a worker tells it on its own standard error
            assert any(mentions(record.getMessage(), "put_in") for record in caplog.records)


def test_an_error_in_render_is_one_line(fresh, monkeypatch, capsys):
    assert train("render") == 0
    for how in ("raise", "exit"):
        capsys.readouterr()
        monkeypatch.setenv("OFFEND", f"{how} render")
        assert run("record", "run") == 2
        error_of(capsys)


def test_in_python_an_error_is_the_environments_own(fresh, monkeypatch):
    monkeypatch.setenv("OFFEND", "raise step")
    with pytest.raises(ArithmeticError):
        metarl.train(small_config(), fresh / "run")
    monkeypatch.setenv("OFFEND", "exit step")
    with refused("put_in", "step"):
        metarl.train(small_config(), fresh / "run")


def test_user_code_that_ends_the_process_is_a_user_error():
    with pytest.raises(UserError), guard.user_code():
        sys.exit(3)


# As a program -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", mostly_slow(["0", "2"], "0"))
def test_ctrl_c_works_though_user_code_installs_handlers(tmp_path, workers):
    many = [*SMALL[:-1], "100000", "--workers", workers, "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "metarl", "train", "foreign_envs:put_in", *many],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "MEDDLE": "make"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert mentions(out, "--resume")


def wait_for_rows(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(read_metrics(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(read_metrics(folder)) >= count


def test_an_error_while_python_takes_environments_apart_changes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "metarl", "train", "foreign_envs:put_in", *SMALL,
         "--workers", "0", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OFFEND": "raise del"},
        capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0
    assert len(read_metrics(tmp_path / "run")) == 2
