"""check_task_family: sound families pass, and each broken one is told its own fault."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from expecting import mentions, refused, run

from metarl.envs import (
    Finite,
    GymnasiumFamily,
    Uniform,
    check_task_family,
    family_names,
    make_family,
)
from metarl.envs.checks.checker import CHECKS


class Point(gym.Env):
    """A point on a line, pushed about with a little chance; it pays its nearness to the task."""

    observation_space = gym.spaces.Box(-100.0, 100.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    task = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.1, 0.1)
        return self.observe(), {}

    def step(self, action):
        self.x += 0.1 * action[0] + 0.01 * self.np_random.standard_normal()
        reward = -abs(self.x - self.task[0]) + 0.1 * self.task[1]
        return self.observe(), float(reward), False, False, {}

    def observe(self):
        return np.array([self.x], np.float32)


def family(env=Point, **changes) -> GymnasiumFamily:
    tasks = Uniform({"goal": (-1.0, 1.0), "bonus": (0.0, 1.0)})
    return GymnasiumFamily(
        **{"name": "point", "env": env, "tasks": tasks, "horizon": 20, **changes}
    )


def put(env, task):
    env.task = task


def pay(observation, action, next_observation, info, task):
    return -np.abs(next_observation[:, 0] - task[:, 0]) + task[:, 1]


@pytest.mark.parametrize("name", family_names())
def test_the_families_of_the_package_pass(name):
    if name.startswith("metaworld"):
        pytest.importorskip("metaworld")
    assert check_task_family(make_family(name)) == []


# The broken ones ----------------------------------------------------------------------------------


class WrongShape(Point):
    def observe(self):
        return np.array([self.x, 0.0], np.float32)


class WrongDtype(Point):
    def observe(self):
        return np.array([self.x])


class TurnsNan(Point):
    def observe(self):
        return np.array([self.x if abs(self.x) < 0.15 else np.nan], np.float32)


class OutOfBounds(Point):
    observation_space = gym.spaces.Box(-0.15, 0.15, (1,), np.float32)


class NanReward(Point):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float("nan"), *rest


class RewardInAnArray(Point):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, np.array([reward]), *rest


class Unseeded(Point):
    def step(self, action):
        self.x += np.random.normal()  # noqa: NPY002
        return super().step(action)


class Remembers(Point):
    x = 0.0

    def reset(self, *, seed=None, options=None):
        before = self.x
        super().reset(seed=seed)
        self.x += before
        return self.observe(), {}


class NoSuperReset(Point):
    def reset(self, *, seed=None, options=None):
        self.x = 0.0
        return self.observe(), {}

    def step(self, action):
        self.x += 0.1 * action[0]
        return self.observe(), -abs(self.x - self.task[0]) + self.task[1], False, False, {}


class AnyKeywords(Point):
    def reset(self, **anything):
        return super().reset(**anything)


class OneBuffer(Point):
    buffer = np.zeros(1, np.float32)

    def observe(self):
        self.buffer[0] = self.x
        return self.buffer


class LosesItsTask(Point):
    def reset(self, *, seed=None, options=None):
        self.task = np.zeros(2)
        return super().reset(seed=seed)


class EndsItself(Point):
    def reset(self, *, seed=None, options=None):
        self.count = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.count += 1
        observation, reward, *_ = super().step(action)
        return observation, reward, False, self.count >= 5, {}


class OldReset(Point):
    def reset(self):
        return self.observe(), {}


class OldResetResult(Point):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class OldStep(Point):
    def step(self, action):
        return super().step(action)[:4]


class Raises(Point):
    def step(self, action):
        raise KeyError("speed")


class Pixels(Point):
    observation_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)

    def observe(self):
        return np.full((4, 4, 3), int(100 * abs(self.x)), np.uint8)


class Flat(gym.ObservationWrapper):
    """As minigrid's FlatObsWrapper: a vector of bytes out of an image."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (48,), np.uint8)

    def observation(self, observation):
        return observation.reshape(-1)

    def set_task(self, task):
        self.unwrapped.task = task


class PaysFloats(gym.RewardWrapper):
    """Mends what its inner environment gets wrong."""

    def reward(self, reward):
        return float(reward[0])

    def set_task(self, task):
        self.unwrapped.task = task


def flat_pixels():
    return Flat(Pixels())


def paid_in_floats():
    return PaysFloats(RewardInAnArray())


class SaysItsMission(Point):
    """As minigrid's environments: a part of the observation is text."""

    observation_space = gym.spaces.Dict(
        {"x": Point.observation_space, "mission": gym.spaces.Text(20)}
    )

    def observe(self):
        return {"x": super().observe(), "mission": "go"}


class FarLimit(Point):
    """As highway-env's speed limit: the task matters only where full thrust leads."""

    def step(self, action):
        self.x += 0.1 * action[0]
        reward = -float(self.task[0]) if self.x > 1.5 else 0.0
        return self.observe(), reward, False, False, {}


class BeyondReach(FarLimit):
    def step(self, action):
        self.x = min(self.x, 1.0)
        return super().step(action)


class TwoFaults(Point):
    """Not seeded, and its episodes leave the observation's bounds; a NaN is the reward."""

    observation_space = gym.spaces.Box(-0.15, 0.15, (1,), np.float32)

    def step(self, action):
        self.x += np.random.normal()  # noqa: NPY002
        observation, _, *rest = super().step(action)
        return observation, float("nan"), *rest


class Grows(Point):
    def __init__(self, size=1.0):
        self.size = int(size)
        self.observation_space = gym.spaces.Box(-100.0, 100.0, (self.size,), np.float32)

    def observe(self):
        return np.full(self.size, self.x, np.float32)


class MadeOfWhole(Point):
    def __init__(self, size=1):
        self.parts = list(range(size))


class NoTask(gym.Env):
    observation_space, action_space = Point.observation_space, Point.action_space


class GlobalRandomness(Uniform):
    def sample(self, rng, n, split="train"):
        return super().sample(np.random.default_rng(), n, split)


class FlatTasks(Uniform):
    def sample(self, rng, n, split="train"):
        return super().sample(rng, n, split)[:, 0]


def misspell(env, task):
    env.tsk = task


def forget(env, task):
    pass


def unpaid(observation, action, next_observation, info, task):
    return -np.abs(next_observation[:, 0])


def first_row_only(observation, action, next_observation, info, task):
    return -np.abs(next_observation[:, 0] - task[0, 0])


def column(observation, action, next_observation, info, task):
    return -np.abs(next_observation - task[:, :1])


def needs_the_main_program(env, task):
    env.task = task * main_program["more"]


def put_what_the_main_program_needs(env, task):
    if multiprocessing.parent_process() is not None:
        raise KeyError("not here")
    env.task = task


main_program = {"scale": 0.0}  # and a worker has only this


def put_what_the_main_program_says(env, task):
    env.task = task * main_program["scale"]


ONE = Uniform({"goal": (-1.0, 1.0)})
SOUND = {
    "its own attribute": {},
    "set_task": {"set_task": put},
    "a reward": {"reward": pay},
    "an image": {"env": Pixels},
    "a vector made of an image": {"env": flat_pixels},
    "a reset that takes any keywords": {"env": AnyKeywords},
    "a wrapper mends the reward": {"env": paid_in_floats},
    "only full thrust shows the task": {"env": FarLimit, "tasks": ONE},
    "registered by an import": {"env": "RegisteredHere-v0"},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_family_passes(name, monkeypatch):
    spec = gym.envs.registration.EnvSpec("RegisteredHere-v0", entry_point=Point)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    assert check_task_family(family(**SOUND[name])) == []


BROKEN = {
    "flat tasks": (
        {"tasks": FlatTasks({"goal": (0.0, 1.0), "bonus": (0.0, 1.0)})},
        "tasks",
        ["tasks.sample", "goal", "bonus", "(16,)"],
    ),
    "random tasks": (
        {"tasks": GlobalRandomness({"goal": (0.0, 1.0), "bonus": (0.0, 1.0)})},
        "tasks",
        ["tasks.sample"],
    ),
    "one task": ({"tasks": Finite(("goal", "bonus"), [[0.5, 0.0]])}, "tasks", []),
    "no way in": (
        {"env": NoTask},
        "environment",
        ["point", "set_task", "keywords", "reward", "task"],
    ),
    "unknown keyword": (
        {"env": "Pendulum-v1", "keywords": True, "tasks": Uniform({"gravity": (5.0, 15.0)})},
        "environment",
        ["point", "Pendulum-v1", "gravity"],
    ),
    "a whole number": (
        {"env": MadeOfWhole, "keywords": True, "tasks": Uniform({"size": (1.0, 4.0)})},
        "environment",
        ["point", "MadeOfWhole", "size", "int(size)"],
    ),
    "unknown id": ({"env": "Pendlum-v1"}, "environment", ["point", "Pendlum-v1"]),
    "old reset": ({"env": OldReset}, "environment", ["reset", "seed", "options"]),
    "old reset's result": (
        {"env": OldResetResult},
        "environment",
        ["reset", "observation", "info", "array"],
    ),
    "old step": ({"env": OldStep}, "environment", ["step", "terminated", "truncated", "info"]),
    "an exception": (
        {"env": Raises},
        "environment",
        ["KeyError", "speed", "test_checker.py", "step"],
    ),
    "text": (
        {"env": SaysItsMission},
        "spaces",
        ["point", "mission", "Text", "SaysItsMission", "FilterObservation"],
    ),
    "spaces that differ": (
        {"env": Grows, "keywords": True, "tasks": Uniform({"size": (1.0, 4.0)})},
        "spaces",
        ["observation_space", "(1,)", "(3,)"],
    ),
    "shape": ({"env": WrongShape}, "episodes", ["reset", "(2,)", "(1,)", "goal", "bonus"]),
    "dtype": ({"env": WrongDtype}, "episodes", ["reset", "float64", "float32", "goal"]),
    "NaN": ({"env": TurnsNan}, "episodes", ["step", "nan", "goal"]),
    "bounds": ({"env": OutOfBounds}, "episodes", ["step", -0.15, 0.15, "goal"]),
    "NaN reward": ({"env": NanReward}, "episodes", ["reward", "nan"]),
    "reward's shape": ({"env": RewardInAnArray}, "episodes", ["reward", "(1,)"]),
    "horizon": ({"env": EndsItself}, "episodes", ["horizon", 5, 20]),
    "reward of columns": ({"reward": column}, "episodes", ["point", "reward", "1, 1"]),
    "unseeded": ({"env": Unseeded}, "seeding", ["self.np_random"]),
    "not set back": ({"env": Remembers}, "seeding", ["reset"]),
    "no super().reset": ({"env": NoSuperReset}, "gymnasium", ["super().reset(seed=seed)"]),
    "one buffer": ({"env": OneBuffer}, "gymnasium", ["observations"]),
    "rows": ({"reward": first_row_only}, "batch", ["make_vec", "goal", "task[:, 0]"]),
    "lost at reset": ({"env": LosesItsTask}, "dependence", ["reset", "set_task"]),
    "misspelt": ({"set_task": misspell, "env": "Pendulum-v1"}, "dependence", ["set_task", "tsk"]),
    "forgotten": ({"set_task": forget}, "dependence", ["step", "set_task"]),
    "unpaid": ({"reward": unpaid}, "dependence", ["reward"]),
    "a component": (
        {"reward": lambda o, a, n, i, task: -np.abs(n[:, 0] - task[:, 0])},
        "dependence",
        ["bonus", 0, 1],
    ),
    "lambda": ({"set_task": lambda env, task: put(env, task)}, "pickling", ["set_task", "lambda"]),
    "lost on the way": (
        {"set_task": put_what_the_main_program_says},
        "worker",
        ["set_task", "reward"],
    ),
    "missing there": (
        {"set_task": needs_the_main_program},
        "worker",
        ["KeyError", "more", "test_checker.py", "needs_the_main_program"],
    ),
    "registered here": ({"env": "RegisteredHere-v0"}, "worker", ["point", "RegisteredHere-v0"]),
    "out of reach": ({"env": BeyondReach, "tasks": ONE}, "dependence", ["step", "set_task"]),
}
"""Changes to `family`; the check that finds their fault, and the names that it mentions."""
WARNINGS = (
    *("dtype", "bounds", "horizon", "no super().reset", "one buffer"),
    *("forgotten", "unpaid", "a component", "out of reach"),
)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_family_is_told_its_fault(fault, monkeypatch):
    monkeypatch.setitem(main_program, "scale", 1.0)
    monkeypatch.setitem(main_program, "more", 1.0)
    # An entry point that cannot be sent to a worker.
    spec = gym.envs.registration.EnvSpec("RegisteredHere-v0", entry_point=lambda: Point())
    monkeypatch.setitem(gym.registry, spec.id, spec)
    changes, check, names = BROKEN[fault]
    first, *more = check_task_family(family(**changes))
    assert first.check == check, first
    assert mentions(first.message, *names), first
    assert first.severity == ("warning" if fault in WARNINGS else "fault")
    after = {"seeding", "gymnasium", "dependence", "pickling", "worker"}
    assert {found.check for found in more} <= after


def test_independent_faults_are_found_in_one_run():
    goals = Uniform({"goal": (0.0, 1.0), "bonus": (0.0, 1.0)})
    broken = family(env=TwoFaults, tasks=goals, set_task=lambda env, task: put(env, task))
    found = check_task_family(broken)
    assert [finding.check for finding in found] == ["episodes", "seeding", "pickling"]
    assert mentions(found[-1].message, "set_task")


def test_the_worker_is_checked_after_a_fault_that_it_does_not_need():
    found = check_task_family(family(env=Unseeded, set_task=put_what_the_main_program_needs))
    assert [finding.check for finding in found] == ["seeding", "worker"]


def test_a_class_instead_of_a_family_is_refused():
    with refused("check_task_family", "TaskFamily", "type"):
        check_task_family(Point)  # type: ignore[arg-type]


# The command --------------------------------------------------------------------------------------

MODULE = """
from metarl.envs import GymnasiumFamily, Uniform

def family(horizon=30, key="g"):
    def put(env, task):
        setattr(env, key, task[0])
    return GymnasiumFamily(name="pendulum", env="Pendulum-v1", horizon=horizon,
        tasks=Uniform({"gravity": (5.0, 15.0)}), set_task=put)
"""


def test_the_command_lists_what_was_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "checked_family.py").write_text(MODULE)
    assert run("check", "checked_family:family") == 0
    assert mentions(capsys.readouterr().out, "gravity", 5, 15, "horizon", 30, *CHECKS)
    options = ["--family-options", "horizon=9", "key=gg"]
    assert run("check", "checked_family:family", *options) == 2
    out = capsys.readouterr().out
    assert mentions(out, "horizon", 9, *CHECKS)  # those after the fault too
    (line,) = (line for line in out.splitlines() if mentions(line, "dependence"))
    assert mentions(line, "set_task", "gg")
    assert run("check", "checked_family:famly") == 2
    assert mentions(capsys.readouterr().err, "famly", "family")


SCRIPT = """
from metarl.envs import check_task_family
from test_checker import family, put
for finding in check_task_family(family(set_task=put)):
    print(finding.check, finding.severity, finding.message)
"""


def test_a_script_without_a_main_guard_is_a_fault_of_the_worker(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.startswith("worker fault"), result.stderr
    assert mentions(result.stdout, "__name__", "__main__")
