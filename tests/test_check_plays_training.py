"""`metarl check` plays what training plays: its seeds, its spaces, its types, episodes in a row."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from expecting import mentions, run

import metarl
from metarl.algorithms import find_algorithm
from metarl.domains.reinforcement import PolicyOptions, Reinforcement
from metarl.envs import GymnasiumFamily, Uniform, make_family
from metarl.envs.checks.checker import Finding, checks
from metarl.envs.errors import UserError
from metarl.envs.seeds import training_seeds
from metarl.sampling.rollouts import RandomKey


class Point(gym.Env):
    """A point on a line that pays its nearness to the task."""

    observation_space = gym.spaces.Box(-100.0, 100.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    task = np.zeros(1)
    count = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.count = self.np_random.uniform(-0.1, 0.1), 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        self.x += 0.1 * float(np.clip(np.sum(action), -1.0, 1.0))
        return self.observe(), -abs(self.x - float(self.task[0])), False, False, {}

    def observe(self):
        return np.array([self.x], np.float32)


def family(env=Point, **changes) -> GymnasiumFamily:
    tasks = Uniform({"goal": (-1.0, 1.0)})
    return GymnasiumFamily(
        **{"name": "point", "env": env, "tasks": tasks, "horizon": 10, **changes}
    )


def found(family, *names: str) -> list[Finding]:
    """Return the findings of some checks, those before them included; later ones are not made."""
    findings, left = [], set(names)
    for checked in checks(family):
        findings += checked.findings
        left.discard(checked.name)
        if not left:
            return findings
    raise AssertionError(f"no such checks: {left}")


def told(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.severity) for finding in findings]


# Seeds --------------------------------------------------------------------------------------------


class Engine(Point):
    """Its simulator takes seeds of a number of bits; all seeds are noted."""

    bits = 31
    seen: ClassVar[list[int]] = []

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seen.append(seed)
            if not 0 <= seed < 2**self.bits:
                raise OverflowError(f"seed {seed} does not fit")
        return super().reset(seed=seed, options=options)


class SmallEngine(Engine):
    bits = 16


engine = family(Engine)


def test_the_seeds_of_the_check_are_those_of_a_run():
    assert training_seeds(8, task=3) == RandomKey(0).episode_seeds(3, 8)
    assert max(training_seeds(8)) >= 2**31  # or the tests below would test nothing
    Engine.seen.clear()
    assert not found(engine, "dependence")
    seeds = set(Engine.seen)
    assert {seed % 2**31 for seed in training_seeds(2)} <= seeds


def test_an_engine_with_seeds_of_31_bits_is_trained_evaluated_and_adapted(tmp_path):
    name, out = f"{__name__}:engine", str(tmp_path / "run")
    sizes = ["--tasks", "4", "--episodes", "4"]
    workers = ["--workers", "0"]
    assert run("train", name, *sizes, *workers, "--iterations", "2", "--out", out) == 0
    assert run("evaluate", out, *sizes, *workers, "--steps", "1") == 0
    policy = metarl.load(out)
    adapted = policy.adapt([0.5], episodes=8)
    env = Engine()
    env.task = np.array([0.5])
    own = policy.adapt(env, episodes=8)
    for key, value in adapted.params.items():
        assert own.params[key].equal(value)


def test_an_engine_whose_seeds_are_smaller_still_is_found_by_the_check():
    fault, *_ = found(family(SmallEngine), "environment")
    assert fault.check == "environment"
    assert mentions(fault.message, "OverflowError")


def test_a_native_family_gets_seeds_of_32_bits():
    seed = 3 * 10**9
    one, other = (
        make_family("hopper-params").make_vec(1, 1).reset(seed=[s])[0] for s in (seed, seed - 2**31)
    )
    assert not np.array_equal(one, other)


# Spaces -------------------------------------------------------------------------------------------

Box = gym.spaces.Box
OBSERVED, ACTED = Point.observation_space, Point.action_space
SPACES = {
    "a point's": (OBSERVED, ACTED),
    "an action that is a number": (OBSERVED, Box(-1.0, 1.0, (), np.float32)),
    "a matrix of actions": (OBSERVED, Box(-1.0, 1.0, (2, 2), np.float32)),
    "no action": (OBSERVED, Box(-1.0, 1.0, (0,), np.float32)),
    "a matrix of choices": (OBSERVED, gym.spaces.MultiDiscrete([[2, 3]])),
    "choices": (OBSERVED, gym.spaces.MultiDiscrete([2, 3])),
    "text": (gym.spaces.Text(3), ACTED),
    "no observation": (Box(-1.0, 1.0, (0,), np.float32), ACTED),
    "an image": (Box(0, 255, (8, 8, 3), np.uint8), ACTED),
    "an image of one pixel": (Box(0, 255, (1, 1), np.uint8), ACTED),
}


@pytest.mark.parametrize("name", SPACES)
def test_check_refuses_the_spaces_that_training_refuses(name):
    observation, action = SPACES[name]

    class Sampled(Point):
        observation_space, action_space = observation, action

        def observe(self):
            return np.zeros(self.observation_space.shape, self.observation_space.dtype)

    mine = family(Sampled)
    try:
        Reinforcement().model(find_algorithm("maml-trpo"), PolicyOptions(), mine)
        trains = True
    except UserError:
        trains = False
    faults = [f for f in found(mine, "spaces") if f.severity == "fault"]
    assert trains == (not faults)


def acted_in(low, high) -> GymnasiumFamily:
    class Bounded(Point):
        action_space = Box(np.array(low, np.float32), np.array(high, np.float32))

    return family(Bounded)


RANGES = {
    "unit": ([-1.0], [1.0], None),
    "without bounds": ([-np.inf], [np.inf], None),
    "bounded below": ([0.0], [np.inf], None),
    "nothing to choose": ([0.0, 0.3], [0.0, 0.3], "fault"),
    "a locked joint": ([-1.0, 0.3], [1.0, 0.3], "warning"),
    "far from 0": ([10.0], [20.0], "warning"),
    "tiny": ([-1e-3], [1e-3], "warning"),
    "wide": ([-500.0], [500.0], "warning"),
}


@pytest.mark.parametrize("name", RANGES)
def test_bounds_of_actions_that_matter_to_a_policy_are_told(name):
    low, high, severity = RANGES[name]
    findings = found(acted_in(low, high), "gymnasium")
    assert [finding.severity for finding in findings] == ([] if severity is None else [severity])


def test_the_locked_component_is_named():
    (warning,) = found(acted_in([-1.0, 0.3], [1.0, 0.3]), "spaces")
    assert mentions(warning.message, "action 1", 0.3)


def test_far_bounds_name_the_option_that_helps():
    (warning,) = found(acted_in([10.0], [20.0]), "spaces")
    assert mentions(warning.message, "--policy.action scale")


# What steps return --------------------------------------------------------------------------------


def returning(change, at: int = 1) -> GymnasiumFamily:
    """A family whose step `at` returns what `change` makes of it."""

    class Changed(Point):
        def step(self, action):
            result = super().step(action)
            return change(*result) if self.count == at else result

    return family(Changed)


ODD = {
    "info": lambda o, r, e, t, info: (o, r, e, t, None),
    "terminated": lambda o, r, e, t, info: (o, r, None, t, info),
    "truncated": lambda o, r, e, t, info: (o, r, e, "no", info),
    "reward": lambda o, r, e, t, info: (o, None, e, t, info),
}


@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize("value", ODD)
def test_a_value_of_another_kind_is_a_fault_at_whatever_step(value, at):
    fault, *_ = found(returning(ODD[value], at), "episodes")
    assert fault.severity == "fault"
    assert mentions(fault.message, value)


SOUND = {
    "flags of NumPy": lambda o, r, e, t, info: (o, r, np.bool_(e), np.array(t), info),
    "flags 0 and 1": lambda o, r, e, t, info: (o, r, int(e), int(t), info),
    "a reward of NumPy": lambda o, r, e, t, info: (o, np.float32(r), e, t, info),
    "a whole reward": lambda o, r, e, t, info: (o, int(r), e, t, info),
}


@pytest.mark.parametrize("value", SOUND)
def test_kinds_that_training_takes_are_no_findings(value):
    assert told(found(returning(SOUND[value]), "gymnasium")) == []


class WornOut(Point):
    """Its third episode is without an observation."""

    def __init__(self):
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        return super().reset(seed=seed)

    def observe(self):
        return np.full(1, math.nan if self.episode == 3 and self.count == 5 else self.x, np.float32)


def test_several_episodes_are_played_in_one_environment_as_adapt_does():
    fault, *_ = found(family(WornOut), "episodes")
    assert told([fault]) == [("episodes", "fault")]
    assert mentions(fault.message, "step 5", "episode 3")


# Gymnasium's checker ------------------------------------------------------------------------------


class FixedSeed(Point):
    def reset(self, *, seed=5, options=None):
        return super().reset(seed=seed)


class OwnGenerator(Point):
    """Seeds a generator of its own, and not self.np_random."""

    def reset(self, *, seed=None, options=None):
        self.x, self.count = np.random.default_rng(seed).uniform(-0.1, 0.1), 0
        return self.observe(), {}


class OneBuffer(Point):
    def __init__(self):
        self.buffer = np.zeros(1, np.float32)

    def observe(self):
        self.buffer[0] = self.x
        return self.buffer


WARNED = {
    "a default seed": (FixedSeed, "seed"),
    "no super().reset": (OwnGenerator, "self.np_random"),
    "one buffer": (OneBuffer, "observations"),
}


@pytest.mark.parametrize("name", WARNED)
def test_a_rule_of_gymnasium_with_a_consequence_is_a_warning(name):
    env, word = WARNED[name]
    (warning,) = found(family(env), "gymnasium")
    assert told([warning]) == [("gymnasium", "warning")]
    assert mentions(warning.message, word)


class OldSeed(Point):
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def seed(self, seed=None):
        return []


class AnyKeywords(Point):
    def reset(self, **anything):
        return super().reset(**anything)


@pytest.mark.parametrize("env", [OldSeed, AnyKeywords])
def test_a_rule_of_gymnasium_that_training_does_not_depend_on_is_no_finding(env):
    assert told(found(family(env), "gymnasium")) == []


def test_what_gymnasium_may_say_some_day_is_passed_on_as_a_warning(monkeypatch):
    def new_check(env, **options):
        warnings.warn("frobnication is missing", stacklevel=1)

    monkeypatch.setattr("metarl.envs.checks.interface.check_env", new_check)
    (warning,) = found(family(), "gymnasium")
    assert told([warning]) == [("gymnasium", "warning")]
    assert mentions(warning.message, "frobnication")
