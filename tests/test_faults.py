"""What is promised when something breaks. docs/faults.md lists every test here."""

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
from conftest import counting_family
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import Poisoned, same_params, small, timeless

from metarl import load, train
from metarl.commands.cli import main
from metarl.envs import make_family
from metarl.learning.first_order import Adam, AdamConfig
from metarl.running import checkpoints, metrics
from metarl.running.checkpoints import CheckpointError
from metarl.running.config import PolicyConfig
from metarl.running.files import write_atomically
from metarl.running.loading import checkpoints_of, newest_checkpoint
from metarl.running.metrics import read_metrics
from metarl.running.runs import RunError
from metarl.running.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ROOT = Path(__file__).parents[1]
TINY = small(
    family_options={"horizon": 3}, tasks=2, episodes=2, threads=1, policy=PolicyConfig(hidden=(4,))
)
FLAGS = [
    "--tasks", "2", "--episodes", "2", "--threads", "1", "--workers", "0", "--policy.hidden", "4",
    "--family-options", "horizon=3",
]  # fmt: skip


def run(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)


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
    config = replace(TINY, iterations=iterations)
    train(config, folder, resume=(folder / "config.json").exists())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(replace(TINY, iterations=3), folder)
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


def test_killed_at_every_write_of_a_run_it_goes_on_to_the_same_end(tmp_path, whole):
    boundary, folder = 0, tmp_path / "run"
    while dies_at(boundary, lambda: train(replace(TINY, iterations=2), folder)):
        assert in_child(lambda: go_on(folder)) == 0, boundary
        assert same_runs(whole, folder), boundary
        shutil.rmtree(folder)
        boundary += 1
    assert boundary > 30


def test_killed_at_every_write_of_a_resume_it_goes_on_to_the_same_end(tmp_path, whole):
    train(replace(TINY, iterations=2), tmp_path / "two")
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
    config, rng = replace(TINY, iterations=120), random.Random(0)
    train(config, tmp_path / "whole")
    killed = 0
    for _ in range(50):
        work = lambda: go_on(tmp_path / "run", 120)  # noqa: E731
        killed += in_child(work, 0.25 * rng.random()) == -signal.SIGKILL
    assert in_child(lambda: go_on(tmp_path / "run", 120)) == 0
    assert same_runs(tmp_path / "whole", tmp_path / "run")
    assert killed > 20


def test_killed_before_its_first_checkpoint_a_run_is_resumed_or_replaced(tmp_path, whole):
    for resume, later in ((True, False), (True, True), (False, True)):
        folder = tmp_path / f"{resume}-{later}"
        folder.mkdir()
        if later:
            (folder / "checkpoints").mkdir()
        shutil.copy(whole / "config.json", folder)
        (folder / "lock").touch()
        train(replace(TINY, iterations=3), folder, resume=resume)
        assert same_runs(whole, folder)
    # But where metrics tell of iterations, nothing begins afresh.
    for path in checkpoints_of(folder).values():
        path.unlink()
    with pytest.raises(CheckpointError, match="holds metrics but no checkpoint"):
        train(replace(TINY, iterations=3), folder, resume=True)


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
def test_ctrl_c_while_it_starts_is_a_line(tmp_path, command):
    process = starting(*command.split(), cwd=tmp_path)
    until_it_runs_metarl(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
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
def test_ctrl_c_at_random_moments_is_a_line_and_leaves_no_process(tmp_path, command, monkeypatch):
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


def full_at(monkeypatch, name: str) -> None:
    """Let nothing be written to files whose names hold a text."""
    write = os.write

    def full(file, data):
        if name in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(os, "write", full)


@pytest.mark.parametrize("name", ["000003.safetensors", "metrics.jsonl"])
def test_a_full_disk_stops_a_run_with_a_line_and_it_goes_on_later(
    tmp_path, monkeypatch, capsys, whole, name
):
    monkeypatch.chdir(tmp_path)
    assert run("train", "navigation-2d", *FLAGS, "--iterations", "2", "--out", "run") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        full_at(patch, name)
        assert run("train", "--resume", "run", "--iterations", "3") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert f"{name}: No space left on device; make room there" in lines[0]
    assert "metarl train --resume run" in lines[0]
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


def test_a_limit_on_file_sizes_is_a_line_and_leaves_no_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        os._exit(run("train", "navigation-2d", *FLAGS, "--out", "run"))

    assert in_child(limited) == 2
    err = capfd.readouterr().err
    assert "config.json: File too large; raise the limit on the size of files (ulimit -f)" in err
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
        ("record navigation-2d-icml2017 --episodes 1 --out x.mp4", "x.gif"),
        ("adapt run --task goal_x=0 goal_y=0 --episodes 1 --save adapted", "adapted"),
    ],
)  # fmt: skip
def test_a_full_disk_stops_other_commands_with_a_line(
    tmp_path, monkeypatch, capsys, whole, command, name
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    full_at(monkeypatch, name)
    assert run(*command.split()) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"error: \S*{name}: No space left on device; make room.*\n", err)
    assert not list(tmp_path.rglob(f"*{name}*"))


def test_tensorboard_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog, whole):
    full_at(monkeypatch, "tfevents")
    meta = train(replace(TINY, iterations=3), tmp_path / "run")
    assert len(caplog.messages) == 1
    assert "No space left on device; TensorBoard shows no more of" in caplog.messages[0]
    assert same_params(meta, load(whole))
    assert timeless(tmp_path / "run") == timeless(whole)


# Damaged ------------------------------------------------------------------------------------------


def test_of_flipped_bits_no_other_row_is_lost_and_none_silently(tmp_path, whole, caplog):
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
        assert intact >= len(rows) - 1 - joined
        assert len(found) == len(rows) or len(caplog.messages) == 1


def test_many_metrics_take_no_more_memory_than_they_are(tmp_path):
    lines = [metrics._Line({"iteration": i + 1}, i + 1, 0) for i in range(3000)]
    tracemalloc.start()
    try:
        kept = metrics._increasing(lines)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept == lines
    assert most < 1e6  # a list of each beginning would be 36 MB


def replace_iteration(row: dict, more: int) -> dict:
    return {**row, "iteration": row["iteration"] + more}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b'{"iteration": 1', b'["iteration": 1', "line 1 is damaged (no JSON)"),
        (b'"env_steps"', b'"env_s\xffeps"', "line 1 is damaged (no JSON)"),
        (b'"iteration": 1', b'"iterbtion": 1', "line 1 is damaged (iteration is missing)"),
        (b'"iteration": 1', b'"iteration": 9', "line 1 is damaged (iteration 9 out of order)"),
        (b'"iteration": 1', b'"iteration": 1.5', "whole numbers"),
    ],
)
def test_damaged_metrics_are_named_and_kept_aside(tmp_path, whole, caplog, old, new, told):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / "metrics.jsonl"
    damaged = path.read_bytes().replace(old, new, 1)
    path.write_bytes(damaged)
    train(replace(TINY, iterations=4), folder, resume=True)
    assert told in caplog.messages[0]
    assert "is kept as" in caplog.messages[0]
    assert "has no row of iteration 1" in caplog.messages[1]
    assert (folder / "metrics.jsonl.set-aside-1").read_bytes() == damaged
    assert [row["iteration"] for row in read_metrics(folder)] == [2, 3, 4]


def test_a_damaged_checkpoint_names_the_newest_good_one(tmp_path, capsys, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    path = newest_checkpoint(Path("run"))
    damaged = path.read_bytes()[:-5]
    path.write_bytes(damaged)
    remedy = "metarl train --resume run --from 2"
    assert run("train", "--resume", "run") == 2
    err = capsys.readouterr().err
    assert err.count("error: run/checkpoints/000003.safetensors is damaged") == 1
    assert remedy in err
    assert run("evaluate", "run", "--tasks", "1") == 2
    assert "the newest good one is run/checkpoints/000002.safetensors" in capsys.readouterr().err
    assert run("train", "--resume", "run", "--from", "1") == 2
    assert "no checkpoint of iteration 1 (there: 0, 2, 3)" in capsys.readouterr().err
    assert run(*remedy.split()[1:]) == 0
    assert timeless(whole) == timeless(Path("run"))
    assert same_params(load(whole), load("run"))
    assert path.with_name(f"{path.name}.set-aside-1").read_bytes() == damaged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "2"}, "has format '2', which no version of metarl writes"),
        ({"format": None}, "has format None"),
        ({"format": 0}, "has format 0"),
        ({"format": -1}, "has format -1"),
        ({"format": True}, "has format True"),
        ({"format": 2}, "this version reads up to 1; update metarl"),
        ({"config": None}, "holds a config that cannot be used"),
        ({"config": "gone"}, "holds no config"),
        ({"config": {"tasks": "5"}}, "holds a config that cannot be used"),
        ({"iteration": "gone"}, "iteration must be a whole number, 0 or more, is 'missing'"),
        ({"iteration": "3"}, "iteration must be a whole number, 0 or more, is '3'"),
        ({"iteration": 2}, "is of iteration 2, which is not its name"),
        ({"env_steps": -1}, "env_steps must be a whole number, 0 or more, is -1"),
        ({"kind": "policy"}, "is no checkpoint of a run but 'policy'"),
        ({"kind": "gone"}, "is no checkpoint of a run but None"),
    ],
)
def test_odd_metadata_is_refused_by_name(tmp_path, whole, changes, message):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = newest_checkpoint(folder)
    tensors, metadata = checkpoints.load(path)
    odd = {k: v for k, v in {**metadata, **changes}.items() if v != "gone"}
    write_as_it_is(path, tensors, odd)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        train(replace(TINY, iterations=4), folder, resume=True)


def write_as_it_is(path: Path, tensors: dict, metadata: dict) -> None:
    """Save without the format that `save` puts in."""
    import safetensors.torch

    text = json.dumps(metadata)
    header = {"metarl": text, "sha256": checkpoints._digest(tensors, text)}
    path.write_bytes(safetensors.torch.save(tensors, header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.double(), "is torch.float64, expected torch.float32"),
        (lambda t: t * torch.nan, "holds a number that is not finite"),
        (lambda t: t.flatten(), "is of another network"),
    ],
)
def test_odd_tensors_are_refused_by_name(tmp_path, whole, change, message):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = newest_checkpoint(folder)
    tensors, metadata = checkpoints.load(path)
    checkpoints.save(path, {name: change(t) for name, t in tensors.items()}, metadata)
    with pytest.raises(CheckpointError, match=message):
        train(replace(TINY, iterations=4), folder, resume=True)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["deleted", "renamed", "replaced"])
def test_a_folder_that_goes_while_it_is_trained_in(tmp_path, whole, fault):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def break_it(row: dict) -> None:
        if row["iteration"] > 1:  # files are written behind: it is told an iteration later
            return
        if fault == "deleted":
            while folder.exists():  # files are being written into it
                shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(elsewhere)
        if fault == "replaced":
            shutil.copytree(whole, folder)

    with pytest.raises(RunError, match="was moved or deleted while it was trained in"):
        train(replace(TINY, iterations=3), folder, progress=break_it)
    if fault == "replaced":
        assert same_runs(whole, folder)
    if fault != "deleted":
        train(replace(TINY, iterations=3), elsewhere, resume=True)
        assert same_runs(whole, elsewhere)


def test_a_run_folder_that_was_moved_is_resumed_there(tmp_path, whole):
    train(replace(TINY, iterations=2), tmp_path / "here")
    (tmp_path / "away").mkdir()
    (tmp_path / "here").rename(tmp_path / "away" / "there")
    train(replace(TINY, iterations=3), tmp_path / "away" / "there", resume=True)
    assert same_runs(whole, tmp_path / "away" / "there")


@pytest.mark.parametrize("resume", [False, True], ids=["two runs", "two resumes"])
def test_of_two_processes_on_a_folder_one_is_refused(tmp_path, whole, resume):
    folder = tmp_path / "run"
    if resume:
        train(replace(TINY, iterations=1), folder)
    ours, theirs = os.pipe()

    def work() -> None:
        def wait(row: dict) -> None:
            os.write(theirs, b"x")  # holds the folder; waits until the other was refused
            os.read(held, 1)

        train(replace(TINY, iterations=3), folder, resume=resume, progress=wait)

    held, go = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    os.read(ours, 1)
    with pytest.raises(RunError, match=r"another process is training|exists; continue it"):
        train(replace(TINY, iterations=3), folder, resume=resume)
    os.write(go, b"xxx")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_runs(whole, folder)


def test_two_processes_that_start_at_once_leave_one_whole_run(tmp_path, whole):
    for i in range(6):
        folder = tmp_path / str(i)
        children = []
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    train(replace(TINY, iterations=3), folder)
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
    train(replace(TINY, iterations=2), folder)
    for path in (folder / "checkpoints").iterdir():
        os.utime(path, (now + 9e6, now + 9e6))
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    train(replace(TINY, iterations=3), folder, resume=True)
    assert same_runs(whole, folder)
    assert len(EventAccumulator(str(folder)).Reload().Scalars("rollout/ep_rew_mean_post")) == 3


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    for iterations in (1, 2, 4):
        go_on(tmp_path / "run", iterations)
    assert len(names_of_events(tmp_path / "run")) == 1
    points = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("rollout/ep_rew_mean_post")
    steps = [row["env_steps"] for row in read_metrics(tmp_path / "run")]
    assert [point.step for point in points] == steps


def test_another_machine_is_told_in_a_line(tmp_path, whole, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    train(replace(TINY, iterations=4), folder, resume=True)
    assert not caplog.messages
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["machine"] |= {"processor": "Z80", "cores": 77}
    data["versions"]["torch"] = "0.4.1"
    path.write_text(json.dumps(data))
    train(replace(TINY, iterations=5), folder, resume=True)
    (message,) = caplog.messages
    here = checkpoints.versions()["torch"]
    assert f"began with torch 0.4.1 (now {here}), processor Z80 (now " in message
    assert "in distribution, not in every bit" in message
    assert "cores" not in message


# Numbers ------------------------------------------------------------------------------------------


class Given:
    """A problem whose gradients are given."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        self.gradients = gradients

    iterates = ()

    def gradient(self, meta, step=0, iterates=()):
        return self.gradients[step], {}


def test_one_huge_gradient_is_bounded_and_counted():
    healthy = torch.tensor([0.3, -0.4], dtype=torch.float64)
    meta = {"a": torch.zeros(2, dtype=torch.float64)}

    def moments(bound: float, factors: list[float]):
        adam = Adam(AdamConfig(steps=len(factors), max_norm=bound))
        problem = Given([healthy * f for f in factors])
        _, state, stats = adam.step(problem, meta, adam.init(meta))
        return state, stats

    state, stats = moments(2.0, [1.0, 1e6, 1.0])
    # The spike counts as 2, four times the healthy norm: v = 0.001 g^2 (b^2 + b 16 + 1).
    b = 0.999
    expected = 0.001 * healthy**2 * (b**2 + 16.0 * b + 1.0)
    torch.testing.assert_close(state["square.a"], expected)
    assert stats["bounded_gradients"] == 1
    free, stats = moments(float("inf"), [1.0, 1.0, 1.0])
    bounded, told = moments(0.5000001, [1.0, 1.0, 1.0])
    assert all(torch.equal(free[name], bounded[name]) for name in free)
    assert stats["bounded_gradients"] == told["bounded_gradients"] == 0


def test_ten_rewards_that_are_nan_stop_with_the_last_good_state(tmp_path, monkeypatch):
    family = replace(counting_family(), env=Poisoned)
    monkeypatch.setattr("metarl.running.trainer.find_family", lambda *_, **__: family)
    config = replace(TINY, iterations=12)
    monkeypatch.setattr("test_trainer.bad_above", 100.0)
    meta = train(replace(config, iterations=1), tmp_path / "run")
    monkeypatch.setattr("test_trainer.bad_above", 0.0)
    with pytest.raises(RunError, match="10 updates in a row were skipped"):
        train(config, tmp_path / "run", resume=True)
    assert same_params(meta, load(tmp_path / "run"))
    monkeypatch.setattr("test_trainer.bad_above", 100.0)
    after = train(config, tmp_path / "run", resume=True)
    assert after.provenance["iteration"] == 12


def test_a_simulation_that_diverges_leaves_the_others_as_they_are(monkeypatch):
    family = make_family("half-cheetah-dir", horizon=8)
    monkeypatch.setattr("metarl.running.trainer.find_family", lambda *_, **__: family)
    config = small(family="half-cheetah-dir", family_options={}, threads=1)
    seen = []
    for sabotaged in (False, True):
        with Trainer(config) as trainer, monkeypatch.context() as patch:
            env = trainer.source.collector._envs[0]
            begin = env._begin

            def broken(ids, seeds, begin=begin, env=env, sabotaged=sabotaged):
                begin(ids, seeds)
                if sabotaged:
                    env.sim.qvel[5, 0] = 1e11  # the second episode of task 1

            patch.setattr(env, "_begin", broken)
            trainer.iterate(seen.append)
    a, b = (rollouts[0] for rollouts in seen)
    assert b.diverged.sum() == 1
    others = ~b.diverged
    for name in ("observation", "action", "reward"):
        one, other = getattr(a, name), getattr(b, name)
        assert torch.equal(one[others], other[others]), name


# Workers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        pytest.param("kill step", "was killed", marks=pytest.mark.slow),
        pytest.param("hang step", "hung", marks=pytest.mark.slow),
        pytest.param("shape step", "shape", marks=pytest.mark.slow),
        pytest.param("nan step", "10 updates in a row were skipped", marks=pytest.mark.slow),
        ("raise step", "ArithmeticError: the fault"),
    ],
)
def test_a_worker_that_goes_on_failing_ends_the_command(tmp_path, monkeypatch, capsys, fault, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faults").write_text(f"always {fault}")
    arguments = ["train", "worker_envs:always_faulty", "--family-options", "faults=faults"]
    small = ["--tasks", "2", "--episodes", "2", "--workers", "2", "--worker-timeout", "1"]
    code = run(*arguments, *small, "--iterations", "10", "--out", "run")
    err = capsys.readouterr().err
    assert (code, "error: " in err, told in err) == (2, True, True)
    assert load("run").provenance["iteration"] == 9 if "nan" in fault else not Path("run").exists()


# The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train navigation-2d --itertions 3",
         "no option '--itertions'; did you mean '--iterations'? (metarl train --help lists"),
        ("train navigation-2d --no-such=3", "no option '--no-such'"),
        ("train navigation-2d --iterations many", "--iterations must be a whole number, got 'man"),
        ("train navigation-2d --seed 1.5", "--seed must be a whole number, got '1.5'"),
        ("record x --speed fast", "--speed must be a number, got 'fast'"),
        ("train navigation-2d --iterations", "--iterations needs a value"),
        ("train navigation-2d --inner.step-sizes x", "--inner.step-sizes cannot be made of 'x'"),
        ("train navigation-2d --policy.activation foo",
         "--policy.activation must be one of tanh, relu, got 'foo'"),
        ("train navigation-2d extra", "'extra' is not expected here"),
        ("train navigation-2d --stratified False",
         "'False' is not expected here: a switch is turned off as in --advantage.no-normalize ("),
        ("train navigation-2d --no-advantage.normalize",
         "no option '--no-advantage.normalize'; did you mean '--advantage.no-normalize'? ("),
        ("check a b", "'b' is not expected here (metarl check --help lists the options)"),
        ("train navigation-2d --from 3", "--from 3 needs the run: --resume FOLDER"),
        ("train navigation-2d --adam.max-norm 0", "adam.max_norm must be positive, got 0"),
        ("train navigation-2d --algorithm promp --adam.learning-rate inf",
         "adam.learning_rate must be finite, got inf"),
        ("train navigation-2d --advantage.ridge inf",
         "advantage.ridge must be positive and finite, got inf"),
        ("train navigation-2d --device tpu", "device must be"),
        ("train navigation-2d --algorithm protomaml", "protomaml"),
        ("train navigation-2d --family-options nope=1", "navigation-2d has no option 'nope'"),
        ("train half-cheetah-vel --iterations 1 --family-options low=0.5 --family-options high=1.5",
         "--family-options is there twice: name all options after one"),
        ("train sinusoid --shots 3 --family-options=nonsense=1",
         "sinusoid has no option 'nonsense'"),
        ("train half-cheetah-vel --iterations 1 --family-options low=0.5 low=0.7",
         "the family option low is given twice"),
        ("train ant-dir --iterations 1 --family-options contact_forces=no",
         "ant-dir: contact_forces must be True or False, got 'no'"),
        ("train half-cheetah-dir --iterations 1 --family-options balanced=no",
         "balanced must be True or False, got 'no'"),
        ("train navigation-2d --iterations 1 --family-options horizon=True",
         "navigation-2d: horizon must be a whole number, got True"),
        ("train hopper-params --iterations 1 --family-options frame_skip=2.5",
         "hopper-params: frame_skip must be a whole number, got 2.5"),
        ("train cartpole-length --iterations 1 --family-options low=-1",
         "cartpole-length: low must be positive, got -1"),
        ("export navigation-2d-icml2017 --steps 2 --out x.pt",
         "to adapt before it is exported, name the task: --task goal_x=... goal_y=..."),
        ("evaluate navigation-2d-icml2017 --tasks 1 --threads 0", "threads must be at least 1"),
        ("report navigation-2d-icml2017 --out x.pdf", "--out x.pdf must end in .html or .htm"),
        ("train half-cheetah-dir --iterations 1 --trust-region.max-kl inf",
         "trust_region.max_kl must be positive and finite, got inf"),
        ("train conftest.py:counting_family",
         "a family is named without .py: conftest:counting_family"),
        ("train conftest:nothing", "module 'conftest' has no 'nothing'"),
        ("evaluate navigation-2d-icml2017 --step-sizes 0.1,0.05",
         "--step-sizes takes numbers, as in 0.1 0.05, got '0.1,0.05'"),
        ("evaluate navigation-2d-icml2017 --step-sizes",
         "--step-sizes takes numbers, as in 0.1 0.05, and none follow"),
        ("adapt navigation-2d-icml2017 --task --steps 2",
         "--task takes component=value, as in goal_x=0.3, and none follow"),
        ("adapt navigation-2d-icml2017 --task goal_x 1",
         "--task takes component=value, as in goal_x=0.3, got 'goal_x'"),
        ("adapt navigation-2d-icml2017 --task goal_x=0 goal_y=0 goal_x=1",
         "task component 'goal_x' is given twice"),
        ("adapt navigation-2d-icml2017 --task goal_x=0 goal_y=0 --save no/where",
         "--save no/where: there is no folder no"),
        ("export navigation-2d-icml2017 --out x.bin", "--out x.bin must end in .pt or .onnx"),
        ("export navigation-2d-icml2017 --out x.pt --format onnx",
         "--out x.pt is a name for torchscript, and --format onnx"),
        ("record navigation-2d-icml2017 --out x.avi", "--out x.avi must end in .mp4 or .gif"),
        ("adapt navigation-2d-icml2017 --task goal_x=0 goal_y=0 --episodes 100000000000",
         "out of memory: take fewer tasks or episodes"),
        ("train navigation-2d --policy.hidden 1000000000000", "out of memory"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert run(*command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_place_for_results_that_is_a_file_is_told_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metarl.running.evaluation.evaluate", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("metarl.showing.videos.record", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("metarl.running.export.export", lambda *_, **__: 1 / 0)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    name = "navigation-2d-icml2017"
    for command, suffix in (("report", "html"), ("record", "mp4"), ("export", "pt")):
        assert run(command, name, "--out", f"file/x.{suffix}") == 2
        told = "file is a file, and results need a folder: name one with --out"
        assert told in capsys.readouterr().err
        assert run(command, name, "--out", "folder") == 2
        assert "--out folder is a folder; name a file" in capsys.readouterr().err
    assert not Path("runs").exists()
    for out in ("file", "file/below"):
        assert run("evaluate", "navigation-2d-icml2017", "--out", out) == 2
        assert "file is a file, and results need a folder" in capsys.readouterr().err
    # Root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != Path("folder"))
    assert run("evaluate", "navigation-2d-icml2017", "--out", "folder/new") == 2
    told = "nothing may be written in folder: name another place with --out"
    assert told in capsys.readouterr().err


def test_links_devices_and_pipes_stay_what_they_are(tmp_path):
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


def test_the_table_of_faults_is_that_of_the_tests():
    text = (ROOT / "docs" / "faults.md").read_text()
    table = text.partition("| fault |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    named = [name for row in rows for name in re.findall(r"`(\w+)::(\w+)`", row[-1])]
    assert all(len(row) == 4 and all(row) and "::" in row[-1] for row in rows)
    for module, name in named:
        assert name in names_of_tests(module), f"{module} has no {name}"
    here = names_of_tests("test_faults") - {"test_the_table_of_faults_is_that_of_the_tests"}
    assert here == {name for module, name in named if module == "test_faults"}


def names_of_tests(module: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / f"{module}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if node.name.startswith("test_")}
