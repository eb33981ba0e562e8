"""Meta-World: with it installed, its tasks and environments; without it, what the user is told."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from expecting import mentions, refused, run
from gymnasium.utils.env_checker import check_env

from metarl.envs import make_family
from metarl.running.metrics import read_metrics

ROOT = Path(__file__).parents[1]
INSTALLED = importlib.util.find_spec("metaworld") is not None
needs_metaworld = pytest.mark.skipif(not INSTALLED, reason="needs Meta-World")


@pytest.mark.skipif(INSTALLED, reason="needs an environment without Meta-World")
def test_without_it_the_error_names_the_script_that_installs_it(capsys):
    script = "scripts/setup_metaworld.sh"
    for make in (lambda: make_family("metaworld-ml1"), lambda: gym.make("metarl/MetaWorldML1-v0")):
        with refused(script):
            make()
    assert (ROOT / script).exists()
    assert run("train", "metaworld-ml10", "--iterations", "1") == 2
    assert mentions(capsys.readouterr().err, script)
    assert run("families") == 0
    assert mentions(capsys.readouterr().out, "metaworld-ml45", script, "half-cheetah-vel")


# In an environment that scripts/setup_metaworld.sh made ------------------------------------------


def places(tasks) -> np.ndarray:
    """What Meta-World's own task objects hold, [tasks, 3 or 6]."""
    return np.array([pickle.loads(task.data)["rand_vec"] for task in tasks])


def rows(tasks) -> set[tuple[float, ...]]:
    return {tuple(task) for task in np.asarray(tasks).tolist()}


@needs_metaworld
def test_ml1_draws_from_the_benchmarks_own_splits():
    import metaworld

    family = make_family("metaworld-ml1", task="push", seed=3)
    benchmark = metaworld.ML1("push-v3", seed=3)
    train, test = rows(places(benchmark.train_tasks)), rows(places(benchmark.test_tasks))
    assert not train & test
    drawn = family.tasks.sample(np.random.default_rng(0), 50)
    assert rows(drawn) == train  # each once
    assert rows(family.tasks.sample(np.random.default_rng(0), 120)) == train
    assert rows(family.tasks.grid(50)) == test
    assert rows(family.tasks.sample(np.random.default_rng(0), 50, "test")) == test
    assert not np.array_equal(drawn, family.tasks.sample(np.random.default_rng(1), 50))


@needs_metaworld
def test_ml10_trains_and_tests_on_other_jobs_and_draws_them_equally_often():
    import metaworld

    family = make_family("metaworld-ml10")
    benchmark = metaworld.ML10(seed=0)
    names = list(metaworld.ALL_V3_ENVIRONMENTS)
    for split, tasks, n in (
        ("train", benchmark.train_tasks, 20),
        ("test", benchmark.test_tasks, 10),
    ):
        drawn = family.tasks.sample(np.random.default_rng(0), n, split)
        found = [names[int(job)] for job in drawn[:, 0]]
        assert sorted(found) == sorted(2 * list({task.env_name for task in tasks}))
        for job, task in zip(found, drawn, strict=True):
            own = places([t for t in tasks if t.env_name == job])
            padded = np.pad(own, ((0, 0), (0, 6 - own.shape[1])))
            assert tuple(task[1:]) in rows(padded)
    grid = family.tasks.grid(40)
    assert set(np.unique(grid[:, 0], return_counts=True)[1]) == {8}
    assert len(rows(grid)) == 40


@needs_metaworld
def test_every_step_is_that_of_metaworlds_own_environment():
    import metaworld

    family = make_family("metaworld-ml10", horizon=12)
    benchmark = metaworld.ML10(seed=0)
    own_tasks = [benchmark.train_tasks[i] for i in (0, 170, 420)]
    names = list(metaworld.ALL_V3_ENVIRONMENTS)
    vectors = np.zeros((3, 7))
    for vector, task in zip(vectors, own_tasks, strict=True):
        drawn = places([task])[0]
        vector[0], vector[1 : 1 + len(drawn)] = names.index(task.env_name), drawn
    vector_env = family.make_vec(3, 1, autoreset_mode="Disabled")
    rng = np.random.default_rng(0)
    # In another order the second time, so that environments change places and are used again.
    for order in ([0, 1, 2], [2, 0, 1], [0, 0, 2]):
        vector_env.set_tasks(vectors[order])
        observation, _ = vector_env.reset(seed=5)
        stock = [benchmark.train_classes[own_tasks[i].env_name]() for i in order]
        for env, i in zip(stock, order, strict=True):
            env.set_task(own_tasks[i])
        assert np.array_equal(observation, [env.reset()[0] for env in stock])
        for _ in range(12):
            action = rng.uniform(-1.0, 1.0, (3, 4)).astype(np.float32)
            observation, reward, terminated, truncated, info = vector_env.step(action)
            results = [env.step(a) for env, a in zip(stock, action, strict=True)]
            assert np.array_equal(observation, [result[0] for result in results])
            assert np.array_equal(reward, [result[1] for result in results])
            assert np.array_equal(info["success"], [result[4]["success"] for result in results])
            assert not terminated.any()
            assert not observation[:, -3:].any()  # the goal is hidden
        assert truncated.all()
    vector_env.close()


@needs_metaworld
def test_the_goal_decides_reward_and_success_but_shows_in_no_observation():
    family = make_family("metaworld-ml1", horizon=60)
    near, far = [0.0, 0.65, 0.02, 0.0, 0.85, 0.2], [0.0, 0.65, 0.02, 0.08, 0.85, 0.06]
    vector = family.make_vec(2, 1, autoreset_mode="Disabled")
    vector.set_tasks([near, far])
    observation, _ = vector.reset()
    for _ in range(60):
        assert np.array_equal(observation[0], observation[1])
        # Forwards at the height of the first goal.
        action = np.tile([0.0, np.clip(20 * (0.85 - observation[0, 1]), -1, 1), 0.0, 0.0], (2, 1))
        observation, reward, _, _, info = vector.step(action)
    assert info["success"].tolist() == [1.0, 0.0]
    assert reward[0] > 9.0 > reward[1]


@needs_metaworld
@pytest.mark.filterwarnings("ignore:.*A Box observation space m")  # its hidden goal is always 0
def test_gymnasium_ids_make_single_and_vector_environments():
    options = {"task": "push", "horizon": 9}
    env = gym.make("metarl/MetaWorldML1-v0", **options)
    check_env(env.unwrapped, skip_render_check=True)
    vector = gym.make_vec("metarl/MetaWorldML1-v0", num_envs=2, **options)
    assert np.array_equal(vector.reset(seed=4)[0][0], env.reset(seed=4)[0])
    for step in range(9):
        action = env.action_space.sample()
        one, two = env.step(action), vector.step(np.stack([action] * 2))
        assert np.array_equal(two[0][0], one[0])
        assert two[1][0] == one[1]
        assert one[3] == (step == 8)
    env = gym.make("metarl/MetaWorldML10-v0")
    seen = {env.reset(seed=seed)[1]["task"][0] for seed in range(30)}
    assert 3 < len(seen) <= 10


@needs_metaworld
def test_unknown_tasks_and_options_out_of_range_are_refused():
    for family, options, names in (
        ("metaworld-ml1", {"task": "raech"}, ["task", "raech", "reach-v3"]),
        ("metaworld-ml10", {"horizon": 501}, ["horizon", 500, 501]),
        ("metaworld-ml45", {"seed": -1}, ["seed", -1]),
    ):
        with refused(*names):
            make_family(family, **options)
    same_place = np.array([0.0, 0.7, 0.02, 0.0, 0.75, 0.2])
    with refused("reach-v3", "object", "goal"):
        make_family("metaworld-ml1").make(same_place).reset()
    with refused("job", 50):
        make_family("metaworld-ml10").make(np.full(7, 50.0)).reset()


# The environment itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    """Where Meta-World is installed: METARL_METAWORLD_VENV, or made by the script (minutes)."""
    if given := os.environ.get("METARL_METAWORLD_VENV"):
        return Path(given).absolute()
    made = tmp_path_factory.mktemp("metaworld") / "venv"
    subprocess.run(["bash", ROOT / "scripts/setup_metaworld.sh", made], check=True)
    return made


def in_venv(venv: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [venv / "bin/python", "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_two_iterations_of_ml1_reach(venv, tmp_path):
    done = in_venv(
        venv, tmp_path, "metarl", "train", "metaworld-ml1",
        "--family-options", "task=reach-v3", "horizon=40", "--tasks", "3", "--episodes", "2",
        "--policy.hidden", "16", "--iterations", "2", "--out", "reach",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "reach")
    assert len(metrics) == 2
    for row in metrics:
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert len(numbers) > 8
        assert np.isfinite(numbers).all()
        assert row["return_pre"] > 0.0  # Meta-World pays up to 10 a step, never less than 0
    tried = in_venv(
        venv, tmp_path, "metarl", "evaluate", "reach", "--tasks", "2", "--episodes", "2",
        "--steps", "1",
    )  # fmt: skip
    assert tried.returncode == 0, tried.stderr
    rates = json.loads((tmp_path / "reach/evaluation.json").read_text())["success"]
    assert len(rates) == 2
    assert all(0.0 <= rate <= 1.0 for rate in rates)


@pytest.mark.slow
def test_the_families_are_right_with_the_older_mujoco(venv, tmp_path):
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("meta_world", "envs", "bodies")]
    done = in_venv(venv, tmp_path, "pytest", "-q", "-p", "no:cacheprovider",
                   "-m", "not slow and not learning", "--rootdir", str(ROOT), *files)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
