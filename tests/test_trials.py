"""Trials of several episodes, and RL^2: what a trial is, how long a state lasts, returns."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import code_family, counting_family, mostly_slow, same_params, timeless
from expecting import refused, run
from gymnasium.vector import AutoresetMode

import metarl
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.reinforcement import make_policy
from metarl.envs import MujocoFamily, TrialFamily, check_task_family, make_family
from metarl.envs.processes import pack, unpack
from metarl.envs.trials import EPISODE, episode_seed
from metarl.evaluation.benchmark import benchmark
from metarl.evaluation.breakdown import physics_seconds
from metarl.evaluation.tables import sampled
from metarl.learning.advantages import Advantages, estimate
from metarl.learning.baselines import LinearFeatures, ZeroBaseline
from metarl.learning.critic import Critic
from metarl.policies.loading import load, load_policy
from metarl.sampling.rollouts import Collector, RandomKey
from metarl.sampling.trials import baseline_input, episodes_of
from metarl.sampling.workers import WorkerCollector
from metarl.training.run import new_trainer, train

FAMILIES = ["recurrent_networks:marked", "cartpole-length", "tabular-mdp", "navigation-2d"]


def base_of(name):
    if name == "code":
        return code_family("shifted")
    options = {"horizon": 9} if name in ("navigation-2d", "tabular-mdp") else {}
    return make_family(name, **options)


# The environments ---------------------------------------------------------------------------------


def numbers(action, space):
    """Return an action as the numbers that the next observation has."""
    if isinstance(space, gym.spaces.Discrete):
        return [float(action == space.start + i) for i in range(space.n)]
    return list(action)


def played_alone(base, task, seed, actions, count):
    """Play a trial on one ordinary environment: [observation, reward, truncated, episode]."""
    with base.make(task) as env:
        number, steps, found = 0, 0, []
        size = len(numbers(actions[0], env.action_space))
        before = [*np.zeros(size), 0.0, 0.0]
        observation, _ = env.reset(seed=seed)
        for action in actions:
            seen = [*observation, *before]
            observation, reward, terminated, truncated, _ = env.step(action)
            steps += 1
            ended = terminated or truncated or steps == base.horizon
            over = ended and number == count - 1
            before = [*numbers(action, env.action_space), reward, float(ended)]
            found.append((seen, reward, over, number))
            if over:
                return found, [*observation, *before]
            if ended:
                number, steps = number + 1, 0
                observation, _ = env.reset(seed=episode_seed(seed, number))
    raise AssertionError("too few actions")


@pytest.mark.parametrize("name", [*FAMILIES, "code"])
def test_a_trial_is_several_episodes_of_one_ordinary_environment(name):
    base, count = base_of(name), 3
    family = TrialFamily.of(base, count)
    tasks = base.tasks.sample(np.random.default_rng(0), 3)
    env = family.make_vec(3, 2, autoreset_mode=AutoresetMode.DISABLED)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(family.horizon)]
    seeds = [5, 6, 7, 8, 9, 10]
    expected = [
        played_alone(base, tasks[i // 2], seed, [a[i] for a in actions], count)
        for i, seed in enumerate(seeds)
    ]
    assert len({len(steps) for steps, _ in expected}) > 1 or name not in FAMILIES[:2]  # ragged
    for _ in range(2):  # a trial leaves nothing behind
        env.set_tasks(tasks)
        observation, info = env.reset(seed=seeds)
        np.testing.assert_array_equal(info["task"], np.repeat(tasks, 2, axis=0))
        assert observation.dtype == env.single_observation_space.dtype
        for t, action in enumerate(actions):
            assert env.observation_space.contains(observation)
            for i, (steps, last) in enumerate(expected):
                seen = steps[t][0] if t < len(steps) else last
                np.testing.assert_allclose(observation[i], seen, rtol=1e-6)
            observation, reward, terminated, truncated, info = env.step(action)
            assert not terminated.any()
            for i, (steps, _) in enumerate(expected):
                if t < len(steps):
                    _, earned, over, number = steps[t]
                    assert reward[i] == pytest.approx(earned, rel=1e-6)
                    assert (truncated[i], info[EPISODE][i]) == (over, number)
                else:
                    assert (reward[i], truncated[i]) == (0.0, True)
            if truncated.all():
                break
        assert truncated.all()
    env.close()


@pytest.mark.parametrize("name", ["cartpole-length", "navigation-2d"])
def test_trials_of_ones_own_environment_are_those_of_the_family(name):
    longer = base_of(name)
    base = dataclasses.replace(longer, horizon=7)  # the family's horizon holds, not the env's
    family, task = TrialFamily.of(base, 3), base.tasks.grid(1)[0]
    env = family.wrap(longer.make(task))
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(family.horizon)]
    for seed in (3, 4):
        steps, last = played_alone(base, task, seed, actions, 3)
        observation, _ = env.reset(seed=seed)
        for action, (seen, reward, over, number) in zip(actions, steps, strict=False):
            np.testing.assert_allclose(observation, np.array(seen, np.float32), rtol=1e-6)
            assert env.observation_space.contains(observation)
            observation, earned, terminated, truncated, info = env.step(action)
            assert (earned, terminated, truncated) == (reward, False, over)
            assert info[EPISODE] == number
        np.testing.assert_allclose(observation, np.array(last, np.float32), rtol=1e-6)
    env.close()


def test_the_next_step_mode_starts_a_new_trial():
    env = TrialFamily.of(counting_family(), 2).make_vec(2, 2)  # it observes the steps of an episode
    observation, _ = env.reset(seed=3)
    before, count, resets = np.zeros(4, bool), np.zeros(4), 0
    for _ in range(60):
        observation, reward, _, truncated, _ = env.step(np.full((4, 1), 0.5, np.float32))
        for i in range(4):
            seen, action, earned, ended = observation[i]
            if before[i]:  # this step was the reset
                assert (seen, action, earned, ended, reward[i]) == (0.0, 0.0, 0.0, 0.0, 0.0)
                count[i], resets = 0.0, resets + 1
                continue
            count[i] += 1.0
            assert (action, earned) == (0.5, reward[i]) == (0.5, count[i])
            if ended and not truncated[i]:
                count[i] = 0.0
            assert seen == count[i]
        before = truncated
    assert resets > 8
    env.close()


@pytest.mark.parametrize("name", mostly_slow(["tabular-mdp", "cartpole-length"], "tabular-mdp"))
def test_trials_pass_the_checks_of_a_family(name):
    found = check_task_family(TrialFamily.of(base_of(name), 2))
    assert not [f for f in found if f.severity == "fault"], found


def test_seeds_of_episodes_are_functions_of_trial_and_episode():
    assert episode_seed(7, 0) == 7
    assert len({episode_seed(seed, k) for seed in range(5) for k in range(5)}) == 25
    assert episode_seed(None, 2) is None
    with refused("trial", 0):
        TrialFamily.of(base_of("tabular-mdp"), 0)
    with refused("flat"):
        TrialFamily.of(make_family("image_envs:corridor"), 2).make_vec(1, 1)


@pytest.mark.parametrize("name", FAMILIES[1:3])
def test_trials_are_made_again_in_another_process(name):
    family = TrialFamily.of(base_of(name), 3)
    again = unpack(pack(family))
    assert isinstance(again, TrialFamily)
    assert (again.horizon, again.count, again.base.name) == (family.horizon, 3, family.base.name)


# How long a state lasts ---------------------------------------------------------------------------


def policy_for(family, network):
    with family.make() as env:
        spaces = env.observation_space, env.action_space
    config = Config().with_options({"policy.network": network})
    return make_policy(config.setup.policy, *spaces)


@pytest.mark.parametrize("name", ["recurrent_networks:marked", "navigation-2d"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_lasts_for_one_trial_of_one_task(name, workers):
    # The policy's mean is a weight times the sum of everything that it has observed.
    base = base_of(name)
    family = TrialFamily.of(base, 3)
    policy = policy_for(family, "recurrent_networks:Sum")
    tasks = base.tasks.sample(np.random.default_rng(0), 5)
    one = [policy.init(np.random.default_rng(seed)) for seed in range(5)]
    params = {name: torch.stack([p[name] for p in one]) for name in one[0]}
    with ChunkPool(2) as pool:
        if workers and not base.parallel:
            collector = WorkerCollector(
                family, policy, 5, 4, info_keys=family.kept, workers=workers
            )
        else:
            collector = Collector(family, policy, 5, 4, pool, info_keys=family.kept)
        try:
            for iteration in range(2):
                rollout = collector.collect(params, tasks, RandomKey(0, iteration))
                total = rollout.observation.double().cumsum(dim=2)
                weight = params["network.head"].double()
                expected = torch.einsum("tehi,tio->teho", total, weight).float()
                found = rollout.behaviour["mean"]
                valid = rollout.valid.unsqueeze(-1)
                torch.testing.assert_close(found * valid, expected * valid, rtol=1e-4, atol=1e-4)
        finally:
            collector.close()
    assert bool((rollout.info[EPISODE].amax(dim=2) == 2).all())
    if not base.parallel:
        assert len(rollout.valid.sum(-1).unique()) > 3  # ragged


# Learning -----------------------------------------------------------------------------------------


@pytest.fixture
def rollout(pool):
    base = base_of("recurrent_networks:marked")
    family = TrialFamily.of(base, 3)
    policy = policy_for(family, "gru")
    collector = Collector(family, policy, 2, 4, pool, info_keys=family.kept)
    params = policy.init(np.random.default_rng(0))
    stacked = {name: p.expand(2, *p.shape) for name, p in params.items()}
    yield collector.collect(stacked, base.tasks.grid(2), RandomKey(0))
    collector.close()


def test_episodes_of_a_trial_are_cut_at_their_ends(rollout):
    parts = episodes_of(rollout, 3)
    for task in range(2):
        for e in range(4):
            place = 0
            for k, part in enumerate(parts):
                length = int(part.valid[task, e].sum())
                assert 1 <= length <= 8
                assert part.valid.shape == (2, 4, 8)
                inside = slice(place, place + length)
                for name in ("observation", "reward", "action"):
                    own, whole = getattr(part, name)[task, e], getattr(rollout, name)[task, e]
                    assert torch.equal(own[:length], whole[inside])
                    assert not own[length:].any()
                assert bool((rollout.info[EPISODE][task, e, inside] == k).all())
                place += length
            assert place == int(rollout.valid[task, e].sum())
    total = torch.stack([part.returns() for part in parts]).sum(0)
    torch.testing.assert_close(total, rollout.returns())


def test_a_baseline_of_trials_observes_the_episode_and_the_time_in_it(rollout):
    found = baseline_input(rollout)
    assert torch.equal(found[..., :-2], rollout.observation)
    for task in range(2):
        for e in range(4):
            before, time = 0, 0
            for t in range(int(rollout.valid[task, e].sum())):
                number = int(rollout.info[EPISODE][task, e, t])
                time = 0 if number != before else time
                assert found[task, e, t, -2:].tolist() == pytest.approx([number, time / 100.0])
                before, time = number, time + 1
    assert not found[~rollout.valid].any()
    plain = dataclasses.replace(rollout, info={})
    assert baseline_input(plain) is plain.observation


def test_the_end_of_an_episode_does_not_cut_the_return_of_a_trial(rollout, pool):
    options = Advantages(discount=0.9, gae_lambda=0.7, normalize=False)
    found, _ = estimate(rollout, options, ZeroBaseline(), {}, pool)
    for task in range(2):
        for e in range(4):
            total = 0.0
            for t in reversed(range(int(rollout.valid[task, e].sum()))):
                total = float(rollout.reward[task, e, t]) + 0.9 * 0.7 * total
                assert float(found[task, e, t]) == pytest.approx(total, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("baseline", ["linear", "critic"])
@pytest.mark.parametrize("outer", ["clipped", "trust-region"])
def test_rl2_trains_with_both_outer_steps(baseline, outer):
    options = {"outer": outer, "baseline": baseline, "tasks": 4, "episodes": 3, "threads": 2}
    config = Config.of("bandit", "rl2").with_options(options | {"trial.episodes": 3})
    kind = {"linear": LinearFeatures, "critic": Critic}[baseline]
    assert isinstance(config.setup.algorithm.baseline, kind)
    with new_trainer(config) as trainer:
        before = {name: p.clone() for name, p in trainer.state.params.items()}
        row = trainer.iterate()
        assert trainer.model.recurrent
        assert all(not torch.equal(p, before[name]) for name, p in trainer.state.params.items())
    assert len(row["returns"]) == 3
    assert row["return_pre"] == row["returns"][0]
    assert row["return_post"] == row["returns"][2]
    assert row["gain"] == pytest.approx(row["return_post"] - row["return_pre"])
    assert row["env_steps"] == 4 * 3 * 30
    assert row["episode_length"] == 10


def small(family="cartpole-length", **options):
    values = {"iterations": 3, "tasks": 5, "episodes": 2, "threads": 1, "checkpoint_every": 2}
    return Config.of(family, "rl2").with_options(values | {"policy.units": 7} | options)


@pytest.mark.parametrize("family", mostly_slow(["tabular-mdp", "cartpole-length"], "tabular-mdp"))
def test_a_run_on_trials_resumes_at_any_number_of_threads_bit_for_bit(family, tmp_path):
    whole = train(small(family), tmp_path / "whole")
    done: list[dict] = []
    train(small(family), tmp_path / "parts", callbacks=[done.append], stop=lambda: len(done) == 2)
    parts = train(small(family, threads=3), tmp_path / "parts", resume=True)
    assert same_params(whole, parts)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_training_on_trials_does_not_depend_on_workers_bit_for_bit():
    trained = []
    for workers in (0, 2):
        with new_trainer(small("recurrent_networks:marked", workers=workers)) as trainer:
            row = trainer.iterate()
            trained.append((trainer.state.params, row["returns"]))
    assert trained[0][1] == trained[1][1]
    for name, p in trained[0][0].items():
        assert torch.equal(p, trained[1][0][name])


# After training -----------------------------------------------------------------------------------


@pytest.fixture
def meta(tmp_path):
    config = small("bandit", iterations=1, **{"trial.episodes": 3})
    return train(config, tmp_path / "run")


def test_an_evaluation_has_the_return_of_each_episode_of_a_trial(meta, undrawn):
    found = metarl.evaluate(meta, tasks=4, episodes=5, threads=1)
    assert found.curve.per_task.shape == (4, 3)
    assert found.curve.step_sizes == []
    longer = metarl.evaluate(meta, tasks=4, episodes=5, steps=5, threads=1)
    assert longer.curve.per_task.shape == (4, 6)
    assert found.to_json()["adapts_in"] == "episode"
    assert "5 trials" in sampled(found.to_json())
    assert "2 episodes" in found.table()
    collected = {}
    for k, part in enumerate(np.moveaxis(found.curve.per_episode[0], 1, 0)):
        assert part.shape == (4, 5)
        collected[k] = part.mean(axis=1)
    np.testing.assert_allclose(np.stack(list(collected.values()), 1), found.curve.per_task)


def test_policies_of_trials_stand_beside_policies_of_inner_steps(meta, tmp_path, undrawn):
    config = Config.of("bandit", "pretrained").with_options({"tasks": 4, "iterations": 1})
    other = train(config, tmp_path / "other")
    found = metarl.evaluate(meta, tasks=3, episodes=4, references={"one": other}, threads=1)
    assert found.references["one"].per_task.shape == (3, 3)
    assert len(found.references["one"].step_sizes) == 2


def test_a_policy_of_trials_is_played_saved_and_exported(meta, tmp_path, capsys):
    task = meta.family.tasks.grid(1)[0]
    policy = meta.adapt(task)
    assert policy.provenance["steps"] == 0
    with meta.played.make(task) as env:
        steps = []
        policy.play(env, seed=0, on_step=lambda t, total: steps.append(t))
        assert steps[-1] == 30
        state = policy.initial_state()
        observation, _ = env.reset(seed=0)
        action, state = policy.act(observation, state=state)
        assert env.action_space.contains(action)
    policy.save(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert loaded.policy.observation_shape == (1 + 5 + 2,)
    words = [f"{name}={x}" for name, x in zip(meta.family.tasks.names, task, strict=True)]
    assert run("adapt", str(tmp_path / "run"), "--task", *words, "--episodes", "2") == 0
    assert "2 episodes" in capsys.readouterr().out
    assert run("export", str(tmp_path / "run"), "--out", str(tmp_path / "policy.pt")) == 0
    with refused("rl2"):
        meta.adapter()
    with meta.family.make(task) as own:
        with refused("wrap"):
            meta.adapt(own)
        env = meta.played.wrap(own)
        with meta.played.make(task) as played:
            assert meta.adapt(env).play(env, seed=4) == meta.adapt(task).play(played, seed=4)
    assert same_params(load(tmp_path / "run"), meta)


def test_trials_are_refused_where_they_have_no_meaning():
    with refused("rl2", "sinusoid"):
        new_trainer(metarl.resolve(None, "sinusoid", "rl2"))
    with refused("trial.episodes", 0):
        metarl.resolve(None, "bandit", "rl2", {"trial.episodes": 0})
    with refused("trial.episodes"):
        metarl.resolve(None, "bandit", "maml-trpo", {"trial.episodes": 2})
    with refused("inner.step_sizes"):
        metarl.resolve(None, "bandit", "rl2", {"inner.step_sizes": (0.1,)})


def test_the_benchmark_replays_the_last_episode_of_each_trial(monkeypatch):
    values = {"iterations": 1, "tasks": 2, "episodes": 3, "policy.units": 7}
    config = Config.of("hopper-params", "rl2", {"horizon": 40}).with_options(values)
    made, make_vec = [], MujocoFamily.make_vec
    with new_trainer(config) as trainer:
        seen: list = []
        trainer.iterate(on_rollouts=seen.extend)
        monkeypatch.setattr(
            MujocoFamily, "make_vec", lambda *a, **k: made.append(make_vec(*a, **k)) or made[-1]
        )
        assert physics_seconds(trainer, seen[0], RandomKey(config.run.seed, 0)) > 0.0
    first, last = (env.sim.qpos[:, 1:].astype(np.float32) for env in made)
    observed = seen[0].last_observation.flatten(0, 1).numpy()[:, : last.shape[1]]
    assert np.array_equal(observed, last)
    assert not np.array_equal(first, last)
    result = benchmark(new_trainer(config), repeats=1)
    assert (result["horizon"], result["network"]) == (80, "gru")


@pytest.mark.learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rl2_learns_to_find_the_best_arm(seed):
    options = {"tasks": 40, "episodes": 5, "threads": 2, "iterations": 60, "seed": seed}
    options |= {"trial.episodes": 5, "outer": "trust-region", "outer.max_kl": 0.02}
    with new_trainer(Config.of("bandit", "rl2").with_options(options)) as trainer:
        rows = [trainer.iterate() for _ in range(60)]
    first, last = (
        np.mean([row[key] for row in rows[-10:]]) for key in ("return_pre", "return_post")
    )
    assert last > first + 0.5
    assert last > 6.0  # random choices earn 5
