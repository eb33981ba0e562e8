"""Returns, advantages and the baseline against naive loops, on ragged episodes, in float64."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch
from expecting import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from metarl.learning.advantages import (
    AdvantageConfig,
    Targets,
    discounted_sum,
    estimate,
    factor_gram,
    features,
    fit_linear,
    gae,
    normalize,
)
from metarl.learning.parallel import ChunkPool
from metarl.learning.trajectories import Rollout

T, E, H, OBS = 3, 4, 9, 2


def make_rollout(lengths: np.ndarray, seed: int = 0, terminated: bool = False) -> Rollout:
    """A rollout of episodes of these lengths [T, E]; zeros after their ends."""
    rng = np.random.default_rng(seed)
    valid = torch.from_numpy(np.arange(H) < lengths[..., None])

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    grid = (T, E, H)
    ended = torch.full((T, E), terminated)
    return Rollout(
        tasks=torch.zeros(T, 1, dtype=torch.float64),
        observation=12.0 * draw(*grid, OBS) * valid.unsqueeze(-1),
        last_observation=draw(T, E, OBS),
        action=draw(*grid, 1) * valid.unsqueeze(-1),
        behaviour={"mean": draw(*grid, 1), "log_std": draw(*grid, 1)},
        reward=draw(*grid) * valid,
        valid=valid,
        terminated=ended & (valid.sum(-1) > 0),
        truncated=~ended,
        diverged=valid.sum(-1) == 0,
    )


def loop_estimate(rollout: Rollout, config: AdvantageConfig) -> np.ndarray:
    """Everything again with loops over tasks, episodes and steps, in NumPy."""
    result = np.zeros((T, E, H))
    for task in range(T):
        rows, targets, where = [], [], []
        for e in range(E):
            n = int(rollout.valid[task, e].sum())
            total = 0.0
            returns = [0.0] * n
            for t in reversed(range(n)):
                total = float(rollout.reward[task, e, t]) + config.discount * total
                returns[t] = total
            for t in range(n):
                rows.append(feature_row(rollout.observation[task, e, t].numpy(), t))
                targets.append(returns[t])
                where.append((e, t))
        if not rows:
            continue
        x = np.array(rows)
        weights = ridge_solution(x, np.array(targets), config.ridge)
        for _ in range(3 if config.targets == "lambda-returns" else 0):
            targets = []
            for e in range(E):
                rewards, values = task_values(rollout, task, e, weights)
                # G[t] = r[t] + discount ((1 - trace) V[t + 1] + trace G[t + 1]); both end with 0.
                following, returns = 0.0, []
                for reward, value in reversed(list(zip(rewards, values[1:], strict=True))):
                    ahead = (1 - config.trace) * value + config.trace * following
                    following = reward + config.discount * ahead
                    returns.append(following)
                targets += returns[::-1]
            weights = ridge_solution(x, np.array(targets), config.ridge)
        for e in range(E):
            rewards, values = task_values(rollout, task, e, weights)
            running = 0.0
            for t in reversed(range(len(rewards))):
                delta = rewards[t] + config.discount * values[t + 1] - values[t]
                running = delta + config.discount * config.trace * running
                result[task, e, t] = running
        if config.normalize:
            seen = np.array([result[task, e, t] for e, t in where])
            for e, t in where:
                result[task, e, t] = (result[task, e, t] - seen.mean()) / (seen.std() + 1e-8)
    return result


def ridge_solution(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    return np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)


def task_values(rollout, task: int, e: int, weights: np.ndarray) -> tuple[list, list]:
    """The rewards of an episode and the values at its steps, with 0 behind the horizon."""
    n = int(rollout.valid[task, e].sum())
    rewards = [float(r) for r in rollout.reward[task, e, :n]]
    seen = rollout.observation[task, e].numpy()
    return rewards, [*(float(feature_row(seen[t], t) @ weights) for t in range(n)), 0.0]


def feature_row(observation: np.ndarray, t: int) -> np.ndarray:
    o = np.clip(observation.astype(np.float64), -10, 10)
    s = t / 100
    return np.concatenate([o, o**2, [s, s**2, s**3, 1.0]])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, H), min_size=T * E, max_size=T * E),
    seed=st.integers(0, 100),
    terminated=st.booleans(),
    norm=st.booleans(),
    targets=st.sampled_from(get_args(Targets)),
)
def test_estimate_matches_loops_on_ragged_episodes(lengths, seed, terminated, norm, targets):
    rollout = make_rollout(np.array(lengths).reshape(T, E), seed, terminated)
    config = AdvantageConfig(discount=0.9, trace=0.8, normalize=norm, ridge=0.1, targets=targets)
    with ChunkPool(1) as pool:
        found, scale = estimate(rollout, config, pool)
        plain, one = estimate(rollout, dataclasses.replace(config, normalize=False), pool)
    assert not found[~rollout.valid].any()
    np.testing.assert_allclose(found.numpy(), loop_estimate(rollout, config), rtol=2e-5, atol=2e-5)
    # The scale is the standard deviation that was divided by.
    assert one.tolist() == [1.0] * T
    for task in range(T):
        seen = plain[task][rollout.valid[task]].double()
        expected = float(seen.std(correction=0)) + 1e-8 if norm and len(seen) else 1.0
        if len(seen) > 1:
            assert float(scale[task]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_discounted_sum_matches_its_definition():
    x = np.random.default_rng(0).standard_normal((2, 50))
    expected = [[sum(0.9**k * row[t + k] for k in range(50 - t)) for t in range(50)] for row in x]
    found = discounted_sum(torch.from_numpy(x), 0.9).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rng = np.random.default_rng(1)
    reward, value = (torch.from_numpy(rng.standard_normal((5, H))) for _ in range(2))
    found = gae(reward, value, 0.9, 1.0)
    torch.testing.assert_close(found, discounted_sum(reward, 0.9) - value)


def test_baseline_is_the_ridge_solution_of_each_task():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((T, 40, 6)), rng.standard_normal((T, 40))
    factor = factor_gram(torch.from_numpy(x), 0.3)
    found = fit_linear(torch.from_numpy(x), torch.from_numpy(y), factor).numpy()
    for task in range(T):
        # Ridge regression as least squares with rows sqrt(ridge) e_i appended.
        rows = np.vstack([x[task], np.sqrt(0.3) * np.eye(6)])
        expected = np.linalg.lstsq(rows, np.append(y[task], np.zeros(6)), rcond=None)[0]
        np.testing.assert_allclose(found[task], expected, rtol=1e-10)


def test_baseline_raises_the_ridge_until_the_system_is_solvable():
    # Large collinear columns: the Gram matrix plus 1e-5 is not positive definite in float64.
    column = 1e5 * torch.linspace(1, 2, 30, dtype=torch.float64)
    hard = torch.stack([column, column * (1 + 1e-15), column], dim=1)
    easy = torch.linspace(1, 2, 30, dtype=torch.float64).unsqueeze(1) ** torch.arange(3)
    grams = [x.T @ x + 1e-5 * torch.eye(3, dtype=torch.float64) for x in (easy, hard)]
    assert torch.linalg.cholesky_ex(grams[1])[1] != 0
    both = torch.stack([easy, hard])
    factors = factor_gram(both, 1e-5)
    # The easy task keeps its own ridge, and both are fitted.
    torch.testing.assert_close(factors[0] @ factors[0].T, grams[0], rtol=1e-12, atol=0.0)
    y = torch.stack([column, column]) / 1e5
    fit = (both @ fit_linear(both, y, factors).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(fit, y, rtol=1e-4, atol=0.0)


def test_baseline_is_zero_if_nothing_can_be_fitted():
    x = torch.full((1, 4, 2), torch.nan, dtype=torch.float64)
    weights = fit_linear(x, torch.ones(1, 4, dtype=torch.float64), factor_gram(x))
    assert torch.equal(weights, torch.zeros(1, 2, dtype=torch.float64))


def test_features_of_a_step_match_their_definition():
    row = features(torch.tensor([[3.0, -40.0]]), torch.tensor([50]))[0]
    expected = torch.tensor([3.0, -10.0, 9.0, 100.0, 0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
    torch.testing.assert_close(row, expected)


def test_normalize_divides_by_the_standard_deviation():
    rng = np.random.default_rng(3)
    advantage = torch.from_numpy(5.0 + 3.0 * rng.standard_normal((2, 3, H)))
    valid = torch.ones(2, 3, H, dtype=torch.bool)
    valid[0, 1, 4:] = False
    found, scale = normalize(torch.where(valid, advantage, 0.0), valid)
    for task in range(2):
        seen = found[task][valid[task]]
        assert float(seen.mean()) == pytest.approx(0.0, abs=1e-12)
        assert float(seen.std(correction=0)) == pytest.approx(1.0, rel=1e-6)
        before = advantage[task][valid[task]]
        assert float(scale[task]) == pytest.approx(float(before.std(correction=0)), rel=1e-6)


def test_lambda_returns_with_lambda_one_are_the_returns(pool):
    rollout = make_rollout(np.full((T, E), H))
    usual, other = (
        estimate(rollout, AdvantageConfig(targets=targets), pool)[0]
        for targets in get_args(Targets)
    )
    np.testing.assert_allclose(other.numpy(), usual.numpy(), rtol=1e-5, atol=1e-6)


def test_a_task_without_valid_steps_has_no_advantages(pool):
    lengths = np.full((T, E), H)
    lengths[1] = 0
    found, _ = estimate(make_rollout(lengths), AdvantageConfig(), pool)
    assert torch.isfinite(found).all()
    assert not found[1].any()
    assert found[0].any()


@pytest.mark.parametrize(
    ("key", "value"),
    [("discount", 1.5), ("trace", -0.1), ("ridge", 0.0), ("targets", "mean")],
)
def test_bad_values_are_refused_by_name(key, value):
    with refused(f"advantage.{key}", value):
        AdvantageConfig(**{key: value})
