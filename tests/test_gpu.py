"""The update on a GPU is that of the processor, within the rounding of floats."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_trainer import small

from metarl.learning.algorithms import ALGORITHMS
from metarl.learning.meta_gradients import Problem, UnrolledProblem
from metarl.learning.networks import Params, flatten
from metarl.learning.parallel import ChunkPool
from metarl.running.config import Config
from metarl.running.iterations import make_problem
from metarl.running.metrics import read_metrics
from metarl.running.presets import resolve
from metarl.running.trainer import Trainer, train
from metarl.sampling.rollouts import Address

GPU = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS = [
    name
    for name, row in ALGORITHMS.items()
    if not row.reference and name not in ("protomaml", "leopard")  # of classification
]


def config_of(algorithm: str, **values: Any) -> Config:
    """Return a small run of an algorithm, with its own options."""
    base, own = small(), resolve(None, "navigation-2d", algorithm)
    return dataclasses.replace(
        own, tasks=base.tasks, episodes=base.episodes, policy=base.policy, threads=1,
        family_options=base.family_options, **values,
    )  # fmt: skip


def problems(algorithm: str) -> tuple[Params, Problem, Problem]:
    """Return meta-parameters and one iteration's problem, on the processor and on the GPU."""
    config, row = config_of(algorithm), ALGORITHMS[algorithm]
    with Trainer(config) as trainer:
        adapted = trainer.inner_loop.run(
            trainer.source.open(Address(config.seed)).sample, trainer.state.params, config.tasks,
            steps=config.inner.steps, query="none" if row.gradient == "displacement" else "batch",
        )  # fmt: skip
        here, there = (
            make_problem(
                row, dataclasses.replace(config, device=device), 0, adapted, adapted.meta,
                trainer.inner_loop.adapter, ChunkPool(),
            )
            for device in ("cpu", GPU)
        )  # fmt: skip
        return adapted.meta, here, there


@pytest.mark.parametrize("algorithm", ROWS)
def test_gradients_and_fisher_products_agree_with_the_cpu(algorithm):
    meta, here, there = problems(algorithm)
    expected, _ = here.gradient(meta)
    gradient, _ = there.gradient(meta)
    assert gradient.device.type == "cpu"
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    if ALGORITHMS[algorithm].outer == "trust-region":
        assert isinstance(here, UnrolledProblem)
        assert isinstance(there, UnrolledProblem)
        v = torch.randn(flatten(meta).shape, generator=torch.Generator().manual_seed(0))
        with here.linearize(meta, here.iterates) as product:
            expected = product(v)
        with there.linearize(meta, there.iterates) as product:
            assert (product(v) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("algorithm", ROWS)
def test_a_run_on_a_gpu_finishes(tmp_path, algorithm):
    train(config_of(algorithm, device=GPU, iterations=2), tmp_path / "run")
    assert [row["skipped_updates"] for row in read_metrics(tmp_path / "run")] == [0, 0]
