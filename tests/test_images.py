"""Image observations: the convolutional networks against torch.nn, bytes kept, adaptation."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import categorical_policy, double_params, policy_options
from expecting import refused
from image_envs import PixelCorridor, corridor
from torch import nn

import metarl
from metarl.config.options import Config
from metarl.config.resolve import resolve
from metarl.config.setup import Setup
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.reinforcement import spaces_of
from metarl.envs.policy_spaces import image_size
from metarl.learning.baselines import seen
from metarl.models.encoders import NatureCNN, SmallImpala
from metarl.models.network_parts import POLICY_NETWORKS, find_network
from metarl.models.networks import MLP, stack
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import Collector, RandomKey
from metarl.sampling.spaces import as_observation, check_spaces
from metarl.training.run import new_trainer


def test_images_that_are_not_bytes_are_refused():
    policy = network(NatureCNN((36, 36, 3)))
    grey = np.random.default_rng(0).random((36, 36, 3))
    with refused("float64"):
        as_observation(grey, policy)
    whole = (255 * grey).astype(np.int64)
    assert np.array_equal(as_observation(whole, policy), whole)
    for odd in (-1, 256):
        whole[3, 4, 0] = odd
        with refused(255, odd):
            as_observation(whole, policy)
    with refused("bool"):
        as_observation(grey > 0.5, policy)
    env = gym.Env()
    env.action_space = gym.spaces.Discrete(3)
    env.observation_space = gym.spaces.Box(0.0, 1.0, (36, 36, 3))
    with refused("mine", "36, 36, 3", "float32"):
        check_spaces(env, policy, "mine")
    env.observation_space = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
    check_spaces(env, policy, "mine")


def network(encoder, normalize=False) -> PolicyModel:
    return categorical_policy(
        observation_dim=encoder.features,
        encoder=encoder,
        categories=(3,),
        hidden=(7,),
        activation="relu",
        normalize=normalize,
    )


def conv(params, name, stride=1, padding=0):
    weight = params[f"{name}.weight"]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding)
    layer = layer.double()
    layer.load_state_dict({"weight": weight, "bias": params[f"{name}.bias"]})
    return layer


def linear(params, name):
    weight = params[f"{name}.weight"].T
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.load_state_dict({"weight": weight, "bias": params[f"{name}.bias"]})
    return layer


class Residual(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.path = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x):
        return x + self.path(x)


def module_of(policy, params):
    """The same network, of torch's own modules, on [samples, C, H, W] in [0, 1]."""
    if isinstance(policy.network.encoder, NatureCNN):
        strides = enumerate((4, 2, 1))
        layers = [x for i, s in strides for x in (conv(params, f"conv{i}", s), nn.ReLU())]
    else:
        layers = []
        for i in range(2):
            block = [conv(params, f"stage{i}.residual{j}", padding=1) for j in range(2)]
            layers.append(conv(params, f"stage{i}", padding=1))
            layers += [nn.MaxPool2d(3, 2, 1), Residual(*block)]
        layers.append(nn.ReLU())
    head = [nn.Flatten(), linear(params, "layer0"), nn.ReLU(), linear(params, "layer1")]
    return nn.Sequential(*layers, *head)


CASES = [
    (NatureCNN((37, 41, 3)), lambda x: x.permute(0, 3, 1, 2)),
    (NatureCNN((4, 36, 40)), lambda x: x),
    (SmallImpala((9, 7, 3)), lambda x: x.permute(0, 3, 1, 2)),
    (SmallImpala((6, 6)), lambda x: x[:, None]),
]


@pytest.mark.parametrize(("encoder", "first"), CASES)
def test_networks_equal_torch_modules_of_the_same_parameters(encoder, first):
    policy, rng = network(encoder), np.random.default_rng(0)
    tasks = [double_params(policy, seed) for seed in range(2)]
    image = torch.from_numpy(rng.integers(0, 256, (2, 3, *encoder.shape)).astype(np.float64))
    stacked = {n: torch.stack([p[n] for p in tasks]).requires_grad_() for n in tasks[0]}
    logits = policy.dist(stacked, image)["logits"]
    # Some leaves a task's own and others common, as where only the last layer adapts.
    common = {n: p for n, p in tasks[0].items() if not n.startswith("layer1")}
    mixed = {**common, **{n: p for n, p in stacked.items() if n.startswith("layer1")}}
    logits_of_mixed = policy.dist(mixed, image)["logits"]
    gradient = torch.autograd.grad(logits.square().sum(), list(stacked.values()))
    for t, params in enumerate(tasks):
        module = module_of(policy, params)
        expected = module(first(image[t]) / 255.0)
        assert torch.allclose(logits[t], expected, rtol=1e-12, atol=1e-12)
        alone = policy.dist(params, image[t])["logits"]
        assert torch.allclose(alone, expected, rtol=1e-12, atol=1e-12)
        # torch adds up the gradients of its modules; the norms of all leaves must agree.
        expected.square().sum().backward()
        ours = sum(float(g[t].square().sum()) for g in gradient)
        theirs = sum(float(p.grad.square().sum()) for p in module.parameters())
        assert ours == pytest.approx(theirs, rel=1e-10)
        head = {n: p for n, p in params.items() if n.startswith("layer1")}
        one = module_of(policy, {**tasks[0], **head})(first(image[t]) / 255.0)
        assert torch.allclose(logits_of_mixed[t], one, rtol=1e-12, atol=1e-12)


def test_second_derivatives_match_finite_differences():
    policy = network(SmallImpala((5, 4, 3)))
    params = stack(double_params(policy), 2)
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.integers(0, 256, (2, 2, 5, 4, 3)).astype(np.float64))
    weight = params["stage1.weight"].clone().requires_grad_()

    def slope(w):
        loss = policy.dist({**params, "stage1.weight": w}, image)["logits"].square().sum()
        return torch.autograd.grad(loss, w, create_graph=True)[0]

    direction = torch.from_numpy(rng.standard_normal(weight.shape))
    product = torch.autograd.grad((slope(weight) * direction).sum(), weight)[0]
    step = 1e-6 * direction
    ends = [slope((weight + sign * step).detach().requires_grad_()) for sign in (1, -1)]
    numeric = (ends[0] - ends[1]).detach() / 2e-6
    assert torch.allclose(product, numeric, rtol=1e-5, atol=1e-5 * float(numeric.abs().max()))


def test_image_bytes_are_stored_unchanged():
    family = corridor()
    policy = categorical_policy(
        observation_dim=256, encoder=SmallImpala((8, 14, 3)), categories=(2,), hidden=()
    )
    assert policy.network.encoder is not None
    assert policy.network.encoder.features == 256
    params = stack(policy.init(np.random.default_rng(0)), 2)
    tasks = family.tasks.grid(2)
    with ChunkPool(1) as pool:
        rollout = Collector(family, policy, 2, 3, pool).collect(params, tasks, RandomKey(0))
    assert rollout.observation.dtype == torch.uint8
    assert rollout.observation.shape == (2, 3, 8, 8, 14, 3)
    places = rollout.observation[..., 3, :, 0].argmax(-1)
    moves = (2 * rollout.action[..., 0] - 1).long()
    inside = (places[..., :-1] > 0) & (places[..., :-1] < 13)
    assert torch.equal((places[..., 1:] - places[..., :-1])[inside], moves[..., :-1][inside])
    # What was computed step by step is what the whole batch gives.
    again = policy.dist(params, rollout.observation.flatten(1, 2))["logits"]
    assert torch.allclose(again, rollout.behaviour["logits"].flatten(1, 2), atol=1e-5)


def test_the_baseline_sees_a_coarse_grey_image():
    image = torch.arange(12 * 18 * 3).view(1, 12, 18, 3).remainder(256).to(torch.uint8)
    coarse = seen(image, 3)
    expected = [
        float(image[0, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].double().mean()) / 255.0
        for i in range(6)
        for j in range(6)
    ]
    assert coarse.shape == (1, 36)
    assert coarse[0].tolist() == pytest.approx(expected, abs=1e-6)
    first = seen(image.movedim(3, 1), 3)  # channels first
    assert torch.allclose(first, coarse)
    vector = torch.ones(2, 5)
    assert seen(vector, 1) is vector


def encoder_of(name, *shape):
    network = find_network(name, POLICY_NETWORKS).make(gym.spaces.Box(0, 255, shape, np.uint8), 2)
    assert isinstance(network, MLP)
    return network.encoder


def test_the_size_of_images_chooses_their_network():
    assert encoder_of("auto", 36, 36, 3) == NatureCNN((36, 36, 3))
    assert encoder_of("auto", 35, 64, 3) == SmallImpala((35, 64, 3))
    assert image_size((4, 84, 84)) == (4, 84, 84)
    assert image_size((84, 84, 3)) == (3, 84, 84)
    assert image_size((20, 30)) == (1, 20, 30)
    with refused("policy.network", "8, 8, 3", 36, "impala"):
        encoder_of("nature", 8, 8, 3)
    with refused("policy.network", "mlp", "8, 8, 3", "FlattenObservation"):
        encoder_of("mlp", 8, 8, 3)
    config = Config(setup=Setup(family="navigation-2d", policy=policy_options(network="nature")))
    with refused("policy.network", "nature", 2):
        new_trainer(config)


@pytest.mark.parametrize("algorithm", ["maml-trpo", "anil", "cavia"])
def test_a_run_on_images_saves_loads_and_acts(algorithm, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    config = resolve(None, "image_envs:corridor", algorithm)
    config = config.with_options({"tasks": 2, "episodes": 2, "iterations": 1, "threads": 1})
    metarl.train(config, tmp_path / "run")
    meta = metarl.load(tmp_path / "run")
    policy = meta.adapt([1.0], episodes=2)
    policy.save(tmp_path / "adapted")
    image = np.zeros((8, 14, 3), np.uint8)
    again = metarl.load_policy(tmp_path / "adapted")
    assert again.act(image, deterministic=True) == policy.act(image, deterministic=True)
    assert policy.act(np.stack([image] * 3)).shape == (3,)
    with refused("8, 14, 3", "7, 14, 3"):
        policy.act(image[:7])


@pytest.mark.learning
def test_adaptation_on_images_raises_the_return(tmp_path):
    # Only what it earns tells the task: before the step both sides pay 0 on average, the best is 6.
    config = resolve(None, "image_envs:corridor")
    config = config.with_options({
        "tasks": 4, "episodes": 10, "iterations": 12, "inner.step_sizes": (0.5,),
        "policy.hidden": (16,), "policy.activation": "relu",
    })  # fmt: skip
    meta = metarl.train(config, tmp_path / "run")
    gain, low, _ = metarl.evaluate(meta, tasks=10, episodes=10, steps=1).curve.gain()
    assert low > 2.0, gain


class Renderer(PixelCorridor):
    """Refers to itself, as a viewer does, and so lives on until Python looks for cycles."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self):
        super().__init__()
        self.viewer = self
        self.alive.add(self)


def test_a_closed_renderer_is_freed_at_once():
    family = dataclasses.replace(corridor(), env=Renderer)
    gc.disable()
    try:
        spaces_of(family)
        assert not Renderer.alive
    finally:
        gc.enable()
