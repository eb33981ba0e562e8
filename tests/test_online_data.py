"""What an `OnlineAdapter` is given: actions of the space, and whose they are."""

from __future__ import annotations

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import gaussian_policy, policy_options, reals
from expecting import refused

import metarl
from metarl.algorithms import Algorithm, find_algorithm
from metarl.config.options import Config, RunOptions
from metarl.config.setup import Setup
from metarl.domains.reinforcement import make_policy
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import likelihood_ratio
from metarl.learning.plausibility import FALSE_ALARM, Plausibility
from metarl.policies.loading import load, load_policy
from metarl.policies.meta_policy import MetaPolicy
from metarl.sampling.spaces import drawn_between, env_action, policy_action, uniform_log_prob

Box = gym.spaces.Box
UNIT, SIX = Box(-1.0, 1.0, (1,)), Box(-1.0, 1.0, (6,))
ARM = Box(
    np.array([0.0, 0.3, 0.0], np.float32),
    np.array([5.0, 0.3, np.inf], np.float32),
    dtype=np.float32,
)
SPACES = {
    "one": UNIT,
    "six": SIX,
    "wide": Box(-5.0, 5.0, (2,)),
    "unbounded": Box(-np.inf, np.inf, (2,)),
    "half": Box(np.float32([0.0, -np.inf]), np.float32([np.inf, 2.0])),
    "whole": Box(0, 4, (2,), np.int64),
    "arm": ARM,
    "discrete": gym.spaces.Discrete(2, start=5),
}
SCALED = ("one", "six", "wide", "whole", "arm")  # which have bounds to scale to
CASES = [*((name, "clip") for name in SPACES), *((name, "scale") for name in SCALED)]


def _meta(space, mode="clip", std=1.0, algorithm="maml-trpo", seed=0):
    box = isinstance(space, Box)
    options = {"action": mode, "initial_std": std} if box else {}
    family = "navigation-2d" if box else "cartpole-length"
    policy = policy_options(hidden=(8,), **options)
    setup = Setup(family=family, algorithm=find_algorithm(algorithm), policy=policy)
    network = make_policy(policy, reals(2 if box else 4), space)
    return MetaPolicy(network.init(np.random.default_rng(seed)), setup)


def _fires(meta, space, choose, steps, seed=0):
    """Return after how many transitions the adapter warns of the actions, None if it does not."""
    adapter, rng = meta.adapter(space, seed=seed), np.random.default_rng([seed, 1])
    size = meta.policy.observation_shape[0]
    policy = meta.adapter(space, seed=seed + 1).adapted()
    for t in range(steps):
        observation = rng.standard_normal(size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapter.add(observation, choose(policy, observation, rng), 0.0)
        if caught:
            assert [found.category for found in caught] == [UserWarning]
            return t + 1
    return None


@pytest.mark.parametrize(("space", "mode"), CASES)
def test_actions_of_the_policy_itself_are_plausible(space, mode):
    for seed, std in enumerate((1.0, 0.2, 3.0)):
        meta = _meta(SPACES[space], mode, 1.0 if space == "discrete" else std, seed=seed)
        own = lambda policy, seen, rng: policy.act(seen)  # noqa: E731
        assert _fires(meta, SPACES[space], own, 150, seed) is None


@pytest.mark.parametrize(("space", "mode"), CASES)
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_constant_actions_are_implausible_after_a_few_dozen(space, mode, std):
    meta = _meta(SPACES[space], mode, std)
    policy = meta.adapter(SPACES[space]).adapted()
    constant = policy.act(np.zeros(meta.policy.observation_shape))
    assert _fires(meta, SPACES[space], lambda *_: constant, 60) is not None


@pytest.mark.parametrize("space", SCALED)
@pytest.mark.parametrize("mode", ["clip", "scale"])
def test_uniform_actions_are_implausible_after_a_few_dozen(space, mode):
    chosen = SPACES[space]
    chosen.seed(0)
    meta = _meta(chosen, mode)
    assert _fires(meta, chosen, lambda *_: chosen.sample(), 60) is not None


def test_the_mean_is_no_sample():
    still = lambda policy, seen, rng: policy.act(seen, deterministic=True)  # noqa: E731
    assert _fires(_meta(UNIT), UNIT, still, 60) is not None


def test_there_is_one_warning(recwarn):
    adapter = _meta(UNIT).adapter(UNIT)
    for _ in range(200):
        adapter.add(np.zeros(2), [0.5], 0.0)
    assert len(recwarn) == 1


def test_false_alarms_are_as_rare_as_said():
    # 300 adapters of 30 actions each: two false alarms would be 60 times what is promised.
    policy = gaussian_policy(observation_dim=1, action_dim=1, hidden=())
    dist = {"mean": torch.zeros(1, 1), "log_std": torch.zeros(1, 1)}
    alarms = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        test = Plausibility(policy, uniform_log_prob(UNIT, "clip"), False, rng)
        for drawn in rng.standard_normal((30, 1)).clip(-1.0, 1.0):
            test.add(dist, *drawn_between(drawn, UNIT, "clip"))
        alarms += test.implausible
    assert alarms <= max(1, 20 * FALSE_ALARM * 300)


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (UNIT, [1.5]),
        (UNIT, [-1.01]),
        (UNIT, [np.nan]),
        (UNIT, [np.inf]),
        (UNIT, [0.0, 0.0]),
        (SPACES["half"], [-0.1, 0.0]),
        (SPACES["half"], [0.0, 2.1]),
        (SPACES["whole"], [0.5, 1.0]),
        (SPACES["whole"], [5, 1]),
        (ARM, [1.0, 0.4, 0.0]),
        (SPACES["discrete"], 4),
        (SPACES["discrete"], 7),
        (SPACES["discrete"], 5.5),
    ],
)
def test_actions_outside_the_space_are_refused(space, action):
    meta = _meta(space)
    adapter = meta.adapter(space)
    with refused() as caught:
        adapter.add(np.zeros(meta.policy.observation_shape), action, 0.0)
    assert type(space).__name__ in str(caught.value)
    assert str(action) in str(caught.value)
    assert adapter.transitions == 0


def test_rounding_of_a_bound_is_no_fault():
    space = Box(np.float32([-0.1]), np.float32([0.1]))
    adapter = _meta(space).adapter(space)
    adapter.add(np.zeros(2), [0.1], 0.0)
    adapter.add(np.zeros(2), np.array([-0.1], np.float64), 0.0)
    assert adapter.transitions == 2


# Bounds that are equal, one-sided, or far apart ---------------------------------------------------


@pytest.mark.parametrize("mode", ["clip", "scale"])
@pytest.mark.parametrize("space", [name for name in SPACES if name != "discrete"])
def test_both_directions_fit_each_other(space, mode):
    box = SPACES[space]
    raw = np.random.default_rng(0).standard_normal((200, *box.shape)).astype(np.float32)
    acts = env_action(raw, box, mode)
    for one, action in zip(raw, acts, strict=True):
        assert box.contains(action)
        back = policy_action(action, box, mode)
        assert np.isfinite(back).all()
        np.testing.assert_allclose(env_action(back, box, mode), action, rtol=1e-6, atol=1e-6)
        low, high = drawn_between(action, box, mode)
        assert ((low <= one + 1e-5) & (one - 1e-5 <= high)).all()


def test_a_locked_component_is_the_middle():
    assert policy_action([1.0, 0.3, 2.0], ARM, "scale").tolist() == pytest.approx([-0.6, 0.0, 2.0])
    low, high = drawn_between(np.float32([1.0, 0.3, 2.0]), ARM, "scale")
    assert np.isinf([low[1], high[1]]).all()  # whatever the policy drew became 0.3
    assert np.isnan(uniform_log_prob(ARM, "scale")[1:]).all()


def test_bounds_near_the_largest_float_do_not_overflow():
    far = Box(np.float32([2e38]), np.float32([3e38]))
    assert np.isfinite(env_action(np.float32([0.5]), far, "scale")).all()
    assert policy_action(np.float32([2.5e38]), far, "scale") == pytest.approx([0.0], abs=1e-6)


def test_a_locked_joint_adapts():
    adapter = _meta(ARM, "scale").adapter(ARM)
    rng = np.random.default_rng(0)
    for _ in range(20):
        seen = rng.standard_normal(2)
        action = adapter.act(seen)
        action[0] = 0.9 * action[0] + 0.05  # another than it gave
        adapter.add(seen, action, float(rng.standard_normal()))
    assert np.isfinite(adapter.adapted().act(np.zeros(2))).all()


# Whose actions they are ---------------------------------------------------------------------------


def _transitions(space, policy, count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        seen = rng.standard_normal(2).astype(np.float32)
        yield seen, policy.act(seen), float(rng.standard_normal())


def _log_prob(network, params, seen, action, space, mode="clip"):
    raw = torch.from_numpy(policy_action(action, space, mode))[None]
    dist = network.dist(params, torch.from_numpy(seen)[None])
    return float(network.log_prob(dist, raw)[0])


FAR = Box(-50.0, 50.0, (2,))


@pytest.mark.parametrize("algorithm", ["maml-trpo", "promp"])
def test_the_policys_own_densities_change_nothing(algorithm):
    meta = _meta(FAR, algorithm=algorithm)
    plain, told = meta.adapter(FAR), meta.adapter(FAR)
    policy = plain.adapted()
    for seen, action, reward in _transitions(FAR, meta.adapter(FAR, seed=1).adapted(), 40):
        plain.add(seen, action, reward)
        known = _log_prob(policy.policy, policy.params, seen, action, FAR)
        told.add(seen, action, reward, log_prob=known)
    for name, p in plain.adapted().params.items():
        assert torch.allclose(told.adapted().params[name], p, atol=1e-5), name


def test_densities_of_another_policy_weight_the_inner_step():
    meta, other = _meta(FAR), _meta(FAR, seed=5).adapter(FAR).adapted()
    adapter = meta.adapter(FAR)
    start = adapter.adapted()
    data = list(_transitions(FAR, other, 60))
    known = [_log_prob(other.policy, other.params, s, a, FAR) for s, a, _ in data]
    for (seen, action, reward), density in zip(data, known, strict=True):
        adapter.add(seen, action, reward, log_prob=density)
    found = adapter.adapted().params
    # The gradient by hand, of the mean of ratio times advantage; the baseline of 60 samples.
    rewards = np.array([reward for *_, reward in data])
    expected = _step_by_hand(start, data, known, rewards, meta.algorithm)
    for name, p in expected.items():
        assert torch.allclose(found[name], p, atol=1e-4), name
    assert any((found[n] - start.params[n]).abs().max() > 1e-3 for n in expected)


def _step_by_hand(start, data, known, rewards, algorithm):
    seen = np.stack([s for s, *_ in data]).astype(np.float64)
    o, t = np.clip(seen, -10, 10), np.arange(len(data))[:, None] / 100.0
    x = np.concatenate([o, o * o, t, t**2, t**3, np.ones_like(t)], axis=1)
    discount = algorithm.advantage.discount
    returns = np.array([
        sum(discount**k * r for k, r in enumerate(rewards[i:])) for i in range(len(data))
    ])  # fmt: skip
    ridge = algorithm.baseline.ridge * np.eye(x.shape[1])
    value = x @ np.linalg.solve(x.T @ x + ridge, x.T @ returns)
    advantage = returns - value
    advantage = (advantage - advantage.mean()) / advantage.std()
    leaves = {name: p.clone().requires_grad_() for name, p in start.params.items()}
    dist = start.policy.dist(leaves, torch.from_numpy(seen.astype(np.float32)))
    action = torch.from_numpy(np.stack([a for _, a, _ in data]))
    ratio = (start.policy.log_prob(dist, action) - torch.tensor(known)).exp()
    loss = -(ratio * torch.from_numpy(advantage.astype(np.float32))).mean()
    gradient = torch.autograd.grad(loss, list(leaves.values()))
    size = algorithm.inner.step_sizes[0]
    return {n: p.detach() - size * g for (n, p), g in zip(leaves.items(), gradient, strict=True)}


def test_actions_with_a_density_are_not_judged():
    adapter = _meta(UNIT).adapter(UNIT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            adapter.add(np.zeros(2), [0.5], 0.0, log_prob=-1.0)


def test_weights_on_next_to_nothing_are_warned_of():
    adapter = _meta(FAR).adapter(FAR)
    rng = np.random.default_rng(0)
    for t in range(50):
        action = rng.uniform(-1.0, 1.0, 2) if t else [0.0, 0.0]
        adapter.add(rng.standard_normal(2), action, 1.0, log_prob=5.0 if t else -5.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter.adapted()
        adapter.adapted()
    assert [found.category for found in caught] == [UserWarning]


@pytest.mark.parametrize("value", [np.nan, np.inf, "0.1", True])
def test_a_density_must_be_a_number(value):
    with refused("log_prob"):
        _meta(UNIT).adapter(UNIT).add(np.zeros(2), [0.5], 0.0, log_prob=value)


def test_a_density_that_the_inner_loss_has_no_use_for_is_refused():
    adapter = _meta(UNIT, algorithm="dice-maml").adapter(UNIT)
    with refused("log_prob", "dice"):
        adapter.add(np.zeros(2), [0.5], 0.0, log_prob=-1.0)


def test_losses_of_ones_own_see_the_density():
    seen = []

    def own(model, output, batch):
        seen.append(batch.old_log_prob)
        return likelihood_ratio(model, output, batch)

    algorithm = Algorithm(name="mine", inner=GradientUpdate(loss=own))
    adapter = _meta(UNIT, algorithm=algorithm).adapter(UNIT)
    adapter.add(np.zeros(2), [0.5], 1.0, log_prob=-1.25)
    adapter.add(np.zeros(2), adapter.act(np.zeros(2)), 0.0)
    adapter.adapted()
    assert seen[0][0, 0] == -1.25
    assert seen[0][0, 1] != -1.25


# Numbers of NumPy in files ------------------------------------------------------------------------


def test_numbers_of_numpy_are_kept_in_files(tmp_path):
    meta = load("navigation-2d-icml2017")
    policy = meta.adapt(
        np.array([0.3, -0.2]), steps=np.int64(1), episodes=np.int32(2), seed=np.int64(3),
        step_sizes=np.array([0.1]),
    )  # fmt: skip
    policy.save(tmp_path / "policy")
    same = meta.adapt([0.3, -0.2], steps=1, episodes=2, seed=3, step_sizes=[0.1])
    assert load_policy(tmp_path / "policy").provenance == same.provenance
    adapter = meta.adapter(seed=np.uint8(3))
    adapter.add(np.zeros(2), adapter.act(np.zeros(2)), np.float32(1.0))
    adapter.adapted().save(tmp_path / "online")
    assert load_policy(tmp_path / "online").provenance["seed"] == 3


def test_an_evaluation_by_numbers_of_numpy_is_json():
    result = metarl.evaluate(
        "navigation-2d-icml2017", tasks=np.int64(2), episodes=np.int64(2), steps=np.int64(1),
        seed=np.int64(3), threads=1,
    )  # fmt: skip
    assert json.loads(json.dumps(result.to_json()))["seed"] == 3


def test_a_run_by_numbers_of_numpy_is_kept_and_goes_on(tmp_path):
    options = {
        "tasks": np.int64(2), "episodes": np.int32(2), "iterations": 1, "seed": np.int64(3),
        "threads": 1, "inner.step_sizes": np.array([0.1, 0.2]),
        "family_options": {"horizon": np.int64(5), "actions": np.str_("scaled")},
    }  # fmt: skip
    config = metarl.resolve(None, "navigation-2d", overrides=options)
    metarl.train(config, tmp_path / "run")
    meta = metarl.load(tmp_path / "run")
    assert (meta.setup, meta.run_options) == (config.setup, config.run)
    config = Config(setup=Setup(family="navigation-2d"), run=RunOptions(seed=np.int64(3)))
    MetaPolicy(meta.params, config.setup, {
        "iteration": np.int64(1), "env_steps": np.int64(20),
    }, {"config": config.to_json(), "family": {}}).save(tmp_path / "policy")  # fmt: skip
    assert load(tmp_path / "policy").run_options.seed == 3


def test_what_no_file_can_hold_is_refused(tmp_path):
    meta = load("navigation-2d-icml2017")
    setup = Setup(family="navigation-2d", family_options={"thing": object()})
    with refused():
        MetaPolicy(meta.params, setup, {}).save(tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
