"""What is called with an object of a wrong kind says what it takes, in the caller's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from expecting import refused, run

import metarl
from metarl import Config, RunError, UserError, resolve, train
from metarl.config.setup import Setup
from metarl.envs import check_task_family, make_family
from metarl.policies.loading import newest_checkpoint

FAMILY = make_family("navigation-2d")


def small(**overrides: Any) -> Config:
    values = {
        "family_options": {"horizon": 5}, "tasks": 2, "episodes": 2, "iterations": 1,
        "policy.hidden": (4,), "threads": 1, **overrides,
    }  # fmt: skip
    return resolve(None, "navigation-2d", overrides=values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / "run"
    train(small(), path)
    return path


@pytest.mark.parametrize(
    "call",
    [
        lambda: resolve(None, FAMILY),  # type: ignore[arg-type]
        lambda: resolve("icml2017", FAMILY),  # type: ignore[arg-type]
        lambda: make_family(FAMILY),  # type: ignore[arg-type]
        lambda: train(FAMILY, "run"),  # type: ignore[arg-type]
        lambda: train(Config(setup=Setup(family=FAMILY)), "run"),  # type: ignore[arg-type]
    ],
)
def test_a_family_object_is_refused_with_what_its_name_looks_like(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    with refused("module:attribute", "navigation-2d"):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [FAMILY, None, 3, 0.5, object(), [], {}, {"a": 1}, small, Config])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: resolve(None, x),
        lambda x: resolve(x if x is not None else 1, "navigation-2d"),
        lambda x: resolve(None, "navigation-2d", x),
        lambda x: resolve(None, "navigation-2d", overrides=x if x else 1),
        lambda x: train(x, "run"),
        lambda x: train(small(), x),
        lambda x: metarl.load(x),
        lambda x: metarl.load_policy(x),
        lambda x: metarl.evaluate(x),
        lambda x: metarl.evaluate([x]),
        lambda x: metarl.evaluate("navigation-2d-icml2017", references=x if x else 1),
        lambda x: metarl.evaluate("navigation-2d-icml2017", references={"other": x}),
        lambda x: make_family(x),
        lambda x: check_task_family(None if x is FAMILY else x),
        lambda x: metarl.load("navigation-2d-icml2017").adapt(x),
        lambda x: metarl.load("navigation-2d-icml2017").adapter(x if x is not None else 1),
        lambda x: metarl.load("navigation-2d-icml2017").save(x),
    ],
)
def test_objects_of_wrong_kinds_are_refused(tmp_path, monkeypatch, call, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        call(wrong)
    assert not list(tmp_path.iterdir())


def test_a_policy_is_saved_to_a_path(folder):
    policy = metarl.load(folder).adapt([0.0, 0.0], episodes=1)
    with refused(3):
        policy.save(3)  # type: ignore[arg-type]


# An existing run, in the words of Python and of a shell -------------------------------------------


def test_an_existing_run_is_refused_in_words_of_python(folder):
    with refused("resume=True", folder, error=RunError) as caught:
        train(small(), folder)
    assert "--" not in str(caught.value)


def test_the_command_refuses_an_existing_run_with_its_flags(folder, capsys):
    assert run("train", "navigation-2d", "--out", str(folder)) == 2
    err = capsys.readouterr().err
    assert "--resume" in err
    assert "--out" in err


def test_a_folder_with_other_things_is_refused_in_either_words(tmp_path, capsys):
    (tmp_path / "thing").write_text("mine")
    with refused(tmp_path, error=RunError) as caught:
        train(small(), tmp_path)
    assert "--" not in str(caught.value)
    assert run("train", "navigation-2d", "--out", str(tmp_path)) == 2
    assert "--out" in capsys.readouterr().err


def test_a_damaged_checkpoint_names_the_good_one_in_either_words(tmp_path, capsys):
    folder = tmp_path / "run"
    train(small(iterations=2, checkpoint_every=1), folder)
    newest_checkpoint(folder).write_bytes(b"damaged")
    with refused("resume=True", "start=1") as caught:
        train(small(iterations=3, checkpoint_every=1), folder, resume=True)
    assert "--" not in str(caught.value)
    assert run("train", "--resume", str(folder), "--iterations", "3") == 2
    assert "--from 1" in capsys.readouterr().err
