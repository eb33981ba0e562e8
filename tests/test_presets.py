"""What a user says, and the config that follows from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from expecting import refused, run

from metarl import load, resolve
from metarl.config.options import Config
from metarl.envs.registry import training_values
from metarl.policies.loading import run_config
from metarl.training.run import new_trainer


def inner(preset, family, algorithm="maml-trpo", **values):
    overrides = {f"inner.{key}": value for key, value in values.items()}
    return resolve(preset, family, algorithm, overrides).setup.algorithm.inner


@pytest.mark.parametrize("family", ["half-cheetah-dir", "half-cheetah-vel", "navigation-2d"])
def test_evaluation_of_the_paper_takes_the_step_size_of_training_then_half(family):
    size = 0.5 if family == "navigation-2d" else 0.1
    assert inner("icml2017", family).sizes_in_evaluation == (size, size / 2)
    assert inner("icml2017", family, step_sizes=(0.3,)).sizes_in_evaluation == (0.3, 0.15)
    given = inner("icml2017", family, step_sizes=(0.3,), test_step_sizes=(0.2,))
    assert given.sizes_in_evaluation == (0.2,)
    # Several sizes, of one's own, learned or the algorithm's: evaluation repeats training.
    assert inner("icml2017", family, step_sizes=(0.3, 0.2)).sizes_in_evaluation == ()
    for algorithm in ("anil", "cavia", "meta-sgd", "maml++"):
        assert inner("icml2017", family, algorithm).sizes_in_evaluation == (), algorithm
    assert inner("promp2019", family).sizes_in_evaluation == ()
    assert inner(None, family).sizes_in_evaluation == ()


def test_the_proximal_strength_of_imaml_follows_its_step_size():
    found = inner("icml2017", "half-cheetah-dir", "imaml")
    assert (found.sizes_in_training, found.proximal) == ((0.05,), 10.0)
    assert found.sizes_in_evaluation == (0.05, 0.025)
    found = inner("icml2017", "half-cheetah-dir", "imaml", step_sizes=(0.25,))
    assert (found.sizes_in_training, found.proximal) == ((0.25,), 2.0)
    found = inner("icml2017", "half-cheetah-dir", "imaml", proximal=2.0)
    assert (found.sizes_in_training, found.proximal) == ((0.25,), 2.0)
    assert found.sizes_in_evaluation == (0.25, 0.125)
    found = inner("icml2017", "half-cheetah-dir", "imaml", proximal=3.0, step_sizes=(0.2,))
    assert (found.sizes_in_training, found.proximal) == ((0.2,), 3.0)


def test_algorithms_that_learn_step_sizes_do_not_fit_them():
    for algorithm in ("maml-trpo", "anil"):
        assert inner("metarl2026", "half-cheetah-dir", algorithm).min_kl == 0.5
    for algorithm in ("meta-sgd", "maml++", "imaml"):
        config = resolve("metarl2026", "half-cheetah-dir", algorithm)
        assert "inner.min_kl" not in config.options()
        with refused("inner.min_kl"):
            config.with_options({"inner.min_kl": 0.5})


def test_given_values_override_the_algorithm_which_overrides_the_preset():
    assert resolve("icml2017", "navigation-2d").options()["policy.hidden"] == (100, 100)
    assert resolve("icml2017", "half-cheetah-vel").run.iterations == 475
    assert resolve(None, "navigation-2d", "promp").setup.algorithm.outer.clip == 0.3
    said = {"outer.clip": 0.1, "policy.hidden": (8,), "iterations": 3}
    config = resolve("icml2017", "half-cheetah-vel", "promp", said)
    assert (
        config.setup.algorithm.outer.clip,
        config.options()["policy.hidden"],
        config.run.iterations,
    ) == (
        0.1,
        (8,),
        3,
    )
    assert config.setup.algorithm.name == "promp"
    assert config.setup.family_options == {"variant": "icml2017"}
    assert resolve("icml2017", "navigation-2d").setup.family_options == {}


def test_family_options_are_merged_with_the_presets_and_the_variant_decides():
    options = {"family_options": {"variant": "promp2019", "balanced": True}}
    config = resolve("metarl2026", "half-cheetah-dir", overrides=options)
    assert config.setup.family_options == {"variant": "promp2019", "balanced": True}
    assert config.options()["policy.initial_std"] == 4.0
    assert resolve("metarl2026", "half-cheetah-dir").options()["policy.initial_std"] == 1.0
    balanced = {"family_options": {"balanced": True}}
    found = resolve("metarl2026", "half-cheetah-dir", overrides=balanced).setup.family_options
    assert found == {"variant": "icml2017", "balanced": True}
    said = {**options, "policy.initial_std": 2.0}
    config = resolve("metarl2026", "half-cheetah-dir", overrides=said)
    assert config.options()["policy.initial_std"] == 2.0
    assert resolve(None, "half-cheetah-dir", overrides=balanced).setup.family_options["balanced"]


def test_a_preset_may_differ_by_algorithm_and_a_family_by_more():
    def sizes(family, algorithm, **overrides):
        return resolve(
            "metarl2026", family, algorithm, overrides
        ).setup.algorithm.inner.sizes_in_training

    assert sizes("half-cheetah-dir", "maml-trpo") == (0.1, 0.05)
    assert sizes("half-cheetah-dir", "meta-sgd") == (1.0,)
    assert sizes("ant-vel", "maml++") == (1.0, 1.0)
    assert sizes("half-cheetah-vel", "maml++") == (0.02, 0.01)
    assert sizes("half-cheetah-dir", "imaml") == (0.2,)  # half, as with any preset
    assert sizes("half-cheetah-dir", "meta-sgd", **{"inner.step_sizes": (0.3,)}) == (0.3,)
    scales = [
        resolve("metarl2026", "half-cheetah-dir", name).options()["policy.output_scale"]
        for name in ("cavia", "maml-trpo")
    ]
    assert scales == [1.0, 0.1]


def test_a_preset_may_differ_for_one_algorithm_on_one_family():
    def share(family, algorithm, **overrides):
        return resolve("metarl2026", family, algorithm, overrides).setup.algorithm.meta.second_order

    assert share("half-cheetah-dir", "maml-trpo") == 0.5
    assert share("half-cheetah-dir", "maml-trpo", **{"meta.second_order": 0.7}) == 0.7
    assert share("half-cheetah-dir", "anil") == share("navigation-2d", "maml-trpo") == 1.0
    # What the preset set has no effect with this, but nobody asked for it.
    assert (
        resolve(
            "metarl2026", "half-cheetah-dir", overrides={"inner.steps": 0}
        ).setup.algorithm.inner.steps
        == 0
    )


@pytest.mark.parametrize("preset", [None, "metarl2026"])
def test_unknown_families_are_refused_by_name(preset):
    with refused("half-cheeta-dir", "half-cheetah-dir"):
        resolve(preset, "half-cheeta-dir")


def test_unknown_keys_are_refused_by_name():
    with refused("inner.step_size", "inner.step_sizes"):
        resolve(None, "navigation-2d", overrides={"inner.step_size": (0.1,)})
    for key in ("inner", "nothing.steps", "seeed", "family.name"):
        with refused(key):
            resolve(None, "navigation-2d", overrides={key: 1})
    with refused("inner.step_sizes", 0.1):
        resolve(None, "navigation-2d", overrides={"inner.step_sizes": 0.1})


SMALL = ["--iterations", "1", "--tasks", "2", "--episodes", "2", "--policy.hidden", "4"]


@pytest.mark.parametrize(
    ("flags", "sizes", "test_sizes", "proximal"),
    [
        (["--inner.step-sizes", "0.3"], [0.3], [0.3, 0.15], 0.0),
        (["--inner.step-sizes=0.3"], [0.3], [0.3, 0.15], 0.0),
        (["--inner.test-step-sizes", "0.5", "0.25"], [0.5], [0.5, 0.25], 0.0),
        (["--inner.step_sizes", "0.3", "--inner.test-step-sizes", "0.5", "0.25"],
         [0.3], [0.5, 0.25], 0.0),
        (["--algorithm", "imaml", "--inner.step-sizes", "0.25"], [0.25], [0.25, 0.125], 2.0),
        (["--algorithm", "imaml"], [0.25], [0.25, 0.125], 2.0),
    ],
)  # fmt: skip
def test_a_run_evaluates_with_the_given_step_sizes(flags, sizes, test_sizes, proximal, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "navigation-2d", "--preset", "icml2017", *SMALL, "--out", str(out)]
    assert run(*arguments, *flags) == 0
    stored = run_config(out).setup.algorithm.inner
    assert list(stored.sizes_in_training) == sizes
    assert list(stored.sizes_in_evaluation) == test_sizes
    assert getattr(stored, "proximal", 0.0) == proximal
    # A resumed run has the values of its folder.
    assert run("train", "--resume", str(out), "--iterations", "2") == 0
    assert load(str(out)).algorithm.inner == run_config(out).setup.algorithm.inner
    assert run_config(out).setup.algorithm.inner == stored


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("iterations", "3", []),
        ("tasks", True, []),
        ("inner.step_sizes", ("a",), []),
        ("outer.max_kl", None, []),
        ("stratified", 1, [True, False]),
        ("inner.step_sizes", (True,), []),
        ("policy.hidden", (64.5,), []),
        ("policy.hidden", (0,), [1]),
        ("policy.action", "scaled", ["clip", "scale"]),
        ("policy.activation", "gelu", ["tanh", "relu"]),
        ("policy.network", "foo", ["auto", "mlp"]),
    ],
)
def test_a_value_of_another_kind_is_refused(key, value, known):
    with refused(key, repr(value), *known):
        resolve(None, "navigation-2d", overrides={key: value})


def test_numpy_numbers_are_accepted():
    said = {"seed": np.int64(3), "inner.step_sizes": np.array([0.4]), "stratified": np.bool_(1)}
    config = resolve(None, "navigation-2d", overrides=said)
    assert (config.run.seed, config.setup.algorithm.inner.step_sizes, config.run.stratified) == (
        3,
        (0.4,),
        True,
    )
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_learned_step_sizes_have_one_entry_per_step():
    sizes = resolve(
        "metarl2026", "half-cheetah-dir", "maml++"
    ).setup.algorithm.inner.sizes_in_training
    assert sizes == (1.0, 1.0)
    inner = resolve(None, "characters", "leopard", {"inner.steps": 3}).setup.algorithm.inner
    assert inner.sizes_in_training == inner.step_sizes[:1] * 3
    said = {"inner.steps": 3, "inner.step_sizes": (0.3, 0.2)}
    config = resolve(None, "navigation-2d", "maml++", said)
    assert config.setup.algorithm.inner.sizes_in_training == (0.3, 0.2, 0.2)
    with new_trainer(config.with_options({"tasks": 2, "episodes": 1})) as trainer:
        learned = {n: p for n, p in trainer.state.params.items() if n.startswith("step_size.")}
    assert {len(p) for p in learned.values()} == {3}


def test_values_that_a_family_sets_for_an_algorithm_are_kept():
    inner = resolve(None, "characters", "imaml").setup.algorithm.inner
    chosen = training_values("characters")["imaml"]
    assert inner.proximal == chosen["inner.proximal"] != 0.5 / inner.step_sizes[0]
    assert inner.step_sizes == chosen["inner.step_sizes"]
    inner = resolve(None, "characters", "imaml", {"inner.proximal": 5.0}).setup.algorithm.inner
    assert (inner.proximal, inner.step_sizes) == (5.0, chosen["inner.step_sizes"])
