"""What stands in the README runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

import metarl
from metarl.commands import cli
from metarl.commands.cli import main
from metarl.learning.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("  #")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if line.strip()
]


MODULES = {name.group(1): code for code in PYTHON if (name := re.match(r"# (my_\w+)\.py\n", code))}
CHECKED = [command.split()[2] for command in COMMANDS if command.startswith("metarl check")]


def module_files(folder: Path) -> None:
    for name, code in MODULES.items():
        (folder / f"{name}.py").write_text(code)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[0][:40])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metarl.learning.algorithms.ALGORITHMS", dict(ALGORITHMS))
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names) > 2  # it ran to its end and left what it made


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_taken(command, tmp_path, monkeypatch):
    # Parsed whole and handed to the function behind them, which is not run here.
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] in ("python", "bash"):
        assert (ROOT / words[1]).exists()
        return
    if words[0] == "source":
        assert words[1].endswith("/bin/activate")
        return
    if words[0] == "tensorboard":
        pytest.importorskip("tensorboard")
        return
    assert words[0] == "metarl"
    module_files(tmp_path)
    if words[1] not in ("check", "families", "algorithms"):
        kind, _ = cli.command_of(words[1])
        monkeypatch.setattr(cli, "command_of", lambda name: (kind, lambda command: 0))
    if "--resume" in words:
        from test_trainer import small

        from metarl.running.runs import create_run

        create_run(tmp_path / words[words.index("--resume") + 1], small())
    assert main(words[1:]) == 0


def test_every_family_of_ones_own_is_checked():
    assert {name.partition(":")[0] for name in CHECKED} == set(MODULES)


@pytest.mark.parametrize("name", CHECKED)
def test_a_family_of_ones_own_trains_and_evaluates(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module_files(tmp_path)
    small = ["--iterations", "2", "--tasks", "2", "--episodes", "2", "--out", "run"]
    assert main(["train", name, *small]) == 0
    assert main(["evaluate", "run", "--tasks", "2", "--episodes", "2", "--steps", "1"]) == 0
    assert "random" in capsys.readouterr().out
    made = importlib.import_module(name.partition(":")[0])  # from Python, the same
    family = getattr(made, name.partition(":")[2])
    task = family.tasks.grid(1)[0]
    policy = metarl.load("run").adapt(family.make(task), steps=1, episodes=2)
    env = family.make(task)
    assert env.action_space.contains(policy.act(env.reset(seed=0)[0]))


def test_every_file_that_is_named_exists():
    for name in re.findall(r"\((docs/[\w./-]+)\)", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"scripts/\w+\.\w+", TEXT):
        assert (ROOT / name).exists(), name
