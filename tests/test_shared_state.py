"""Copies of an environment that share state are found by `metarl check`."""

from __future__ import annotations

import random
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from expecting import mentions
from test_check_plays_training import Point, family, found

from metarl.envs import Uniform
from metarl.envs.checks.checker import checks


class Gusts(Point):
    """Seeds a global generator at the reset, and draws from it in step."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        if seed is not None:
            self.seed_all(seed)
        return result

    def step(self, action):
        self.x += self.draw()
        return super().step(action)

    def seed_all(self, seed):
        np.random.seed(seed)  # noqa: NPY002

    def draw(self):
        return np.random.randn()  # noqa: NPY002


class PythonsGusts(Gusts):
    def seed_all(self, seed):
        random.seed(seed)

    def draw(self):
        return random.gauss()


class TorchsGusts(Gusts):
    def seed_all(self, seed):
        torch.manual_seed(seed)

    def draw(self):
        return float(torch.randn(()))


class Simulator:
    x = 0.0


simulator = Simulator()


class OneSimulator(Point):
    """Its position is that of the only simulator there is."""

    @property
    def x(self):
        return simulator.x

    @x.setter
    def x(self, value):
        simulator.x = value


class ClassTask(Point):
    """set_task sets an attribute of the class."""

    def set_task(self, task):
        type(self).task = task


class ClassGenerator(Point):
    """Its generator belongs to the class."""

    rng = np.random.default_rng()

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            type(self).rng = np.random.default_rng(seed)
        return super().reset(seed=seed)

    def step(self, action):
        self.x += self.rng.normal()
        return super().step(action)


settings = {"goal": 0.0}


class GlobalSetting(Point):
    """The keyword arguments are kept for all copies."""

    task = None

    def __init__(self, goal):
        settings["goal"] = goal

    def step(self, action):
        self.x += 0.1 * float(action[0])
        return self.observe(), -abs(self.x - settings["goal"]), False, False, {}


class OneInfo(Point):
    """All copies return the same dictionary."""

    info: ClassVar[dict[str, float]] = {}

    def step(self, action):
        observation, reward, *ends, _ = super().step(action)
        self.info["x"] = self.x
        return observation, reward, *ends, self.info


class ClosesAll(Point):
    """Closing one copy ends the engine of all."""

    def __init__(self):
        ClosesAll.power = 1.0

    def step(self, action):
        return super().step(action * self.power)

    def close(self):
        ClosesAll.power = 0.0


SHARED = {
    "NumPy's generator": (Gusts, "numpy.random"),
    "Python's generator": (PythonsGusts, "random"),
    "torch's generator": (TorchsGusts, "torch"),
    "a generator of the class": (ClassGenerator, "step 1"),
    "a module-level simulator": (OneSimulator, "observations"),
    "a task of the class": (ClassTask, "rewards"),
    "one info": (OneInfo, "info"),
    "close": (ClosesAll, "closed"),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_copies_share_is_found_before_anything_else_is_blamed(name, monkeypatch):
    env, word = SHARED[name]
    monkeypatch.setattr(ClassTask, "task", np.zeros(1), raising=False)
    *_, fault = found(family(env), "dependence")
    assert (fault.check, fault.severity) == ("copies", "fault")
    assert mentions(fault.message, word)


def test_a_setting_that_a_constructor_leaves_for_all_copies_is_found():
    by_keyword = family(GlobalSetting, keywords=True, tasks=Uniform({"goal": (-1.0, 1.0)}))
    (fault,) = found(by_keyword, "copies")
    assert (fault.check, fault.severity) == ("copies", "fault")


def test_checks_that_build_on_copies_are_left_out():
    left_out = {checked.name: checked.left_out for checked in checks(family(Gusts))}
    assert left_out["batch"] == left_out["dependence"] == "copies"
    assert left_out["worker"] is None


class OnlySeeds(Gusts):
    """Seeds the global generator and draws from it in reset alone: copies do not meet there."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.1 * self.draw()
        return self.observe(), {}

    def step(self, action):
        return Point.step(self, action)


def test_a_global_generator_without_consequence_is_no_finding():
    assert found(family(OnlySeeds), "dependence") == []


def test_a_check_leaves_the_global_generators_as_they_are():
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    for env in (Gusts, PythonsGusts, TorchsGusts):
        found(family(env), "copies")
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


class Unseeded(Gusts):
    def seed_all(self, seed):
        pass


def test_an_episode_that_no_seed_determines_names_the_generator_that_was_used():
    (fault,) = found(family(Unseeded), "dependence")
    assert (fault.check, fault.severity) == ("seeding", "fault")
    assert mentions(fault.message, "numpy.random")


def test_the_spaces_of_an_environment_may_be_shared():
    assert isinstance(Point.action_space, gym.spaces.Box)
    assert found(family(Point), "dependence") == []
