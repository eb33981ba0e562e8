"""Rollouts against a plain loop over environments; random streams; masks."""

from __future__ import annotations

import dataclasses
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    SPACES,
    CountingEnv,
    categorical_policy,
    code_family,
    counting_family,
    gaussian_policy,
    reals,
)
from expecting import refused

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.domains.reinforcement import PolicyOptions, make_policy
from metarl.envs import make_family
from metarl.models.networks import stack
from metarl.models.policies import PolicyModel
from metarl.sampling.episodes import collect_episodes
from metarl.sampling.rollouts import Collector, RandomKey
from metarl.sampling.seeding import episode_seeds, stream
from metarl.sampling.spaces import categories, env_action

POLICY = gaussian_policy(observation_dim=17, action_dim=6, hidden=(8,))


def per_task_params(policy: PolicyModel, tasks: int):
    each = [policy.init(np.random.default_rng(t)) for t in range(tasks)]
    return {name: torch.stack([p[name] for p in each]) for name in each[0]}


def test_collect_matches_a_plain_loop_over_single_environments(pool):
    family = make_family("half-cheetah-vel", horizon=25)
    tasks = family.tasks.grid(3)
    params = per_task_params(POLICY, 3)
    key = RandomKey(seed=4, iteration=7, inner_step=1)
    rollout = Collector(family, POLICY, 3, 2, pool).collect(params, tasks, key)
    assert rollout.observation.shape == (3, 2, 25, 17)
    assert rollout.env_steps == 150
    assert rollout.valid.all()
    for t in range(3):
        noise = POLICY.noise(key.noise(t), 2, 25)
        for e, seed in enumerate(key.episode_seeds(t, 2)):
            env = gym.make("HalfCheetah-v5", max_episode_steps=25)
            observation, _ = env.reset(seed=seed)
            for h in range(25):
                np.testing.assert_array_equal(
                    rollout.observation[t, e, h].numpy(), observation.astype(np.float32)
                )
                alone = {name: p[t] for name, p in params.items()}
                dist = POLICY.dist(alone, rollout.observation[t, e, h : h + 1])
                action = rollout.action[t, e, h].numpy()
                np.testing.assert_allclose(
                    action, dist["mean"][0].numpy() + noise[e, h], rtol=0, atol=1e-5
                )
                np.testing.assert_allclose(
                    rollout.behaviour["mean"][t, e, h], dist["mean"][0], rtol=0, atol=1e-5
                )
                observation, _, _, truncated, info = env.step(np.clip(action, -1, 1))
                cost = 0.05 * np.square(np.clip(action, -1, 1)).sum()
                reward = -abs(info["x_velocity"] - tasks[t, 0]) - cost
                assert float(rollout.reward[t, e, h]) == pytest.approx(reward, abs=1e-5)
            assert truncated
            np.testing.assert_array_equal(
                rollout.last_observation[t, e].numpy(), observation.astype(np.float32)
            )
    assert rollout.truncated.all()
    assert not rollout.terminated.any()


@pytest.mark.parametrize("name", ["half-cheetah-dir", "navigation-2d"])
def test_results_are_bit_identical_at_any_number_of_threads(name):
    family = make_family(name, horizon=15)
    sizes = {"half-cheetah-dir": (17, 6), "navigation-2d": (2, 2)}[name]
    policy = gaussian_policy(observation_dim=sizes[0], action_dim=sizes[1], hidden=(32, 32))
    tasks = family.tasks.sample(np.random.default_rng(0), 7)
    results = []
    for threads in (1, 2, 3, 7):
        with ChunkPool(threads) as pool:
            collector = Collector(family, policy, 7, 5, pool)
            results.append(collector.collect(per_task_params(policy, 7), tasks, RandomKey(1)))
    for other in results[1:]:
        for name in ("observation", "action", "reward", "valid", "last_observation"):
            assert torch.equal(getattr(results[0], name), getattr(other, name))


class Homebound(CountingEnv):
    """Steps only in the thread that made it, as what holds an OpenGL context does."""

    def __init__(self):
        self.home = threading.get_ident()

    def step(self, action):
        assert threading.get_ident() == self.home
        return super().step(action)


def test_python_environments_stay_in_the_thread_that_made_them(pool):
    family = dataclasses.replace(counting_family(), env=Homebound)
    policy = gaussian_policy(observation_dim=1, action_dim=1, hidden=(4,))
    collector = Collector(family, policy, 3, 2, pool)
    rollout = collector.collect(per_task_params(policy, 3), np.full((3, 1), 4.0), RandomKey(0))
    assert rollout.valid.sum(dim=2).tolist() == [[4, 4]] * 3


def test_a_single_environment_gives_the_episodes_of_the_vector(pool):
    family = make_family("half-cheetah-dir", horizon=5)
    params = POLICY.init(np.random.default_rng(0))
    key = RandomKey(3, split="test", inner_step=2)
    together = Collector(family, POLICY, 1, 3, pool).collect(
        stack(params, 1), np.array([[1.0]]), key
    )
    alone = collect_episodes(
        family.make(np.array([1.0])), POLICY, params, episodes=3, horizon=5, key=key
    )
    for name in ("observation", "action", "reward", "last_observation"):
        a, b = getattr(together, name), getattr(alone, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # Resets pass through no matrix product, whose bits may depend on the number of rows.
    assert torch.equal(together.observation[:, :, 0], alone.observation[:, :, 0])


def test_ragged_episodes_are_masked_and_zero_after_their_ends(pool):
    # Task g ends its episodes after g steps; reward t + 1 at step t.
    family = counting_family(horizon=6)
    policy = gaussian_policy(observation_dim=1, action_dim=1, hidden=())
    params = stack(policy.init(np.random.default_rng(0)), 3)
    rollout = Collector(family, policy, 3, 2, pool).collect(
        params, np.array([[1.0], [4.0], [9.0]]), RandomKey(0)
    )
    lengths = torch.tensor([1, 4, 6])
    assert torch.equal(rollout.valid.sum(-1), lengths[:, None].expand(3, 2))
    assert rollout.terminated.tolist() == [[True, True], [True, True], [False, False]]
    assert rollout.truncated.tolist() == [[False, False], [False, False], [True, True]]
    for name in ("observation", "action", "reward"):
        values = getattr(rollout, name)
        assert not values[~rollout.valid].any()
    assert rollout.returns()[:, 0].tolist() == pytest.approx([1.0, 10.0, 21.0])
    assert rollout.last_observation[:, 0, 0].tolist() == [1.0, 4.0, 6.0]
    assert rollout.env_steps == 2 * 11


def test_a_diverged_episode_is_left_out_whole(monkeypatch):
    family = make_family("half-cheetah-dir", horizon=10)
    make_vec = type(family).make_vec

    def sabotaged(*arguments, **options):
        env = make_vec(*arguments, **options)
        reset = env.reset

        def sabotage(**options):
            result = reset(**options)
            env.sim.qvel[4, 0] = 1e11  # episode 1 of task 1
            return result

        env.reset = sabotage
        return env

    monkeypatch.setattr(type(family), "make_vec", sabotaged)
    collector = Collector(family, POLICY, 2, 3, ChunkPool(1))
    rollout = collector.collect(per_task_params(POLICY, 2), np.array([[1.0], [-1.0]]), RandomKey(0))
    assert rollout.diverged.tolist() == [[False] * 3, [False, True, False]]
    assert rollout.env_steps == 50
    assert not rollout.valid[1, 1].any()
    assert torch.isnan(rollout.returns()[1, 1])
    assert torch.isfinite(rollout.mean_returns()).all()
    expected = rollout.returns()[1, [0, 2]].mean()
    torch.testing.assert_close(rollout.mean_returns()[1], expected)


def test_deterministic_actions_are_the_mean(pool):
    family = make_family("navigation-2d", horizon=5)
    policy = gaussian_policy(observation_dim=2, action_dim=2, hidden=(4,))
    params = stack(policy.init(np.random.default_rng(0)), 2)
    rollout = Collector(family, policy, 2, 2, pool).collect(
        params, family.tasks.grid(2), RandomKey(0), deterministic=True
    )
    assert torch.equal(rollout.action, rollout.behaviour["mean"])


def test_actions_are_clipped_or_scaled_to_the_bounds():
    space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))
    action = np.float32([[0.5, 0.5], [-3.0, 3.0]])
    np.testing.assert_allclose(env_action(action, space, "clip"), [[0.5, 0.5], [-2.0, 1.0]])
    np.testing.assert_allclose(env_action(action, space, "scale"), [[1.0, 0.75], [-2.0, 1.0]])


def test_unbounded_actions_are_not_scaled():
    low, high = np.float32([-2, -np.inf, 0]), np.float32([4, np.inf, np.inf])
    action = np.float32([[0.5, 7.0, -1.0]])
    found = env_action(action, gym.spaces.Box(low, high), "scale")
    np.testing.assert_allclose(found, [[2.5, 7.0, 0.0]])
    bytes_ = gym.spaces.Box(0, 255, (1,), np.uint8)
    assert env_action(np.float32([[0.0], [9.0]]), bytes_, "scale").tolist() == [[128], [255]]


@pytest.mark.parametrize("limit", [np.inf, np.finfo(np.float32).max])
def test_scaling_is_refused_if_every_action_is_unbounded(limit):
    options = PolicyOptions(action="scale")
    make_policy(options, reals(2), gym.spaces.Box(np.float32([-1, -limit]), np.float32([1, limit])))
    with refused("policy.action", "scale"):
        make_policy(options, reals(2), gym.spaces.Box(-limit, limit, (2,)))


def test_integer_actions_are_rounded():
    space = gym.spaces.Box(-3, 3, (5,), np.int32)
    found = env_action(np.float32([[-9.0, -0.6, 0.4, 0.6, 2.9]]), space, "clip")
    assert found.tolist() == [[-3, -1, 0, 1, 3]]
    assert found.dtype == np.int32


def test_a_policy_of_other_sizes_is_refused(pool):
    with refused("navigation-2d", "(2,)", "(17,)"):
        Collector(make_family("navigation-2d"), POLICY, 1, 1, pool)
    with refused("CountingEnv", "(1,)", "(17,)"):
        collect_episodes(CountingEnv(), POLICY, {}, episodes=1, horizon=1, key=RandomKey(0))


# Random streams -----------------------------------------------------------------------------------


def test_streams_differ_by_every_part_of_their_key():
    keys = [
        (0, 0, "noise", 0, 0), (1, 0, "noise", 0, 0), (0, 1, "noise", 0, 0),
        (0, 0, "reset", 0, 0), (0, 0, "noise", 1, 0), (0, 0, "noise", 0, 1),
        (0, 0, "test-noise", 0, 0), (0, 0, "validation-noise", 0, 0),
    ]  # fmt: skip
    draws = [tuple(stream(*key).integers(1 << 60, size=2)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert tuple(stream(*keys[0]).integers(1 << 60, size=2)) == draws[0]


def test_streams_of_an_episode_do_not_depend_on_the_number_of_episodes():
    few = episode_seeds(0, 0, "reset", 0, 3, episodes=3)
    assert episode_seeds(0, 0, "reset", 0, 3, episodes=10)[:3] == few
    key = RandomKey(0)
    few, more = (POLICY.noise(key.noise(2), episodes, 4) for episodes in (3, 5))
    assert np.array_equal(few, more[:3])


def test_results_of_chunks_come_back_in_order():
    assert slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    with ChunkPool(3) as pool:
        assert pool.map(lambda x: x * x, range(20)) == [x * x for x in range(20)]
        with pytest.raises(ZeroDivisionError):
            pool.map(lambda x: 1 / x, range(3))
        assert pool.map(lambda x: x, [1]) == [1]
    with refused("threads", 0):
        ChunkPool(0)


def test_after_an_error_no_thread_works_on_a_chunk():
    # Else what a thread still works with, environments say, might be closed under it.
    began, working = threading.Event(), []

    def work(chunk: int) -> None:
        if chunk == 0:
            began.wait(timeout=10.0)
            raise KeyboardInterrupt
        working.append(chunk)
        began.set()
        time.sleep(0.3)
        working.remove(chunk)

    with ChunkPool(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.map(work, range(2))
        assert working == []
        assert pool.map(lambda x: x, [1, 2]) == [1, 2]


def test_seeds_and_noise_differ_by_task_inner_step_and_split():
    places = [
        (RandomKey(0, iteration, split, step), task)
        for iteration in (0, 1)
        for split in ("train", "test", "validation")
        for step in (0, 1)
        for task in (0, 1)
    ]
    assert len({tuple(a.episode_seeds(task, 3)) for a, task in places}) == len(places)
    assert len({a.noise(task).standard_normal(6).tobytes() for a, task in places}) == len(places)


@pytest.mark.parametrize("kind", SPACES)
def test_discrete_actions_reach_the_environment_as_its_space_defines_them(kind):
    family = code_family(kind)
    found = categories(SPACES[kind])
    assert found == {"discrete": (3,), "shifted": (4,), "multi": (3, 2), "binary": (2,) * 4}[kind]
    policy = categorical_policy(observation_dim=4, hidden=(5,), categories=found)
    params = stack(policy.init(np.random.default_rng(0)), 2)
    tasks = np.array([[0.5], [-0.5]])
    with ChunkPool(1) as pool:
        collector = Collector(family, policy, 2, 3, pool)
        rollout = collector.collect(params, tasks, RandomKey(0))
        collector.close()
    assert rollout.action.shape == (2, 3, 7, len(found))
    digit = rollout.observation[..., :3].argmax(-1)  # one-hot, then the time
    assert torch.equal(rollout.observation[..., 3], torch.arange(7.0).expand(2, 3, 7))
    shown = rollout.action - (1.0 if kind == "shifted" else 0.0)
    expected = (shown == digit.unsqueeze(-1)).float().sum(-1) + torch.tensor([0.5, -0.5])[
        :, None, None
    ]
    torch.testing.assert_close(rollout.reward, expected)
    logits = policy.dist(params, rollout.observation.flatten(1, 2))["logits"]
    torch.testing.assert_close(rollout.behaviour["logits"].flatten(1, 2), logits)


def test_a_text_action_space_is_refused():
    with refused("Text", "Box", "Discrete", "MultiDiscrete", "MultiBinary"):
        categories(gym.spaces.Text(3))


class Announcing(CountingEnv):
    """Succeeds while its count is 2, and fails again afterwards."""

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "success": self.count == 2.0}


def test_success_at_any_step_of_an_episode_counts(pool):
    policy = gaussian_policy(observation_dim=1, action_dim=1, hidden=(4,))
    params = policy.init(np.random.default_rng(0))
    for length, done in ((1.0, False), (3.0, True)):
        env = Announcing()
        env.length = length
        rollout = collect_episodes(
            env, policy, params, episodes=2, horizon=5, key=RandomKey(seed=0)
        )
        assert rollout.success is not None
        assert rollout.success.tolist() == [[done, done]]
        assert rollout.success_rates().tolist() == pytest.approx([float(done)])
    mixed = dataclasses.replace(
        rollout,
        success=torch.tensor([[True, False, True], [False, False, False]]),
        diverged=torch.tensor([[False, False, True], [True, True, True]]),
    )
    assert float(mixed.success_rates()[0]) == pytest.approx(0.5)
    assert mixed.success_rates()[1].isnan()
