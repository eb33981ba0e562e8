"""Memory that can be foreseen: wide observations, their baseline, copies of heavy environments."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import gaussian_policy
from expecting import refused, run

from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains import memory
from metarl.domains.memory import need
from metarl.envs import GymnasiumFamily, Uniform
from metarl.envs import memory as copies
from metarl.envs.errors import UserError
from metarl.envs.memory import Copies, resident, share_with
from metarl.learning import baselines
from metarl.learning.advantages import Advantages, estimate
from metarl.learning.baselines import (
    DUAL,
    LinearFeatures,
    ZeroBaseline,
    factor_gram,
    feature_count,
    features,
    fit_dual,
    fit_linear,
    is_dual,
    seen,
)
from metarl.models.encoders import NatureCNN
from metarl.sampling.trajectories import Rollout


def _rollout(tasks, episodes, horizon, size, *, ragged=False):
    rng = np.random.default_rng(0)
    valid = torch.ones(tasks, episodes, horizon, dtype=torch.bool)
    if ragged:
        valid[:, 0, horizon // 2 :] = False
    none = torch.zeros(tasks, episodes, dtype=torch.bool)
    grid = (tasks, episodes, horizon)

    def drawn(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    return Rollout(
        tasks=torch.zeros(tasks, 1), observation=drawn(*grid, size) * valid.unsqueeze(-1),
        last_observation=drawn(tasks, episodes, size), action=drawn(*grid, 1),
        behaviour={}, reward=drawn(*grid) * valid, valid=valid, terminated=none, truncated=~none,
        diverged=none,
    )  # fmt: skip


@pytest.mark.parametrize(("samples", "size"), [(3, 50), (40, 41), (20, 20), (30, 8)])
def test_both_forms_of_the_baseline_are_the_same_regression(samples, size):
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((3, samples, size)))
    x[:, samples // 2] = 0.0  # a row that is left out
    y = torch.from_numpy(rng.standard_normal((3, samples)))
    y[:, samples // 2] = 0.0
    primal = fit_linear(x, y, factor_gram(x, 0.1))
    dual = fit_dual(x, y, factor_gram(x.transpose(1, 2), 0.1))
    expected = np.linalg.solve(
        x.numpy().transpose(0, 2, 1) @ x.numpy() + 0.1 * np.eye(size),
        x.numpy().transpose(0, 2, 1) @ y.numpy()[..., None],
    )[..., 0]
    np.testing.assert_allclose(dual.numpy(), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(primal.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("targets", ["returns", "lambda-returns"])
@pytest.mark.parametrize("ragged", [False, True])
def test_advantages_do_not_depend_on_the_form(monkeypatch, targets, ragged):
    rollout = _rollout(3, 4, 5, 600, ragged=ragged)
    options, baseline = Advantages(targets=targets, gae_lambda=0.9), LinearFeatures(ridge=1e-3)
    found, scale = estimate(rollout, options, baseline, {}, ChunkPool(1))
    assert is_dual(20, feature_count((600,)))
    monkeypatch.setattr(baselines, "is_dual", lambda samples, size: False)
    expected, expected_scale = estimate(rollout, options, baseline, {}, ChunkPool(1))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale.numpy(), expected_scale.numpy(), rtol=1e-5)


def test_small_baselines_keep_their_form():
    assert not is_dual(5, DUAL)  # fewer samples than features, and a small matrix all the same
    assert not is_dual(DUAL + 1, DUAL + 1)
    assert is_dual(5, DUAL + 1)


def test_features_are_counted_as_they_are_made():
    shapes = [(3,), (40, 36, 3), (3, 36, 40), (5, 4)]
    for shape in shapes:
        kind = torch.uint8 if len(shape) > 1 else torch.float32
        coarse = seen(torch.zeros((2, *shape), dtype=kind), len(shape))
        made = features(coarse, torch.arange(2)).shape[-1]
        assert feature_count(shape) == made


def test_the_smaller_matrix_is_counted():
    matrix = 8 * (2 * 3000 + 4) ** 2
    baseline_bytes = LinearFeatures().peak_bytes
    assert baseline_bytes(32, (3000,), 4) < 0.1 * matrix
    assert baseline_bytes(8000, (3000,), 2) > 3 * 2 * matrix  # of two tasks at a time
    few = _need(3000, 500, 16, tasks=1, threads=8).baseline  # no more tasks than there are
    assert few == baseline_bytes(8000, (3000,), 1) < 6 * matrix


def _need(size, episodes, horizon, **options):
    policy = gaussian_policy(observation_dim=size, action_dim=1, hidden=(5,))
    usual = {"tasks": 4, "rollouts": 2, "threads": 2, "baseline": LinearFeatures()}
    return need(policy, episodes=episodes, horizon=horizon, **{**usual, **options})


def test_the_baseline_and_the_parameters_are_a_part_of_the_need():
    wide = _need(3000, 500, 16)
    assert wide.least == wide.rollouts + wide.baseline
    assert wide.baseline > 3 * 4 * 8 * 6004**2
    assert wide.total >= wide.rollouts + wide.update
    parameters = 4 * 4 * 3000 * 5
    assert _need(3000, 1, 1).update > 3 * parameters
    images = gaussian_policy(observation_dim=64, action_dim=2, encoder=NatureCNN((36, 36, 3)))
    of = {"tasks": 4, "episodes": 2, "horizon": 5, "rollouts": 2}
    assert 0 < need(images, **of, baseline=LinearFeatures()).baseline < 10**6
    assert need(images, **of, baseline=ZeroBaseline()).baseline == 0


def test_a_baseline_that_cannot_fit_is_refused_with_its_numbers(monkeypatch):
    needed = _need(3000, 500, 16)
    monkeypatch.setattr(memory, "available", lambda: needed.least - 1)
    with refused("wide", 500, 4, "--episodes", "--tasks"):
        memory.check_memory(needed, "wide")
    monkeypatch.setattr(memory, "available", lambda: needed.total + 1)
    memory.check_memory(needed, "wide")


# Copies of an environment -------------------------------------------------------------------------


class _Heavy(gym.Env):
    observation_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    task = np.zeros(1)
    size, late = 20_000_000, False

    def __init__(self):
        self.held = None
        if not self.late:
            self._hold()

    def _hold(self):
        self.held = np.ones(self.size // 8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.held is None:
            self._hold()
        return self.np_random.random(2, np.float32), {}

    def step(self, action):
        return self.np_random.random(2, np.float32), 0.0, False, False, {}


class _Late(_Heavy):
    late = True


class _Light(_Heavy):
    size = 800


def _family(env, name="heavy"):
    return GymnasiumFamily(name=name, env=env, tasks=Uniform({"goal": (-1.0, 1.0)}), horizon=3)


heavy, late = _family(_Heavy), _family(_Late)

KNOWS = pytest.mark.skipif(resident() is None, reason="the system does not tell its memory")


@KNOWS
@pytest.mark.parametrize("env", [_Heavy, _Late])
def test_copies_that_cannot_fit_are_refused_after_a_few(monkeypatch, env):
    monkeypatch.setattr(copies, "available", lambda: 200_000_000)
    with refused("heavy", 40, 20, 800, "--tasks", "--episodes"):
        _family(env).make_vec(40, 20).reset(seed=0)
    fits = _family(env).make_vec(2, 2)
    fits.reset(seed=0)
    fits.close()


@KNOWS
def test_light_copies_and_unknown_memory_are_no_matter(monkeypatch):
    monkeypatch.setattr(copies, "available", lambda: 1000)
    _family(_Light, "light").make_vec(20, 20).close()
    monkeypatch.setattr(copies, "available", lambda: None)
    _family(_Heavy).make_vec(1, 5).close()
    monkeypatch.setattr(copies, "available", lambda: 1000)
    monkeypatch.setattr(copies, "resident", lambda: None)
    _family(_Heavy).make_vec(1, 5).close()


def test_processes_that_share_the_memory_are_counted(monkeypatch):
    grown = iter(range(0, 10**12, 10**8))
    monkeypatch.setattr(copies, "resident", lambda: next(grown))
    monkeypatch.setattr(copies, "available", lambda: 3 * 10**9)

    def made():
        watch = Copies("mine", 5, 4)
        for _ in range(20):
            watch.one_more()

    made()  # 2 GB in all
    try:
        share_with(4)
        with refused("mine", 80):
            made()
    finally:
        share_with(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError):
        made()


@KNOWS
def test_the_command_refuses_copies_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(copies, "available", lambda: 200_000_000)
    assert run("train", f"{__name__}:heavy", "--workers", "0", "--out", "run") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
