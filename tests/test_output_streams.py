"""Standard output holds results alone, in any encoding; results are saved before they are shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import mostly_slow

SMALL = ["--iterations", "1", "--tasks", "2", "--episodes", "2", "--threads", "1"]

CHATTY = '''
"""A family whose code prints wherever it can: with Python, and as C code does."""
import atexit
import os
import gymnasium as gym
import numpy as np
from metarl.envs import GymnasiumFamily, Uniform

def say(what):
    print("python says", what)
    os.write(1, f"C says {what}\\n".encode())

say("import")
atexit.register(say, "exit")

class Chatty(gym.Env):
    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    x = 0.0
    goal = 0.0

    def __init__(self):
        say("init")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        say("reset")
        self.x = float(self.np_random.uniform(-0.1, 0.1))
        return np.array([self.x], np.float32), {}

    def step(self, action):
        say("step")
        self.x = float(np.clip(self.x + 0.2 * action[0], -9, 9))
        return np.array([self.x], np.float32), -abs(self.x - self.goal), False, False, {}

    def close(self):
        say("close")

    def __del__(self):
        print("python says del")

def put(env, task):
    say("set_task")
    env.goal = float(task[0])

chatty = GymnasiumFamily(
    name="chatty", env=Chatty, set_task=put, tasks=Uniform({"goal": (-1.0, 1.0)}), horizon=5
)
'''


def metarl(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "metarl", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A folder with the family and a run on it."""
    folder = tmp_path_factory.mktemp("chatty")
    (folder / "talk.py").write_text(CHATTY, "utf-8")
    done = metarl(
        "train", "talk:chatty", *SMALL, "--workers", "0", "--out", "run", cwd=folder
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


MEASURE = ["evaluate", "run", "--json", "--tasks", "2", "--episodes", "2", "--steps", "1"]
BENCHMARK = ["benchmark", "talk:chatty", "--json", "--repeats", "1", *SMALL[2:]]
PRINTING = [(MEASURE, "0"), (MEASURE, "2"), (BENCHMARK, "0"), (BENCHMARK, "2")]


@pytest.mark.parametrize(
    ("command", "workers"),
    mostly_slow(PRINTING, (MEASURE, "2"), (BENCHMARK, "0")),
    ids=[f"{command[0]}-{workers}" for command, workers in PRINTING],
)
def test_the_output_of_json_is_json_whatever_user_code_prints(chatty, command, workers):
    done = metarl(*command, "--workers", workers, cwd=chatty)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert b"python says" in done.stderr
    assert b"C says" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["train", "talk:chatty", *SMALL, "--workers", "0", "--out", "other-0"],
        *mostly_slow([["train", "talk:chatty", *SMALL, "--workers", "2", "--out", "other-2"]]),
        ["train", "talk:chatty", "--help"],
        ["adapt", "run", "--task", "goal=0.5", "--episodes", "2"],
        ["check", "talk:chatty"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_what_user_code_prints_goes_to_standard_error(chatty, command):
    done = metarl(*command, cwd=chatty)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert b" says " not in done.stdout
    assert b" says " in done.stderr or "--help" in command


EVALUATE = [*MEASURE, "--workers", "0", "--out", "here"]
EVALUATE.remove("--json")
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("command", "locale"),
    [
        (EVALUATE, {"PYTHONIOENCODING": "ascii"}),
        (["train", "--help"], {"PYTHONIOENCODING": "ascii"}),
        *mostly_slow([(EVALUATE, {"PYTHONIOENCODING": "cp437"}), (EVALUATE, C_LOCALE)]),
    ],
    ids=["ascii", "help", "a code page", "C"],
)
def test_output_of_any_encoding_takes_every_character(chatty, command, locale):
    done = metarl(*command, cwd=chatty, **locale)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    if command[0] == "evaluate":
        assert json.loads((chatty / "here" / "evaluation.json").read_text("utf-8"))


def test_names_in_an_error_need_no_unicode(tmp_path):
    done = metarl("evaluate", "größe-→", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_pages_and_results_are_utf_8_in_any_locale(chatty):
    flags = ["--tasks", "2", "--episodes", "2", "--steps", "1", "--no-video", "--out", "page.html"]
    done = metarl("report", "run", *flags, cwd=chatty, **C_LOCALE)
    assert done.returncode == 0, done.stderr
    assert "charset" in (chatty / "page.html").read_text("utf-8").lower()


def test_an_adapted_policy_is_saved_before_it_is_told_of(chatty):
    # Nobody reads what it prints.
    with subprocess.Popen(
        [sys.executable, "-m", "metarl", "adapt", "run", "--task", "goal=0.5", "--episodes", "2",
         "--save", "kept.safetensors"],
        cwd=chatty, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=300) == 141
    assert (chatty / "kept.safetensors").exists()
