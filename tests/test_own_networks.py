"""Networks of users: any torch module that is named, or given as an object."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import own_networks
import pytest
import torch
from conftest import random_batch, reals, timeless
from expecting import refused, run
from own_networks import Plain, Residual
from torch import nn

import metarl
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.learning.adapter import Adapter
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.losses import likelihood_ratio, log_likelihood
from metarl.models.distributions import Gaussian
from metarl.models.modules import ModuleNetwork
from metarl.models.networks import MLP, stack
from metarl.models.policies import PolicyModel
from metarl.policies.export import export
from metarl.runs.checkpoints import CheckpointError
from metarl.training.run import new_trainer

SMALL = {"iterations": 2, "tasks": 4, "episodes": 4, "threads": 2}
NAMES = [f"own_networks:{kind}" for kind in ("Residual", "Attention", "Recurrent")]


def iterate(network, algorithm="maml-trpo", family="navigation-2d", iterations=1, **options):
    values = SMALL | {"policy.network": network} | options
    with new_trainer(metarl.resolve(None, family, algorithm, values)) as trainer:
        rows = [trainer.iterate() for _ in range(iterations)]
        return rows, trainer.state.params


def policies():
    """Return the built-in MLP and the same network as a module."""
    over = Gaussian().over(gym.spaces.Box(-1.0, 1.0, (2,)))
    builtin = PolicyModel(network=MLP(inputs=(3,), outputs=2, hidden=(8,)), distribution=over)
    module = PolicyModel(network=ModuleNetwork(Plain, "plain", reals(3), 2), distribution=over)
    return builtin, module


def translated(params):
    names = {"network.body": "layer0", "network.head": "layer1"}
    found = {}
    for whole, p in params.items():
        layer, _, leaf = whole.rpartition(".")
        if layer in names:
            found[f"{names[layer]}.{leaf}"] = p.mT if leaf == "weight" else p
        else:
            found[whole] = p
    return found


def test_a_module_has_the_outputs_and_second_order_gradients_of_the_mlp_it_equals():
    builtin, module = policies()
    support, query = (random_batch(builtin, tasks=3, samples=10, seed=s) for s in (1, 2))
    start = {n: p.double() for n, p in module.init(np.random.default_rng(0)).items()}
    found = []
    for policy in (builtin, module):
        leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
        theta = translated(leaves) if policy is builtin else leaves
        adapter = Adapter(policy, log_likelihood, (0.3,))
        fast, slow, sizes = adapter.split(theta)
        last = adapter.adapt(stack(fast, 3), slow, sizes, [support], curvature=1.0)[-1]
        loss = likelihood_ratio(policy, adapter.output(last, slow, query), query).sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert a.abs().max() > 1e-6


def test_a_task_has_the_same_outputs_alone_and_among_others():
    _, policy = policies()
    params = [policy.init(np.random.default_rng(seed)) for seed in range(3)]
    stacked = {n: torch.stack([p[n] for p in params]) for n in params[0]}
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 7, 3)).astype(np.float32))
    with torch.inference_mode():
        together = policy.network_output(stacked, x)
        for t, own in enumerate(params):
            assert torch.equal(policy.network_output(own, x[t]), together[t])
            some = {n: p[t : t + 1] for n, p in stacked.items()}
            assert torch.equal(policy.network_output(some, x[t : t + 1])[0], together[t])


@pytest.mark.parametrize("network", NAMES)
@pytest.mark.parametrize("algorithm", ["maml-trpo", "promp", "meta-sgd", "anil"])
def test_networks_of_many_kinds_train(network, algorithm):
    rows, _ = iterate(network, algorithm)
    assert np.isfinite(rows[0]["return_post"])
    assert rows[0]["inner_kl"] > 0.0


@pytest.mark.parametrize("algorithm", ["cavia", "oracle", "maml++", "reptile", "imaml", "e-maml"])
def test_other_algorithms_take_a_module(algorithm):
    iterate(Residual, algorithm)


@pytest.mark.parametrize("family", ["sinusoid", "characters"])
@pytest.mark.parametrize("algorithm", ["maml-trpo", "reptile", "cavia"])
def test_a_module_learns_a_data_set(family, algorithm):
    values = {"iterations": 1, "tasks": 2, "threads": 1, "policy.network": "own_networks:Plain"}
    with new_trainer(metarl.resolve(None, family, algorithm, values)) as trainer:
        assert np.isfinite(trainer.iterate()["loss_pre"])


def test_an_algorithm_that_makes_the_last_layer_refuses_a_module():
    with refused("protomaml", "policy.network", "own_networks:Plain"):
        values = {"policy.network": "own_networks:Plain"}
        new_trainer(metarl.resolve(None, "characters", "protomaml", values))


def test_anil_adapts_the_module_that_is_called_head():
    _, model = policies()
    fast, _, _ = Adapter(model, log_likelihood, (0.1,), fast="head").split(
        model.init(np.random.default_rng(0))
    )
    assert set(fast) == {"network.head.weight", "network.head.bias"}

    class NoHead(nn.Module):
        def __init__(self, space, outputs):
            super().__init__()
            self.only = nn.Linear(space.shape[0], outputs)

        def forward(self, x):
            return self.only(x)

    with refused("policy.network", "head"):
        iterate(NoHead, "anil")


def test_frozen_parameters_stay():
    class Frozen(Residual):
        def __init__(self, space, outputs):
            super().__init__(space, outputs)
            self.first.requires_grad_(False)

    _, after = iterate(Frozen, iterations=2)
    _, before = iterate(Frozen, iterations=0)
    assert torch.equal(after["network.first.weight"], before["network.first.weight"])
    assert not torch.equal(after["network.second.weight"], before["network.second.weight"])


class Dropping(Residual):
    def __init__(self, space, outputs):
        super().__init__(space, outputs)
        self.drop = nn.Dropout(0.2)


class Batched(Residual):
    def __init__(self, space, outputs):
        super().__init__(space, outputs)
        self.batch = nn.BatchNorm1d(16)


class Noisy(Residual):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(len(x), 1)


class OfTheBatch(Residual):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class RandomBuffer(Residual):
    def __init__(self, space, outputs):
        super().__init__(space, outputs)
        self.register_buffer("features", torch.randn(3))


class Narrow(Residual):
    def forward(self, x):
        return super().forward(x)[:, :1]


class Fails(Residual):
    def forward(self, x):
        raise RuntimeError("no way")


class Scaled(Residual):
    """A buffer in a product, which backward passes keep."""

    def __init__(self, space, outputs):
        super().__init__(space, outputs)
        self.register_buffer("scale", torch.full((space.shape[0],), 2.0))
        self.plain = torch.ones(1)

    def forward(self, x):
        return super().forward(x * self.scale) * self.plain


class Experts(nn.Module):
    """A mixture with hard routing, and a layer that is never used."""

    def __init__(self, space, outputs):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(space.shape[0], outputs) for _ in range(8))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        chosen = (x[:, :1] * 4).long().clamp(0, 7).squeeze(1)
        parts = torch.stack([expert(x) for expert in self.experts])
        found = torch.zeros_like(parts[0])
        for i in range(8):
            if (chosen == i).any():
                found = torch.where((chosen == i).unsqueeze(1), self.experts[i](x), found)
        return found


class Lazy(nn.Module):
    def __init__(self, space, outputs):
        super().__init__()
        self.body, self.head = nn.LazyLinear(8), nn.LazyLinear(outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("network", [Scaled, Experts, Lazy, own_networks.Bare])
@pytest.mark.parametrize("algorithm", ["maml-trpo", "reptile", "meta-sgd"])
def test_networks_with_buffers_experts_and_lazy_layers_train(network, algorithm):
    rows, _ = iterate(network, algorithm)
    assert rows[0]["inner_kl"] > 0.0


def test_a_head_may_be_one_parameter():
    _, params = iterate(own_networks.Bare, "anil")
    assert set(params) == {"network.head", "log_std"}


def test_a_run_is_loaded_whatever_its_parameters_are_called(tmp_path):
    meta, folder = runs(tmp_path, "own_networks:Bare")
    assert torch.equal(metarl.load(folder).params["network.head"], meta.params["network.head"])


def test_a_module_of_a_data_set_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = ("--policy.network", "own_networks:Plain")
    common = ("--iterations", "1", "--tasks", "3", "--threads", "1")
    assert run("train", "sinusoid", *network, *common, "--out", "run") == 0
    assert run("evaluate", "run", "--tasks", "3", "--steps", "1") == 0


def test_a_policy_with_a_context_is_exported(tmp_path):
    meta, _ = runs(tmp_path, "own_networks:Residual", **{"iterations": 1})
    values = SMALL | {"policy.network": Residual, "iterations": 1}
    config = metarl.resolve(None, "navigation-2d", "cavia", values)
    policy = metarl.train(config, tmp_path / "cavia").adapt([0.1, 0.2], episodes=2)
    export(policy, tmp_path / "policy.pt", "torchscript", reals(2))
    assert meta.setup.algorithm.name == "maml-trpo"


class Squeezed(Residual):
    def forward(self, x):
        return super().forward(x).squeeze(0)


class InPlace(Residual):
    def forward(self, x):
        x -= 1.0
        return super().forward(x)


class Cut(Residual):
    def forward(self, x):
        return super().forward(x).detach()


class Counting(Residual):
    def __init__(self, space, outputs):
        super().__init__(space, outputs)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Deaf(Residual):
    """Does not read the context."""

    def forward(self, x):
        return super().forward(torch.cat([x[:, :2], torch.zeros(len(x), x.shape[1] - 2)], 1))


def compiled(space, outputs):
    return torch.compile(Residual(space, outputs), backend="eager")


def test_a_context_that_is_not_read_or_not_free_is_refused():
    with refused("policy.network", "context"):
        iterate(Deaf, "cavia")
    space = gym.spaces.Dict(context=reals(3), other=reals(1))
    with refused("policy.network", "context"):
        ModuleNetwork(Plain, "mine", space, 2, context_dim=4)


def test_a_function_without_a_name_is_refused_with_workers():
    with refused("policy.network", "workers"):
        iterate(
            lambda space, outputs: Residual(space, outputs), family="cartpole-length", workers=2
        )


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (Squeezed, "1"), (InPlace, "in place"), (Cut, "gradient"), (Counting, "calls"),
        (compiled, "compiled"),
        (Dropping, "drop"), (Batched, "batch"), (Noisy, "chance"), (OfTheBatch, "batch"),
        (RandomBuffer, "features"), (Narrow, "2"), (Fails, "RuntimeError"),
        (lambda space, outputs: 3, "int"), (lambda: None, "TypeError"),
        ("own_networks:Resid", "Resid"), ("mlpp", "mlp"), (7, "7"),
    ],
)  # fmt: skip
def test_what_is_no_network_of_this_kind_is_refused(network, named):
    with refused(named):
        iterate(network)


def test_options_of_the_mlp_are_unknown_with_a_module():
    with refused("policy.hidden"):
        iterate(Residual, **{"policy.hidden": (8,)})


def test_the_seed_draws_the_initial_parameters_and_nothing_else():
    (one, two), (again, _) = (
        [iterate(Residual, iterations=0, seed=seed)[1] for seed in seeds]
        for seeds in ((0, 1), (0, 1))
    )
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["network.first.weight"], two["network.first.weight"])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    iterate(Residual)
    assert torch.equal(torch.rand(1), expected)


def test_a_module_that_is_given_itself_is_where_training_starts():
    torch.manual_seed(0)
    module = Residual(reals(2), 2)
    _, params = iterate(module, iterations=0)
    assert torch.equal(params["network.first.weight"], module.first.weight)
    iterate(module)
    assert torch.equal(params["network.first.weight"], module.first.weight)


def runs(tmp_path, network, **options):
    config = metarl.resolve(
        None, "cartpole-length", overrides=SMALL | {"policy.network": network} | options
    )
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    return metarl.train(config, folder), folder


@pytest.mark.parametrize("network", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)])
def test_results_do_not_depend_on_threads_and_workers_bit_for_bit(tmp_path, network):
    kept = []
    for options in ({"threads": 1}, {"threads": 2}, {"workers": 2}):
        meta, folder = runs(tmp_path, network, **options)
        kept.append((meta.params, timeless(folder)))
    for params, rows in kept[1:]:
        assert all(torch.equal(params[n], kept[0][0][n]) for n in params)
        assert rows == kept[0][1]


def test_a_named_network_is_resumed_evaluated_adapted_and_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ("--preset", "None", "--tasks", "3", "--episodes", "3", "--threads", "1")
    network = ("--policy.network", "own_networks:Residual")
    whole = ("train", "navigation-2d", *common, *network)
    assert run(*whole, "--iterations", "2", "--out", "whole") == 0
    assert run(*whole, "--iterations", "1", "--out", "parts") == 0
    assert run("train", "--resume", "parts", "--iterations", "2") == 0
    one, two = (metarl.load(name) for name in ("whole", "parts"))
    assert all(torch.equal(one.params[n], two.params[n]) for n in one.params)
    assert run("evaluate", "parts", "--tasks", "2", "--episodes", "2") == 0
    policy = one.adapt([0.3, 0.2], episodes=2, seed=1)
    seen = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    with torch.no_grad():
        found = policy.module()(torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(found, policy.act(seen, deterministic=True), atol=1e-5)
    export(policy, tmp_path / "policy.pt", "torchscript", reals(2))
    policy.save(tmp_path / "adapted.safetensors")
    again = metarl.load_policy(tmp_path / "adapted.safetensors")
    np.testing.assert_array_equal(
        again.act(seen, deterministic=True), policy.act(seen, deterministic=True)
    )


def test_an_object_without_a_name_trains_and_resumes_if_it_is_passed_again(tmp_path):
    def factory(space, outputs):
        return Residual(space, outputs, width=9)

    values = SMALL | {"policy.network": factory}
    config = metarl.resolve(None, "navigation-2d", overrides=values | {"iterations": 1})
    metarl.train(config, tmp_path / "run")
    with refused("policy.network", error=CheckpointError):
        metarl.load(tmp_path / "run")
    assert metarl.load(tmp_path / "run", config.setup).setup == config.setup
    with refused("policy.network"):
        Config.from_json(config.to_json())
    longer = metarl.resolve(None, "navigation-2d", overrides=values)
    meta = metarl.train(longer, tmp_path / "run", resume=True)
    metarl.evaluate(meta, tasks=2, episodes=1, steps=1, threads=1)
    policy, file = meta.adapt([0.1, 0.2], episodes=2), tmp_path / "adapted.safetensors"
    policy.save(file)
    with refused("policy.network", error=CheckpointError):
        metarl.load_policy(file)
    again, seen = metarl.load_policy(file, config.setup), np.zeros(2, np.float32)
    np.testing.assert_array_equal(
        again.act(seen, deterministic=True), policy.act(seen, deterministic=True)
    )


@pytest.mark.parametrize("algorithm", ["maml-trpo", "cavia", "oracle"])
def test_the_components_of_a_dict_reach_a_module(algorithm):
    rows, _ = iterate(
        "own_networks:CameraAndJoints", algorithm, "own_networks:seeing", iterations=2
    )
    assert np.isfinite(rows[-1]["return_post"])


def test_a_dict_reaches_a_module_as_the_environment_gave_it():
    space = own_networks.Seeing.observation_space
    network = ModuleNetwork(own_networks.CameraAndJoints, "mine", space, 1)
    space.seed(0)
    given = [space.sample() for _ in range(5)]
    flat = np.stack([gym.spaces.flatten(space, x) for x in given]).astype(np.float32)
    found = network.inputs.split(torch.from_numpy(flat), None)
    for i, x in enumerate(given):
        for name in space.spaces:
            np.testing.assert_array_equal(found[name][i].numpy(), x[name])


def test_the_default_network_refuses_an_image_in_a_dict_and_check_warns():
    with refused("camera", "policy.network"):
        iterate("auto", family="own_networks:seeing")
    found = metarl.check_task_family(own_networks.seeing())
    assert {finding.severity for finding in found} == {"warning"}


def test_a_policy_of_components_acts_and_adapts_on_its_environment(tmp_path):
    values = SMALL | {"policy.network": "own_networks:CameraAndJoints", "iterations": 1}
    metarl.train(metarl.resolve(None, "own_networks:seeing", overrides=values), tmp_path / "run")
    policy = metarl.load(tmp_path / "run").adapt([0.2], episodes=2)
    env = own_networks.Seeing()
    observation, _ = env.reset(seed=0)
    assert env.action_space.contains(policy.act(observation))
    with refused("policy.normalize", "policy.network"):
        iterate(
            values["policy.network"], family="own_networks:seeing", **{"policy.normalize": True}
        )


def test_the_inner_loop_takes_a_module(tmp_path):
    _, policy = policies()
    batch = random_batch(policies()[0], tasks=2, samples=6, seed=3)
    single = batch.map(lambda x: x.float() if x.is_floating_point() else x)
    with ChunkPool(1) as pool:
        loop = InnerLoop(Adapter(policy, log_likelihood, (0.1,)), pool)
        meta = policy.init(np.random.default_rng(0))
        adapted = loop.run(lambda params, k: single, meta, 2, steps=2, query=True)
    assert len(adapted.iterates) == 3
