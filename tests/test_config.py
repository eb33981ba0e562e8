"""Parts, configs and command lines: options are known, checked, stored and found again."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from expecting import mentions, refused, run

import metarl
from metarl.algorithms import Algorithm, algorithms, find_algorithm
from metarl.cli.parsing import first_name
from metarl.config.options import Config
from metarl.config.resolve import find_recipe, recipes, resolve
from metarl.envs.errors import UserError
from metarl.envs.registry import family_names
from metarl.parts import Part, fixed, tunable
from metarl.policies.loading import run_config
from metarl.runs.checkpoints import CheckpointError
from metarl.training.run import train

FAMILIES = ["navigation-2d", "sinusoid", "characters"]


def config_or_skip(family: str, algorithm: str) -> Config:
    try:
        return Config.of(family, algorithm)
    except UserError:
        pytest.skip(f"{algorithm} is not for {family}")


# Parts --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Widget(Part):
    """A part with an option of every kind."""

    section: ClassVar[str] = "widget"

    size: float = 1.0
    """How large."""
    count: int = 2
    """How many."""
    on: bool = False
    """Whether."""
    name: str = "a"
    """What."""
    sizes: tuple[float, ...] = (1.0,)
    """Each."""
    limit: float | None = None
    """Or none."""
    kl: float = tunable(0.1, 0.01, 1.0, of_policies=True)
    """Of policies."""
    kind: str = fixed("round")

    def __post_init__(self) -> None:
        self.require_positive("size")
        self.require_at_least(1, "count")


def test_the_fields_of_a_part_are_its_options():
    names = ["size", "count", "on", "name", "sizes", "limit", "kl"]
    assert list(Widget().options()) == names
    assert list(Widget().without_policies().options()) == names[:-1]
    assert Widget(size=2.0, kind="square").own_options() == {"size": 2.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "1"), ("size", True), ("size", -1.0), ("size", float("inf")), ("size", None),
        ("count", 1.5), ("count", 0), ("count", True), ("on", 1), ("on", "yes"), ("name", 3),
        ("sizes", 1.0), ("sizes", ("a",)), ("sizes", (True,)),
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_range_is_refused_by_key(name, value):
    with refused(f"widget.{name}"):
        Widget().with_options({name: value})


@pytest.mark.parametrize("name", ["kind", "siz", "policies"])
def test_what_is_no_option_of_a_part_is_unknown(name):
    with refused(f"widget.{name}"):
        Widget().with_options({name: 1.0})
    with refused("widget.kl"):
        Widget().without_policies().with_options({"kl": 0.2})


def test_values_become_plain_python():
    values = {"count": np.int64(3), "sizes": np.array([1.0, 2.0]), "on": np.bool_(True)}
    part = Widget().with_options({**values, "limit": None})
    assert part == Widget(count=3, sizes=(1.0, 2.0), on=True)
    assert type(part.count) is int
    assert Widget().with_options({"sizes": [3.0]}).sizes == (3.0,)


# Configs ------------------------------------------------------------------------------------------


def another(value: object) -> list[object]:
    """Values of the same type that an option may also have; the first that is allowed is taken."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [0.9 * value or 0.25, 0.5]
    if isinstance(value, tuple):
        return [(*value, value[-1]) if value else (0.5,), (0.8, 0.9)]
    return {
        "constant": ["cosine"], "clip": ["scale"], "tanh": ["relu"], "relu": ["tanh"],
        "auto": ["mlp"], "returns": ["lambda-returns"], "cpu": ["cuda"],
    }.get(str(value), [])  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("algorithm", list(algorithms()))
def test_every_option_of_every_algorithm_round_trips(algorithm, family):
    config = config_or_skip(family, algorithm)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    needed = {"advantage.targets": {"advantage.gae_lambda": 0.9}}
    changed = 0
    for key, value in config.options().items():
        for other in another(value):
            try:
                one = config.with_options({**needed.get(key, {}), key: other})
            except UserError as error:
                fault = str(error)
            else:
                fault = ""
            if fault:  # out of range
                assert mentions(fault, key)
                continue
            assert one != config, key
            assert one.options()[key] == other
            assert Config.from_json(json.loads(json.dumps(one.to_json()))) == one
            changed += 1
            break
    assert changed > len(config.options()) // 2


@pytest.mark.parametrize(
    ("family", "algorithm", "key", "near"),
    [
        ("navigation-2d", "maml-reinforce", "outer.max_kll", "outer.max_kl"),
        ("navigation-2d", "maml-trpo", "outer.learning_rate", None),
        ("navigation-2d", "maml-reinforce", "outer.cg_damping", None),
        ("navigation-2d", "maml-trpo", "outer.clipp", None),
        ("navigation-2d", "maml-trpo", "meta.sampling_coef", None),
        ("navigation-2d", "e-maml", "meta.sampling_coeff", "meta.sampling_coef"),
        ("navigation-2d", "meta-sgd", "inner.min_kl", None),
        ("navigation-2d", "maml-trpo", "inner.context", None),
        ("navigation-2d", "cavia", "inner.contexts", "inner.context"),
        ("navigation-2d", "maml-trpo", "policy.filters", None),
        ("sinusoid", "maml-trpo", "advantage.discount", None),
        ("sinusoid", "maml-trpo", "episodes", None),
        ("sinusoid", "maml-trpo", "workers", None),
        ("sinusoid", "maml-trpo", "outer.max_kl", None),
        ("sinusoid", "maml-trpo", "policy.normalize", None),
        ("sinusoid", "maml-trpo", "outer.learning_rat", "outer.learning_rate"),
        ("navigation-2d", "pretrained", "inner.steps", None),
        ("navigation-2d", "random", "outer.schedule", None),
    ],
)  # fmt: skip
def test_an_option_of_a_part_that_is_not_chosen_is_refused(family, algorithm, key, near):
    config = Config.of(family, algorithm)
    with refused(key, *([near] if near else [])):
        config.with_options({key: 1})
    with refused(key):
        resolve(None, family, algorithm, {key: 1})
    flag = f"--{key.replace('_', '-')}"
    assert run("train", family, "--algorithm", algorithm, "--preset", "None", flag, "1") == 2


def test_an_option_of_another_algorithm_names_it(capsys):
    with refused("inner.decay", "dice-maml"):
        resolve(None, "navigation-2d", "maml-trpo", {"inner.decay": 0.5})
    assert run("train", "navigation-2d", "--inner.decay", "0.5") == 2
    assert mentions(capsys.readouterr().err, "--inner.decay", "dice-maml")


def test_a_file_with_an_unknown_option_or_without_a_part_is_refused():
    data = Config.of("navigation-2d", "maml-trpo").to_json()
    with refused("outer.nonsense"):
        Config.from_json({**data, "options": {**data["options"], "outer.nonsense": 1}})
    for key in ("family", "algorithm", "options"):
        with refused(key):
            Config.from_json({k: v for k, v in data.items() if k != key})
    with refused("maml-trpoo", "maml-trpo"):
        Config.from_json({**data, "algorithm": "maml-trpoo"})


@pytest.mark.parametrize("algorithm", ["maml-trpo", "maml-reinforce", "anil"])
def test_any_optimizer_of_torch_is_an_outer_optimizer(algorithm):
    said = {"outer": "adamw", "outer.weight_decay": 0.1, "outer.betas": (0.8, 0.9)}
    config = resolve(None, "navigation-2d", algorithm, said)
    assert config.options()["outer"] == "adamw"
    assert (config.setup.algorithm.outer.weight_decay, config.setup.algorithm.outer.betas) == (
        0.1,
        (0.8, 0.9),
    )  # type: ignore[attr-defined]
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    with refused("outer.cg_damping"):
        config.with_options({"outer.cg_damping": 0.1})
    with refused("adamww", "adamw"):
        config.with_options({"outer": "adamww"})
    back = config.with_options({"outer": "trust-region", "outer.cg_damping": 0.1})
    assert back.setup.algorithm.outer.name == "trust-region"


def test_a_new_outer_optimizer_starts_from_its_own_defaults():
    config = resolve("icml2017", "half-cheetah-dir", overrides={"outer": "adam"})
    assert (
        config.setup.algorithm.outer.max_kl
        == Config.of("", "maml-reinforce").setup.algorithm.outer.max_kl
    )  # type: ignore[attr-defined]
    assert resolve("icml2017", "half-cheetah-dir").setup.algorithm.outer.max_kl == 0.02  # type: ignore[attr-defined]


# Recipes ------------------------------------------------------------------------------------------


def scoped(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from scoped(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_options(domain: str) -> set[str]:
    """Every option's key on a domain, whatever the algorithm; those of one part with its name."""
    family = {"reinforcement": "navigation-2d", "supervised": "sinusoid"}[domain]
    found: set[str] = set()
    for algorithm in algorithms():
        try:
            config = Config.of(family, algorithm)
        except UserError:
            continue
        found |= set(config.options())
        for key in config.options():
            section, dot, name = key.partition(".")
            if dot and (part := getattr(config.sections()[section], "name", "")):
                found.add(f"{section}.{part}.{name}")
    return found


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_has_known_keys_only(name):
    recipe = find_recipe(name)
    families = {*family_names(), *recipes_families(recipe)}
    assert recipes_families(recipe) <= families & set(every_family())
    tables = [recipe.options, *recipe.variants.values(), *recipe.algorithms.values()]
    named = set(recipe.algorithms)
    for own in recipe.families.values():
        assert set(own) <= {"options", "algorithms"}
        tables += [own.get("options", {}), *own.get("algorithms", {}).values()]
        named |= set(own.get("algorithms", {}))
    for own in recipe.references.values():
        named |= set(own)
    assert named <= set(algorithms())
    known = known_options(recipe.domain)
    for table in tables:
        assert {key for key, _ in scoped(table)} <= known


def recipes_families(recipe) -> set[str]:
    return {*recipe.usual_for, *recipe.families, *recipe.references}


def every_family() -> list[str]:
    from metarl.envs.registry import data_names

    return [*family_names(), *data_names()]


@pytest.mark.parametrize("name", sorted(recipes()))
def test_values_of_an_algorithm_in_a_recipe_are_options_of_it(name):
    """What a recipe sets for one algorithm is not left out silently."""
    recipe = find_recipe(name)
    family = {"reinforcement": "navigation-2d", "supervised": "sinusoid"}[recipe.domain]
    pairs = list(recipe.algorithms.items())
    for own in recipe.families.values():
        pairs += own.get("algorithms", {}).items()
    for algorithm, values in pairs:
        known = Config.of(family, algorithm).options()
        assert {key for key, _ in scoped(values)} <= set(known), algorithm


def test_values_of_an_algorithm_on_a_family_take_effect(monkeypatch):
    of_reptile = {"outer.learning_rate": 0.02, "outer.adam.steps": 3, "policy.output_scale": 0.3}
    family = find_recipe("metarl2026").families["navigation-2d"]
    monkeypatch.setitem(family, "algorithms", {**family["algorithms"], "reptile": of_reptile})
    reptile = find_algorithm("reptile")
    config = resolve("metarl2026", "navigation-2d", reptile)
    outer = config.setup.algorithm.outer
    assert (outer.learning_rate, outer.steps) == (0.02, 3)
    assert config.options()["policy.output_scale"] == 0.3
    # Options that a user changed in the algorithm remain.
    own = dataclasses.replace(reptile, outer=reptile.outer.with_options({"learning_rate": 0.007}))
    outer = resolve("metarl2026", "navigation-2d", own).setup.algorithm.outer
    assert (outer.learning_rate, outer.steps) == (0.007, 3)
    for name in recipes():
        for family, tables in find_recipe(name).families.items():
            for algorithm, values in tables.get("algorithms", {}).items():
                options = resolve(name, family, algorithm).options()
                for key, value in scoped(values):
                    parts = key.split(".")
                    key = ".".join(dict.fromkeys([parts[0], parts[-1]]))
                    assert options[key] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_algorithm_takes_every_recipe(name):
    recipe = find_recipe(name)
    usual = {"reinforcement": ["navigation-2d", "half-cheetah-dir"], "supervised": ["sinusoid"]}
    for family in {*usual[recipe.domain], *recipe.families, *recipe.usual_for}:
        for algorithm in algorithms():
            try:
                Config.of(family, algorithm)
            except UserError:
                continue
            config = resolve(name, family, algorithm)
            assert config.setup.preset == name
            assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


# Algorithms of a user's own -----------------------------------------------------------------------

OWN = """
import dataclasses
import importlib
import torch
from metarl.algorithms import find_algorithm

mine = dataclasses.replace(
    find_algorithm("maml-trpo"), name="mine", outer=torch.optim.SGD,
    regularizer=lambda meta: 1e-3 * sum(p.square().sum() for p in meta.values()),
)
"""
SMALL = ["--iterations", "1", "--tasks", "2", "--episodes", "2", "--threads", "1",
         "--workers", "0", "--family-options", "horizon=5"]  # fmt: skip


def test_an_algorithm_of_a_file_trains_resumes_evaluates_and_reports(
    tmp_path, monkeypatch, undrawn
):
    (tmp_path / "own_algorithm.py").write_text(OWN)

    own = ["--algorithm", "own_algorithm:mine", "--outer.momentum", "0.5"]
    begin = ["train", "navigation-2d", *own, *SMALL, "--out", "run"]
    subprocess.run([sys.executable, "-m", "metarl", *begin], cwd=tmp_path, check=True, timeout=300)
    monkeypatch.chdir(tmp_path)
    assert run("train", "--resume", "run", "--iterations", "2") == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert stored["algorithm"] == "own_algorithm:mine"
    assert stored["options"]["outer.momentum"] == 0.5
    assert stored["options"]["iterations"] == 2
    few = ["--tasks", "2", "--episodes", "2", "--steps", "1", "--threads", "1"]
    assert run("evaluate", "run", *few) == 0
    assert run("report", "run", "--no-video") == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_a_run_is_plotted_without_the_module_of_its_algorithm(tmp_path, monkeypatch):
    (tmp_path / "lost_algorithm.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--algorithm", "lost_algorithm:mine", *SMALL, "--out", "run"]
    assert run("train", "navigation-2d", *own) == 0
    monkeypatch.delitem(sys.modules, "lost_algorithm")
    (tmp_path / "lost_algorithm.py").unlink()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()
    assert run("evaluate", "run") == 2
    assert run("plot", "run") == 0
    assert (tmp_path / "run" / "learning.png").exists()


def test_an_error_in_a_users_file_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(
        "import metarl\nmine = metarl.Algorithm(name='mine', outer='adamq')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with refused("faulty", "adamq"):
        find_algorithm("faulty:mine")


@pytest.mark.parametrize(
    ("said", "meant"),
    [("outer.lr", "outer.learning_rate"), ("inner.lr", "inner.step_sizes"),
     ("lr", "outer.learning_rate"), ("gamma", "advantage.discount"),
     ("advantage.lambda", "advantage.gae_lambda")],
)  # fmt: skip
def test_names_of_other_packages_are_understood(said, meant, capsys):
    with refused(said, meant):
        resolve(None, "navigation-2d", "reptile", {said: 0.5})
    assert run("train", "navigation-2d", "--algorithm", "reptile", f"--{said}", "0.5") == 2
    assert mentions(capsys.readouterr().err, said, meant)


def test_an_algorithm_without_a_name_trains_and_is_refused_when_it_is_loaded(tmp_path):
    own = dataclasses.replace(
        find_algorithm("maml-trpo"), name="mine", source="",
        regularizer=lambda meta: 1e-3 * meta["layer0.weight"].square().sum(),
    )  # fmt: skip
    said = {"iterations": 1, "tasks": 2, "episodes": 2, "threads": 1}
    options = {"family_options": {"horizon": 5}}
    config = resolve(None, "navigation-2d", own, {**said, **options})
    meta = train(config, tmp_path / "run")
    assert meta.algorithm.name == "mine"
    metarl.evaluate(meta, tasks=2, episodes=1, steps=1, threads=1)
    with refused("mine", "--algorithm", "module:attribute", error=CheckpointError):
        metarl.load(tmp_path / "run")
    with refused("mine"):
        run_config(tmp_path / "run")
    assert run("evaluate", str(tmp_path / "run")) == 2
    assert run("train", "--resume", str(tmp_path / "run")) == 2
    assert Config.from_json(config.to_json(), config.setup) == config


def test_a_changed_algorithm_is_not_taken_for_the_named_one(tmp_path):
    """An algorithm made of a named one keeps its source, and is not the one found by it."""
    own = dataclasses.replace(find_algorithm("maml-trpo"), regularizer=lambda meta: 0.0)  # type: ignore[arg-type,return-value]
    config = resolve(None, "navigation-2d", own)
    assert not config.setup.is_named
    with refused("maml-trpo"):
        Config.from_json(config.to_json())


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("nowhere:mine", ["nowhere"]),
        ("test_config:nothing", ["nothing"]),
        ("test_config:OWN", ["test_config:OWN", "str"]),
        ("maml-trop", ["maml-trop", "maml-trpo"]),
    ],
)
def test_an_algorithm_that_is_not_there_is_named(word, names, capsys):
    assert run("train", "navigation-2d", "--algorithm", word) == 2
    err = capsys.readouterr().err
    assert mentions(err, *names)
    assert err.count("\n") == 1


def test_parts_of_another_kind_are_refused():
    for name in ("inner", "meta", "outer", "advantage", "baseline"):
        with refused(name):
            Algorithm(name="odd", **{name: 3})
    with refused("outer_loss"):
        Algorithm(name="odd", outer_loss=3)  # type: ignore[arg-type]


# Command lines ------------------------------------------------------------------------------------


def test_options_of_an_optimizer_of_torch_are_flags(tmp_path):
    words = ["--outer", "adamw", "--outer.weight-decay", "0.1", "--outer.betas", "0.8", "0.9"]
    assert run("train", "navigation-2d", *words, *SMALL, "--out", str(tmp_path / "run")) == 0
    found = run_config(tmp_path / "run").options()
    assert (found["outer"], found["outer.weight_decay"]) == ("adamw", 0.1)
    assert found["outer.betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    "words",
    [
        ["--threads", "1", "FAMILY"],
        ["--threads=1", "FAMILY"],
        ["--stratified", "FAMILY"],
        ["--no-stratified", "FAMILY"],
        ["--policy.hidden", "8", "8", "FAMILY"],
        ["--inner.step-sizes", "0.1", "1e-2", "FAMILY", "--tasks", "3"],
        ["--family-options", "a=1", "b=2", "FAMILY"],
        ["--algorithm", "module:own", "FAMILY"],
        ["FAMILY", "--algorithm", "module:own"],
    ],
)
def test_a_name_is_found_wherever_it_stands(words):
    assert first_name(words, ["--stratified", "--no-stratified"]) == "FAMILY"
    assert first_name([word for word in words if word != "FAMILY"], ["--stratified"]) == ""


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--stratified=yes"], ["--stratified", "--no-stratified"]),
        (["--stratified", "true"], ["true", "--no-stratified"]),
        (["--no-policy.normalize"], ["--no-policy.normalize", "--policy.no-normalize"]),
        (["--tasks"], ["--tasks"]),
        (["--tasks", "1.5"], ["--tasks", 1.5]),
        (["--inner.step-sizes"], ["--inner.step-sizes"]),
        (["--inner.step-sizes", "0.1,0.05"], ["--inner.step-sizes", "0.1,0.05"]),
        (["--inner.step-sizes", "0.1", "--inner.step_sizes", "0.2"], ["--inner.step-sizes"]),
        (["--family-options", "horizon=5", "--family-options", "a=1"], ["--family-options"]),
        (["--policy.activation", "tan"], ["--policy.activation", "tan", "tanh", "relu"]),
        (["--outer.shedule", "cosine"], ["--outer.shedule", "--outer.schedule"]),
        (["half-cheetah-dir"], ["half-cheetah-dir"]),
    ],
)
def test_a_word_that_is_not_understood_is_named(words, names, capsys, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert run("train", "navigation-2d", *words, *out) == 2
    err = capsys.readouterr().err
    assert mentions(err, *names)
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_switches_are_turned_on_and_off(tmp_path):
    words = [*SMALL, "--preset", "metarl2026", "--policy.hidden", "4"]
    off = ["--policy.no-normalize", "--no-stratified"]
    for i, (more, expected) in enumerate((([], True), (off, False), (["--stratified"], True))):
        out = tmp_path / str(i)
        assert run("train", "half-cheetah-dir", *words, *more, "--out", str(out)) == 0
        config = run_config(out)
        assert config.run.stratified == expected
        assert config.options()["policy.normalize"] == (more != off)


def test_the_path_of_a_users_file_is_that_of_the_shell(tmp_path, monkeypatch):
    """A file beside the shell's folder is imported, whatever Python's own path is."""
    (tmp_path / "beside.py").write_text(OWN)
    done = subprocess.run(
        [sys.executable, "-m", "metarl", "train", "navigation-2d", "--algorithm", "beside:mine",
         "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--outer.momentum" in done.stdout
    assert Path(tmp_path / "beside.py").exists()
