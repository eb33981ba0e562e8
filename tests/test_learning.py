"""Training until something is learned; `make slow` runs these."""

from __future__ import annotations

import dataclasses

import pytest

from metarl import evaluate, resolve, train


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", ["maml-trpo", "fomaml-trpo"])
def test_navigation_learns_to_adapt_in_one_step(tmp_path, algorithm):
    base = resolve("icml2017", "navigation-2d")
    config = dataclasses.replace(
        base,
        algorithm=algorithm,
        iterations=30,
        advantage=dataclasses.replace(base.advantage, trace=0.95),
    )
    result = evaluate(train(config, tmp_path / "run"), steps=1)
    mean, low, _ = result.curve.gain()
    assert low > 10.0
    assert result.curve.returns[1] > -20.0
    assert result.curve.returns[1] > result.references["random"].returns[1] + 30.0
    assert mean < 60.0  # start and goal are at most 0.71 apart, over 100 steps


@pytest.mark.learning
def test_half_cheetah_learns_to_run_both_ways(tmp_path):
    base = resolve("icml2017", "half-cheetah-dir")
    config = dataclasses.replace(
        base,
        seed=1,
        iterations=25,
        policy=dataclasses.replace(base.policy, hidden=(64, 64), activation="tanh"),
        advantage=dataclasses.replace(base.advantage, trace=0.95),
    )
    result = evaluate(train(config, tmp_path / "run"), steps=1)
    assert result.curve.gain()[1] > 100.0
    backward, forward = result.curve.per_task[0::2, 1], result.curve.per_task[1::2, 1]
    assert backward.mean() > 100.0
    assert forward.mean() > 100.0
