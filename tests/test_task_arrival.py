"""A task that is set arrives in the environment, through wrappers too, or is an error."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from expecting import refused

from metarl.envs import GymnasiumFamily, Uniform, check_task_family


class Windy(gym.Env):
    """Moved by a wind that `blow` reads."""

    observation_space = gym.spaces.Box(-100, 100, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def blow(self) -> float:
        raise NotImplementedError

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-0.1, 0.1))
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += 0.1 * float(action[0]) + self.blow()
        return np.array([self.x], np.float32), -abs(self.x), False, False, {}


class Method(Windy):
    wind = 0.0

    def set_task(self, task):
        self.wind = float(task[0])

    def blow(self):
        return self.wind


class Attribute(Windy):
    task = np.zeros(1)

    def blow(self):
        return float(self.task[0])


class Keyword(Windy):
    def __init__(self, wind=0.0):
        self.wind = wind

    def blow(self):
        return self.wind


class Calm(Windy):
    def blow(self):
        return 0.0


class Keeps(gym.Wrapper):
    """Has a method of its own, and does not hand the task on."""

    def set_task(self, task):
        self.kept = task


class Passes(Keeps):
    def set_task(self, task):
        super().set_task(task)
        self.env.get_wrapper_attr("set_task")(task)


class Sets(Keeps):
    """Hands the task on as the attribute that the environment reads."""

    def set_task(self, task):
        self.unwrapped.wind = float(task[0])


class Shows(gym.Wrapper):
    """Has an attribute of its own."""

    task = np.zeros(1)


class Reads(gym.Wrapper):
    """Shows the task of the environment inside."""

    @property
    def task(self):
        return self.env.get_wrapper_attr("task")


class Deaf(Windy):
    """Its attribute is a property that takes everything and keeps nothing."""

    @property
    def task(self):
        return np.zeros(1)

    @task.setter
    def task(self, task):
        pass


class Indexed(Calm):
    """Uses the word for one of its own modes."""

    task = "pick"


def pay(observation, action, next_observation, info, task):
    return -np.abs(next_observation[:, 0] - task[:, 0])


def put_wind(env, task):
    env.wind = float(task[0])


def family(env, **changes):
    tasks = Uniform({"wind": (-0.5, 0.5)})
    return GymnasiumFamily(**{"name": "wind", "env": env, "tasks": tasks, "horizon": 5, **changes})


def ends(made: GymnasiumFamily) -> list[list[float]]:
    """Return where two winds lead after a step without force, in make and in make_vec."""
    winds = [[-0.4], [0.3]]
    vector = made.make_vec(2, 1)
    found = []
    for seed in (1, 2):  # an environment gets several tasks in its life
        vector.set_tasks(winds[::-1])
        vector.reset(seed=[seed, seed])
        vector.set_tasks(winds)
        starts, _ = vector.reset(seed=[seed, seed])
        after, *_ = vector.step(np.zeros((2, 1), np.float32))
        found.append((after - starts)[:, 0].tolist())
    alone = []
    for wind in winds:
        env = made.make(wind)
        start, _ = env.reset(seed=3)
        alone.append(float(env.step(np.zeros(1, np.float32))[0][0] - start[0]))
    return [*found, alone]


WAYS = {
    "a method": (lambda: Method(), {}),
    "a method, with a reward": (lambda: Method(), {"reward": pay}),
    "an attribute": (lambda: Attribute(), {}),
    "an attribute, with a reward": (lambda: Attribute(), {"reward": pay}),
    "a function, with a reward": (lambda: Method(), {"set_task": put_wind, "reward": pay}),
    "keywords, with a reward": (Keyword, {"keywords": True, "reward": pay}),
    "a wrapper hands it on": (lambda: Passes(Method()), {}),
    "two wrappers hand it on": (lambda: Passes(Passes(Method())), {"reward": pay}),
    "a wrapper sets the attribute": (lambda: Sets(Method()), {}),
    "a wrapper has an attribute too": (lambda: Shows(Attribute()), {}),
    "a wrapper has an attribute, the environment a method": (lambda: Shows(Method()), {}),
    "a wrapper's property": (lambda: Reads(Attribute()), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_task_arrives_by_each_way_of_setting_it(way):
    env, changes = WAYS[way]
    for found in ends(family(env, **changes)):
        assert found == pytest.approx([-0.4, 0.3], abs=1e-5)


@pytest.mark.parametrize("env", [lambda: Shows(Attribute()), lambda: Shows(Method())])
def test_a_wrapper_with_an_attribute_gets_the_task_too(env):
    made = family(env).make([0.25])
    made.reset(seed=0)
    assert made.get_wrapper_attr("task").tolist() == [0.25]
    layer = made
    while not isinstance(layer, Shows):
        layer = layer.env
    assert layer.task.tolist() == [0.25]


def test_a_wrapper_that_alone_uses_the_task_is_sound():
    made = family(lambda: Keeps(Calm())).make([0.25])
    made.reset(seed=0)
    assert made.get_wrapper_attr("kept").tolist() == [0.25]


@pytest.mark.parametrize(
    ("env", "inner"),
    [
        (lambda: Keeps(Method()), "Method"),
        (lambda: Keeps(Attribute()), "Attribute"),
        (lambda: Passes(Keeps(Method())), "Method"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"reward": pay}], ids=["alone", "reward"])
def test_a_wrapper_that_keeps_the_task_for_itself_is_refused(env, inner, changes):
    made = family(env, **changes)
    with refused("wind", "set_task", "Keeps", inner):
        made.make([0.3]).reset(seed=0)
    with refused("Keeps", inner):
        made.make_vec(1, 1).reset(seed=0)
    assert any(found.severity == "fault" for found in check_task_family(made))


def test_an_attribute_that_keeps_no_task_is_refused():
    with refused("wind", "task", "Deaf"):
        family(Deaf).make([0.3]).reset(seed=0)


def test_a_foreign_attribute_is_refused_alone_and_left_alone_with_a_reward():
    with refused("task", "Indexed", "'pick'", "set_task"):
        family(Indexed).make([0.3]).reset(seed=0)
    made = family(Indexed, reward=pay).make([0.3])
    made.reset(seed=0)
    assert made.unwrapped.task == "pick"


def ignores_its_keyword(wind):
    return Method()


def ignores_its_keyword_and_holds_another():
    return Attribute()


@pytest.mark.parametrize("changes", [{}, {"reward": pay}], ids=["alone", "reward"])
def test_keywords_and_a_way_of_the_environment_do_not_combine(changes):
    with refused("wind", "keywords", "Method", "set_task"):
        family(ignores_its_keyword, keywords=True, **changes).make([0.3]).reset(seed=0)
    with refused("wind", "keywords", "Attribute", "task"):
        family(lambda wind: Attribute(), keywords=True, **changes).make([0.3]).reset(seed=0)


def test_a_function_and_a_way_of_a_wrapper_do_not_combine():
    with refused("wind", "set_task", "Keeps"):
        family(lambda: Keeps(Method()), set_task=put_wind).make([0.3]).reset(seed=0)
    with refused("wind", "set_task", "Shows", "task"):
        family(lambda: Shows(Method()), set_task=put_wind).make([0.3]).reset(seed=0)


def put_nothing(env, task):
    env.wimd = float(task[0])


@pytest.mark.parametrize(
    ("env", "changes"),
    [(Method, {"set_task": put_nothing}), (Calm, {"set_task": put_wind}),
     (lambda wind: Calm(), {"keywords": True})],
    ids=["misspelt", "nobody reads it", "keyword unused"],
)  # fmt: skip
def test_check_doubts_a_way_that_changes_nothing_behind_a_reward(env, changes):
    found = check_task_family(family(env, reward=pay, **changes))
    doubts = [f for f in found if f.check == "dependence"]
    assert [f.severity for f in doubts] == ["warning"]


@pytest.mark.parametrize(
    ("env", "changes"),
    [(Method, {}), (Attribute, {}), (Method, {"set_task": put_wind}), (Calm, {})],
)
def test_check_finds_nothing_where_the_way_and_the_reward_both_count(env, changes):
    assert check_task_family(family(env, reward=pay, **changes)) == []
