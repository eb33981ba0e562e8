"""Policies taken away: modules, files, and adaptation from transitions alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SPACES, counting_family

import metarl.running.export
from metarl.commands.cli import main
from metarl.envs import make_family, registry
from metarl.envs.errors import UserError
from metarl.learning.encoders import NatureCNN
from metarl.learning.parallel import ChunkPool
from metarl.running.building import make_policy
from metarl.running.config import Config, PolicyConfig
from metarl.running.export import export
from metarl.running.loading import load, load_policy
from metarl.running.meta_policy import MetaPolicy
from metarl.running.policy import Policy
from metarl.sampling.episodes import collect_episodes
from metarl.sampling.rollouts import Address
from metarl.sampling.spaces import env_action, policy_action, space_from_json, space_to_json

# torch's own, of TorchScript's age.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

RECORD = {"task": None, "steps": 0, "episodes": 0, "seed": 0}


def made(space, shape=(3,), context=0, **options) -> Policy:
    config = Config(policy=PolicyConfig(hidden=(6, 5), **options))
    policy = make_policy(config, shape, space, context)
    rng = np.random.default_rng(0)
    params = {
        name: torch.from_numpy(rng.standard_normal(size).astype(np.float32))
        for name, size in policy.shapes().items()
    }
    if "norm.var" in params:
        params["norm.var"] = params["norm.var"].square() + 0.1
    if context:
        params["context"] = torch.from_numpy(rng.standard_normal(context).astype(np.float32))
    return Policy(policy, params, space, 10, config, RECORD)


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
    if policy.policy.encoder is not None:
        seen = rng.integers(0, 256, (50, *shape))
    seen = seen.astype(policy.policy.observation_dtype)
    expected = policy.act(seen, deterministic=True)
    with torch.no_grad():
        found = policy.module()(torch.from_numpy(seen)).numpy()
    assert found.shape == expected.shape
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(np.unique(expected, axis=0)) > 1
    assert isinstance(CASES["large images"].policy.encoder, NatureCNN)


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
@pytest.mark.parametrize("case", ["scale, normalized", "multi", "small images"])
def test_files_act_as_the_policy(kind, case, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnx")
    policy = CASES[case]
    shape = policy.policy.observation_shape
    space = gym.spaces.Box(-np.inf, np.inf, shape)
    if policy.policy.encoder is not None:
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


def test_a_file_that_acts_otherwise_is_refused(tmp_path, monkeypatch):
    policy = CASES["clip"]
    wrong = made(BOX, activation="relu").module()
    monkeypatch.setattr(policy, "module", lambda: wrong)
    with pytest.raises(UserError, match="the exported policy acts otherwise, by up to"):
        export(policy, tmp_path / "policy", "torchscript", gym.spaces.Box(-9, 9, (3,)))
    assert not (tmp_path / "policy").exists()


def test_the_command_exports_and_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "navigation-2d-icml2017", "--out", "here.pt"]) == 0
    assert "here.pt: observations [n, 2] to the most likely actions" in capsys.readouterr().out
    policy = load("navigation-2d-icml2017").adapt([0.3, -0.2], steps=1, episodes=3)
    policy.save("adapted")
    assert main(["export", "adapted"]) == 0
    seen = np.array([[0.1, 0.2], [-0.4, 0.0]], np.float32)
    module = torch.jit.load("adapted.pt")
    expected = load_policy("adapted").act(seen, deterministic=True)
    assert module(torch.from_numpy(seen)).numpy() == pytest.approx(expected, abs=1e-6)
    for version in ("policy.v1", "policy.v2"):  # neither writes over the other
        policy.save(f"{version}.safetensors")
        assert main(["export", f"{version}.safetensors"]) == 0
        assert Path(f"{version}.pt").exists()
    monkeypatch.setattr(metarl.running.export.importlib.util, "find_spec", lambda name: None)
    assert main(["export", "adapted", "--format", "onnx"]) == 2
    assert "pip install 'metarl-gradient[onnx]'" in capsys.readouterr().err


# Transitions as they come -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clip", "scale"])
def test_actions_of_the_environment_are_taken_back(mode):
    raw = np.array([0.3, -2.0, 0.9], np.float32)  # within the bounds either way
    again = policy_action(env_action(raw, BOX, mode), BOX, mode)
    assert again == pytest.approx(raw, abs=1e-6)
    space = SPACES["shifted"]
    assert policy_action(env_action(np.array([2.0]), space, mode), space, mode) == [2.0]


def test_transitions_adapt_as_episodes_do(monkeypatch):
    # Ragged episodes, two steps: what the adapter makes of them is what `adapt` makes.
    monkeypatch.setitem(registry._factories, "counting", counting_family)
    config = Config(family="counting", policy=PolicyConfig(hidden=(5,)))
    policy = make_policy(config, (1,), gym.spaces.Box(-1.0, 1.0, (1,)))
    meta = MetaPolicy(policy.init(np.random.default_rng(0)), config)
    expected = meta.adapt([4.0], steps=2, episodes=3, seed=5)
    adapter = meta.adapter()
    for k in range(2):
        with ChunkPool(1):
            current = adapter.adapted()  # nothing new: takes no step
        rollout = collect_episodes(
            meta.family.make(np.array([4.0])), policy, current.params, episodes=3,
            horizon=meta.family.horizon, address=Address(5, split="test", inner_step=k),
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


def test_an_episode_goes_on_to_its_horizon_over_an_inner_step():
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
    assert [len(episode.reward) for episode in adapter._episodes] == [10, horizon, 5]
    adapter.add(np.zeros(2), adapter.act(np.zeros(2)), -1.0, truncated=True)
    adapter.adapted()
    act(horizon + 1)
    assert [len(episode.reward) for episode in adapter._episodes] == [horizon, 1]


def test_the_adapter_knows_what_it_drew_and_refuses_what_is_no_transition():
    meta = load("navigation-2d-icml2017")
    adapter = meta.adapter(seed=3)
    env = make_family("navigation-2d").make(np.array([0.4, 0.4]))
    observation, _ = env.reset(seed=0)
    cut = 0
    for _ in range(40):
        action = adapter.act(observation)
        following, reward, terminated, truncated, _ = env.step(action)
        adapter.add(observation, action, float(reward), terminated, truncated)
        drawn = adapter._episodes[-1].action[-1]
        cut += not np.array_equal(drawn, action)
        assert np.array_equal(np.clip(drawn, env.action_space.low, env.action_space.high), action)
        observation = following
    assert cut  # some actions were cut, and are known as they were drawn
    policy = adapter.adapted()
    assert np.isfinite(policy.act(observation)).all()
    with pytest.raises(UserError, match=r"observations must be \[2\], got \[3\]"):
        adapter.add(np.zeros(3), action, 0.0)
    for huge in (float("nan"), 1e39):  # rewards are held in float32
        with pytest.raises(UserError, match=r"reward must be a finite .* got (nan|1e.39)"):
            adapter.add(observation, action, huge)
    with pytest.raises(UserError, match="observations must be finite, got inf"):
        adapter.add([0.0, np.inf], action, 0.0)
    with pytest.raises(UserError, match=r"observations must be an array, got a dict: gymnasium"):
        adapter.add({"x": 0.0}, action, 0.0)
    with pytest.raises(UserError, match="observations must be an array, got a dict: gymnasium"):
        policy.act({"x": 0.0})
    with pytest.raises(UserError, match=r"action \[0. 0. 0.\] is none of Box"):
        adapter.add(observation, np.zeros(3), 0.0)
    dicts = gym.Env()
    dicts.observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (2,))})
    dicts.action_space = env.action_space
    with pytest.raises(UserError, match="FlattenObservation"):
        meta.adapt(dicts)
    several = meta.adapter(gym.spaces.MultiDiscrete([3, 4]))
    with pytest.raises(UserError, match=r"action \[0 0 0\] is none of MultiDiscrete"):
        several.add(observation, np.zeros(3, np.int64), 0.0)
    box, steps = env.action_space, gym.spaces.Discrete(3, start=-1)
    for space, wrong in (
        *((steps, action) for action in (2, -2, 0.5, [0, 1])),
        *((several._space, action) for action in ([3, 0], [0, 4], [-1, 0])),
        *((box, action) for action in ([np.inf, 0.0], 0.0)),
    ):
        with pytest.raises(UserError, match="is none of"):
            policy_action(wrong, space, "clip")
    assert policy_action(1, steps, "clip") == policy_action([1], steps, "clip") == [2]
    assert policy_action([2, 3], several._space, "clip").tolist() == [2, 3]
    assert policy_action([7.0, 0.0], box, "clip").tolist() == [7, 0]  # as if it had been cut
    oracle = dataclasses.replace(meta, config=dataclasses.replace(meta.config, algorithm="oracle"))
    with pytest.raises(UserError, match="an oracle is told its task"):
        oracle.adapter(env.action_space)
