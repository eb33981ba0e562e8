"""A value that no list of an option has is an error that names it, from Python and from a shell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import gaussian_policy
from expecting import refused, run

import metarl
from metarl.algorithms import Algorithm, find_algorithm
from metarl.envs import Finite, TaskFamily, Uniform, make_family
from metarl.envs.checks.checker import Finding
from metarl.envs.families.tabular import TabularFamily
from metarl.envs.registry import find_family
from metarl.envs.supervised.family import FunctionFamily
from metarl.envs.supervised.few_shot import FewShotFamily
from metarl.learning.adapter import Adapter
from metarl.learning.inner_update import GradientUpdate, LearnedStepSizes, ProximalUpdate
from metarl.learning.losses import log_likelihood
from metarl.learning.meta_gradients.implicit import Implicit
from metarl.learning.meta_gradients.reptile import Reptile
from metarl.models.networks import MLP
from metarl.models.predictors import Classifier
from metarl.plots.learning_curves import plot_learning
from metarl.plots.video import Video
from metarl.policies.export import export
from metarl.policies.loading import load
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import (
    beyond_bounds,
    env_action,
    policy_action,
    space_from_json,
    space_to_json,
)
from metarl.training.trainer import check_device

POLICY = gaussian_policy(observation_dim=3, action_dim=2, hidden=(5,))
BOX = gym.spaces.Box(-1.0, 1.0, (2,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inner", "gradient"),
        ("inner", GradientUpdate),
        ("inner", None),
        ("meta", "unroled"),
        ("meta", None),
        ("outer", "adamq"),
        ("outer", None),
        ("outer", ["adam"]),
        ("advantage", "gae"),
        ("baseline", True),
        ("outer_loss", "likelihood-ratio"),
        ("task_weights", 1.0),
        ("regularizer", "l2"),
        ("head", "last"),
        ("task_conditioned", None),
        ("role", "pretraind"),
    ],
)
def test_every_field_of_an_algorithm_is_checked(field, value):
    with refused(field):
        Algorithm(name="mine", **{field: value})
    with refused(field):
        dataclasses.replace(find_algorithm("maml-trpo"), **{field: value})


@pytest.mark.parametrize("name", ["", None, 3])
def test_an_algorithm_has_a_name(name):
    with refused("name"):
        Algorithm(name=name)


@pytest.mark.parametrize(
    ("outer", "meta"),
    [
        ("trust-region", Reptile()),
        ("trust-region", Implicit()),
        ("clipped", Reptile()),
    ],
)
def test_an_outer_optimizer_that_cannot_use_the_meta_gradient_is_refused(outer, meta):
    with refused("mine", "outer", type(meta).__name__):
        Algorithm(name="mine", meta=meta, outer=outer)


@pytest.mark.parametrize("kind", [GradientUpdate, LearnedStepSizes, ProximalUpdate])
def test_every_field_of_an_inner_update_is_checked(kind):
    for field, value in {
        "loss": "likelihood", "adapts": "body", "steps": -1, "step_sizes": (-0.1,),
        "test_step_sizes": (0.1, 0.0),
    }.items():  # fmt: skip
        said = value[-1] if isinstance(value, tuple) else value
        with refused(f"inner.{field}", said):
            kind(**{field: value})


def _classifier(activation="tanh", **options):
    network = MLP(inputs=(4,), outputs=3, hidden=(), activation=activation)
    return Classifier(network=network, **options)


def _tabular(payoff):
    family = make_family("bandit")
    return TabularFamily(
        name="mine", tasks=family.tasks, horizon=2, states=1, actions=5, payoff=payoff
    )


def _few_shot(split, call):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 4)
    family = FewShotFamily(
        rng.random((48, 3)), labels, ways=2, shots=1, queries=1, test_queries=1,
    )  # fmt: skip
    return call(family.tasks, split)


class _OtherKind(FunctionFamily):
    kind = "ranking"  # type: ignore[assignment]


def _calls_of_tasks():
    distributions = {
        "Uniform": Uniform({"x": (0.0, 1.0)}),
        "Finite": Finite(("x",), [[0.0], [1.0]]),
        "RandomTables": make_family("tabular-mdp").tasks,
    }
    for name, tasks in distributions.items():
        yield f"{name}.sample", lambda t=tasks: t.sample(np.random.default_rng(0), 2, "validaton")
        yield f"{name}.grid", lambda t=tasks: t.grid(2, "validaton")
        yield f"{name}.bounds", lambda t=tasks: t.bounds("validaton")


CALLS = {
    "Adapter.fast": (lambda: Adapter(POLICY, log_likelihood, (0.1,), fast="body"), "fast", "body"),
    "Adapter.learned": (
        lambda: Adapter(POLICY, log_likelihood, (0.1,), learned="all"), "learned", "all",
    ),
    "inner.per": (lambda: LearnedStepSizes(per="all"), "inner.per", "all"),
    "policy.activation": (
        lambda: dataclasses.replace(POLICY.network, activation="gelu"), "activation", "gelu",
    ),
    "predictor.activation": (lambda: _classifier(activation="gelu"), "activation", "gelu"),
    "Classifier.head": (lambda: _classifier(head="last"), "head", "last"),
    "adapts": (lambda: POLICY.adapts("layer0.weight", "lower"), "part", "lower"),
    "Address.split": (lambda: RandomKey(0, split="valid"), "split", "valid"),
    "env_action": (lambda: env_action(np.zeros(2), BOX, "clipped"), "policy.action", "clipped"),
    "policy_action": (
        lambda: policy_action(np.zeros(2), BOX, "scaled"), "policy.action", "scaled",
    ),
    "beyond_bounds": (
        lambda: beyond_bounds(np.zeros(2), BOX, "scaled"), "policy.action", "scaled",
    ),
    "actions of a Dict": (lambda: env_action(np.zeros(2), gym.spaces.Dict(), "clip"), "Dict"),
    "actions of a Text": (lambda: space_to_json(gym.spaces.Text(3)), "Text"),
    "a stored space": (
        lambda: space_from_json({"kind": "Text", "dtype": "int64"}), "kind", "Text",
    ),
    "autoreset_mode": (
        lambda: make_family("navigation-2d").make_vec(1, 1, autoreset_mode="Next"),
        "autoreset_mode", "Next",
    ),
    "render_mode": (
        lambda: make_family("navigation-2d").make_vec(1, 1, render_mode="rgb"),
        "render_mode", "rgb",
    ),
    "render_mode of a body": (
        lambda: make_family("half-cheetah-dir").make_vec(1, 1, render_mode="rgb"),
        "render_mode", "rgb",
    ),
    "navigation actions": (
        lambda: make_family("navigation-2d", actions="scale"), "actions", "scale",
    ),
    "payoff": (lambda: _tabular("gaussian"), "payoff", "gaussian"),
    "kind of supervised tasks": (
        lambda: _OtherKind(
            name="mine", tasks=Uniform({"a": (0.0, 1.0)}), function=lambda x, t: x,
            interval=(0.0, 1.0),
        ),
        "kind", "ranking",
    ),
    "severity": (lambda: Finding("tasks", "", "error"), "severity", "error"),
    "few-shot sample": (
        lambda: _few_shot("dev", lambda t, s: t.sample(np.random.default_rng(0), 1, s)),
        "split", "dev",
    ),
    "few-shot grid": (lambda: _few_shot("dev", lambda t, s: t.grid(1, s)), "split", "dev"),
    "few-shot bounds": (lambda: _few_shot("dev", lambda t, s: t.bounds(s)), "split", "dev"),
    "evaluate": (
        lambda: metarl.evaluate("navigation-2d-icml2017", split="train"), "split", "train",
    ),
    "plot": (lambda: plot_learning([], Path("x"), against="steps"), "against", "steps"),
    "network conv4 of a policy": (
        lambda: metarl.train(
            metarl.resolve(None, "navigation-2d", "maml-trpo", {"policy.network": "conv4"}), "none"
        ),
        "policy.network", "conv4",
    ),
    **{name: (call, "split", "validaton") for name, call in _calls_of_tasks()},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_value_is_refused(name):
    call, *names = CALLS[name]
    with refused(*names):
        call()


def test_files_of_unknown_formats_are_refused(tmp_path):
    policy = load("navigation-2d-icml2017").adapter(BOX).adapted()
    with refused("format", "tflite"):
        export(policy, tmp_path / "policy", "tflite", gym.spaces.Box(-1.0, 1.0, (2,)))
    with refused("suffix", ".avi"):
        Video(np.zeros((1, 4, 4, 3), np.uint8), 1.0).save(tmp_path / "film.avi")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["gpu", "cudnn", "cuda:first", "cuda:", "CPU"])
def test_unknown_devices_are_refused(device):
    with refused("device", device):
        check_device(device)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with refused("cuda:2"):
        check_device("cuda:2")


@pytest.mark.parametrize(
    "options",
    [
        ("--algorithm", "AdamW"),
        ("--policy.action", "tanh"),
        ("--policy.activation", "gelu"),
        ("--policy.network", "conv4"),
        ("--inner.loss", "dice"),
        ("--outer", "adamq"),
        ("--outer.schedule", "linear"),
        ("--device", "cudnn"),
        ("--advantage.targets", "td"),
    ],
)
def test_the_command_line_refuses_unknown_values(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert run("train", "navigation-2d", *options, "--out", "run") == 2
    assert not (tmp_path / "run").exists()


def test_known_families_of_all_kinds_are_still_made():
    for name in ("navigation-2d", "bandit", "tabular-mdp", "sinusoid", "cartpole-length"):
        family = find_family(name)
        assert family.tasks.grid(2).shape[0] == 2
        if isinstance(family, TaskFamily):
            family.make_vec(1, 1).close()
