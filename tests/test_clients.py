"""What other programs do with the environments: Gymnasium's makers, wrappers, loops, and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from expecting import refused, run
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import metarl
from metarl.envs import UserError, make_family
from metarl.plots.video import draws

CHEETAH = "metarl/HalfCheetahVel-v0"
NATIVE = {
    "metarl/HalfCheetahVel-v0": {},
    "metarl/HalfCheetahDir-v0": {"variant": "icml2017"},
    "metarl/AntVel-v0": {},
    "metarl/AntDir-v0": {"variant": "icml2017"},
    "metarl/AntGoal-v0": {},
    "metarl/HopperParams-v0": {},
    "metarl/Walker2dParams-v0": {},
    "metarl/SwimmerVel-v0": {},
    "metarl/HumanoidDir-v0": {},
    "metarl/Navigation2D-v0": {},
    "metarl/TabularMDP-v0": {},
    "metarl/Bandit-v0": {},
}
"""Ids, and options that select other code."""
MODES = [mode.value for mode in AutoresetMode]
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda env: pickle.loads(pickle.dumps(env)),
    "deepcopy": copy.deepcopy,
}


def same(one: Any, other: Any) -> None:
    """Compare results of environments to the last bit, infos with their keys."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, tuple) or (isinstance(one, np.ndarray) and one.dtype == object):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            same(x, y)
    else:
        assert np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
        assert np.shape(one) == np.shape(other)


def length(env: Any) -> int:
    """Return the number of steps of the first episode."""
    env.reset(seed=0)
    for t in range(1, 2000):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if np.any(terminated) or np.any(truncated):
            return t
    raise AssertionError


# Makers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize("id", [CHEETAH, "metarl/Bandit-v0", "metarl/PendulumGravity-v0"])
def test_an_unknown_keyword_is_the_type_error_after_which_others_retry(make, id):
    # TorchRL looks for these words of Python.
    with pytest.raises(TypeError, match="unexpected keyword argument 'frameskip'"):
        make(id, frameskip=1)
    with refused("frameskip", error=UserError):
        make(id, frameskip=1)


def test_a_misspelt_component_of_a_task_is_named():
    with refused("velocty", "velocity", error=TypeError):
        gym.make(CHEETAH, velocty=1.0)


@pytest.mark.parametrize("id", sorted(i for i in gym.registry if i.startswith("metarl/")))
def test_the_specification_of_an_id_has_its_horizon(id):
    if "MetaWorld" in id:
        pytest.importorskip("metaworld")
    env = gym.make(id)
    horizon = env.get_wrapper_attr("family").horizon
    assert gym.spec(id).max_episode_steps == env.spec.max_episode_steps == horizon


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 200),
        ({"max_episode_steps": 20}, 20),
        ({"max_episode_steps": 210}, 210),
        ({"variant": "promp2019"}, 100),
        ({"variant": "promp2019", "max_episode_steps": 110}, 110),
        ({"variant": "promp2019", "max_episode_steps": 200}, 200),
        ({"horizon": 10}, 10),
        ({"horizon": 210, "max_episode_steps": 210}, 210),
    ],
)
def test_episodes_end_at_the_limit_that_was_asked_for(make, options, steps):
    assert length(make(CHEETAH, **options)) == steps


def test_limits_that_cannot_hold_are_refused():
    with refused(300, "max_episode_steps"):  # Gymnasium would end episodes after 200 steps
        gym.make(CHEETAH, horizon=300)
    with refused("horizon", 300, "max_episode_steps", 100):
        gym.make(CHEETAH, horizon=300, max_episode_steps=100)
    for limit in (0, -1):
        with refused("max_episode_steps", limit):
            gym.make(CHEETAH, max_episode_steps=limit)


@pytest.mark.parametrize("id", [CHEETAH, "metarl/PendulumGravity-v0"])
def test_an_environment_is_made_again_from_its_specification(id):
    env = gym.make(id, max_episode_steps=7)
    assert length(gym.make(env.spec)) == length(env) == 7
    if id == CHEETAH:
        assert length(gym.make(EnvSpec.from_json(env.spec.to_json()))) == 7
        vector = gym.make_vec(id, num_envs=2, max_episode_steps=7)
        assert length(gym.make_vec(vector.spec)) == 7


def test_wrappers_that_need_a_limit_accept_a_native_environment():
    env = gym.wrappers.TimeAwareObservation(gym.make(CHEETAH))
    env.reset(seed=0)
    assert env.step(np.zeros(6))[0][-1] == 1.0
    assert env.observation_space.high[-1] == 200.0


@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is .*infinity")
def test_gymnasiums_checker_finds_nothing():
    for id in ("metarl/Navigation2D-v0", "metarl/Bandit-v0"):
        check_env(gym.make(id).unwrapped, skip_render_check=True)


# Loops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", NATIVE)
@pytest.mark.parametrize("mode", MODES)
def test_a_vector_environment_equals_gymnasiums_of_single_ones_bit_for_bit(id, mode):
    """Observations, rewards, flags and infos, across resets; simulations of one and of several."""
    options = {"max_episode_steps": 5, **NATIVE[id]}
    ours = gym.make_vec(id, num_envs=3, autoreset_mode=mode, **options)
    theirs = SyncVectorEnv([lambda: gym.make(id, **options)] * 3, autoreset_mode=mode)
    same(ours.reset(seed=4), theirs.reset(seed=4))
    ours.action_space.seed(1)
    for t in range(13):
        actions = ours.action_space.sample()
        one, other = ours.step(actions), theirs.step(actions)
        same(one, other)
        ended = one[2] | one[3]
        if mode == "Disabled" and ended.any():
            mask = {"options": {"reset_mask": ended}}
            seeds = [t + i for i in range(3)]
            same(ours.reset(seed=seeds, **mask), theirs.reset(seed=seeds, **mask))


@pytest.mark.parametrize("name", ["half-cheetah-dir", "half-cheetah-vel", "ant-dir", "ant-vel"])
@pytest.mark.parametrize("variant", ["stock", "icml2017"])
def test_one_simulation_computes_what_several_do_bit_for_bit(name, variant):
    family = make_family(name, variant=variant)
    task = family.tasks.grid(1)[0]
    env, vector = family.make(task), family.make_vec(1, 2, autoreset_mode="Disabled")
    vector.set_tasks(task[None])
    assert np.array_equal(env.reset(seed=3)[0], vector.reset(seed=[3, 4])[0][0])
    env.action_space.seed(0)
    for _ in range(60):
        action = 1.5 * env.action_space.sample()
        several = vector.step(np.stack([action, -action]))
        alone = env.step(action)
        same(alone[:4], tuple(values[0] for values in several[:4]))
        same(alone[4], {k: v[0] for k, v in several[4].items() if k[0] != "_"})
        if alone[2]:
            break


def test_an_ended_episode_stays_as_it_is_until_the_reset():
    env = gym.make(CHEETAH, max_episode_steps=3)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(6))
    length(env)
    last = env.step(np.ones(6))
    assert last[1:4] == (0.0, False, True)
    same(env.step(np.zeros(6))[:4], last[:4])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("id", [*NATIVE, "metarl/PendulumGravity-v0"])
def test_a_copied_environment_continues_bit_for_bit(id, how, count):
    options = {"max_episode_steps": 8, **NATIVE.get(id, {})}
    env = gym.make(id, **options) if count == 1 else gym.make_vec(id, num_envs=3, **options)
    env.reset(seed=2)
    env.action_space.seed(2)
    for _ in range(3):
        env.step(env.action_space.sample())
    actions = [env.action_space.sample() for _ in range(12)]

    def play(env: Any) -> tuple[Any, ...]:
        found = []
        for action in actions:
            found.append(env.step(action))
            if count == 1 and (found[-1][2] or found[-1][3]):
                found.append(env.reset())
        return tuple(found)

    copied, again = COPIES[how](env), COPIES[how](env)
    first = play(copied)  # which leaves the others as they were
    same(first, play(env))
    same(first, play(again))


@pytest.mark.parametrize("id", ["metarl/PendulumGravity-v0", CHEETAH])
def test_seeded_actions_and_resets_repeat_although_tasks_change(id):
    def play() -> tuple[Any, ...]:
        env = gym.make(id, max_episode_steps=4)
        env.action_space.seed(42)
        found = [env.reset(seed=42)]
        for _ in range(3):
            found += [env.step(env.action_space.sample()) for _ in range(4)]
            found.append(env.reset())
        return tuple(found)

    same(play(), play())


# Tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "name"), [(CHEETAH, "velocity"), ("metarl/PendulumGravity-v0", "g")]
)
def test_a_task_is_set_in_a_made_environment(id, name):
    env = gym.make(id)
    set_task, get_task = (env.get_wrapper_attr(x) for x in ("set_task", "get_task"))
    assert get_task() is None
    drawn = env.reset(seed=0)[1]["task"]
    assert np.array_equal(get_task(), drawn)
    set_task([1.5])
    assert env.reset(seed=0)[1]["task"] == get_task() == [1.5]
    set_task({name: 1.25})
    assert env.reset()[1]["task"] == [1.25]
    assert env.reset(options={"task": [1.75]})[1]["task"] == [1.75]
    assert env.reset()[1]["task"] == [1.75]  # and from then on
    set_task(None)
    assert np.array_equal(env.reset(seed=0)[1]["task"], drawn)
    for wrong in ([1.0, 2.0], [np.nan], 1.0, {"speed": 1.0}, "fast", ["fast"]):
        with refused():
            set_task(wrong)
        with refused():
            env.reset(options={"task": wrong})


def test_tasks_are_set_by_an_option_of_a_vector_environments_reset():
    vector = gym.make_vec(CHEETAH, num_envs=2)
    info = vector.reset(seed=0, options={"task": [[0.5], [1.0]]})[1]
    assert info["task"].tolist() == [[0.5], [1.0]]
    assert vector.reset()[1]["task"].tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_an_unknown_option_of_a_reset_is_refused(make):
    with refused("tsk", "task"):
        make(CHEETAH).reset(options={"tsk": [1.0]})


# Pictures -----------------------------------------------------------------------------------------

rendering = pytest.mark.skipif(not draws("egl"), reason="MuJoCo renders nothing here")


@pytest.fixture
def _egl(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")


@rendering
@pytest.mark.usefixtures("_egl")
def test_pictures_have_the_size_that_was_asked_for():
    env = gym.make(CHEETAH, render_mode="rgb_array", width=64, height=48)
    with pytest.raises(gym.error.ResetNeeded):
        env.render()
    env.reset(seed=0)
    assert env.render().shape == (48, 64, 3)
    vector = gym.make_vec(CHEETAH, num_envs=2, render_mode="rgb_array", width=64, height=48)
    vector.reset(seed=0)
    assert [frame.shape for frame in vector.render()] == [(48, 64, 3)] * 2
    with refused("width", 0):
        gym.make(CHEETAH, width=0)
    with refused("width", error=TypeError):
        gym.make("metarl/Bandit-v0", width=64)


@rendering
@pytest.mark.usefixtures("_egl")
@pytest.mark.parametrize("id", [CHEETAH, "metarl/AntDir-v0", "metarl/HopperParams-v0"])
def test_a_body_does_not_run_off_the_drawn_floor(id):
    env = gym.make(id, render_mode="rgb_array", width=64, height=64)
    env.reset(seed=0)
    sim = env.unwrapped.vector.sim
    start = sim.qpos.copy()

    def floor() -> np.ndarray:
        return env.render()[52:].astype(int)

    near = floor()
    assert near.std() > 20.0  # a chessboard
    for x in (60.0, -500.0):
        sim.qpos[0, 0] = x
        assert floor().std() > 20.0
    sim.qpos[...] = start
    assert np.array_equal(floor(), near)


@rendering
@pytest.mark.usefixtures("_egl")
def test_drawing_changes_nothing():
    env, other = (gym.make(CHEETAH, render_mode="rgb_array", width=8, height=8) for _ in range(2))
    for each in (env, other):
        each.reset(seed=0)
    for _ in range(20):
        other.render()
        action = env.action_space.sample()
        same(env.step(action), other.step(action))


# Names and words ----------------------------------------------------------------------------------


def test_every_public_name_can_be_imported():
    assert set(metarl._LAZY) | {"UserError", "check_task_family"} == set(metarl.__all__)
    for name in metarl.__all__:
        assert getattr(metarl, name).__name__ == name
    with pytest.raises(AttributeError):
        metarl.lod  # noqa: B018


@pytest.mark.slow
def test_the_benchmark_of_a_users_family_names_neither_preset_nor_ceiling(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "own_world.py").write_text(
        "from conftest import counting_family\nworld = counting_family(4)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    few = ["--tasks", "2", "--episodes", "2", "--repeats", "1", "--workers", "0"]
    assert run("benchmark", "own_world:world", *few) == 0
    out = capsys.readouterr().out
    assert "own_world:world" in out
    assert "pearl2019" not in out
    assert "ceiling" not in out
