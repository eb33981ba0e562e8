"""Training until something is learned; `make slow` runs these."""

from __future__ import annotations

import pytest

from metarl import evaluate, resolve, train


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", ["maml-trpo", "fomaml-trpo"])
def test_navigation_learns_to_adapt_in_one_step(tmp_path, algorithm):
    config = resolve("metarl2026", "navigation-2d", algorithm, {"iterations": 15})
    result = evaluate(train(config, tmp_path / "run"), steps=1)
    mean, low, _ = result.curve.gain()
    assert low > 10.0
    assert result.curve.returns[1] > -20.0
    assert result.curve.returns[1] > result.references["random"].returns[1] + 30.0
    assert mean < 60.0  # start and goal are at most 0.71 apart, over 100 steps


@pytest.mark.learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_cheetah_learns_to_run_both_ways(tmp_path, seed):
    config = resolve("metarl2026", "half-cheetah-dir", overrides={"iterations": 15, "seed": seed})
    result = evaluate(train(config, tmp_path / "run"), steps=1)
    assert result.curve.gain()[1] > 100.0
    backward, forward = result.curve.per_task[0::2, 1], result.curve.per_task[1::2, 1]
    assert backward.mean() > 100.0
    assert forward.mean() > 100.0
