"""Policies taken away: modules, files, and adaptation from transitions alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SPACES, policy_options, reals
from expecting import mentions, refused, run

from metarl.algorithms import find_algorithm
from metarl.config.setup import Setup
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.reinforcement import make_policy
from metarl.envs import make_family
from metarl.models.encoders import NatureCNN
from metarl.policies.export import export
from metarl.policies.loading import load, load_policy
from metarl.policies.meta_policy import MetaPolicy
from metarl.policies.policy import Policy
from metarl.sampling.episodes import collect_episodes
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import env_action, policy_action, space_from_json, space_to_json

# torch's own, of TorchScript's age.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

RECORD = {"task": None, "steps": 0, "episodes": 0, "seed": 0}


def made(space, shape=(3,), context=0, **options) -> Policy:
    options = policy_options(hidden=(6, 5), **options)
    images = len(shape) > 1
    observations = gym.spaces.Box(0, 255, shape, np.uint8) if images else reals(*shape)
    policy = make_policy(options, observations, space, context)
    rng = np.random.default_rng(0)
    params = {
        name: torch.from_numpy(rng.standard_normal(size).astype(np.float32))
        for name, size in policy.shapes().items()
    }
    if "norm.var" in params:
        params["norm.var"] = params["norm.var"].square() + 0.1
    if context:
        params["context"] = torch.from_numpy(rng.standard_normal(context).astype(np.float32))
    return Policy(policy, params, space, 10, options.action, RECORD, {})


BOX = gym.spaces.Box(
    np.array([-0.5, -np.inf, 0.0], np.float32), np.array([2.0, np.inf, 1.0], np.float32)
)
IMAGE = (8, 14, 3)
WHOLE = gym.spaces.Box(-2, 3, (3,), np.int32)
CASES = {
    "whole numbers": made(WHOLE),
    "whole numbers, scale": made(WHOLE, action="scale"),
    "clip": made(BOX),
    "bytes, scale": made(gym.spaces.Box(100, 200, (3,), np.uint8), action="scale"),
    "scale, normalized": made(BOX, action="scale", normalize=True),
    "context, relu": made(BOX, context=4, activation="relu"),
    **{kind: made(space) for kind, space in SPACES.items()},
    "small images": made(SPACES["shifted"], IMAGE),
    "large images": made(BOX, (36, 40, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_acts_as_its_policy(case):
    policy = CASES[case]
    rng = np.random.default_rng(1)
    shape = policy.policy.observation_shape
    seen = 3.0 * rng.standard_normal((50, *shape))
    if policy.policy.images:
        seen = rng.integers(0, 256, (50, *shape))
    seen = seen.astype(policy.policy.observation_dtype)
    expected = policy.act(seen, deterministic=True)
    with torch.no_grad():
        found = policy.module()(torch.from_numpy(seen)).numpy()
    assert found.shape == expected.shape
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(np.unique(expected, axis=0)) > 1
    assert isinstance(CASES["large images"].policy.network.encoder, NatureCNN)


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
@pytest.mark.parametrize("case", ["scale, normalized", "multi", "small images"])
def test_files_act_as_the_policy(kind, case, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnx")
    policy = CASES[case]
    shape = policy.policy.observation_shape
    space = gym.spaces.Box(-np.inf, np.inf, shape)
    if policy.policy.images:
        space = gym.spaces.Box(0, 255, shape, np.uint8)
    assert export(policy, tmp_path / "policy", kind, space) < 1e-4
    if kind == "torchscript":
        alone = torch.jit.load(tmp_path / "policy")
        seen = np.stack([space.sample() for _ in range(7)])
        assert alone(torch.from_numpy(seen)).numpy() == pytest.approx(
            policy.act(seen, deterministic=True), abs=1e-4
        )


@pytest.mark.parametrize("space", [BOX, WHOLE, *SPACES.values()], ids=str)
def test_spaces_of_actions_are_kept_in_files(space):
    found = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert found == space
    assert found.dtype == space.dtype


def test_an_adapted_policy_keeps_its_actions(tmp_path):
    wide = gym.spaces.Box(-3.0, 7.0, (2,))
    policy = load("navigation-2d-icml2017").adapter(wide).adapted()
    policy.save(tmp_path / "policy")
    seen = np.random.default_rng(0).standard_normal((200, 2))
    acts = policy.act(seen)
    np.testing.assert_array_equal(load_policy(tmp_path / "policy").act(seen), acts)
    assert np.abs(acts).max() > 1.0  # the family's bounds


def test_an_exported_file_that_acts_differently_is_refused(tmp_path, monkeypatch):
    policy = CASES["clip"]
    wrong = made(BOX, activation="relu").module()
    monkeypatch.setattr(policy, "module", lambda: wrong)
    with refused(tmp_path / "policy"):
        export(policy, tmp_path / "policy", "torchscript", gym.spaces.Box(-9, 9, (3,)))
    assert not (tmp_path / "policy").exists()


def test_the_command_exports_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("export", "navigation-2d-icml2017", "--out", "here.pt") == 0
    assert mentions(capsys.readouterr().out, "here.pt")
    assert Path("here.pt").exists()
    policy = load("navigation-2d-icml2017").adapt([0.3, -0.2], steps=1, episodes=3)
    policy.save("adapted")
    assert run("export", "adapted") == 0
    seen = np.array([[0.1, 0.2], [-0.4, 0.0]], np.float32)
    module = torch.jit.load("adapted.pt")
    expected = load_policy("adapted").act(seen, deterministic=True)
    assert module(torch.from_numpy(seen)).numpy() == pytest.approx(expected, abs=1e-6)
    for version in ("policy.v1", "policy.v2"):  # neither writes over the other
        policy.save(f"{version}.safetensors")
        assert run("export", f"{version}.safetensors") == 0
        assert Path(f"{version}.pt").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("export", "adapted", "--format", "onnx") == 2
    assert mentions(capsys.readouterr().err, "onnx", "metarl-gradient[onnx]")


# Transitions as they come -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clip", "scale"])
def test_actions_of_the_environment_are_mapped_back_to_the_policy(mode):
    raw = np.array([0.3, -2.0, 0.9], np.float32)  # within the bounds either way
    again = policy_action(env_action(raw, BOX, mode), BOX, mode)
    assert again == pytest.approx(raw, abs=1e-6)
    space = SPACES["shifted"]
    assert policy_action(env_action(np.array([2.0]), space, mode), space, mode) == [2.0]


def test_transitions_adapt_as_episodes_do():
    # Ragged episodes, two steps: what the adapter makes of them is what `adapt` makes.
    options = policy_options(hidden=(5,))
    setup = Setup(family="conftest:counting_family", policy=options)
    policy = make_policy(options, reals(1), gym.spaces.Box(-1.0, 1.0, (1,)))
    meta = MetaPolicy(policy.init(np.random.default_rng(0)), setup)
    expected = meta.adapt([4.0], steps=2, episodes=3, seed=5)
    adapter = meta.adapter(gym.spaces.Box(-9.0, 9.0, (1,)))  # it is given actions before clipping
    for k in range(2):
        with ChunkPool(1):
            current = adapter.adapted()  # nothing new: takes no step
        rollout = collect_episodes(
            meta.family.make(np.array([4.0])), policy, current.params, episodes=3,
            horizon=meta.family.horizon, key=RandomKey(5, split="test", inner_step=k),
        )  # fmt: skip
        assert int(rollout.valid.sum()) == 12
        for e in range(3):
            for t in range(4):
                adapter.add(
                    rollout.observation[0, e, t].numpy(),
                    rollout.action[0, e, t].numpy(),
                    float(rollout.reward[0, e, t]),
                    terminated=t == 3,
                )
        assert adapter.transitions == 12
        adapted = adapter.adapted()
        assert adapter.transitions == 0
    assert adapted.provenance["steps"] == 2
    assert adapted.provenance["episodes"] == 6
    for name, p in expected.params.items():
        assert torch.allclose(adapted.params[name], p, atol=1e-6), name
        assert not torch.equal(p, meta.params[name])


@pytest.fixture
def learned(monkeypatch):
    """The rollouts that inner steps are taken on, in order."""
    rollouts = []
    batch = MetaPolicy.batch

    def note(self, rollout, *arguments, **options):
        rollouts.append(rollout)
        return batch(self, rollout, *arguments, **options)

    monkeypatch.setattr(MetaPolicy, "batch", note)
    return rollouts


def test_an_episode_continues_to_its_horizon_after_an_inner_step(learned):
    meta = load("navigation-2d-icml2017")
    adapter, horizon = meta.adapter(), meta.family.horizon

    def act(steps):
        for _ in range(steps):
            adapter.add(np.zeros(2), adapter.act(np.zeros(2)), -1.0)

    act(horizon // 2)
    adapter.adapted()
    act(horizon - horizon // 2 - 10)
    adapter.adapted()
    act(10 + horizon + 5)
    adapter.add(np.zeros(2), adapter.act(np.zeros(2)), -1.0, truncated=True)
    adapter.adapted()
    assert learned[-1].valid.sum(-1).tolist() == [[10, horizon, 6]]
    act(horizon + 1)
    adapter.adapted()
    assert learned[-1].valid.sum(-1).tolist() == [[horizon, 1]]


def test_the_adapter_learns_from_actions_as_drawn_and_refuses_invalid_transitions(learned):
    meta = load("navigation-2d-icml2017")
    adapter = meta.adapter(seed=3)
    env = make_family("navigation-2d").make(np.array([0.4, 0.4]))
    observation, _ = env.reset(seed=0)
    taken = []
    for _ in range(40):
        action = adapter.act(observation)
        taken.append(action)
        following, reward, terminated, truncated, _ = env.step(action)
        adapter.add(observation, action, float(reward), terminated, truncated)
        observation = following
    policy = adapter.adapted()
    (rollout,) = learned
    drawn = rollout.action[rollout.valid].numpy()
    assert not np.array_equal(drawn, taken)  # some were cut to the bounds
    assert np.array_equal(np.clip(drawn, env.action_space.low, env.action_space.high), taken)
    assert np.isfinite(policy.act(observation)).all()
    with refused("observations", "[2]", "[3]"):
        adapter.add(np.zeros(3), action, 0.0)
    for huge in (float("nan"), 1e39):  # rewards are held in float32
        with refused("reward", huge):
            adapter.add(observation, action, huge)
    with refused("observations", "inf"):
        adapter.add([0.0, np.inf], action, 0.0)
    with refused("observations", "dict"):
        adapter.add({"x": 0.0}, action, 0.0)
    with refused("observations", "dict"):
        policy.act({"x": 0.0})
    with refused("action", "0. 0. 0.", "Box"):
        adapter.add(observation, np.zeros(3), 0.0)
    dicts = gym.Env()
    dicts.observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (2,))})
    dicts.action_space = env.action_space
    with refused("FlattenObservation"):
        meta.adapt(dicts)
    pair = gym.spaces.MultiDiscrete([3, 4])
    several = meta.adapter(pair)
    with refused("action", "0 0 0", "MultiDiscrete"):
        several.add(observation, np.zeros(3, np.int64), 0.0)
    box, steps = env.action_space, gym.spaces.Discrete(3, start=-1)
    for space, wrong in (
        *((steps, action) for action in (2, -2, 0.5, [0, 1])),
        *((pair, action) for action in ([3, 0], [0, 4], [-1, 0])),
        *((box, action) for action in ([np.inf, 0.0], 0.0)),
    ):
        with refused("action", type(space).__name__):
            policy_action(wrong, space, "clip")
    assert policy_action(1, steps, "clip") == policy_action([1], steps, "clip") == [2]
    assert policy_action([2, 3], pair, "clip").tolist() == [2, 3]
    assert policy_action([7.0, 0.0], box, "clip").tolist() == [7, 0]  # as if it had been cut
    conditioned = dataclasses.replace(meta.setup, algorithm=find_algorithm("oracle"))
    oracle = MetaPolicy(meta.params, conditioned)
    with refused("oracle"):
        oracle.adapter(env.action_space)
