"""Recurrent policies: cells, states of episodes, gradients, and everywhere that a policy acts."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import mostly_slow, policy_options, random_batch, reals, same_params, timeless
from expecting import refused
from torch import nn

import metarl
from metarl.config.options import Config
from metarl.config.setup import Setup
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.reinforcement import make_policy
from metarl.envs import make_family
from metarl.learning.adapter import Adapter
from metarl.learning.losses import dice, likelihood_ratio, log_likelihood
from metarl.learning.meta_gradients.problem import Objective
from metarl.learning.meta_gradients.unrolled import UnrolledProblem
from metarl.learning.trust_region import fisher_samples
from metarl.models.networks import stack
from metarl.models.recurrent import GRU, LSTM
from metarl.policies.export import export
from metarl.policies.loading import load
from metarl.policies.meta_policy import MetaPolicy
from metarl.policies.policy import Policy
from metarl.sampling.rollouts import Collector, RandomKey
from metarl.sampling.workers import WorkerCollector
from metarl.training.run import new_trainer, train

BOX = gym.spaces.Box(-1.0, 1.0, (2,))
NETWORKS = ["gru", "lstm", "recurrent_networks:Cell"]


def small(algorithm, family="navigation-2d", **options):
    """Return the config of a small run."""
    values = {"iterations": 3, "tasks": 5, "episodes": 3, "threads": 2, "checkpoint_every": 2}
    horizon = {"horizon": 6} if family == "navigation-2d" else {}
    return Config.of(family, algorithm, horizon).with_options(values | options)


def made(network="gru", observation=3, space=BOX, context=0, **options):
    if network in ("gru", "lstm"):
        options.setdefault("units", 5)
    return make_policy(
        policy_options(network=network, **options), reals(observation), space, context
    )


def double(policy, seed=0):
    """Return parameters in float64, with another value for each entry."""
    rng = np.random.default_rng(seed)
    shapes = policy.shapes().items()
    return {name: torch.from_numpy(0.5 * rng.standard_normal(shape)) for name, shape in shapes}


def episodes_of(policy, tasks=2, episodes=3, horizon=4, seed=0):
    """Return a batch of ragged episodes whose entries after the end are zero, as in a rollout."""
    batch = random_batch(policy, tasks, episodes * horizon, seed, ragged=False)
    length = torch.from_numpy(
        np.random.default_rng(seed).integers(1, horizon + 1, (tasks, episodes))
    )
    valid = (torch.arange(horizon) < length.unsqueeze(-1)).flatten(1)
    batch = batch.map(lambda x: torch.where(valid.view(*valid.shape, *[1] * (x.dim() - 2)), x, 0.0))
    weight = valid.double() / valid.sum(1, keepdim=True)
    return dataclasses.replace(batch, weight=weight, episodes=episodes)


# Cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cell"), [(GRU, nn.GRUCell), (LSTM, nn.LSTMCell)])
def test_cells_are_those_of_torch(kind, cell):
    network = kind(inputs=3, outputs=2, units=4)
    rng = np.random.default_rng(0)
    params = {n: torch.from_numpy(rng.standard_normal(s)) for n, s in network.shapes().items()}
    theirs = cell(3, 4).double()
    names = {"weight_ih": "input.weight", "weight_hh": "recurrent.weight"}
    names |= {"bias_ih": "input.bias", "bias_hh": "recurrent.bias"}
    # torch's order of an LSTM's gates is i, f, g, o.
    order = [0, 1, 2] if kind is GRU else [0, 1, 3, 2]
    gates = {n: torch.cat([params[own].chunk(len(order), -1)[i] for i in order], -1)
             for n, own in names.items()}  # fmt: skip
    theirs.load_state_dict({name: p.t() for name, p in gates.items()})
    x = torch.from_numpy(rng.standard_normal((6, 5, 3)))  # [time, sequences, inputs]
    state, hidden = network.initial_state(params, (5,)), None
    outputs = []
    for one in x:
        output, state = network.step(params, one, state)
        hidden = theirs(one, hidden)
        own = hidden if kind is GRU else hidden[0]
        torch.testing.assert_close(state["hidden"], own)
        expected = own @ params["output.weight"] + params["output.bias"]
        torch.testing.assert_close(output, expected)
        outputs.append(output)
    stacked = stack(params, 1)
    start = network.initial_state(stacked, (1, 5))
    whole = network.replay(stacked, x.movedim(0, 1).unsqueeze(0), start)
    torch.testing.assert_close(whole[0].unflatten(0, (5, 6)), torch.stack(outputs, 1))


def test_recurrent_weights_start_orthogonal_and_the_forget_gate_open():
    network = LSTM(inputs=3, outputs=2, units=8, output_scale=0.1)
    params = network.init(np.random.default_rng(0))
    for gate in params["recurrent.weight"].split(8, dim=1):
        torch.testing.assert_close(gate @ gate.mT, torch.eye(8), atol=1e-5, rtol=0.0)
    assert params["input.bias"].tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16
    assert params["input.weight"].abs().max() <= (6.0 / 11.0) ** 0.5
    assert params["output.weight"].abs().max() <= 0.1 * (6.0 / 10.0) ** 0.5


@pytest.mark.parametrize("network", NETWORKS)
def test_sampling_gives_a_task_the_same_bits_alone_and_among_others_bit_for_bit(network):
    policy = made(network, units=33) if ":" not in network else made(network)
    params = [policy.init(np.random.default_rng(seed)) for seed in range(3)]
    stacked = {n: torch.stack([p[n] for p in params]) for n in params[0]}
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 3, 7, 3)).astype(np.float32))

    def outputs(tasks):
        some = {n: p[tasks].clone() for n, p in stacked.items()}
        state, found = policy.initial_state(some, len(some["log_std"]), 7), []
        for one in x[:, tasks]:
            output, state = policy.step(some, one, state)
            found.append(output)
        return torch.stack(found, dim=1)

    with torch.inference_mode():
        together = outputs(slice(0, 3))
        for t in range(3):
            assert torch.equal(outputs(slice(t, t + 1))[0], together[t])


# Learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "loss", mostly_slow([likelihood_ratio, log_likelihood, dice], likelihood_ratio)
)
def test_meta_gradients_match_finite_differences(network, loss, pool):
    policy = made(network)
    theta = double(policy)
    support, query = (episodes_of(policy, seed=seed) for seed in (1, 2))
    adapter = Adapter(policy, loss, (0.3,))
    objective = Objective(likelihood_ratio)
    problem = UnrolledProblem(adapter, [support, query], pool, objective, theta)
    gradient, _ = problem.gradient(theta)

    def value(vector):
        parts = vector.split([p.numel() for p in theta.values()])
        moved = {n: v.view_as(p) for (n, p), v in zip(theta.items(), parts, strict=True)}
        return problem.evaluate(moved).loss

    flat = torch.cat([p.flatten() for p in theta.values()])
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = torch.from_numpy(rng.standard_normal(len(flat)))
        slope = (value(flat + 1e-5 * direction) - value(flat - 1e-5 * direction)) / 2e-5
        assert float(gradient @ direction) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("network", NETWORKS)
def test_replay_equals_a_loop_over_single_episodes(network):
    policy = made(network)
    params = stack(double(policy), 2)
    batch = episodes_of(policy)
    found = policy.output(params, batch)["mean"].unflatten(1, (3, 4))
    seen = batch.observation.unflatten(1, (3, 4))
    for task in range(2):
        own = {name: p[task] for name, p in params.items()}
        for e in range(3):
            state = policy.initial_state(own, 1)
            for t in range(4):
                output, state = policy.step(own, seen[task, e, t : t + 1], state)
                torch.testing.assert_close(found[task, e, t], output[0])


@pytest.mark.parametrize("loss", [likelihood_ratio, log_likelihood, dice])
def test_samples_after_the_end_of_an_episode_change_nothing(loss):
    policy = made()
    batch = episodes_of(policy)
    after = batch.weight == 0.0
    assert bool(after.any())

    def other(x):
        return torch.where(after.view(*after.shape, *[1] * (x.dim() - 2)), x + 7.0, x)

    changed = dataclasses.replace(
        batch, observation=other(batch.observation), action=other(batch.action),
        advantage=other(batch.advantage), old_log_prob=other(batch.old_log_prob),
    )  # fmt: skip
    found = []
    for one in (batch, changed):
        theta = {n: p.clone().requires_grad_() for n, p in stack(double(policy), 2).items()}
        value = loss(policy, policy.output(theta, one), one)
        found.append([value, *torch.autograd.grad(value.sum(), list(theta.values()))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_samples_out_of_order_are_refused():
    policy = made()
    batch = episodes_of(policy)
    params = stack(double(policy), 2)
    whole = torch.arange(12).view(1, 3, 4)[:, 1:].expand(2, -1, -1)
    some = policy.output(params, batch.select(whole))["mean"]
    torch.testing.assert_close(some, policy.output(params, batch)["mean"][:, 4:])
    with pytest.raises(ValueError, match="episodes"):
        policy.output(params, batch.select(torch.arange(12)))


def test_fisher_products_use_whole_episodes(pool):
    policy = made()
    support, query = (episodes_of(policy, episodes=200, seed=seed) for seed in (1, 2))
    adapter = Adapter(policy, likelihood_ratio, (0.3,))
    problem = UnrolledProblem(adapter, [support, query], pool, Objective(likelihood_ratio))
    for chosen in fisher_samples(problem, 0.5):
        assert chosen is not None
        assert chosen.shape[1] < 200
        assert torch.equal(chosen - chosen[..., :1], torch.arange(4).expand_as(chosen))
        assert bool((chosen[..., 0] % 4 == 0).all())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "algorithm",
    mostly_slow(
        [
            "maml-trpo",
            "promp",
            "maml-reinforce",
            "fomaml-trpo",
            "reptile",
            "anil",
            "cavia",
            "imaml",
            "maml++",
            "meta-sgd",
            "dice-maml",
            "e-maml",
            "oracle",
        ],
        "maml-trpo",
        "promp",
    ),
)
def test_algorithms_train_recurrent_policies(network, algorithm):
    # The check of the first iteration compares the densities of sampling and learning.
    config = small(algorithm, **{"policy.network": network, "policy.normalize": True})
    with new_trainer(config.with_options({"tasks": 2})) as trainer:
        before = {name: p.clone() for name, p in trainer.state.params.items()}
        rows = [trainer.iterate() for _ in range(2)]
        assert np.isfinite(rows[1]["return_post"])
        assert not rows[1].get("skipped")
        moved = [n for n, p in trainer.state.params.items() if not torch.equal(p, before[n])]
        assert {"input.weight", "recurrent.weight"} <= set(moved) or ":" in network


# The state of an episode --------------------------------------------------------------------------


def sums(rollout, params):
    """Return what the policy of `Sum` must have done: a weight times the sum of observations."""
    weight = params["network.head"]
    total = rollout.observation.double().cumsum(dim=2)
    expected = torch.einsum("tehi,tio->teho", total, weight.double()).float()
    return torch.where(rollout.valid.unsqueeze(-1), expected, 0.0)


def assert_one_state_for_each_episode(rollout, params):
    torch.testing.assert_close(
        rollout.behaviour["mean"], sums(rollout, params), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", ["navigation-2d", "recurrent_networks:marked"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_lasts_for_one_episode_of_one_task(family, workers):
    made_family = make_family(family)
    tasks = made_family.tasks.sample(np.random.default_rng(0), 5)
    with make_family(family).make() as env:
        sizes = env.observation_space.shape[0], env.action_space
    policy = made("recurrent_networks:Sum", *sizes)
    one = [policy.init(np.random.default_rng(seed)) for seed in range(5)]
    params = {name: torch.stack([p[name] for p in one]) for name in one[0]}
    with ChunkPool(2) as pool:
        if workers and not made_family.parallel:
            collector = WorkerCollector(made_family, policy, 5, 4, workers=workers)
        else:
            collector = Collector(made_family, policy, 5, 4, pool)
        try:
            for iteration in range(2):  # no state remains from the collect before
                rollout = collector.collect(params, tasks, RandomKey(0, iteration))
                assert_one_state_for_each_episode(rollout, params)
        finally:
            collector.close()
    if family != "navigation-2d":
        assert len(rollout.valid.sum(-1).unique()) > 3  # ragged


def meta_policy(network="recurrent_networks:Sum", family="recurrent_networks:marked", **options):
    config = Config.of(family, "maml-trpo").with_options({"policy.network": network, **options})
    model = config.setup.domain.model(
        config.setup.algorithm, config.setup.policy, make_family(family)
    )
    return MetaPolicy(model.init(np.random.default_rng(0)), config.setup)


@pytest.fixture
def learned(monkeypatch):
    """The samples of inner steps, in order."""
    batches = []
    batch = MetaPolicy.batch

    def note(self, rollout, pool):
        batches.append(batch(self, rollout, pool))
        return batches[-1]

    monkeypatch.setattr(MetaPolicy, "batch", note)
    return batches


def test_adapt_starts_each_episode_with_a_new_state(learned):
    meta = meta_policy()
    meta.adapt([4.0], steps=1, episodes=6)
    rollout = learned[0].rollout
    stacked = {name: p[None] for name, p in meta.params.items()}
    assert_one_state_for_each_episode(rollout, stacked)
    assert len(rollout.valid.sum(-1).unique()) > 2


@pytest.mark.parametrize("network", ["gru", "recurrent_networks:Cell"])
def test_transitions_adapt_as_episodes_do(network, learned):
    meta = meta_policy(network)
    expected = meta.adapt([4.0], steps=1, episodes=5, seed=3)
    rollout = learned[0].rollout
    adapter = meta.adapter(gym.spaces.Box(-9.0, 9.0, (1,)))  # it is given actions before clipping
    for e in range(5):
        length = int(rollout.valid[0, e].sum())
        for t in range(length):
            adapter.add(
                rollout.observation[0, e, t].numpy(), rollout.action[0, e, t].numpy(),
                float(rollout.reward[0, e, t]), terminated=t == length - 1,
            )  # fmt: skip
    adapted = adapter.adapted()
    for name, p in expected.params.items():
        torch.testing.assert_close(adapted.params[name], p, atol=1e-6, rtol=1e-5)
        assert name == "log_std" or not torch.equal(p, meta.params[name])


def test_an_episode_keeps_its_state_across_an_inner_step(learned):
    meta = meta_policy(**{"inner.step_sizes": (1e-4,)})
    meta.params["log_std"].fill_(-6.0)  # actions are almost the mean
    adapter = meta.adapter(seed=1)
    weight, total = float(meta.params["network.head"]), 0.0

    def play(values, end=False):
        nonlocal total
        for i, value in enumerate(values):
            x = np.array([value], np.float32)
            total += value
            first, action = adapter.act(x), adapter.act(x)  # asking again does not move the state
            assert (float(first[0]), float(action[0])) == pytest.approx(
                (weight * total,) * 2, abs=0.02
            )
            adapter.add(x, action, 1.0 - value, terminated=end and i == len(values) - 1)
        total = 0.0 if end else total

    play([0.1, 0.2, 0.3])
    policy = adapter.adapted()
    before, weight = weight, float(policy.params["network.head"])
    assert abs(weight - before) > 1e-4
    play([0.4, 0.5], end=True)
    play([3.0])
    adapter.adapted()
    batch = learned[-1]
    means = batch.old["mean"].flatten().tolist()
    assert means == pytest.approx([weight * 1.0, weight * 1.5, weight * 3.0, 0.0], rel=1e-4)
    stacked = {name: p[None] for name, p in policy.params.items()}
    again = policy.policy.output(stacked, batch)  # the learning pass starts from the same state
    torch.testing.assert_close(
        again["mean"][batch.weight > 0], batch.old["mean"][batch.weight > 0], rtol=1e-4, atol=1e-6
    )


def alone(network="gru", space=BOX, **options) -> Policy:
    chosen = policy_options(network=network, **options)
    policy = make_policy(chosen, reals(3), space)
    rng = np.random.default_rng(0)
    shapes = policy.shapes().items()
    drawn = {name: (0.3 * rng.standard_normal(s)).astype(np.float32) for name, s in shapes}
    params = {n: torch.from_numpy(np.abs(x) if "var" in n else x) for n, x in drawn.items()}
    provenance = {"task": None, "steps": 0, "episodes": 0, "seed": 0}
    record = {"config": Setup(policy=chosen).to_json(), "family": {}}
    return Policy(policy, params, space, 10, chosen.action, provenance, record)


def test_a_policy_acts_with_its_state():
    policy = alone()
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    state, batch = policy.initial_state(4), []
    for one in x:
        actions, state = policy.act(one, state=state, deterministic=True)
        batch.append(actions)
    for e in range(4):
        own = policy.initial_state()
        for t in range(6):
            action, own = policy.act(x[t, e], state=own, deterministic=True)
            assert action == pytest.approx(batch[t][e], abs=1e-5)
    first, _ = policy.act(x[5], state=policy.initial_state(4), deterministic=True)
    assert not np.allclose(first, batch[5], atol=1e-3)
    with refused("state"):
        policy.act(x[0])
    for wrong in (policy.initial_state(3), policy.initial_state(), {}, 7):
        with refused("state"):
            policy.act(x[0], state=wrong)
    plain = alone("mlp")
    assert plain.initial_state() == {}
    action, after = plain.act(x[0], state={}, deterministic=True)
    assert after == {}
    np.testing.assert_array_equal(action, plain.act(x[0], deterministic=True))


def test_play_starts_with_a_new_state():
    meta = meta_policy()
    policy = meta.adapt([4.0], steps=0)
    with meta.family.make([4.0]) as env:
        one, two = (policy.play(env, seed=2, deterministic=True) for _ in range(2))
        observation, _ = env.reset(seed=2)
        total, length = 0.0, 0
        for length in range(1, 9):
            mean = length * float(observation[0]) * float(policy.params["network.head"])
            total += min(max(mean, -1.0), 1.0)
            observation, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
            if terminated or truncated:
                break
    assert one == two == pytest.approx(total, rel=1e-4)
    assert length > 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("space", [BOX, gym.spaces.MultiDiscrete([3, 2])], ids=str)
def test_modules_and_files_have_the_state_as_input_and_output(network, space, tmp_path):
    policy = alone(network, space, normalize=True)
    x = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    assert export(policy, tmp_path / "policy", "torchscript", reals(3)) < 1e-4
    for module in (policy.module(), torch.jit.load(tmp_path / "policy")):
        state = policy.initial_state(4)
        own = list(state.values())
        for one in x:
            expected, state = policy.act(one, state=state, deterministic=True)
            with torch.no_grad():
                found, *own = module(torch.from_numpy(one), *own)
            assert found.numpy() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_files_have_the_state_as_input_and_output(network, tmp_path):
    pytest.importorskip("onnx")
    assert export(alone(network), tmp_path / "policy", "onnx", reals(3)) < 1e-4


# Runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", mostly_slow(NETWORKS, "gru"))
def test_a_recurrent_run_resumes_at_any_number_of_threads_bit_for_bit(network, tmp_path):
    def config(threads=1):
        return small("maml-trpo", threads=threads, **{"policy.network": network})

    whole = train(config(), tmp_path / "whole")
    done: list[dict] = []
    train(config(), tmp_path / "parts", callbacks=[done.append], stop=lambda: len(done) == 2)
    parts = train(config(threads=3), tmp_path / "parts", resume=True)
    assert same_params(whole, parts)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    found = metarl.evaluate(load(tmp_path / "whole"), tasks=3, episodes=2, steps=2, threads=1)
    assert np.isfinite(found.curve.per_task).all()


def test_a_recurrent_run_does_not_depend_on_workers_bit_for_bit():
    trained = []
    for workers in (0, 2):
        options = {"tasks": 4, "workers": workers, "policy.network": "gru", "policy.units": 7}
        with new_trainer(small("maml-trpo", "recurrent_networks:marked", **options)) as trainer:
            row = trainer.iterate()
            trained.append((trainer.state.params, row["returns"]))
    assert trained[0][1] == trained[1][1]
    for name, p in trained[0][0].items():
        assert torch.equal(p, trained[1][0][name])


@pytest.mark.parametrize("network", ["NoState", "Growing"])
def test_modules_with_a_wrong_state_are_refused(network):
    with refused("policy.network", network):
        made(f"recurrent_networks:{network}")


def test_recurrent_networks_are_refused_where_samples_have_no_order():
    for network in ("gru", "recurrent_networks:Cell"):
        with refused("policy.network", network):
            new_trainer(metarl.resolve(None, "sinusoid", "maml-trpo", {"policy.network": network}))
    with refused("gru"):
        make_policy(
            policy_options(network="gru"), gym.spaces.Box(0, 255, (40, 40, 3), np.uint8), BOX
        )


@pytest.mark.learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_a_recurrent_policy_recalls_the_start_of_an_episode(seed):
    earned = {}
    for network in ("gru", "mlp"):
        options = {"tasks": 4, "episodes": 30, "outer.max_kl": 0.05, "advantage.discount": 1.0}
        options |= {"policy.network": network, "iterations": 30, "seed": seed, "threads": 2}
        config = Config.of("recurrent_networks:recall", "pretrained").with_options(options)
        with new_trainer(config) as trainer:
            rows = [trainer.iterate() for _ in range(config.run.iterations)]
        earned[network] = np.mean([row["return_pre"] for row in rows[-10:]])
    assert earned["gru"] > 0.95
    assert earned["mlp"] < 0.6
