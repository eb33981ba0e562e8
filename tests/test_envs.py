"""The families: task distributions, the registry, native physics against stock Gymnasium."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from expecting import mentions, refused, run
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from metarl.envs import Finite, GymnasiumFamily, Uniform, check_task_family, make_family, register
from metarl.envs.registry import family_names, parse_options

DISABLED = AutoresetMode.DISABLED


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def actions(steps: int, n: int, dim: int = 6, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * rng(seed).standard_normal((steps, n, dim))).astype(np.float32)


# Task distributions -------------------------------------------------------------------------------


def test_uniform_tasks_lie_in_their_box_and_fill_it():
    box = Uniform({"x": (0.0, 2.0), "y": (-1.0, 1.0)}, test={"x": (2.0, 3.0), "y": (-1.0, 1.0)})
    assert box.names == ("x", "y")
    train, test = box.sample(rng(), 500), box.sample(rng(), 500, "test")
    assert train.shape == (500, 2)
    assert train.dtype == np.float64
    assert train[:, 0].min() < 0.1
    assert 1.9 < train[:, 0].max() <= 2.0
    assert 2.0 <= test[:, 0].min() < 2.05
    grid = box.grid(64)
    assert ((grid >= [2.0, -1.0]) & (grid <= [3.0, 1.0])).all()
    # Even cover: every quarter of each axis holds about its share.
    for column, (low, high) in zip(grid.T, [(2.0, 3.0), (-1.0, 1.0)], strict=True):
        counts = np.histogram(column, 4, (low, high))[0]
        assert counts.min() >= 14
    np.testing.assert_allclose(Uniform({"v": (0.0, 2.0)}).grid(4)[:, 0], [0.25, 0.75, 1.25, 1.75])


def test_stratified_tasks_lie_one_in_each_slice_and_are_distributed_as_others():
    box = Uniform({"x": (-1.0, 3.0), "y": (0.0, 1.0)})
    tasks = box.stratified(rng(), 20)
    low, high = box.bounds()
    slices = np.floor((tasks - low) / (high - low) * 20)
    for axis in slices.T:
        assert sorted(axis) == list(range(20))
    assert not np.array_equal(slices[:, 0], slices[:, 1])  # axes are permuted apart
    many = np.concatenate([box.stratified(np.random.default_rng(i), 4) for i in range(2000)])
    np.testing.assert_allclose(many.mean(0), [1.0, 0.5], atol=0.05)
    np.testing.assert_allclose(many.var(0), [16 / 12, 1 / 12], rtol=0.05)
    assert abs(np.corrcoef(many.T)[0, 1]) < 0.05
    assert Finite(("side",), [[-1.0], [1.0]]).stratified(rng(), 40).sum() == 0.0
    thirds = Finite(("n",), [[0.0], [1.0], [2.0]])
    rest = [thirds.stratified(np.random.default_rng(i), 4)[-1, 0] for i in range(3000)]
    np.testing.assert_allclose(np.bincount(np.int64(rest)) / 3000, 1 / 3, atol=0.04)


def test_finite_test_tasks_are_balanced():
    directions = Finite(("direction",), [[-1.0], [1.0]])
    assert directions.sample(rng(), 40, "test").sum() == 0.0
    assert abs(directions.sample(rng(), 41, "test").sum()) == pytest.approx(1.0)
    train = directions.sample(rng(), 1000)
    assert 400 < (train > 0).sum() < 600
    balanced = Finite(("direction",), [[-1.0], [1.0]], balanced=True)
    assert balanced.sample(rng(), 40).sum() == 0.0
    assert directions.grid(3).tolist() == [[-1.0], [1.0], [-1.0]]


@pytest.mark.parametrize("name", ["half-cheetah-dir", "ant-dir", "walker2d-dir"])
def test_balanced_directions_are_drawn_equally_often(name):
    assert make_family(name, balanced=True).tasks.sample(rng(), 40).sum() == 0.0
    assert make_family(name).tasks.sample(rng(), 40).sum() != 0.0


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (0.0, np.inf)])
def test_a_box_needs_low_below_high(bounds):
    with refused("velocity", *(f"{bound:g}" for bound in bounds)):
        Uniform({"velocity": bounds})


# The registry -------------------------------------------------------------------------------------


def test_a_misspelt_name_or_option_is_refused_with_the_nearest_name():
    with refused("half-cheeta-vel", "half-cheetah-vel"):
        make_family("half-cheeta-vel")
    with refused("half-cheetah-vel", "hihg", "high"):
        make_family("half-cheetah-vel", hihg=3.0)
    with refused("variant", "icml", "icml2017"):
        make_family("half-cheetah-vel", variant="icml")
    with refused("tests_family_module", "grvity_family", "gravity_family"):
        make_family("tests_family_module:grvity_family")
    with refused("nowhere"):
        make_family("nowhere:family")


@pytest.fixture(autouse=True)
def _own_module(tmp_path, monkeypatch):
    (tmp_path / "tests_family_module.py").write_text(
        "from metarl.envs import GymnasiumFamily, Uniform\n"
        "def put(env, task):\n    env.g = float(task[0])\n"
        "def gravity_family(low=5.0):\n"
        "    return GymnasiumFamily(name='pendulum', env='Pendulum-v1', set_task=put,\n"
        "        tasks=Uniform({'gravity': (low, 15.0)}), horizon=30)\n"
        "def any_family(*more, **options):\n    return gravity_family(**options)\n"
    )
    # A user's own package of the name envs must not be found first.
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.chdir(tmp_path)


def test_a_users_family_is_found_by_module_and_attribute():
    family = make_family("tests_family_module:gravity_family", low=8.0)
    assert family.source == ("tests_family_module:gravity_family", {"low": 8.0})
    assert family.tasks.bounds()[0] == [8.0]


def test_a_function_may_take_any_options():
    family = make_family("tests_family_module:any_family", low=7.0)
    assert family.tasks.bounds()[0] == [7.0]
    assert make_family("tests_family_module:any_family").tasks.bounds()[0] == [5.0]


def test_options_are_python_literals_or_strings():
    assert parse_options(["low=0.5", "variant=icml2017", "n=3", "a-b=True", "c=false"]) == {
        "low": 0.5, "variant": "icml2017", "n": 3, "a_b": True, "c": False,
    }  # fmt: skip
    with refused("low"):
        parse_options(["low"])


def test_register_names_a_family_after_its_function():
    program = """
from metarl.envs import family_names, register
before = family_names()
@register
def my_own_family():
    raise AssertionError
print(*sorted(set(family_names()) - set(before)))
"""  # in a process of its own: there is no unregistering
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["my-own-family"], done.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that offers three families, one of which cannot be loaded."""
    folder = tmp_path / "site"
    info = folder / "more_worlds-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-worlds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[metarl.families]\n"
        "offered-swing = more_worlds:swing\n"
        "offered-made = more_worlds:made\n"
        "offered-broken = more_worlds:gone\n"
        "bandit = more_worlds:gone\n"
    )
    (folder / "more_worlds.py").write_text(
        "from metarl.envs import GymnasiumFamily, Uniform\n"
        "def swing(low=5.0):\n"
        "    return GymnasiumFamily(name='swing', env='Pendulum-v1', keywords=True,\n"
        "        tasks=Uniform({'g': (low, 15.0)}), horizon=30)\n"
        "made = swing()\n"
    )
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.usefixtures("package")
def test_a_package_offers_families_by_an_entry_point(capsys):
    assert {"offered-swing", "offered-made", "navigation-2d"} <= set(family_names())
    swing = make_family("offered-swing", low=8.0)
    assert swing.source == ("offered-swing", {"low": 8.0})
    assert swing.tasks.bounds()[0] == [8.0]
    assert make_family("offered-made").tasks.bounds()[0] == [5.0]
    assert make_family("bandit").name == "bandit"  # ours comes before theirs
    with refused("offered-broken", "more-worlds", "gone"):
        make_family("offered-broken")
    with refused("offered-swig", "offered-swing"):
        make_family("offered-swig")
    assert run("families") == 0  # the broken one is named with its package, and hides no other
    out = capsys.readouterr().out
    assert mentions(out, "offered-swing", "low", "5.0", "offered-broken", "more-worlds", "gone")
    assert mentions(out, "navigation-2d", "tabular-mdp")


# Half-cheetah against stock Gymnasium -------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["half-cheetah-vel", "half-cheetah-dir"])
def test_native_physics_equals_stock_half_cheetah_bit_for_bit(name, threads):
    family = make_family(name)
    tasks = family.tasks.grid(3)
    vector = family.make_vec(3, 2, autoreset_mode=DISABLED, threads=threads)
    vector.set_tasks(tasks)
    seeds = [11, 12, 13, 14, 15, 16]
    stock = [gym.make("HalfCheetah-v5", max_episode_steps=200) for _ in seeds]
    observation, _ = vector.reset(seed=seeds)
    single = np.stack([env.reset(seed=s)[0] for env, s in zip(stock, seeds, strict=True)])
    assert np.array_equal(observation, single)
    for action in actions(200, 6):
        observation, reward, terminated, truncated, _ = vector.step(action)
        clipped = np.clip(action, -1, 1)
        results = [env.step(a) for env, a in zip(stock, clipped, strict=True)]
        assert np.array_equal(observation, np.stack([r[0] for r in results]))
        assert terminated.tolist() == [r[2] for r in results]
        assert truncated.tolist() == [r[3] for r in results]
        velocity = np.array([r[4]["x_velocity"] for r in results])
        goal = np.repeat(tasks[:, 0], 2)
        term = -np.abs(velocity - goal) if name == "half-cheetah-vel" else goal * velocity
        cost = 0.05 * np.square(clipped.astype(np.float64)).sum(1)
        np.testing.assert_allclose(reward, term - cost, rtol=0, atol=1e-12)
    assert truncated.all()


@pytest.mark.parametrize(
    ("variant", "horizon", "frame_skip", "size", "bound", "highest"),
    [
        ("icml2017", 200, 1, 20, 1.0, 2.0),
        ("promp2019", 100, 5, 17, 10.0, 3.0),
        ("pearl2019", 200, 5, 17, 10.0, 3.0),
        ("stock", 200, 5, 17, 1.0, 2.0),
    ],
)
def test_variants_set_horizon_frame_skip_and_bounds(
    variant, horizon, frame_skip, size, bound, highest
):
    family = make_family("half-cheetah-vel", variant=variant)
    env = family.make()
    assert family.horizon == horizon
    assert family.frame_skip == frame_skip
    assert env.observation_space.shape == (size,)
    np.testing.assert_array_equal(env.action_space.high, np.full(6, bound, np.float32))
    assert family.tasks.bounds()[1] == [highest]


def test_icml2017_velocity_and_observation_are_of_the_centre_of_mass():
    family = make_family("half-cheetah-dir", variant="icml2017")
    vector = family.make_vec(2, 1, autoreset_mode=DISABLED)
    vector.set_tasks([[1.0], [-1.0]])
    observation, _ = vector.reset(seed=3)
    model = family.model
    data = [mujoco.MjData(model) for _ in range(2)]
    for i, d in enumerate(data):
        d.qpos[:], d.qvel[:] = vector.sim.qpos[i], vector.sim.qvel[i]
        mujoco.mj_forward(model, d)
    torso = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "torso")
    for action in actions(60, 2):
        before = observation[:, 17].copy()
        observation, reward, *_ = vector.step(action)
        clipped = np.clip(action, -1, 1).astype(np.float64)
        for i, d in enumerate(data):
            d.ctrl[:] = clipped[i]
            mujoco.mj_step(model, d)
            assert np.array_equal(d.qpos, vector.sim.qpos[i])
            # A fresh forward pass at the new state, on a copy: the stepped one stays as it is.
            fresh = mujoco.MjData(model)
            fresh.qpos[:], fresh.qvel[:] = d.qpos, d.qvel
            mujoco.mj_forward(model, fresh)
            mujoco.mj_subtreeVel(model, fresh)
            expected = np.concatenate([d.qpos[1:], d.qvel, fresh.subtree_com[torso]])
            np.testing.assert_allclose(observation[i], expected, rtol=0, atol=1e-12)
            cost = 0.05 * np.square(clipped[i]).sum()
            forward = fresh.subtree_linvel[torso, 0]
            assert reward[i] == pytest.approx([1.0, -1.0][i] * forward - cost, abs=1e-12)
            # First order in dt: the difference quotient of the centre of mass.
            assert forward == pytest.approx((observation[i, 17] - before[i]) / 0.01, abs=0.3)


def test_reset_noise_of_icml2017_has_its_standard_deviations():
    vector = make_family("half-cheetah-dir", variant="icml2017").make_vec(1, 2000)
    vector.reset(seed=0)
    assert vector.sim.qpos.std() == pytest.approx(0.01, rel=0.03)
    assert vector.sim.qvel.std() == pytest.approx(0.1, rel=0.03)


def test_action_scale_divides_before_clipping():
    plain = make_family("half-cheetah-dir").make_vec(1, 4, autoreset_mode=DISABLED)
    scaled = make_family("half-cheetah-dir", variant="pearl2019").make_vec(
        1, 4, autoreset_mode=DISABLED
    )
    for vector in (plain, scaled):
        vector.set_tasks([[1.0]])
        vector.reset(seed=5)
    for action in actions(20, 4):
        action = np.round(16 * action) / 16  # ten times it, and back, is exact in float32
        one, two = plain.step(action), scaled.step(10 * action)
        assert np.array_equal(one[0], two[0])
        assert np.array_equal(one[1], two[1])


def test_a_diverged_simulation_is_truncated_and_the_others_continue():
    family = make_family("half-cheetah-dir")
    vector = family.make_vec(1, 3, autoreset_mode=DISABLED)
    alone = family.make_vec(1, 3, autoreset_mode=DISABLED)
    for v in (vector, alone):
        v.set_tasks([[1.0]])
        v.reset(seed=0)
    vector.sim.qvel[1, 0] = 1e11  # MuJoCo calls this bad and resets the simulation
    for t, action in enumerate(actions(5, 3)):
        observation, reward, terminated, truncated, info = vector.step(action)
        expected = alone.step(action)
        assert np.isfinite(observation).all()
        if t == 0:
            assert info["diverged"].tolist() == [False, True, False]
        else:
            assert not info.get("diverged", np.zeros(3)).any()
        assert truncated.tolist() == [False, True, False]
        assert reward[1] == 0.0
        assert not terminated.any()
        assert np.array_equal(observation[[0, 2]], expected[0][[0, 2]])


def test_a_bad_control_counts_as_divergence():
    vector = make_family("half-cheetah-dir").make_vec(1, 2, autoreset_mode=DISABLED)
    vector.reset(seed=0)
    action = actions(1, 2)[0]
    action[1, 3] = np.nan
    assert vector.step(action)[4]["diverged"].tolist() == [False, True]


# The semantics of TaskVectorEnv -------------------------------------------------------------------


def test_tasks_take_effect_at_the_next_reset():
    vector = make_family("half-cheetah-dir").make_vec(2, 1, autoreset_mode=DISABLED)
    vector.set_tasks([[1.0], [1.0]])
    vector.reset(seed=0)
    vector.set_tasks([[-1.0], [1.0]])
    assert vector.tasks.tolist() == [[1.0], [1.0]]
    _, info = vector.reset(seed=0)
    assert info["task"].tolist() == [[-1.0], [1.0]]


def test_a_reset_mask_resets_only_the_masked_environments():
    family = make_family("half-cheetah-dir")
    vector = family.make_vec(3, 1, autoreset_mode=DISABLED)
    vector.set_tasks([[1.0]] * 3)
    vector.reset(seed=0)
    before = vector.step(actions(1, 3)[0])[0]
    after, _ = vector.reset(seed=7, options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(after[[0, 2]], before[[0, 2]])
    fresh = family.make_vec(3, 1)
    fresh.set_tasks([[1.0]] * 3)
    assert np.array_equal(after[1], fresh.reset(seed=7)[0][1])
    with refused("reset_mask"):
        vector.reset(options={"reset_mask": np.zeros(3, bool)})


def test_a_reset_after_steps_equals_a_fresh_start():
    # A warm start left behind would change the trajectory.
    family = make_family("half-cheetah-dir")
    used = family.make_vec(1, 2, autoreset_mode=DISABLED)
    used.reset(seed=0)
    for action in actions(50, 2):
        used.step(action)
    fresh = family.make_vec(1, 2, autoreset_mode=DISABLED)
    assert np.array_equal(used.reset(seed=9)[0], fresh.reset(seed=9)[0])
    for action in actions(20, 2, seed=1):
        assert np.array_equal(used.step(action)[0], fresh.step(action)[0])


def test_finished_episodes_stay_or_restart_by_the_autoreset_mode():
    family = make_family("half-cheetah-dir", horizon=3)
    still = family.make_vec(1, 2, autoreset_mode=DISABLED)
    still.reset(seed=0)
    moves = actions(6, 2)
    for action in moves[:3]:
        observation, reward, _, truncated, _ = still.step(action)
    assert truncated.all()
    for action in moves[3:]:
        again, reward, _, truncated, _ = still.step(action)
        assert np.array_equal(again, observation)
        assert not reward.any()
        assert truncated.all()
    restarting = family.make_vec(1, 2)  # NEXT_STEP
    start, _ = restarting.reset(seed=0)
    for action in moves[:3]:
        *_, truncated, _ = restarting.step(action)
    assert truncated.all()
    observation, reward, _, truncated, _ = restarting.step(moves[3])
    assert not reward.any()
    assert not truncated.any()
    assert not np.array_equal(observation, start)
    assert np.abs(observation - start).max() < 2.0
    _, reward, _, truncated, _ = restarting.step(moves[4])
    assert reward.all()


@pytest.mark.parametrize("name", ["half-cheetah-dir", "half-cheetah-vel", "ant-dir", "ant-vel"])
def test_results_of_a_step_do_not_change_later(name):
    vector = make_family(name, variant="icml2017", horizon=3).make_vec(
        2, 1, autoreset_mode=DISABLED
    )
    vector.reset(seed=0)
    kept = []
    for action in actions(4, 2, vector.single_action_space.shape[0]):
        observation, reward, terminated, truncated, info = vector.step(action)
        given = {"o": observation, "r": reward, "end": terminated, "cut": truncated, **info}
        kept.append((given, {key: value.copy() for key, value in given.items()}))
    vector.reset(seed=1)
    for given, copies in kept:
        for key, value in given.items():
            np.testing.assert_array_equal(value, copies[key], err_msg=key)


def test_achieved_must_name_a_key_of_info():
    family = dataclasses.replace(make_family("navigation-2d"), achieved={"goal_x": "z_position"})
    told = ("navigation-2d", "achieved", "z_position", "x_position", "y_position")
    finding = check_task_family(family)[0]
    assert finding.severity == "fault"
    assert mentions(finding.message, *told)
    env = family.make()
    env.reset(seed=0)
    with refused(*told):
        env.step(np.zeros(2, np.float32))


def test_misuse_of_a_vector_environment_is_refused():
    family = make_family("half-cheetah-dir")
    with refused("autoreset_mode", "SameStp", "SameStep"):
        family.make_vec(1, 1, autoreset_mode="SameStp")
    with refused("num_tasks", "episodes", 0):
        family.make_vec(0, 1)
    vector = family.make_vec(2, 1)
    with pytest.raises(gym.error.ResetNeeded):
        vector.step(np.zeros((2, 6)))
    with refused("tasks", "2, 1", "1, 1"):
        vector.set_tasks([[1.0]])
    with refused("seed", 2, 3):
        vector.reset(seed=[1, 2, 3])
    vector.reset(seed=0)
    with refused("actions", "2, 6", "2, 5"):
        vector.step(np.zeros((2, 5)))


# Gymnasium ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "task"),
    [
        ("metarl/HalfCheetahDir-v0", {"direction": -1.0}),
        ("metarl/HalfCheetahVel-v0", {"velocity": 1.5}),
        ("metarl/Navigation2D-v0", {"goal": (0.3, -0.2)}),
        ("metarl/Bandit-v0", {"arm": (0.1, 0.9, 0.5, 0.5, 0.2)}),
        ("metarl/PendulumGravity-v0", {"g": 7.0}),
        ("metarl/CartPoleLength-v0", {"length": 1.2}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is .*infinity")
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space")
def test_gymnasium_ids_make_single_and_vector_environments(id, task):
    env = gym.make(id, **task)
    check_env(env.unwrapped, skip_render_check=True)
    vector = gym.make_vec(id, num_envs=3, **task)
    assert isinstance(vector.unwrapped, gym.vector.VectorEnv)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observation, info = vector.reset(seed=4)
    assert np.array_equal(observation[0], env.reset(seed=4)[0])
    np.testing.assert_array_equal(info["task"], [np.ravel(list(task.values()))] * 3)
    action = env.action_space.sample()
    one = env.step(action)
    all_three = vector.step(np.stack([action] * 3))
    assert np.array_equal(all_three[0][0], one[0])
    assert all_three[1][0] == one[1]
    # Without a task each reset draws one, by the seed.
    free = gym.make(id)
    tasks = [free.reset(seed=s)[1]["task"] for s in (1, 2, 3, 4, 5, 1)]
    assert np.array_equal(tasks[0], tasks[5])
    assert len({tuple(t) for t in tasks}) > 1


def test_gymnasium_ids_take_a_task_each_and_refuse_unknown_keywords():
    vector = gym.make_vec("metarl/HalfCheetahVel-v0", num_envs=3, velocity=[0.5, 1.0, 1.5])
    assert vector.reset(seed=0)[1]["task"].tolist() == [[0.5], [1.0], [1.5]]
    with refused("speed"):
        gym.make("metarl/HalfCheetahVel-v0", speed=1.0)
    with refused("velocity", "fast"):
        gym.make("metarl/HalfCheetahVel-v0", velocity="fast")
    with refused("velocity", "nan"):
        gym.make("metarl/HalfCheetahVel-v0", velocity=float("nan"))
    with refused("velocity", 3, "1.0, 2.0"):
        gym.make_vec("metarl/HalfCheetahVel-v0", num_envs=3, velocity=[1.0, 2.0])
    with refused("goal", "goal_x", "goal_y", 0.3):
        gym.make("metarl/Navigation2D-v0", goal=0.3)
    with refused("goal", "there"):
        gym.make("metarl/Navigation2D-v0", goal="there")
    free = gym.make("metarl/TabularMDP-v0", states=4)
    assert free.reset(seed=0)[1]["task"].shape == (4 * 5 * 5,)
    scaled = gym.make("metarl/HalfCheetahDir-v0", direction=1.0, variant="icml2017")
    assert scaled.observation_space.shape == (20,)


# Navigation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reading", "gain"), [("scaled", 0.1), ("clipped", 1.0)])
def test_navigation_moves_by_at_most_a_tenth_and_pays_the_distance(reading, gain):
    family = make_family("navigation-2d", actions=reading)
    vector = family.make_vec(1, 1, autoreset_mode=DISABLED)
    vector.set_tasks([[0.3, -0.4]])
    assert vector.reset(seed=0)[0].tolist() == [[0.0, 0.0]]
    bound = np.float32(0.1 / gain)
    position = np.zeros(2)
    for action in actions(30, 1, dim=2, scale=0.1 / gain):
        observation, reward, terminated, _, _ = vector.step(action)
        position = position + gain * np.clip(action[0], -bound, bound).astype(np.float64)
        np.testing.assert_allclose(observation[0], position, rtol=0, atol=1e-12)
        distance = np.hypot(*(position - [0.3, -0.4]))
        assert reward[0] == pytest.approx(-distance, abs=1e-12)
        assert not terminated[0]


def test_navigation_ends_at_the_goal():
    vector = make_family("navigation-2d").make_vec(2, 1, autoreset_mode=DISABLED)
    vector.set_tasks([[0.105, 0.005], [0.2, 0.2]])
    vector.reset(seed=0)
    *_, terminated, truncated, _ = vector.step(np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert terminated.tolist() == [True, False]
    observation, reward, terminated, truncated, _ = vector.step(np.ones((2, 2)))
    assert observation[0].tolist() == pytest.approx([0.1, 0.0])
    assert reward[0] == 0.0
    assert terminated.tolist() == [True, False]
    assert not truncated.any()


# Any Gymnasium environment ------------------------------------------------------------------------


def put_gravity(env: gym.Env, task: np.ndarray) -> None:
    env.g = float(task[0])  # type: ignore[attr-defined]


def pendulum(**changes) -> GymnasiumFamily:
    values = {
        "name": "pendulum-gravity",
        "env": "Pendulum-v1",
        "tasks": Uniform({"gravity": (5.0, 15.0)}),
        "set_task": put_gravity,
        "horizon": 30,
    }
    return GymnasiumFamily(**{**values, **changes})


def test_any_gymnasium_environment_becomes_a_family():
    vector = pendulum().make_vec(2, 2, autoreset_mode=DISABLED)
    vector.set_tasks([[6.0], [14.0]])
    observation, _ = vector.reset(seed=[1, 2, 3, 4])
    stock = [gym.make("Pendulum-v1") for _ in range(4)]
    for i, env in enumerate(stock):
        assert np.array_equal(observation[i], env.reset(seed=i + 1)[0])
        env.unwrapped.g = [6.0, 6.0, 14.0, 14.0][i]
    for t, action in enumerate(actions(30, 4, dim=1)):
        observation, reward, _, truncated, _ = vector.step(action)
        results = [env.step(a) for env, a in zip(stock, action, strict=True)]
        assert np.array_equal(observation, np.stack([r[0] for r in results]))
        assert reward.tolist() == [r[1] for r in results]
        assert truncated.all() == (t == 29)
    pickle.loads(pickle.dumps(pendulum()))


def test_a_single_environment_is_given_its_task_before_every_reset():
    env = pendulum().make(np.array([7.0]))
    for seed in (0, 1):
        env.reset(seed=seed)
        assert env.unwrapped.g == 7.0
        env.unwrapped.g = 0.0
    drawing = pendulum().make()
    gravities = [drawing.reset(seed=s)[1]["task"][0] for s in (1, 2, 1)]
    assert gravities[0] == gravities[2] != gravities[1]
    assert drawing.unwrapped.g == gravities[2]


def test_a_discrete_action_space_is_kept():
    env = pendulum(env="CartPole-v1", name="cart").make_bare()
    assert env.action_space == gym.spaces.Discrete(2)
    env.close()


def test_an_unknown_environment_id_and_an_object_that_is_no_family_are_refused(tmp_path):
    with refused("cart", "NoSuch-v0"):
        pendulum(env="NoSuch-v0", name="cart").make_vec(1, 1)
    (tmp_path / "odd_family.py").write_text("number = 3\n")
    with refused("odd_family:number", "TaskFamily", "int"):
        make_family("odd_family:number")


def test_dict_observations_are_flattened():
    class Both(gym.Env):
        observation_space = gym.spaces.Dict(
            {"a": gym.spaces.Box(-1, 1, (2,)), "b": gym.spaces.Discrete(3)}
        )
        action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return {"a": np.zeros(2, np.float32), "b": 1}, {}

    vector = pendulum(env=Both, name="both").make_vec(1, 1)
    assert vector.reset(seed=0)[0].tolist() == [[0.0, 0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import no_such_package", ["mine", "no_such_package", "mine.py", 1]),
        ("x = 1\nfamily = )", ["mine.py", 2]),
        ("def family():\n    return 1 / 0", ["mine:family", "ZeroDivisionError", "mine.py", 2]),
        ("def family(low):\n    return low", ["mine:family", "low", "--family-options"]),
    ],
)
def test_a_fault_in_a_users_file_is_one_line_with_file_and_line_number(
    tmp_path, monkeypatch, text, names
):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with refused(*names) as caught:
        make_family("mine:family")
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_that_is_taken_is_refused():
    def navigation_2d():
        """Another one."""

    with refused("navigation-2d", type(make_family("navigation-2d")).__module__):
        register(navigation_2d)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Uniform({"low": (1.0,)}), ["low", "(1.0,)"]),
        (lambda: Uniform({"low": (0.0, "x")}), ["low", 0.0, "x"]),
        (lambda: make_family("half-cheetah-vel", variant=3), ["variant", 3, "icml2017"]),
        (lambda: Finite("a", [[1.0]]), ["names", "('a',)"]),
        (lambda: Finite(("a",), [["x"]]), ["tasks", "x"]),
    ],
)
def test_arguments_that_make_no_distribution_are_refused(make, names):
    with refused(*names):
        make()


def test_a_box_without_components_is_refused():
    with refused():
        Uniform({})
