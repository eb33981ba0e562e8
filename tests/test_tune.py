"""The search of `scripts/tune.py`."""

import dataclasses
import importlib.util
import json
import shlex
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import tomllib

import metarl
from metarl.algorithms import algorithms
from metarl.cli.main import main as cli

pytest.importorskip("optuna")

PATH = Path(__file__).parents[1] / "scripts" / "tune.py"
spec = importlib.util.spec_from_file_location("tune", PATH)
assert spec is not None
assert spec.loader is not None
tune = importlib.util.module_from_spec(spec)
sys.modules["tune"] = tune
spec.loader.exec_module(tune)


class Inline(Executor):
    """Executor that runs a job when it is submitted, at most `limit` of them."""

    def __init__(self, limit=1000):
        self.left = limit

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture
def arguments(tmp_path):
    return tune.Arguments(
        algorithm="promp", family="navigation-2d", out=tmp_path / "tune", trials=5,
        env_steps=2400, validation_tasks=2, validation_episodes=2, finalists=2, seeds=(7, 8),
        family_options=("horizon=20",), options=("tasks=3", "episodes=2", "policy.hidden=[8]"),
    )  # fmt: skip


def run(arguments, pool):
    arguments.out.mkdir(exist_ok=True)
    finalists = tune.finals(arguments, tune.search(arguments, pool), pool)
    tune.write_results(arguments, finalists)
    return finalists


def best_of(arguments):
    """Return the numbers of the complete trials, best first."""
    trials = [t for t in tune.load_study(arguments).trials if t.value is not None]
    return [t.number for t in sorted(trials, key=lambda t: -t.value)]


def test_every_range_is_searched_from_the_defaults(arguments):
    config = tune.starting_point(arguments)
    assert config.run.iterations == 10  # 2400 / (2 rollouts x 3 tasks x 2 episodes x 20 steps)
    space = tune.search_space(arguments, config)
    assert {"inner.step_sizes", "outer.clip", "meta.inner_kl_coef"} <= set(space)
    assert "outer.max_norm" not in space
    options = tune.options_of(config, tune.first_values(arguments, config))
    same, known = config.with_options(options).options(), config.options()
    assert {key: same[key] for key in space} == {key: known[key] for key in space}


def test_the_search_is_near_the_defaults(arguments):
    config = tune.starting_point(arguments)
    near = dataclasses.replace(arguments, spread=2.0, fixed=("inner.min_kl",))
    space = tune.search_space(near, config)
    assert "inner.min_kl" not in space
    rate = space["outer.learning_rate"]
    default = config.setup.algorithm.outer.learning_rate
    assert (rate.low, rate.high) == (0.5 * default, 2 * default)
    assert space["outer.clip"] == tune.search_space(arguments, config)["outer.clip"]
    with pytest.raises(metarl.UserError, match="fixed"):
        tune.search_space(dataclasses.replace(arguments, fixed=("inner.max_kl",)), config)


def test_ranges_contain_the_defaults_of_every_algorithm(arguments):
    names = [name for name, found in algorithms().items() if found.head == "meta"]
    for name in names:
        for family in ("navigation-2d", "half-cheetah-dir", "half-cheetah-vel"):
            config = metarl.resolve("metarl2026", family, name)
            options = config.options()
            for key, space in tune.search_space(arguments, config).items():
                value = options[key][0] if isinstance(options[key], tuple) else options[key]
                assert space.low <= value <= space.high, (name, family, key)


def test_a_search_ends_with_the_best_mean_over_seeds(arguments, tmp_path):
    finalists = run(arguments, Inline())
    numbers = [trial.number for trial, _ in finalists]
    assert 0 in numbers  # the defaults
    assert len(numbers) == (2 if best_of(arguments)[:2].count(0) else 3)
    assert all(len(scores) == 2 for _, scores in finalists)
    means = [sum(scores) / 2 for _, scores in finalists]
    assert means == sorted(means, reverse=True)
    best = tomllib.loads((arguments.out / "best.toml").read_text("utf-8"))
    values = best["families"]["navigation-2d"]["algorithms"]["promp"]
    config = tune.starting_point(arguments)
    chosen = config.with_options(tune.flat(values))
    expected = config.with_options(tune.options_of(config, finalists[0][0].params))
    assert chosen.options() == expected.options()
    command = (arguments.out / "table.md").read_text("utf-8").splitlines()[-1]
    words = [*shlex.split(command)[1:], "--iterations", "1", "--tasks", "2"]
    assert cli([*words, "--out", str(tmp_path / "run")]) == 0
    assert metarl.load(tmp_path / "run").setup.options() == chosen.setup.options()
    assert len(list((arguments.out / "results").iterdir())) == 5 + len(numbers)
    assert not list((arguments.out / "runs").iterdir())


def test_an_interrupted_search_continues(arguments):
    arguments.out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        tune.search(arguments, Inline(limit=3))
    done = {p.name: json.loads(p.read_text("utf-8")) for p in (arguments.out / "results").iterdir()}
    assert len(done) == 3
    run(arguments, Inline())
    after = {
        p.name: json.loads(p.read_text("utf-8")) for p in (arguments.out / "results").iterdir()
    }
    assert {name: after[name] for name in done} == done
    assert len(tune.load_study(arguments).trials) == 5


def test_a_search_of_one_trial_has_a_result(arguments):
    one = dataclasses.replace(arguments, trials=1)
    ((trial, _),) = run(one, Inline())
    assert trial.number == 0
    more = dataclasses.replace(one, trials=2, seeds=(7,))
    assert run(more, Inline())
    assert len(tune.load_study(more).trials) == 2


def test_a_search_with_other_settings_is_refused(arguments):
    one = dataclasses.replace(arguments, trials=1, seeds=(7,))
    run(one, Inline())
    for change in (
        {"env_steps": 4800},
        {"spread": 2.0},
        {"seeds": (8,)},
        {"options": ("tasks=4",)},
    ):
        with pytest.raises(metarl.UserError, match="--out"):
            tune.search(dataclasses.replace(one, **change), Inline())


def test_a_folder_of_another_run_is_an_error(arguments):
    folder = arguments.out / "runs" / "trial-000"
    other = tune.starting_point(arguments).with_options({"tasks": 2, "iterations": 1, "seed": 7})
    metarl.train(other, folder)
    with pytest.raises(metarl.RunError):
        run(arguments, Inline())


def test_what_cannot_be_tuned_is_refused(arguments):
    for change in ({"algorithm": "random"}, {"family": "sinusoid"}, {"options": ("tasks 3",)}):
        with pytest.raises(metarl.UserError):
            tune.starting_point(dataclasses.replace(arguments, **change))
    with pytest.raises(metarl.UserError):
        dataclasses.replace(arguments, seeds=()).check()
