"""The update on a GPU is that of the processor, within the rounding of floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import small

from metarl.algorithms import algorithms, find_algorithm
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.learning.meta_gradients.problem import Objective, Problem, Sampled
from metarl.learning.meta_gradients.unrolled import UnrolledProblem
from metarl.learning.trust_region import TrustRegion
from metarl.models.networks import Params, flatten
from metarl.runs.metrics import read_metrics
from metarl.sampling.rollouts import RandomKey
from metarl.training.run import new_trainer, train

GPU = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS = [
    name
    for name, row in algorithms().items()
    if not row.reference and name not in ("protomaml", "leopard")  # of classification
]


def config_of(algorithm: str, **values: Any) -> Config:
    """Return a small run of an algorithm, with its own options."""
    return small(algorithm, threads=1, **values)


def problems(algorithm: str) -> tuple[Params, Problem, Problem]:
    """Return meta-parameters and one iteration's problem, on the processor and on the GPU."""
    config = config_of(algorithm)
    algorithm = config.setup.algorithm
    with new_trainer(config) as trainer:
        adapted = trainer.inner_loop.run(
            trainer.source.open(RandomKey(config.run.seed), trainer.state.baseline).sample,
            trainer.state.params, config.run.tasks, steps=algorithm.inner.steps,
            query=algorithm.meta.needs_query,
        )  # fmt: skip
        loss = algorithm.outer.loss(trainer.domain.outer_loss(trainer.model))
        here, there = (
            algorithm.meta.problem(
                Sampled(
                    trainer.inner_loop.adapter, adapted, ChunkPool(), Objective(loss),
                    chunk=trainer.source.chunk(adapted.batches, device), device=device,
                )
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
    if isinstance(find_algorithm(algorithm).outer, TrustRegion):
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
