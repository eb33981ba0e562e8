"""The ways in which a task reaches any Gymnasium environment, against that environment alone."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from conftest import reals
from expecting import refused
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.vector import AutoresetMode

from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.reinforcement import PolicyOptions, make_policy
from metarl.envs import GymnasiumFamily, Uniform, make_family
from metarl.envs.errors import NonFiniteError
from metarl.envs.families.classic_control import put_length
from metarl.learning.advantages import Advantages, to_batch
from metarl.learning.baselines import LinearFeatures
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import log_likelihood
from metarl.sampling.episodes import collect_episodes
from metarl.sampling.rollouts import Collector, RandomKey

DISABLED = AutoresetMode.DISABLED


def pendulum(**changes) -> GymnasiumFamily:
    tasks = Uniform({"g": (5.0, 15.0)})
    values = {"name": "pendulum", "env": "Pendulum-v1", "tasks": tasks, "horizon": 12}
    return GymnasiumFamily(**{**values, **changes})


def pushes(steps: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-2, 2, (steps, n, 1)).astype(np.float32)


def stock(gravity: float) -> gym.Env:
    return gym.make("Pendulum-v1", g=gravity)


# Keyword arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["Pendulum-v1", PendulumEnv])
def test_components_as_keywords_make_the_environment(env):
    vector = pendulum(env=env, keywords=True).make_vec(2, 2, autoreset_mode=DISABLED)
    for gravities in ([6.0, 14.0], [14.0, 9.0]):  # the second round makes them anew
        vector.set_tasks([[g] for g in gravities])
        observation, _ = vector.reset(seed=[1, 2, 3, 4])
        alone = [stock(g) for g in np.repeat(gravities, 2)]
        seen = [env.reset(seed=i + 1)[0] for i, env in enumerate(alone)]
        assert np.array_equal(observation, seen)
        for t, action in enumerate(pushes(12, 4)):
            observation, reward, _, truncated, _ = vector.step(action)
            results = [env.step(a) for env, a in zip(alone, action, strict=True)]
            assert np.array_equal(observation, [r[0] for r in results])
            assert reward.tolist() == [r[1] for r in results]
            assert truncated.all() == (t == 11)


def test_an_environment_is_made_again_only_for_another_task():
    made = []

    def make(g):
        made.append(g)
        return PendulumEnv(g=g)

    env = pendulum(env=make, keywords=True).make(np.array([7.0]))
    for seed in range(3):
        env.reset(seed=seed)
    assert made == [7.0]
    vector = pendulum(env=make, keywords=True).make_vec(1, 1)
    made.clear()
    for task in (8.0, 8.0, 9.0):
        vector.set_tasks([[task]])
        vector.reset(seed=0)
    assert made == [8.0, 9.0]


def test_a_new_environment_continues_the_random_numbers_of_the_one_before():
    # Seeded once, every later start is still the seed's, as in one environment that lives on.
    env, alone = pendulum(keywords=True).make(), stock(10.0)
    for run in range(2):
        starts = [env.reset(seed=5)[0]] + [env.reset()[0] for _ in range(3)]
        if run == 0:
            first = starts
    assert np.array_equal(first, starts)
    expected = [alone.reset(seed=5)[0]] + [alone.reset()[0] for _ in range(3)]
    assert np.array_equal(starts, expected)
    assert len({env.reset()[1]["task"][0] for _ in range(4)}) == 4


def test_other_options_and_the_render_mode_reach_the_environment():
    family = pendulum(
        env="CartPole-v1",
        keywords=True,
        tasks=Uniform({"gravity": (1.0, 2.0)}),
        env_options={"sutton_barto_reward": True},
    )
    with refused("CartPole-v1", "sutton_barto_reward", "gravity"):
        family.make()
    env = pendulum(keywords=True).make(np.array([9.0]), render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render_mode == "rgb_array"


def test_spaces_that_a_keyword_changes_are_refused():
    class Wide(gym.Env):
        action_space = gym.spaces.Box(-1, 1, (1,))

        def __init__(self, g):
            self.observation_space = gym.spaces.Box(-g, g, (1,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

    vector = pendulum(env=Wide, keywords=True).make_vec(1, 1)
    vector.set_tasks([[5.0]])
    with refused("pendulum", "observation_space", 10.0, 5.0):
        vector.reset(seed=0)


# A reward over an unchanged environment -----------------------------------------------------------

calls: list[int] = []


def hold_angle(observation, action, next_observation, info, task):
    calls.append(len(task))
    angle = np.arctan2(next_observation[:, 1], next_observation[:, 0])
    effort = np.square(action[:, 0]) + np.abs(next_observation[:, 2] - observation[:, 2])
    return -np.abs(angle - task[:, 0]) - 0.1 * effort


def test_a_reward_pays_by_the_task_and_the_environment_stays_as_it_is():
    family = pendulum(reward=hold_angle, tasks=Uniform({"angle": (-1.0, 1.0)}))
    vector = family.make_vec(2, 2, autoreset_mode=DISABLED)
    goals = [[-0.5], [0.7]]
    vector.set_tasks(goals)
    observation, _ = vector.reset(seed=[1, 2, 3, 4])
    alone = [gym.make("Pendulum-v1") for _ in range(4)]
    singles = [family.make(np.array(goals[i // 2])) for i in range(4)]
    for i in range(4):
        assert np.array_equal(observation[i], alone[i].reset(seed=i + 1)[0])
        singles[i].reset(seed=i + 1)
    calls.clear()
    for action in pushes(12, 4):
        before = observation
        observation, reward, *_ = vector.step(action)
        assert calls == [4]  # once for all rows
        for i, env in enumerate(alone):
            after = env.step(action[i])[0]
            assert np.array_equal(observation[i], after)
            effort = action[i, 0] ** 2 + abs(float(after[2]) - float(before[i, 2]))
            expected = -abs(np.arctan2(after[1], after[0]) - goals[i // 2][0]) - 0.1 * effort
            assert reward[i] == pytest.approx(expected, abs=1e-5)  # observations are float32
            assert singles[i].step(action[i])[1] == pytest.approx(reward[i], abs=1e-6)
        calls.clear()


class Ends(gym.Env):
    """Ends after as many steps as its seed; reports its speed, and its length only at the end."""

    observation_space = gym.spaces.Box(-9.0, 9.0, (1,))
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = seed or 3
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        end = self.time >= self.length
        info = {"speed": 10.0 * self.time, "note": "a word"} | ({"length": 1.0} if end else {})
        return np.full(1, self.time, np.float32), np.float32(99.0), end, False, info


def pay_speed(observation, action, next_observation, info, task):
    assert info["speed"].shape == action.shape == (len(task),)
    assert np.array_equal(info["speed"], 10.0 * next_observation[:, 0])
    return info["speed"] + action + task[:, 0]


def test_a_reward_sees_the_rows_that_moved_and_what_all_of_them_report():
    vector = pendulum(env=Ends, reward=pay_speed).make_vec(3, 1, autoreset_mode=DISABLED)
    vector.set_tasks([[5.0], [6.0], [7.0]])
    vector.reset(seed=[1, 3, 2])
    paid = []
    for _ in range(3):
        _, reward, terminated, _, _ = vector.step(np.array([2, 1, 0]))
        paid.append(reward.tolist())
    assert paid == [[17.0, 17.0, 17.0], [0.0, 27.0, 27.0], [0.0, 37.0, 0.0]]
    assert terminated.all()


class Blind(Ends):
    """Its sensor fails at the third step, or with an even seed from the beginning."""

    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.length, self.blind = 9, seed % 2 == 0
        return np.full_like(observation, np.nan if self.blind else 0.0), info

    def step(self, action):
        assert np.isfinite(action).all()
        observation, *rest = super().step(action)
        return observation * (np.nan if self.time == 3 else 1.0), *rest


def test_a_nan_observation_never_reaches_the_policy_and_is_reported_with_its_task():
    family = pendulum(
        env=Blind, set_task=lambda env, task: None, reward=lambda o, a, n, i, t: o[:, 0]
    )
    env = family.make_vec(1, 2, autoreset_mode=DISABLED)
    observation, _ = env.reset(seed=[1, 2])
    ends = []
    for _ in range(6):
        observation, reward, terminated, truncated, _ = env.step(0.0 * observation)
        assert not terminated.any()
        assert np.isfinite(reward).all()
        ends.append(truncated.tolist())
    assert ends == [[False, True]] * 3 + [[True, True]] * 3
    policy = make_policy(PolicyOptions(), reals(1), env.single_action_space)
    params = policy.init(np.random.default_rng(0))
    with ChunkPool(1) as pool:
        collector = Collector(family, policy, 2, 1, pool)
        adapter = GradientUpdate().adapter(policy, log_likelihood)

        def sample(stacked, k):
            rollout = collector.collect(stacked, np.full((2, 1), 9.0), RandomKey(0))
            return to_batch(policy, rollout, Advantages(), LinearFeatures(), {}, pool)

        with refused("observation", 9.0, error=NonFiniteError):  # the task's component
            InnerLoop(adapter, pool).run(sample, params, 2, steps=1, query=False)
    with refused("observation", 3, error=NonFiniteError):  # the step
        collect_episodes(Blind(), policy, params, episodes=1, horizon=9, key=RandomKey(0))


def test_a_reward_of_another_shape_is_refused():
    def column(observation, action, next_observation, info, task):
        return next_observation - task

    vector = pendulum(env=Ends, reward=column).make_vec(3, 1)
    vector.reset(seed=1)
    with refused("pendulum", "reward", "3, 1"):
        vector.step(np.zeros(3, np.int64))


def test_a_task_may_change_the_environment_and_its_reward():
    def put(env, task):
        env.g = task[0]

    def pay(observation, action, next_observation, info, task):
        return task[:, 0]

    env = pendulum(set_task=put, reward=pay).make(np.array([7.5]))
    env.reset(seed=0)
    assert env.unwrapped.g == env.step(np.zeros(1, np.float32))[1] == 7.5


class Ragged(PendulumEnv):
    """Tells what has another shape in every environment."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"seen": np.zeros(int(self.g)), "speed": float(self.state[1])}


def test_a_reward_reads_info_of_equal_and_of_varying_shapes():
    def put(env, task):
        env.g = task[0]

    def pay(before, action, after, info, task):
        assert info["speed"].dtype == np.float64
        return np.array([len(seen) for seen in info["seen"]])

    vector = pendulum(env=Ragged, set_task=put, reward=pay).make_vec(2, 1)
    vector.set_tasks([[5.0], [7.0]])
    vector.reset(seed=0)
    assert vector.step(np.zeros((2, 1), np.float32))[1].tolist() == [5.0, 7.0]


# The environment's own way ------------------------------------------------------------------------


class OwnMethod(Ends):
    def set_task(self, task):
        self.given = task.tolist()


class OwnAttribute(Ends):
    task = None


class WrapperMethod(gym.Wrapper):
    def set_task(self, task):
        self.unwrapped.given = task.tolist()


def test_an_environments_own_set_task_or_task_is_used():
    for env, name in (
        (OwnMethod, "given"),
        (OwnAttribute, "task"),
        (lambda: WrapperMethod(OwnAttribute()), "given"),
    ):
        made = []

        def make(env=env, made=made):
            made.append(env())
            return made[-1]

        single = pendulum(env=make).make(np.array([7.0]))
        single.reset(seed=0)
        assert getattr(single.unwrapped, name) == [7.0]
        made.clear()
        vector = pendulum(env=make).make_vec(2, 1)
        vector.set_tasks([[5.0], [6.0]])
        vector.reset(seed=0)
        given = [getattr(e.unwrapped, name, None) for e in made]
        assert [task for task in given if task is not None] == [[5.0], [6.0]]


@pytest.mark.parametrize("tasks", [{"g": (5.0, 15.0)}, None, [[5.0]]])
def test_tasks_that_are_no_distribution_are_refused(tasks):
    with refused("pendulum", "tasks", tasks, "Uniform"):
        pendulum(tasks=tasks, keywords=True)


def test_a_family_without_a_way_to_set_the_task_is_refused_and_the_ways_are_named():
    with refused("pendulum", "set_task", "keywords", "reward", "task"):
        pendulum().make()
    with refused("pendulum", "set_task", "keywords"):
        pendulum(keywords=True, set_task=put_length)
    with refused("pendulum", "env", "Ends"):
        pendulum(env=Ends())
    with refused("pendulum", "reward", 3):
        pendulum(reward=3)
    with refused("pendulum", "env", "dict"):
        pendulum(env=dict, set_task=put_length).make()


# Robustness ---------------------------------------------------------------------------------------


class OneBuffer(Ends):
    """Hands out the same array again and again."""

    seen = np.zeros(1, np.float32)

    def step(self, action):
        observation, *rest = super().step(action)
        self.seen[:] = observation
        return self.seen, *rest


def test_returned_observations_do_not_change_later():
    def pay(observation, action, next_observation, info, task):
        return (next_observation - observation)[:, 0]

    family = pendulum(env=OneBuffer, reward=pay)
    vector, single = family.make_vec(1, 1, autoreset_mode=DISABLED), family.make()
    kept = [vector.reset(seed=9)[0]]
    single.reset(seed=9)
    for _ in range(3):
        observation, reward, *_ = vector.step(np.zeros(1, np.int64))
        kept.append(observation)
        assert reward[0] == single.step(0)[1] == 1.0
    assert np.array_equal(np.concatenate(kept)[:, 0], [0.0, 1.0, 2.0, 3.0])


class Narrow(Ends):
    """float64 observations in a float32 space, a reward of float32, an end of its own."""

    def step(self, action):
        *_, terminated, _, info = super().step(action)
        return np.array([0.1]), np.float32(0.1), False, terminated, info


def test_types_are_those_of_the_spaces_and_own_truncation_counts():
    family = pendulum(env=Narrow, set_task=lambda env, task: None)
    vector = family.make_vec(2, 1, autoreset_mode=DISABLED)
    vector.reset(seed=[1, 2])
    observation, reward, terminated, truncated, _ = vector.step(np.zeros(2, np.int64))
    assert observation.dtype == np.float32
    assert reward.dtype == np.float64
    assert reward[0] == np.float64(np.float32(0.1))
    assert truncated.tolist() == [True, False]
    assert not terminated.any()


@pytest.mark.parametrize(
    ("space", "inside", "expected"),
    [
        (gym.spaces.Discrete(3, start=1), 3, [0, 0, 1]),
        (gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Box(0, 9, (2,)))), None, None),
        (gym.spaces.Dict(b=gym.spaces.MultiBinary(2), a=gym.spaces.Discrete(2)), None, None),
        (gym.spaces.Box(0.0, 1.0, (2, 2)), np.eye(2, dtype=np.float32), [1, 0, 0, 1]),
    ],
)  # fmt: skip
def test_observations_are_flattened_by_gymnasiums_own_utilities(space, inside, expected):
    if inside is None:
        space.seed(0)
        inside = space.sample()
        expected = gym.spaces.flatten(space, inside)

    class Shows(Ends):
        observation_space = space

        def reset(self, *, seed=None, options=None):
            gym.Env.reset(self, seed=seed)
            return inside, {}

    family = pendulum(env=Shows, set_task=lambda env, task: None)
    assert family.make_vec(2, 1).reset(seed=0)[0].tolist() == [list(expected)] * 2
    assert family.make().reset(seed=0)[0].tolist() == list(expected)


def test_an_observation_space_that_cannot_be_flattened_is_refused():
    class Talks(Ends):
        observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))

    with refused("pendulum", "Sequence"):
        pendulum(env=Talks, set_task=put_length).make()


# The two examples ---------------------------------------------------------------------------------


def test_pendulum_gravity_and_cartpole_length_are_the_stock_environments():
    env, alone = make_family("pendulum-gravity").make(np.array([12.0])), stock(12.0)
    assert np.array_equal(env.reset(seed=3)[0], alone.reset(seed=3)[0])
    for action in pushes(50, 1)[:, 0]:
        assert np.array_equal(env.step(action)[0], alone.step(action)[0])
    # A pole made with the stock class, its length in the constructor.
    cart = make_family("cartpole-length").make(np.array([1.5]))
    longer = gym.make("CartPole-v1").unwrapped
    longer.length, longer.polemass_length = 1.5, 0.1 * 1.5
    assert np.array_equal(cart.reset(seed=3)[0], longer.reset(seed=3)[0])
    moved = False
    for t in range(15):
        ours, theirs = cart.step(t % 2), longer.step(t % 2)
        assert np.array_equal(ours[0], theirs[0])
        moved = moved or ours[2]
    stock_pole = gym.make("CartPole-v1")
    stock_pole.reset(seed=3)
    for t in range(15):
        last = stock_pole.step(t % 2)
    assert not np.allclose(last[0], ours[0])
