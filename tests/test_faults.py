"""What is promised when something breaks. guarantees.txt lists every test here."""

from __future__ import annotations

import ast
import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import mostly_slow, same_params, small, timeless
from expecting import mentions, refused, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarl import load, train
from metarl.learning.gradient_steps import Adam
from metarl.policies.loading import newest_checkpoint
from metarl.runs import checkpoints
from metarl.runs.checkpoints import CheckpointError, checkpoints_of
from metarl.runs.files import write_atomically
from metarl.runs.folder import RunError
from metarl.runs.metrics import read_metrics
from metarl.training.callbacks import Iteration
from metarl.training.run import new_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ROOT = Path(__file__).parents[1]
TINY = small(
    family_options={"horizon": 3}, tasks=2, episodes=2, threads=1, **{"policy.hidden": (4,)}
)
FLAGS = [
    "--tasks", "2", "--episodes", "2", "--threads", "1", "--workers", "0", "--policy.hidden", "4",
    "--family-options", "horizon=3",
]  # fmt: skip


def in_child(work: Callable[[], object], seconds: float | None = None) -> int:
    """Do something in a process of its own; return its exit code, that of kill -9 after a time."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def go_on(folder: Path, iterations: int = 3) -> None:
    """Do what a user does after a kill."""
    config = TINY.with_options({"iterations": iterations})
    train(config, folder, resume=(folder / "config.json").exists())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(TINY.with_options({"iterations": 3}), folder)
    return folder


def same_runs(a: Path, b: Path) -> bool:
    names = {path.name for path in b.iterdir()}
    assert names == {path.name for path in a.iterdir()} - names_of_events(a) | names_of_events(b)
    hidden = list(b.rglob(".*"))
    return not hidden and timeless(a) == timeless(b) and same_params(load(a), load(b))


def names_of_events(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("events.*")}


# Killed -------------------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "replace", "unlink", "ftruncate", "mkdir")


def dies_at(boundary: int, work: Callable[[], object]) -> bool:
    """Whether work was ended before its call number `boundary` that changes files.

    A write gets half done first: not even a line or a header need be whole.
    """

    def hooked() -> None:
        left = boundary

        def hook(name: str):
            original = getattr(os, name)

            def call(*arguments, **options):
                nonlocal left
                reads = name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC)
                left -= not reads
                if left < 0:
                    if name == "write":
                        original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os._exit(99)
                return original(*arguments, **options)

            return call

        for name in CALLS:
            setattr(os, name, hook(name))
        work()

    code = in_child(hooked)
    assert code in (0, 99)
    return code == 99


def test_a_run_killed_at_any_write_continues_to_the_same_end(tmp_path, whole):
    boundary, folder = 0, tmp_path / "run"
    while dies_at(boundary, lambda: train(TINY.with_options({"iterations": 2}), folder)):
        assert in_child(lambda: go_on(folder)) == 0, boundary
        assert same_runs(whole, folder), boundary
        shutil.rmtree(folder)
        boundary += 1
    assert boundary > 30


def test_a_resume_killed_at_any_write_continues_to_the_same_end(tmp_path, whole):
    train(TINY.with_options({"iterations": 2}), tmp_path / "two")
    # What a crash leaves: a row without its checkpoint, half a line, a file aside.
    rows = (whole / "metrics.jsonl").read_text()
    (tmp_path / "two" / "metrics.jsonl").write_text(rows + '{"iterat')
    (tmp_path / "two" / "checkpoints" / ".000003.safetensors.7").write_text("half")
    boundary, folder = 0, tmp_path / "run"
    shutil.copytree(tmp_path / "two", folder)
    while dies_at(boundary, lambda: go_on(folder)):
        assert in_child(lambda: go_on(folder)) == 0, boundary
        assert same_runs(whole, folder), boundary
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "two", folder)
        boundary += 1
    assert boundary > 15


@pytest.mark.slow
def test_kill_9_at_fifty_random_moments(tmp_path):
    config, rng = TINY.with_options({"iterations": 120}), random.Random(0)
    train(config, tmp_path / "whole")
    killed = 0
    for _ in range(50):
        work = lambda: go_on(tmp_path / "run", 120)  # noqa: E731
        killed += in_child(work, 0.25 * rng.random()) == -signal.SIGKILL
    assert in_child(lambda: go_on(tmp_path / "run", 120)) == 0
    assert same_runs(tmp_path / "whole", tmp_path / "run")
    assert killed > 20


def test_a_run_killed_before_its_first_checkpoint_is_resumed_or_replaced(tmp_path, whole):
    for resume, later in ((True, False), (True, True), (False, True)):
        folder = tmp_path / f"{resume}-{later}"
        folder.mkdir()
        if later:
            (folder / "checkpoints").mkdir()
        shutil.copy(whole / "config.json", folder)
        (folder / "lock").touch()
        train(TINY.with_options({"iterations": 3}), folder, resume=resume)
        assert same_runs(whole, folder)
    # But where metrics tell of iterations, nothing begins afresh.
    for path in checkpoints_of(folder).values():
        path.unlink()
    with refused(folder, error=CheckpointError):
        train(TINY.with_options({"iterations": 3}), folder, resume=True)


def starting(*arguments: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "metarl", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until_it_runs_metarl(process: subprocess.Popen) -> None:
    """Wait until numpy is being loaded: metarl's own first lines have run by then."""
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.002)


@pytest.mark.parametrize("command", ["train navigation-2d --out run", "evaluate x"])
def test_ctrl_c_during_startup_is_one_line(tmp_path, command):
    process = starting(*command.split(), cwd=tmp_path)
    until_it_runs_metarl(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err.count("\n")) == (130, "", 1)
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path, monkeypatch, buffering):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffering)
    with starting("algorithms", cwd=tmp_path) as process:
        process.stdout.close()
        assert (process.wait(timeout=300), process.stderr.read()) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "train conftest:counting_family --workers 2 --out run --tasks 4 --episodes 2",
        "evaluate navigation-2d-icml2017",
        "record half-cheetah-dir-icml2017",
        "report half-cheetah-dir-icml2017",
    ],
)
def test_ctrl_c_at_random_moments_is_one_line_and_leaves_no_process(tmp_path, command, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    rng = random.Random(command)
    for _ in range(12):
        process = starting(*command.split(), cwd=tmp_path)
        until_it_runs_metarl(process)
        time.sleep(6.0 * rng.random())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert process.returncode in (130, 0), err
        assert "Traceback" not in err
        children = subprocess.run(
            ["pgrep", "-f", f"parent_pid={process.pid}"], capture_output=True, text=True
        )
        assert not children.stdout
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


# Disks --------------------------------------------------------------------------------------------

NO_SPACE = os.strerror(errno.ENOSPC)


def full_at(monkeypatch, name: str) -> None:
    """Let nothing be written to files whose names hold a text."""
    write = os.write

    def full(file, data):
        if name in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, NO_SPACE)
        return write(file, data)

    monkeypatch.setattr(os, "write", full)


@pytest.mark.parametrize("name", ["000003.safetensors", "metrics.jsonl"])
def test_a_full_disk_stops_a_run_with_one_line_and_it_can_be_resumed(
    tmp_path, monkeypatch, capsys, whole, name
):
    monkeypatch.chdir(tmp_path)
    assert run("train", "navigation-2d", *FLAGS, "--iterations", "2", "--out", "run") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        full_at(patch, name)
        assert run("train", "--resume", "run", "--iterations", "3") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if mentions(line, NO_SPACE)]
    assert mentions(line, name, "metarl train --resume run")
    assert len(checkpoints_of(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").rglob(".*"))
    assert run("train", "--resume", "run", "--iterations", "3") == 0
    a, b = timeless(whole), timeless(tmp_path / "run")
    assert [row["iteration"] for row in a] == [row["iteration"] for row in b]


@pytest.mark.parametrize("name", ["000001.safetensors", "metrics.jsonl"])
def test_a_write_that_fails_once_leaves_no_gap(tmp_path, monkeypatch, whole, name):
    # The iteration after it is done by then, and could be written.
    monkeypatch.chdir(tmp_path)
    write, left = os.write, [1]

    def once(file, data):
        if name in os.readlink(f"/proc/self/fd/{file}") and left:
            left.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", once)
        assert run("train", "navigation-2d", *FLAGS, "--iterations", "3", "--out", "run") == 2
    assert not left
    written = [row["iteration"] for row in read_metrics(tmp_path / "run")]
    assert written == ([1] if "safetensors" in name else [])
    assert list(checkpoints_of(tmp_path / "run")) == [0]
    assert run("train", "--resume", "run") == 0
    rows = [row["iteration"] for row in read_metrics(tmp_path / "run")]
    assert rows == [row["iteration"] for row in timeless(whole)]


def test_a_limit_on_file_sizes_is_one_line_and_leaves_no_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        os._exit(run("train", "navigation-2d", *FLAGS, "--out", "run"))

    assert in_child(limited) == 2
    err = capfd.readouterr().err
    assert mentions(err, "config.json", os.strerror(errno.EFBIG), "ulimit")
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("evaluate navigation-2d-icml2017 --tasks 2 --episodes 1 --steps 1 --workers 0 --out x",
         "evaluation.json"),
        ("evaluate navigation-2d-icml2017 --tasks 2 --episodes 1 --steps 1 --workers 0 --out x",
         "evaluation.png"),
        ("plot run", "learning.svg"),
        ("report run --no-video --tasks 2 --episodes 1 --steps 1", "report.html"),
        ("record navigation-2d-icml2017 --episodes 1 --out x.mp4", "x.mp4"),
        ("adapt run --task goal_x=0 goal_y=0 --episodes 1 --save adapted", "adapted"),
        *mostly_slow([("record navigation-2d-icml2017 --episodes 1 --out x.mp4", "x.gif")]),
    ],
)  # fmt: skip
def test_a_full_disk_stops_other_commands_with_one_line(
    tmp_path, monkeypatch, capsys, whole, command, name
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    full_at(monkeypatch, name)
    assert run(*command.split()) == 2
    err = capsys.readouterr().err
    assert mentions(err, name, NO_SPACE)
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob(f"*{name}*"))


# Damaged ------------------------------------------------------------------------------------------


def test_a_flipped_bit_loses_its_row_and_is_reported(tmp_path, whole, caplog):
    rows = [replace_iteration(row, i) for row in read_metrics(whole) for i in (0, 3, 6)]
    rows.sort(key=lambda row: row["iteration"])
    path = tmp_path / "metrics.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    rng = random.Random(0)
    flips = [(rng.randrange(len(good) - 1), rng.randrange(8)) for _ in range(600)]
    numbers = [found.end() for found in re.finditer(rb'"iteration": ', good)]
    assert len(numbers) == len(rows)
    flips += itertools.product(numbers, range(8))  # seldom hit, and the hardest: another iteration
    for at, bit in flips:
        flipped = bytearray(good)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        caplog.clear()
        found = read_metrics(tmp_path)
        intact = sum(row in rows for row in found)
        joined = good[at : at + 1] == b"\n"
        # A row with the iteration of a later one takes its place.
        assert intact >= len(rows) - 1 - (joined or at in numbers)
        assert len(found) == len(rows) or len(caplog.messages) == 1


def test_reading_many_metrics_takes_little_memory(tmp_path):
    numbers = ["env_steps", "seconds_iteration", "return_pre", "return_post"]
    rows = [{"iteration": i + 1, **dict.fromkeys(numbers, i)} for i in range(3000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    try:
        found = read_metrics(tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == rows
    assert most < 1e7  # a list of each beginning would be 36 MB


def replace_iteration(row: dict, more: int) -> dict:
    return {**row, "iteration": row["iteration"] + more}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (b'{"iteration": 1', b'["iteration": 1', ["JSON"]),
        (b'"env_steps"', b'"env_s\xffeps"', ["JSON"]),
        (b'"iteration": 1', b'"iterbtion": 1', ["iteration"]),
        (b'"iteration": 1', b'"iteration": 9', ["iteration", 3]),
        (b'"iteration": 1', b'"iteration": 1.5', ["iteration", "env_steps"]),
    ],
)
def test_damaged_metrics_are_named_and_set_aside(tmp_path, whole, caplog, old, new, names):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "metrics.jsonl"
    damaged = path.read_bytes().replace(old, new, 1)
    path.write_bytes(damaged)
    train(TINY.with_options({"iterations": 4}), folder, resume=True)
    aside = folder / "metrics.jsonl.set-aside-1"
    assert mentions(caplog.messages[0], path, "line 1", *names, aside)
    assert mentions(caplog.messages[1], path, "iteration 1")
    assert aside.read_bytes() == damaged
    assert [row["iteration"] for row in read_metrics(folder)] == [2, 3, 4]


def test_a_damaged_checkpoint_names_the_newest_good_one(tmp_path, capsys, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    path = newest_checkpoint(Path("run"))
    damaged = path.read_bytes()[:-5]
    path.write_bytes(damaged)
    remedy = "metarl train --resume run --from 2"
    assert run("train", "--resume", "run") == 2
    bad, good = (f"run/checkpoints/00000{i}.safetensors" for i in (3, 2))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if mentions(line, bad)]
    assert mentions(line, remedy)
    assert run("evaluate", "run", "--tasks", "1") == 2
    assert mentions(capsys.readouterr().err, bad, good)
    assert run("train", "--resume", "run", "--from", "1") == 2
    assert mentions(capsys.readouterr().err, "run", 1, "0, 2, 3")
    assert run(*remedy.split()[1:]) == 0
    assert timeless(whole) == timeless(Path("run"))
    assert same_params(load(whole), load("run"))
    assert path.with_name(f"{path.name}.set-aside-1").read_bytes() == damaged


ODD_CONFIG = {"family": "navigation-2d", "algorithm": "maml-trpo", "options": {"tasks": "5"}}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"format": "2"}, ["format", "'2'"]),
        ({"format": None}, ["format", None]),
        ({"format": 0}, ["format", 0]),
        ({"format": -1}, ["format", -1]),
        ({"format": True}, ["format", True]),
        ({"format": 2}, ["format", 2, 1]),
        ({"config": None}, ["config"]),
        ({"config": "gone"}, ["config"]),
        ({"config": ODD_CONFIG}, ["config", "tasks", "'5'"]),
        ({"iteration": "gone"}, ["iteration"]),
        ({"iteration": "3"}, ["iteration", "'3'"]),
        ({"iteration": 2}, ["iteration", 2]),
        ({"env_steps": -1}, ["env_steps", -1]),
        ({"kind": "policy"}, ["policy"]),
        ({"kind": "gone"}, [None]),
    ],
)
def test_odd_metadata_is_refused_by_name(tmp_path, monkeypatch, whole, changes, names):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = newest_checkpoint(folder)
    tensors, metadata = checkpoints.load(path)
    odd = {k: v for k, v in {**metadata, **changes}.items() if v != "gone"}
    with monkeypatch.context() as another_version:
        another_version.setattr(checkpoints, "FORMAT", odd["format"])
        checkpoints.save(path, tensors, odd)
    with refused(path, *names, error=CheckpointError):
        train(TINY.with_options({"iterations": 4}), folder, resume=True)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.double(), ["torch.float64", "torch.float32"]),
        (lambda t: t * torch.nan, []),
        (lambda t: t.flatten(), ["(8,)"]),
    ],
)
def test_odd_tensors_are_refused_by_name(tmp_path, whole, change, names):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = newest_checkpoint(folder)
    tensors, metadata = checkpoints.load(path)
    checkpoints.save(path, {name: change(t) for name, t in tensors.items()}, metadata)
    with refused(path, *names, error=CheckpointError) as in_training:
        train(TINY.with_options({"iterations": 4}), folder, resume=True)
    with refused(path, *names, error=CheckpointError) as in_loading:
        load(folder)
    for caught in (in_training, in_loading):
        assert any(mentions(str(caught.value), name.removeprefix("meta.")) for name in tensors)


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["deleted", "renamed", "replaced"])
def test_a_run_whose_folder_disappears_is_stopped(tmp_path, whole, fault):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def break_it(iteration: Iteration) -> None:
        if iteration.number > 1:  # files are written behind: it is told an iteration later
            return
        if fault == "deleted":
            while folder.exists():  # files are being written into it
                shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(elsewhere)
        if fault == "replaced":
            shutil.copytree(whole, folder)

    with refused(folder, "--resume", error=RunError):
        train(TINY.with_options({"iterations": 3}), folder, callbacks=[break_it])
    if fault == "replaced":
        assert same_runs(whole, folder)
    if fault != "deleted":
        train(TINY.with_options({"iterations": 3}), elsewhere, resume=True)
        assert same_runs(whole, elsewhere)


def test_a_run_folder_that_was_moved_is_resumed_there(tmp_path, whole):
    train(TINY.with_options({"iterations": 2}), tmp_path / "here")
    (tmp_path / "away").mkdir()
    (tmp_path / "here").rename(tmp_path / "away" / "there")
    train(TINY.with_options({"iterations": 3}), tmp_path / "away" / "there", resume=True)
    assert same_runs(whole, tmp_path / "away" / "there")


@pytest.mark.parametrize("resume", [False, True], ids=["two runs", "two resumes"])
def test_a_second_process_on_a_folder_is_refused(tmp_path, whole, resume):
    folder = tmp_path / "run"
    if resume:
        train(TINY.with_options({"iterations": 1}), folder)
    ours, theirs = os.pipe()

    def work() -> None:
        def wait(iteration: Iteration) -> None:
            os.write(theirs, b"x")  # holds the folder; waits until the other was refused
            os.read(held, 1)

        train(TINY.with_options({"iterations": 3}), folder, resume=resume, callbacks=[wait])

    held, go = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.read(ours, 1)
    with refused(folder, "--out", error=RunError):
        train(TINY.with_options({"iterations": 3}), folder, resume=resume)
    os.write(go, b"xxx")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_runs(whole, folder)


def test_two_processes_started_together_leave_one_complete_run(tmp_path, whole):
    for i in range(6):
        folder = tmp_path / str(i)
        children = []
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    train(TINY.with_options({"iterations": 3}), folder)
                    os._exit(0)
                except RunError:
                    os._exit(2)
                finally:
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0, 2]
        assert same_runs(whole, folder)


def test_the_clock_set_back_changes_nothing(tmp_path, monkeypatch, whole):
    folder, now = tmp_path / "run", time.time()
    train(TINY.with_options({"iterations": 2}), folder)
    for path in (folder / "checkpoints").iterdir():
        os.utime(path, (now + 9e6, now + 9e6))
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    train(TINY.with_options({"iterations": 3}), folder, resume=True)
    assert same_runs(whole, folder)
    assert len(EventAccumulator(str(folder)).Reload().Scalars("rollout/ep_rew_mean_post")) == 3


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    for iterations in (1, 2, 4):
        go_on(tmp_path / "run", iterations)
    assert len(names_of_events(tmp_path / "run")) == 1
    points = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("rollout/ep_rew_mean_post")
    steps = [row["env_steps"] for row in read_metrics(tmp_path / "run")]
    assert [point.step for point in points] == steps


def test_a_resume_on_another_machine_is_one_warning(tmp_path, whole, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    train(TINY.with_options({"iterations": 4}), folder, resume=True)
    assert not caplog.messages
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["machine"] |= {"processor": "Z80", "cores": 77}
    data["versions"]["torch"] = "0.4.1"
    path.write_text(json.dumps(data))
    train(TINY.with_options({"iterations": 5}), folder, resume=True)
    (message,) = caplog.messages
    here = checkpoints.versions()["torch"]
    assert mentions(message, "torch", "0.4.1", here, "processor", "Z80")
    assert not mentions(message, "cores")


# Numbers ------------------------------------------------------------------------------------------


class Given:
    """A problem whose gradients are given."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        self.gradients = iter(gradients)

    iterates = ()

    def gradient(self, meta, iterates=()):
        return next(self.gradients), {}


def test_one_huge_gradient_is_bounded_and_counted():
    healthy = torch.tensor([0.3, -0.4], dtype=torch.float64)
    meta = {"a": torch.zeros(2, dtype=torch.float64)}

    def moments(bound: float, factors: list[float]):
        adam = Adam(steps=len(factors), max_norm=bound, policies=False)
        problem = Given([healthy * f for f in factors])
        _, state, stats = adam.step(problem, meta, adam.init(meta))
        return state, stats

    state, stats = moments(2.0, [1.0, 1e6, 1.0])
    # The spike counts as 2, four times the healthy norm: v = 0.001 g^2 (b^2 + b 16 + 1).
    b = 0.999
    expected = 0.001 * healthy**2 * (b**2 + 16.0 * b + 1.0)
    torch.testing.assert_close(state["a/exp_avg_sq"], expected)
    assert stats["bounded_gradients"] == 1
    free, stats = moments(float("inf"), [1.0, 1.0, 1.0])
    bounded, told = moments(0.5000001, [1.0, 1.0, 1.0])
    assert all(torch.equal(free[name], bounded[name]) for name in free)
    assert stats["bounded_gradients"] == told["bounded_gradients"] == 0


def test_ten_iterations_of_nan_rewards_stop_with_the_last_good_state(tmp_path, monkeypatch):
    setup = replace(TINY.setup, family="test_trainer:poisoned", family_options={})
    config = replace(TINY, setup=setup).with_options({"iterations": 12})
    monkeypatch.setattr("test_trainer.bad_above", 100.0)
    meta = train(config.with_options({"iterations": 1}), tmp_path / "run")
    monkeypatch.setattr("test_trainer.bad_above", 0.0)
    with refused(10, "reward", error=RunError):
        train(config, tmp_path / "run", resume=True)
    assert same_params(meta, load(tmp_path / "run"))
    monkeypatch.setattr("test_trainer.bad_above", 100.0)
    after = train(config, tmp_path / "run", resume=True)
    assert after.provenance["iteration"] == 12


def test_a_simulation_that_diverges_does_not_change_the_others():
    seen = []
    for which in ([], [5]):  # the second episode of task 1
        options = {"which": which}
        config = small(family="test_trainer:thrown", family_options=options, threads=1)
        with new_trainer(config) as trainer:
            trainer.iterate(seen.append)
    a, b = (rollouts[0] for rollouts in seen)
    assert b.diverged.sum() == 1
    others = ~b.diverged
    for name in ("observation", "action", "reward"):
        one, other = getattr(a, name), getattr(b, name)
        assert torch.equal(one[others], other[others]), name


# Workers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        pytest.param("kill step", ["worker", "killed"], marks=pytest.mark.slow),
        pytest.param("hang step", ["worker", "--worker-timeout"], marks=pytest.mark.slow),
        pytest.param("shape step", ["shape"], marks=pytest.mark.slow),
        pytest.param("nan step", [10, "observation"], marks=pytest.mark.slow),
        ("raise step", ["ArithmeticError", "the fault"]),
    ],
)
def test_a_worker_that_keeps_failing_ends_the_command(tmp_path, monkeypatch, capsys, fault, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faults").write_text(f"always {fault}")
    arguments = ["train", "worker_envs:always_faulty", "--family-options", "faults=faults"]
    small = ["--tasks", "2", "--episodes", "2", "--workers", "2", "--worker-timeout", "1"]
    code = run(*arguments, *small, "--iterations", "10", "--out", "run")
    err = capsys.readouterr().err
    assert code == 2
    assert mentions(err, *names)
    assert load("run").provenance["iteration"] == 9 if "nan" in fault else not Path("run").exists()


# The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("train navigation-2d --itertions 3", "--itertions --iterations"),
        ("train navigation-2d --no-such=3", "--no-such"),
        ("train navigation-2d --iterations many", "--iterations many"),
        ("train navigation-2d --seed 1.5", "--seed 1.5"),
        ("record x --speed fast", "--speed fast"),
        ("train navigation-2d --iterations", "--iterations"),
        ("train navigation-2d --inner.step-sizes x", "--inner.step-sizes x"),
        ("train navigation-2d --policy.activation foo", "--policy.activation foo tanh relu"),
        ("train navigation-2d extra", "extra"),
        ("train navigation-2d --stratified False", "False"),
        ("train navigation-2d --no-advantage.normalize",
         "--no-advantage.normalize --advantage.no-normalize"),
        ("check a b", "b"),
        ("train navigation-2d --from 3", "--from 3 --resume"),
        ("train navigation-2d --algorithm promp --outer.max-norm 0", "outer.max_norm 0"),
        ("train navigation-2d --outer.max-norm 0", "--outer.max-norm"),
        ("train navigation-2d --algorithm promp --outer.learning-rate inf",
         "outer.learning_rate inf"),
        ("train navigation-2d --baseline.ridge inf", "baseline.ridge inf"),
        ("train navigation-2d --device tpu", "device tpu"),
        ("train navigation-2d --algorithm protomaml", "protomaml navigation-2d"),
        ("train navigation-2d --family-options nope=1", "navigation-2d nope"),
        ("train half-cheetah-vel --iterations 1 --family-options low=0.5 --family-options high=1.5",
         "--family-options low=0.5 high=1.5"),
        ("train sinusoid --shots 3 --family-options=nonsense=1", "sinusoid nonsense"),
        ("train half-cheetah-vel --iterations 1 --family-options low=0.5 low=0.7", "low"),
        ("train ant-dir --iterations 1 --family-options contact_forces=no",
         "ant-dir contact_forces no True False"),
        ("train half-cheetah-dir --iterations 1 --family-options balanced=no",
         "balanced no True False"),
        ("train navigation-2d --iterations 1 --family-options horizon=True",
         "navigation-2d horizon True"),
        ("train hopper-params --iterations 1 --family-options frame_skip=2.5",
         "hopper-params frame_skip 2.5"),
        ("train cartpole-length --iterations 1 --family-options low=-1", "cartpole-length low -1"),
        ("export navigation-2d-icml2017 --steps 2 --out x.pt", "--task goal_x goal_y"),
        ("evaluate navigation-2d-icml2017 --tasks 1 --threads 0", "threads 0"),
        ("report navigation-2d-icml2017 --out x.pdf", "--out x.pdf .html"),
        ("train half-cheetah-dir --iterations 1 --outer.max-kl inf",
         "outer.max_kl inf"),
        ("train conftest.py:counting_family", ".py conftest:counting_family"),
        ("train conftest:nothing", "conftest nothing"),
        ("evaluate navigation-2d-icml2017 --step-sizes 0.1,0.05", "--step-sizes 0.1,0.05"),
        ("evaluate navigation-2d-icml2017 --step-sizes", "--step-sizes"),
        ("adapt navigation-2d-icml2017 --task --steps 2", "--task goal_x"),
        ("adapt navigation-2d-icml2017 --task goal_x 1", "--task goal_x"),
        ("adapt navigation-2d-icml2017 --task goal_x=0 goal_y=0 goal_x=1", "goal_x"),
        ("adapt navigation-2d-icml2017 --task goal_x=0 goal_y=0 --save no/where",
         "--save no/where no"),
        ("export navigation-2d-icml2017 --out x.bin", "--out x.bin .pt .onnx"),
        ("export navigation-2d-icml2017 --out x.pt --format onnx",
         "--out x.pt torchscript --format onnx"),
        ("record navigation-2d-icml2017 --out x.avi", "--out x.avi .mp4 .gif"),
        ("adapt navigation-2d-icml2017 --task goal_x=0 goal_y=0 --episodes 100000000000",
         "memory tasks episodes"),
        ("train navigation-2d --policy.hidden 1000000000000", "memory network"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_in_one_line(tmp_path, monkeypatch, capsys, command, names):
    monkeypatch.chdir(tmp_path)
    assert run(*command.split()) == 2
    err = capsys.readouterr().err
    assert mentions(err, *names.split())
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_path_below_a_file_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metarl.evaluation.evaluate.evaluate", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("metarl.plots.video.record", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("metarl.policies.export.export", lambda *_, **__: 1 / 0)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    name = "navigation-2d-icml2017"
    for command, suffix in (("report", "html"), ("record", "mp4"), ("export", "pt")):
        assert run(command, name, "--out", f"file/x.{suffix}") == 2
        assert mentions(capsys.readouterr().err, "file", "--out")
        assert run(command, name, "--out", "folder") == 2
        assert mentions(capsys.readouterr().err, "folder", "--out")
    assert not Path("runs").exists()
    for out in ("file", "file/below"):
        assert run("evaluate", "navigation-2d-icml2017", "--out", out) == 2
        assert mentions(capsys.readouterr().err, "file", "--out")
    # Root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != Path("folder"))
    assert run("evaluate", "navigation-2d-icml2017", "--out", "folder/new") == 2
    assert mentions(capsys.readouterr().err, "folder", "--out")


def test_writing_to_links_and_pipes_keeps_them(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", b"told")
    assert os.read(reader, 10) == b"told"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# The table ----------------------------------------------------------------------------------------


def test_the_tables_of_faults_and_the_tests_agree():
    text = (ROOT / "tests" / "guarantees.txt").read_text()
    promised = {
        fault: re.findall(r"    (\w+)::(\w+)\n", names)
        for fault, names in re.findall(r"^([^#\s].*)\n((?:    \w+::\w+\n)+)", text, re.M)
    }
    assert sum(map(len, promised.values())) == text.count("::")
    for module, name in (test for tests in promised.values() for test in tests):
        assert name in names_of_tests(module), f"{module} has no {name}"
    here = names_of_tests("test_faults") - {"test_the_tables_of_faults_and_the_tests_agree"}
    assert here == {n for tests in promised.values() for m, n in tests if m == "test_faults"}
    page = (ROOT / "docs" / "faults.md").read_text()
    tables = re.findall(r"^\| fault \| what happens \|\n\|.*\n((?:\|.*\n)+)", page, re.M)
    rows = [line.strip("|").split(" | ") for table in tables for line in table.splitlines()]
    assert [row[0].strip() for row in rows] == list(promised)
    assert all(len(row) == 2 and row[1].strip() for row in rows)


def names_of_tests(module: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if node.name.startswith("test_")}
