"""Runs that start from a policy: `init`, `--init`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small, timeless
from expecting import mentions, refused, run

from metarl import load, train
from metarl.config.options import Config
from metarl.policies.loading import run_config
from metarl.runs import checkpoints
from metarl.runs.checkpoints import CheckpointError, newest_checkpoint
from metarl.runs.folder import RunError
from metarl.training.run import new_trainer


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "run"
    train(small(iterations=2), folder)
    return folder


def start_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoints.load(folder / "checkpoints" / "000000.safetensors")
    return {n.removeprefix("meta."): t for n, t in tensors.items() if n.startswith("meta.")}


def config(*args: Any, **options: Any) -> Config:
    return small(*args, iterations=1, **options)


@pytest.mark.parametrize("kind", ["run", "file", "object"])
def test_a_run_starts_from_a_policy_and_records_it(tmp_path, parent, kind):
    policy = load(parent)
    what: Any = {"run": parent, "file": newest_checkpoint(parent), "object": policy}[kind]
    train(config(family_options={"horizon": 5}, seed=7), tmp_path / "run", init=what)
    assert all(torch.equal(p, policy.params[n]) for n, p in start_of(tmp_path / "run").items())
    loaded = load(tmp_path / "run")
    origin = loaded.origin
    assert (origin["sha256"], origin["iteration"]) == (policy.digest, 2)
    assert origin["policy"] == (str(what) if kind != "object" else "maml-trpo on navigation-2d")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["config"]["origin"] == origin
    loaded.save(tmp_path / "policy")
    assert load(tmp_path / "policy").origin == origin


def test_a_resumed_run_does_not_read_its_origin_again(tmp_path, parent):
    policy = tmp_path / "policy.safetensors"
    load(parent).save(policy)
    train(small(), tmp_path / "whole", init=policy)
    train(small(iterations=2), tmp_path / "parts", init=policy)
    policy.unlink()
    with refused("init", "resume"):
        train(small(), tmp_path / "parts", init=policy, resume=True)
    with refused("init", "other", policy, error=RunError):
        train(small(), tmp_path / "parts", init="other", resume="auto")
    with refused("init", error=RunError):
        train(small(), tmp_path / "parts", init=load(tmp_path / "parts"), resume="auto")
    meta = train(small(), tmp_path / "parts", init=policy, resume="auto")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    assert meta.setup == load(tmp_path / "whole").setup
    same = load(tmp_path / "parts" / "checkpoints" / "000000.safetensors")
    train(small(iterations=5), tmp_path / "parts", init=same, resume="auto")
    train(small(iterations=6), tmp_path / "parts", resume=True)
    with refused("none-such", error=CheckpointError):
        train(small(), tmp_path / "new", init="none-such", resume="auto")
    assert not (tmp_path / "new").exists()


def test_new_meta_parameters_start_at_their_own_values(tmp_path, parent):
    told: list[str] = []
    options: Any = {"init": parent, "notice": told.append}
    train(config("meta-sgd"), tmp_path / "sgd", **options)
    with new_trainer(config("meta-sgd")) as trainer:
        own = trainer.state.params
    found, policy = start_of(tmp_path / "sgd"), load(parent)
    assert found.keys() == own.keys() > policy.params.keys()
    assert all(torch.equal(p, policy.params.get(n, own[n])) for n, p in found.items())
    assert not told
    train(config(), tmp_path / "back", init=tmp_path / "sgd", notice=told.append)
    assert mentions(told[0], "init", *own.keys() - policy.params.keys())
    assert set(start_of(tmp_path / "back")) == set(policy.params)


def test_the_optimizer_starts_from_the_policy_too(tmp_path, parent):
    train(config("maml-reinforce"), tmp_path / "run", init=parent)
    with new_trainer(config("maml-reinforce")) as trainer:
        shapes = {name: p.shape for name, p in trainer.state.outer.items()}
    tensors, _ = checkpoints.load(newest_checkpoint(tmp_path / "run"))
    assert {n: t.shape for n, t in tensors.items() if n.startswith("outer.")} == {
        f"outer.{n}": shape for n, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (config(**{"policy.hidden": (9,)}), ["policy.hidden", 8, 9]),
        (config(**{"policy.activation": "relu"}), ["policy.activation", "tanh", "relu"]),
        (config(**{"policy.normalize": True}), ["policy.normalize"]),
        (config(family="half-cheetah-dir", family_options={}), ["observations", 17]),
        (config(family="conftest:counting_family", family_options={}), ["observations", 1]),
        (config(family="conftest:code_family", family_options={}), ["actions", "Discrete"]),
        (config("cavia"), ["layer0.weight"]),
        (Config.of("sinusoid", "maml-trpo"), ["supervised", "reinforcement"]),
    ],
    ids=["hidden", "activation", "normalize", "body", "size", "discrete", "context", "domain"],
)
def test_a_policy_that_does_not_fit_is_refused_with_the_difference(
    tmp_path, parent, changed, names
):
    with refused("init", parent, *names):
        train(changed.with_options({"threads": 1}), tmp_path / "run", init=parent)
    assert not (tmp_path / "run").exists()


FLAGS = ["--tasks", "2", "--episodes", "2", "--threads", "1", "--iterations", "1"]


def test_the_command_starts_from_a_shipped_policy(tmp_path, capsys):
    out = str(tmp_path / "run")
    begin = ["train", "half-cheetah-vel", *FLAGS, "--init", "half-cheetah-dir-icml2017"]
    assert run(*begin, "--policy.hidden", "8", "--out", out) == 2
    assert mentions(capsys.readouterr().err, "policy.hidden", 8, "64 64")
    assert run(*begin, "--out", out) == 0
    assert load(out).origin["policy"] == "half-cheetah-dir-icml2017"
    shipped = load("half-cheetah-dir-icml2017")
    assert all(torch.equal(p, shipped.params[n]) for n, p in start_of(Path(out)).items())
    assert run("train", "--resume", out, "--init", "half-cheetah-dir-icml2017") == 2
    assert mentions(capsys.readouterr().err, "--init", "--resume")
    assert run("train", "--resume", out, "--iterations", "2") == 0
    assert load(out).provenance["iteration"] == 2


def test_the_config_of_a_started_run_gives_a_run_of_its_own(tmp_path, parent):
    train(config(), tmp_path / "run", init=parent)
    assert not train(run_config(tmp_path / "run"), tmp_path / "new").origin
    assert not all(torch.equal(p, start_of(tmp_path / "run")[n])
                   for n, p in start_of(tmp_path / "new").items())  # fmt: skip


def test_without_an_origin_the_config_has_none(tmp_path, parent):
    assert "origin" not in json.loads((parent / "config.json").read_text())["config"]
    assert not load(parent).origin


def test_the_state_of_an_equal_baseline_is_kept(tmp_path):
    critic = {"baseline": "critic", "baseline.steps": 2}
    policy = train(small(iterations=1, **critic), tmp_path / "policy")
    assert any(p.abs().sum() for p in policy.baseline.values())

    def start(name: str, **options: Any) -> dict[str, torch.Tensor]:
        train(config(**options), tmp_path / name, init=policy)
        tensors, _ = checkpoints.load(tmp_path / name / "checkpoints" / "000000.safetensors")
        return {n: t for n, t in tensors.items() if n.startswith("baseline.")}

    kept = start("same", seed=5, **critic)
    assert kept.keys() == {f"baseline.{name}" for name in policy.baseline}
    assert all(torch.equal(p, kept[f"baseline.{name}"]) for name, p in policy.baseline.items())
    assert load(tmp_path / "same").origin["baseline"] == list(policy.baseline)
    other = start("other", seed=5, **{**critic, "baseline.steps": 3})
    assert not all(torch.equal(kept[name], p) for name, p in other.items())
    for name, options in (("other", {}), ("linear", {"baseline": "linear"})):
        if options:
            assert not start(name, **options)
        assert "baseline" not in load(tmp_path / name).origin
