"""What `metarl check` would say at once is said when a run starts, and disturbs nothing."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from expecting import mentions, run
from test_check_plays_training import Point, family
from test_shared_state import ClassTask, Gusts, OneSimulator, Unseeded

import metarl
from metarl.envs.checks.start import start_findings


class Doubles(Point):
    """Gives observations of float64, where the space says float32."""

    def observe(self):
        return np.array([self.x])


class Alone(Point):
    """There may be one in a process; it is trained by a worker for each."""

    count_of_all = 0

    def __init__(self):
        if Alone.count_of_all:
            raise RuntimeError("the engine runs already")
        Alone.count_of_all += 1

    def close(self):
        Alone.count_of_all -= 1


class Counted(Point):
    made = steps = resets = closed = 0

    def __init__(self):
        Counted.made += 1

    def reset(self, *, seed=None, options=None):
        Counted.resets += 1
        return super().reset(seed=seed)

    def step(self, action):
        Counted.steps += 1
        return super().step(action)

    def close(self):
        Counted.closed += 1


point, gusts, unseeded, doubles, alone, counted = map(
    family, (Point, Gusts, Unseeded, Doubles, Alone, Counted)
)
one_simulator, class_task = family(OneSimulator), family(ClassTask)


def set_another_name(env, task):
    env.unwrapped.taks = task


misspelt = family(set_task=set_another_name)


@pytest.fixture
def fresh(monkeypatch):
    """Set back what the classes count."""
    for name in ("made", "steps", "resets", "closed"):
        monkeypatch.setattr(Counted, name, 0)
    monkeypatch.setattr(ClassTask, "task", np.zeros(1), raising=False)


def trained(name: str, out, *options: str) -> int:
    sizes = ["--tasks", "2", "--episodes", "2", "--iterations", "1"]
    return run("train", f"{__name__}:{name}", *sizes, "--out", str(out), *options)


def warned(caplog) -> list[str]:
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records]


WARNED = {
    "gusts": "numpy.random",
    "unseeded": "numpy.random",
    "doubles": "float64",
    "one_simulator": "--workers",
    "class_task": "rewards",
    "misspelt": "taks",
}


@pytest.mark.parametrize("name", WARNED)
def test_train_warns_of_shared_state_in_one_line(name, tmp_path, caplog, fresh):
    assert trained(name, tmp_path / "run", "--workers", "0") == 0
    (line,) = warned(caplog)
    assert "\n" not in line
    assert mentions(line, f"{__name__}:{name}", WARNED[name])


def test_train_warns_with_workers_too(tmp_path, caplog):
    assert trained("gusts", tmp_path / "run", "--workers", "2") == 0
    (line,) = warned(caplog)
    assert mentions(line, "numpy.random")


def test_evaluate_and_adapt_warn_once(tmp_path, caplog):
    assert trained("gusts", tmp_path / "run", "--workers", "0") == 0
    caplog.clear()
    policy = metarl.load(tmp_path / "run")
    metarl.evaluate(policy, tasks=2, episodes=2, steps=1, tune_step_sizes=True)
    (line,) = warned(caplog)
    assert mentions(line, "numpy.random")
    caplog.clear()
    for _ in range(2):
        policy.adapt([0.5], episodes=2)
    (line,) = warned(caplog)
    assert mentions(line, "numpy.random")


def test_a_sound_family_is_silent(tmp_path, caplog):
    assert trained("point", tmp_path / "run", "--workers", "0") == 0
    assert warned(caplog) == []


def test_the_global_generators_stay_as_they_are():
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    assert start_findings(gusts)
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_two_copies_are_made_at_most_and_closed(fresh):
    assert start_findings(counted) == []
    assert Counted.made == Counted.closed == 2


def test_a_slow_environment_is_left_after_a_step(fresh, monkeypatch):
    monkeypatch.setattr("metarl.envs.checks.start.SECONDS", 0.0)
    assert start_findings(counted) == []
    assert (Counted.made, Counted.resets, Counted.steps) == (1, 1, 1)


def test_built_in_families_are_not_looked_at(monkeypatch):
    monkeypatch.setattr("metarl.envs.checks.start.play", None)
    assert start_findings(metarl.envs.make_family("pendulum-gravity")) == []


def test_an_environment_that_stands_alone_in_its_process_is_trained(tmp_path, caplog):
    one_each = ["--tasks", "1", "--episodes", "1", "--workers", "1"]
    assert trained("alone", tmp_path / "run", *one_each) == 0
    assert warned(caplog) == []


@pytest.mark.parametrize(
    "fault",
    mostly_slow(["kill step", "exit step", "hang step", "raise step"], "kill step"),
)
def test_an_environment_that_fails_is_told_by_the_run(fault, tmp_path, capsys):
    file = tmp_path / "fault"
    file.write_text(f"always {fault}")
    options = ["--family-options", f"faults={file}", "--workers", "1", "--worker-timeout", "1"]
    sizes = ["--tasks", "1", "--episodes", "1", "--iterations", "1"]
    out = str(tmp_path / "run")
    assert run("train", "worker_envs:always_faulty", *sizes, "--out", out, *options) == 2
    assert mentions(capsys.readouterr().err, "worker 0", "task [0.8]")
