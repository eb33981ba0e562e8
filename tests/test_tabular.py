"""Random MDPs and bandits: their dynamics, and the best return against brute force."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
from expecting import mentions, refused
from gymnasium.vector import AutoresetMode

from metarl import evaluate, resolve
from metarl.domains.lookup import domain_of
from metarl.envs import make_family
from metarl.policies.meta_policy import MetaPolicy

DISABLED = AutoresetMode.DISABLED


def expected_return(rewards, transitions, policy) -> float:
    """Of a policy [horizon][state], by following the distribution over states forwards."""
    states = np.eye(len(rewards))[0]
    total = 0.0
    for choice in policy:
        total += sum(p * rewards[s, choice[s]] for s, p in enumerate(states))
        states = sum(p * transitions[s, choice[s]] for s, p in enumerate(states))
    return total


def test_no_policy_of_a_tiny_mdp_beats_the_optimum_and_one_reaches_it():
    family = make_family("tabular-mdp", states=2, actions=2, horizon=3)
    tasks = family.tasks.sample(np.random.default_rng(0), 6)
    choices = list(itertools.product(range(2), repeat=2))
    for i, best in enumerate(family.optimal_return(tasks)):
        rewards, transitions = (table[i] for table in family.tables(tasks))
        policies = itertools.product(choices, repeat=3)  # all 64 that count the steps
        returns = [expected_return(rewards, transitions, policy) for policy in policies]
        assert best == pytest.approx(max(returns), abs=1e-12)


def test_the_optimum_of_a_bandit_is_the_best_arm_every_time():
    family = make_family("bandit", arms=4, horizon=7)
    tasks = family.tasks.grid(9)
    np.testing.assert_allclose(family.optimal_return(tasks), 7 * tasks.max(axis=1))


def test_probability_and_reward_tables_are_components_of_the_task():
    family = make_family("tabular-mdp", states=3, actions=2)
    task = family.tasks.grid(1)
    rewards, transitions = family.tables(task)
    named = dict(zip(family.tasks.names, task[0], strict=True))
    assert rewards[0, 2, 1] == named["reward_2_1"]
    assert transitions[0, 1, 0, 2] == named["transition_1_0_2"]
    np.testing.assert_allclose(transitions.sum(axis=-1), 1.0)


def test_tasks_are_drawn_as_in_the_paper():
    tasks = make_family("tabular-mdp").tasks
    assert tasks.dim == 10 * 5 + 10 * 5 * 10
    drawn = tasks.sample(np.random.default_rng(0), 400)
    rewards, transitions = drawn[:, :50], drawn[:, 50:]
    assert rewards.mean() == pytest.approx(1.0, abs=0.03)
    assert rewards.std() == pytest.approx(1.0, abs=0.03)
    # A component of a flat Dirichlet of ten is Beta(1, 9).
    assert transitions.mean() == pytest.approx(0.1, abs=1e-3)
    assert transitions.var() == pytest.approx(1 * 9 / (10**2 * 11), rel=0.02)
    assert np.array_equal(tasks.grid(3), tasks.grid(3))
    assert not np.array_equal(tasks.grid(3), tasks.grid(3, "train"))
    low, high = tasks.bounds()
    assert ((low <= drawn) & (drawn <= high)).mean() > 0.995


def test_next_states_and_rewards_follow_the_tables():
    family = make_family("tabular-mdp", states=3, actions=2, horizon=4)
    episodes = 8000
    vector = family.make_vec(2, episodes, autoreset_mode=DISABLED)
    tasks = family.tasks.grid(2)
    vector.set_tasks(tasks)
    observation, _ = vector.reset(seed=0)
    assert (observation == np.eye(3)[0]).all()
    means, transitions = family.tables(tasks)
    rng = np.random.default_rng(1)
    owner = np.repeat([0, 1], episodes)
    seen = []
    for t in range(4):
        before = observation.argmax(axis=1)
        action = rng.integers(2, size=2 * episodes)
        observation, reward, terminated, truncated, _ = vector.step(action)
        assert (np.sort(observation, axis=1) == [0.0, 0.0, 1.0]).all()
        seen.append((owner, before, action, observation.argmax(axis=1), reward))
        assert not terminated.any()
        assert truncated.all() == (t == 3)
    owners, befores, actions, afters, rewards = (np.concatenate(x) for x in zip(*seen, strict=True))
    for i, s, a in itertools.product(range(2), range(3), range(2)):
        rows = (owners == i) & (befores == s) & (actions == a)
        n = rows.sum()
        frequency = np.bincount(afters[rows], minlength=3) / n
        assert np.abs(frequency - transitions[i, s, a]).max() < 4 * 0.5 / np.sqrt(n)
        assert rewards[rows].mean() == pytest.approx(means[i, s, a], abs=4 / np.sqrt(n))
        assert rewards[rows].std() == pytest.approx(1.0, abs=4 / np.sqrt(n))


def test_arms_pay_one_with_their_probability():
    family = make_family("bandit", arms=3, horizon=5)
    vector = family.make_vec(1, 4000, autoreset_mode=DISABLED)
    vector.set_tasks([[0.0, 0.3, 1.0]])
    vector.reset(seed=0)
    for arm, p in [(0, 0.0), (1, 0.3), (2, 1.0)]:
        observation, reward, *_ = vector.step(np.full(4000, arm))
        assert set(reward) <= {0.0, 1.0}
        assert reward.mean() == pytest.approx(p, abs=0.03 if 0 < p < 1 else 1e-6)
        assert (observation == 1.0).all()


@pytest.mark.parametrize("name", ["tabular-mdp", "bandit"])
def test_an_episode_depends_on_its_seed_and_task_alone(name):
    family = make_family(name)
    tasks = family.tasks.grid(3)
    vector = family.make_vec(3, 2, autoreset_mode=DISABLED)
    vector.set_tasks(tasks)
    vector.reset(seed=[4, 5, 6, 7, 8, 9])
    single = gym.wrappers.OrderEnforcing(family.make(tasks[2]))
    single.reset(seed=8)
    for t in range(10):
        action = np.random.default_rng(t).integers(5, size=6)
        observation, reward, *_ = vector.step(action)
        seen, paid, _, truncated, _ = single.step(action[4])
        assert np.array_equal(observation[4], seen)
        assert reward[4] == paid
    assert truncated


def test_bad_actions_and_sizes_are_refused():
    vector = make_family("bandit").make_vec(2, 1)
    vector.reset(seed=0)
    with refused("actions", 0, 4, 5):
        vector.step(np.array([0, 5]))
    with refused("actions", "0. 1."):
        vector.step(np.array([0.0, 1.0]))
    with refused("arms", 2, 1):
        make_family("bandit", arms=1)
    with refused("states", 2, 1):
        make_family("tabular-mdp", states=1)
    with refused("bandit", "human"):
        make_family("bandit").make(render_mode="human")


def test_evaluation_reports_the_optimum():
    config = resolve(None, "bandit")
    family = make_family("bandit")
    policy = domain_of(family).model(config.setup.algorithm, config.setup.policy, family)
    meta = MetaPolicy(policy.init(np.random.default_rng(0)), config.setup)
    found = evaluate(meta, tasks=8, episodes=2, steps=1, threads=1)
    arms = np.array(found.setting["tasks"])
    assert found.setting["optimal_returns"] == pytest.approx(arms.max(1) * family.horizon)
    best = f"{arms.max(1).mean() * family.horizon:.1f}"
    assert mentions(found.table(), best)
