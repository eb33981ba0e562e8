"""Observations, rewards, flags, info and actions of unusual types: taken as meant, or refused."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
from expecting import refused, run
from gymnasium.wrappers.utils import RunningMeanStd

from metarl.config.options import Config
from metarl.envs import GymnasiumFamily, Uniform, check_task_family
from metarl.envs.errors import UserError
from metarl.policies.meta_policy import MetaPolicy
from metarl.training.run import new_trainer

Box, Dict = gym.spaces.Box, gym.spaces.Dict
BYTES = Box(0, 255, (4, 5, 3), np.uint8)


class Point(gym.Env):
    """A point on a line; subclasses return what it sees and says in other types."""

    observation_space: gym.Space = Box(-10, 10, (1,), np.float32)
    action_space: gym.Space = Box(-1, 1, (1,), np.float32)
    task = np.zeros(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, float(self.np_random.uniform(-0.1, 0.1))
        return self.see(), {}

    def step(self, action):
        self.t += 1
        self.x = float(np.clip(self.x + 0.2 * np.ravel(action)[0], -9, 9))
        return self.see(), *self.say(-abs(self.x - float(self.task[0])))

    def see(self):
        return np.array([self.x], np.float32)

    def say(self, reward):
        return reward, self.t >= 4, False, {}


def family(env=Point, **changes):
    tasks = Uniform({"goal": (-1.0, 1.0)})
    return GymnasiumFamily(**{"name": "point", "env": env, "tasks": tasks, "horizon": 6, **changes})


def sees(space, see):
    return type("Sees", (Point,), {"observation_space": space, "see": see})


def says(say):
    return type("Says", (Point,), {"say": say})


def play_everywhere(made: GymnasiumFamily) -> None:
    """Play in make and make_vec, and adapt in a bare environment of the family."""
    env = made.make([0.5])
    env.reset(seed=0)
    for _ in range(2):
        env.step(env.action_space.sample())
    vector = made.make_vec(2, 1)
    vector.reset(seed=0)
    for _ in range(2):
        vector.step(vector.action_space.sample())


def faults(made: GymnasiumFamily) -> list[str]:
    """Name the checks that find a fault, except those of workers: the classes are made here."""
    found = [finding.check for finding in check_task_family(made) if finding.severity == "fault"]
    return [check for check in found if check not in ("pickling", "worker")]


def as_in(module, monkeypatch, made: GymnasiumFamily) -> Config:
    """Return a config that names the family."""
    monkeypatch.setattr(module, "present", made, raising=False)
    values = {"tasks": 2, "episodes": 2, "iterations": 1}
    return Config.of("test_observation_types:present", "maml-trpo").with_options(values)


@pytest.fixture
def named(monkeypatch):
    import sys

    return lambda made: as_in(sys.modules[__name__], monkeypatch, made)


present = family()

# Observations -------------------------------------------------------------------------------------

WHOLE = Box(-10, 10, (1,), np.int64)

REFUSED_OBSERVATIONS = {
    "floats in whole numbers": (WHOLE, lambda self: np.array([self.x])),
    "floats after the reset": (WHOLE, lambda self: np.array([self.x if self.t else 0])),
    "floats in bytes": (BYTES, lambda self: np.full(BYTES.shape, 0.5)),
    "below zero in bytes": (BYTES, lambda self: np.full(BYTES.shape, -1)),
    "too large for the dtype": (Box(0, 100, (1,), np.int8), lambda self: np.array([300])),
    "complex": (Point.observation_space, lambda self: np.array([1j])),
    "words": (Point.observation_space, lambda self: np.array(["1.5"])),
    "floats in a matrix of whole numbers": (
        Box(-10, 10, (2, 2), np.int64), lambda self: np.full((2, 2), self.x),
    ),
    "floats in a component": (
        Dict({"a": WHOLE, "b": Point.observation_space}),
        lambda self: {"a": np.array([self.x]), "b": np.zeros(1, np.float32)},
    ),
    "floats in a tuple": (gym.spaces.Tuple((WHOLE, WHOLE)), lambda self: (0.5, np.array([1]))),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_OBSERVATIONS)
def test_observations_that_their_space_cannot_hold_are_refused(kind):
    made = family(sees(*REFUSED_OBSERVATIONS[kind]))
    with pytest.raises(UserError):
        play_everywhere(made)
    vector = made.make_vec(2, 1)
    with refused("point"):
        vector.reset(seed=0)
        vector.step(vector.action_space.sample())
    assert faults(made)


ACCEPTED_OBSERVATIONS = {
    "float64 for float32": (Point.observation_space, lambda self: np.array([self.x])),
    "a list": (Point.observation_space, lambda self: [self.x]),
    "whole numbers for floats": (Point.observation_space, lambda self: np.array([round(self.x)])),
    "int32 for int64": (WHOLE, lambda self: np.array([round(self.x)], np.int32)),
    "bytes as int64": (BYTES, lambda self: np.full(BYTES.shape, 200)),
}


@pytest.mark.parametrize("kind", ACCEPTED_OBSERVATIONS)
def test_observations_that_keep_their_numbers_are_taken(kind):
    made = family(sees(*ACCEPTED_OBSERVATIONS[kind]))
    play_everywhere(made)
    assert not faults(made)


def test_floats_in_whole_numbers_are_refused_in_training_and_adaptation(named):
    with new_trainer(named(family())) as trainer:
        meta = trainer.meta_policy()
    wrong = sees(WHOLE, lambda self: np.array([self.x]))
    with refused("int64"):
        meta.adapt(wrong(), episodes=2)
    with refused("int64"), new_trainer(named(family(wrong))) as trainer:
        trainer.iterate()


# Images and dictionaries --------------------------------------------------------------------------


def flat_zero(space):
    return lambda self: gym.spaces.unflatten(space, np.zeros(gym.spaces.flatdim(space)))


IMAGES = {
    "in a Dict": (Dict({"camera": BYTES, "speed": Point.observation_space}), "camera"),
    "in a Dict in a Dict": (Dict({"sensors": Dict({"camera": BYTES})}), "sensors.camera"),
    "in a Tuple": (gym.spaces.Tuple((BYTES, Point.observation_space)), "0"),
    "grey": (Dict({"camera": Box(0, 255, (8, 8), np.uint8), "x": WHOLE}), "camera"),
    "as floats": (Dict({"camera": Box(0, 255, (8, 8), np.float32), "x": WHOLE}), "camera"),
    "floats alone": (Box(0, 255, (8, 8, 3), np.float32), "float32"),
    "a stack of images": (Box(0, 255, (2, 8, 8, 3), np.uint8), "uint8"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_that_would_become_raw_numbers_is_refused(kind, named):
    space, name = IMAGES[kind]
    made = family(sees(space, flat_zero(space)))
    with refused("point", name):
        new_trainer(named(made))
    assert check_task_family(made)


DICTS = {
    "a dictionary": (Dict({"b": WHOLE, "a": Box(0, 1, (2,))}), [("a", 0, 2), ("b", 2, 3)]),
    "keywords": (Dict(b=WHOLE, a=Box(0, 1, (2,))), [("b", 0, 1), ("a", 1, 3)]),
    "nested": (
        Dict({"z": Dict(y=gym.spaces.Discrete(3), x=WHOLE), "c": WHOLE}),
        [("c", 0, 1), ("z.y", 1, 4), ("z.x", 4, 5)],
    ),
    "a tuple": (gym.spaces.Tuple((WHOLE, gym.spaces.MultiBinary(2))), [("0", 0, 1), ("1", 1, 3)]),
}


@pytest.mark.parametrize("kind", DICTS)
def test_the_columns_are_those_of_the_flat_vector(kind):
    space, expected = DICTS[kind]
    made = family(sees(space, lambda self: space.sample()))
    assert made.columns() == expected
    assert made.make().observation_space.shape == (expected[-1][2],)


def test_the_columns_follow_the_order_that_flatten_has():
    space = Dict(b=Box(-1, 1, (2,)), a=Box(-1, 1, (1,)))
    seen = {"a": np.array([0.1], np.float32), "b": np.array([0.2, 0.3], np.float32)}
    made = family(sees(space, lambda self: seen))
    flat, _ = made.make().reset(seed=0)
    for name, start, end in made.columns():
        assert np.array_equal(flat[start:end], seen[name])


def test_check_prints_the_columns(capsys, monkeypatch, named):
    named(family(sees(DICTS["keywords"][0], lambda self: {"b": np.array([1]), "a": np.ones(2)})))
    run("check", "test_observation_types:present")
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if "column" in line]
    assert [line[-1] for line in lines] == ["b", "a"]
    assert [[word for word in line if word.isdigit()] for line in lines] == [["0"], ["1", "2"]]


# Rewards, flags, info -----------------------------------------------------------------------------

REFUSED_STEPS = {
    "a reward of one element": (lambda self, r: (np.array([r]), False, False, {}), "reward"),
    "no reward": (lambda self, r: (None, False, False, {}), "reward"),
    "a word as reward": (lambda self, r: ("1", False, False, {}), "reward"),
    "a complex reward": (lambda self, r: (1j, False, False, {}), "reward"),
    "no flag": (lambda self, r: (r, False, None, {}), "truncated"),
    "a flag of one element": (lambda self, r: (r, np.array([False]), False, {}), "terminated"),
    "a flag of two": (lambda self, r: (r, 2, False, {}), "terminated"),
    "no info": (lambda self, r: (r, False, False, None), "info"),
    "a list as info": (lambda self, r: (r, False, False, []), "info"),
}


@pytest.mark.parametrize("kind", REFUSED_STEPS)
def test_a_step_of_other_types_is_refused_everywhere(kind, named):
    say, name = REFUSED_STEPS[kind]
    made = family(says(say))
    for env in (made.make([0.5]), made.make_vec(1, 1)):
        env.reset(seed=0)
        with refused("point", name):
            env.step(np.zeros(env.action_space.shape, np.float32))
    assert faults(made)
    with refused("point", name), new_trainer(named(made)) as trainer:
        trainer.iterate()
    with new_trainer(named(family())) as trainer:
        meta = trainer.meta_policy()
    with refused(name):
        meta.adapt(says(say)(), episodes=2)


def test_all_that_is_wrong_with_a_step_is_told_at_once():
    env = family(says(lambda self, r: (None, None, None, None))).make([0.5])
    env.reset(seed=0)
    with refused("reward", "terminated", "truncated", "info"):
        env.step(np.zeros(1, np.float32))


def plain(self, reward):
    return reward, self.t >= 3, False, {}


ACCEPTED_STEPS = {
    "NumPy's numbers": lambda self, r: (np.float64(r), np.bool_(self.t >= 3), np.bool_(False), {}),
    "arrays without axes": lambda self, r: (np.array(r), np.array(self.t >= 3), np.array(0), {}),
    "whole numbers as flags": lambda self, r: (r, int(self.t >= 3), 0, {}),
}


@pytest.mark.parametrize("kind", ACCEPTED_STEPS)
def test_numbers_of_other_types_change_nothing(kind, named):
    rows, policies = [], []
    for say in (plain, ACCEPTED_STEPS[kind]):
        made = family(says(say))
        assert not faults(made)
        with new_trainer(named(made)) as trainer:
            rows.append(trainer.iterate()["return_post"])
            policies.append(trainer.meta_policy().adapt(says(say)(), episodes=2))
    assert rows[0] == rows[1]
    for name, p in policies[0].params.items():
        assert p.equal(policies[1].params[name])


def test_with_a_reward_function_the_environments_own_reward_may_be_none():
    made = family(
        says(lambda self, r: (None, False, False, {})),
        reward=lambda seen, action, after, info, task: -np.abs(after[:, 0] - task[:, 0]),
    )
    play_everywhere(made)


# Actions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [Box(-1, 1, (), np.float32), Box(-1, 1, (2, 2), np.float32)])
def test_check_and_train_agree_on_actions_that_are_not_flat(space, named):
    made = family(type("Acts", (Point,), {"action_space": space}))
    assert "spaces" in faults(made)
    with refused("Box"):
        new_trainer(named(made))


# Running statistics -------------------------------------------------------------------------------


class OwnNormalizer(gym.ObservationWrapper):
    """Normalizes as stable-baselines3 does, under a name of its own."""

    def __init__(self, env):
        super().__init__(env)
        self.statistics = RunningMeanStd(shape=(1,))

    def observation(self, observation):
        self.statistics.update(observation[None])
        return (observation - self.statistics.mean).astype(np.float32)


class Renamed(gym.wrappers.NormalizeReward):
    """A subclass is no other."""


NORMALIZED = {
    "observations": (lambda: gym.wrappers.NormalizeObservation(Point()), "NormalizeObservation"),
    "rewards": (lambda: gym.wrappers.NormalizeReward(Point()), "NormalizeReward"),
    "a subclass": (lambda: Renamed(Point()), "Renamed"),
    "deep inside": (
        lambda: gym.wrappers.RecordEpisodeStatistics(gym.wrappers.NormalizeReward(Point())),
        "NormalizeReward",
    ),
    "of one's own": (lambda: OwnNormalizer(Point()), "OwnNormalizer"),
}


@pytest.mark.parametrize("kind", NORMALIZED)
def test_wrappers_that_normalize_as_they_go_are_refused(kind, named):
    env, name = NORMALIZED[kind]
    made = family(env)
    with refused("point", name, "--policy.normalize"):
        made.make()
    assert faults(made)
    with new_trainer(named(family())) as trainer:
        meta = trainer.meta_policy()
    config = named(made)
    with refused(name, "--policy.normalize"):
        new_trainer(config)
    with refused(name, "--policy.normalize"):
        meta.adapt(env(), episodes=2)
    with refused(name, "--policy.normalize"):
        MetaPolicy(meta.params, meta.setup, {}).adapt([0.5], episodes=2)


def test_frozen_statistics_and_constant_factors_are_taken():
    def make():
        env = gym.wrappers.NormalizeObservation(Point())
        env.update_running_mean = False
        return gym.wrappers.TransformReward(env, lambda reward: 0.1 * reward)

    play_everywhere(family(make))


# Ends ---------------------------------------------------------------------------------------------


class Stuck(Point):
    """Cannot be closed, draws frames of other sizes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def close(self):
        raise RuntimeError("the engine is gone")

    def render(self):
        return np.full((40 + 10 * self.t, 60 + 10 * (self.t % 2), 3), 100, np.uint8)


def test_an_environment_that_cannot_be_closed_loses_nothing(tmp_path, named, caplog):
    made = dataclasses.replace(family(Stuck), name="stuck")
    named(made)
    out = str(tmp_path / "run")
    sizes = ["--tasks", "2", "--episodes", "2"]
    train = ["train", "test_observation_types:present", *sizes, "--iterations", "1"]
    assert run(*train, "--workers", "0", "--out", out) == 0
    assert run("evaluate", out, *sizes, "--workers", "0") == 0
    assert run("adapt", out, "--task", "goal=0.5", "--episodes", "2") == 0
    told = [record.getMessage() for record in caplog.records if "stuck" in record.getMessage()]
    assert told
    assert all("engine" in text and "\n" not in text for text in told)
    found = [f for f in check_task_family(made) if "engine" in f.message]
    assert found
    assert all(f.severity == "warning" for f in found)


def test_frames_that_change_their_size_become_a_video(tmp_path, named):
    named(family(Stuck))
    out = str(tmp_path / "run")
    train = ["train", "test_observation_types:present", "--tasks", "2", "--episodes", "2"]
    assert run(*train, "--iterations", "1", "--workers", "0", "--out", out) == 0
    video = tmp_path / "video.gif"
    assert run("record", out, "--task", "goal=0.5", "--out", str(video)) == 0
    assert video.read_bytes()[:3] == b"GIF"
