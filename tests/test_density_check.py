"""A run checks at its start that learning sees the densities that actions were drawn with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expecting import refused, run

import metarl
from metarl.envs.errors import UserError
from metarl.models.distributions import Categorical, Gaussian
from metarl.models.networks import MLP
from metarl.training.run import new_trainer

SMALL = {"tasks": 5, "episodes": 5, "iterations": 2, "threads": 1}
EMBED, SAMPLE, LOG_PROB = MLP.embed, Gaussian.sample, Gaussian.log_prob


def _iterate(family, algorithm="maml-trpo", iterations=1, **options):
    config = metarl.resolve(None, family, algorithm, SMALL | options)
    with new_trainer(config) as trainer:
        return [trainer.iterate() for _ in range(iterations)]


def _dropout(self, params, x, weight=None):
    x = EMBED(self, params, x, weight)
    return torch.nn.functional.dropout(x, 0.1, training=True)


def _batch_normalized(self, params, x, weight=None):
    x = EMBED(self, params, x, weight)
    return (x - x.mean(-2, keepdim=True)) / (x.std(-2, keepdim=True) + 1e-5)


@pytest.mark.parametrize("features", [_dropout, _batch_normalized])
@pytest.mark.parametrize("algorithm", ["maml-trpo", "promp", "reptile", "pretrained"])
def test_a_network_whose_passes_differ_is_refused(monkeypatch, features, algorithm):
    monkeypatch.setattr(MLP, "embed", features)
    with refused("dropout", "batch normalization"):
        _iterate("navigation-2d", algorithm)


def test_categorical_policies_are_checked_too(monkeypatch):
    monkeypatch.setattr(MLP, "embed", _dropout)
    with refused("dropout"):
        _iterate("bandit")


def test_workers_whose_policy_is_another_are_found(monkeypatch):
    # Workers import the package afresh: they know nothing of what was put into this process.
    monkeypatch.setattr(MLP, "embed", _batch_normalized)
    with refused("batch normalization"):
        _iterate("cartpole-length", workers=2)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("sample", lambda self, dist, noise: torch.tanh(SAMPLE(self, dist, noise))),
        ("sample", lambda self, dist, noise: SAMPLE(self, dist, 2.0 * noise)),
        ("sample", lambda self, dist, noise: SAMPLE(self, dist, noise) + 0.5),
        # Of standard deviation 1, whatever the policy's own is.
        ("log_prob", lambda self, dist, action: -0.5 * (action - dist["mean"]).square().sum(-1)),
        (
            "log_prob",
            lambda self, dist, action: LOG_PROB(
                self, {**dist, "log_std": dist["log_std"] + 0.3}, action
            ),
        ),
    ],
)
def test_a_density_of_something_else_is_refused(monkeypatch, name, wrong):
    monkeypatch.setattr(Gaussian, name, wrong)
    with refused("log_prob", "sample"):
        _iterate("navigation-2d", **{"policy.initial_std": 0.5})


def test_a_categorical_density_of_something_else_is_refused(monkeypatch):
    sample = Categorical.sample
    hot = lambda self, dist, noise: sample(self, dist, 0.2 * noise)  # noqa: E731
    monkeypatch.setattr(Categorical, "sample", hot)
    with refused("log_prob", "sample"):
        _iterate("tabular-mdp", "maml-trpo", tasks=20, episodes=20)


@pytest.mark.parametrize(
    ("family", "algorithm", "options"),
    [
        ("navigation-2d", "maml-trpo", {}),
        ("navigation-2d", "promp", {"policy.normalize": True}),
        ("navigation-2d", "e-maml", {"policy.initial_std": 1e-4}),
        ("navigation-2d", "oracle", {"policy.action": "scale"}),
        ("navigation-2d", "cavia", {"tasks": 1, "episodes": 1}),
        ("half-cheetah-dir", "anil", {"tasks": 2, "episodes": 2}),
        ("ant-dir", "meta-sgd", {"tasks": 1, "episodes": 2, "policy.activation": "relu"}),
        ("bandit", "dice-maml", {"tasks": 1, "episodes": 1}),
        ("tabular-mdp", "imaml", {}),
        ("cartpole-length", "reptile", {"tasks": 2, "episodes": 2}),
        ("sinusoid", "maml-trpo", {}),
    ],
)
def test_ordinary_runs_pass_the_density_check(family, algorithm, options):
    if family == "sinusoid":
        options = {"iterations": 1}
        config = metarl.resolve(None, family, algorithm, options)
        with new_trainer(config) as trainer:
            trainer.iterate()
        return
    rows = _iterate(family, algorithm, 2, **options)
    assert np.isfinite([row["return_pre"] for row in rows]).all()


def test_large_observations_and_small_deviations_are_rounding(monkeypatch):
    far = lambda self, params, x, weight=None: EMBED(  # noqa: E731
        self, params, 1e4 + 1e3 * x, weight
    )
    monkeypatch.setattr(MLP, "embed", far)
    _iterate("navigation-2d", **{"policy.initial_std": 1e-2, "policy.activation": "relu"})


def test_the_command_refuses_in_one_line_and_leaves_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MLP, "embed", _dropout)
    options = ("--preset", "None", "--tasks", "4", "--episodes", "4", "--out", "run")
    assert run("train", "navigation-2d", *options) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_checked_again(tmp_path, monkeypatch):
    config = metarl.resolve(None, "navigation-2d", overrides=SMALL | {"iterations": 1})
    metarl.train(config, tmp_path / "run")
    monkeypatch.setattr(MLP, "embed", _dropout)
    longer = metarl.resolve(None, "navigation-2d", overrides=SMALL | {"iterations": 2})
    with pytest.raises(UserError):
        metarl.train(longer, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
