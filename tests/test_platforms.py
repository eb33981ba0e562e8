"""Systems without POSIX: what Windows lacks is taken from Python (no_posix/sitecustomize.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import small, timeless

from metarl import train
from metarl.runs.files import lock

TESTS = Path(__file__).parent
CONFIG = 'small("maml-trpo", "worker_envs:walk", {}, tasks=2, episodes=2'
SCRIPT = f"""\
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from conftest import small
from metarl import train
from metarl.runs.folder import locked

if __name__ == "__main__":
    assert not hasattr(os, "fork")
    assert multiprocessing.get_start_method() == "spawn"
    train({CONFIG}, iterations=2, workers=2), "run")
    train({CONFIG}, iterations=3), "run", resume=True)
    with locked(Path("run")):
        again = [sys.executable, "-m", "metarl", "train", "--resume", "run"]
        sys.exit(subprocess.call(again))
"""


def test_training_resuming_and_locking_need_no_posix(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(TESTS / "no_posix"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, timeout=300,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr  # the last process found the folder locked
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TESTS))
    train(small("maml-trpo", "worker_envs:walk", {}, tasks=2, episodes=2, iterations=3), "same")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "same")


@pytest.mark.parametrize("held", [False, True])
def test_windows_locks_by_msvcrt(held, tmp_path, monkeypatch):
    def locking(file: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        if held:
            raise PermissionError(13, "Permission denied")

    stand_in = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setattr("metarl.runs.files.msvcrt", stand_in, raising=False)
    with open(tmp_path / "lock", "a") as file:
        number = file.fileno()
        with monkeypatch.context() as windows:
            windows.setattr("metarl.runs.files.fcntl", None)
            mine = lock(number)
    assert mine is not held
