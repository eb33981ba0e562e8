"""Shared by the tests: one intra-op thread, as in training, and small random problems."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from metarl.objectives import Batch
from metarl.parallel import ChunkPool
from metarl.policies import GaussianMLP, Params


@pytest.fixture(autouse=True)
def _one_intraop_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool() -> Iterator[ChunkPool]:
    with ChunkPool(2) as made:
        yield made


@pytest.fixture
def small_policy() -> GaussianMLP:
    return GaussianMLP(observation_dim=3, action_dim=2, hidden=(5, 4))


def double_params(policy: GaussianMLP, seed: int = 0) -> Params:
    """Parameters in float64 with every entry, biases and log_std too, drawn at random."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(0.5 * rng.standard_normal(shape))
        for name, shape in policy.shapes().items()
    }


def random_batch(
    policy: GaussianMLP, tasks: int, samples: int, seed: int, ragged: bool = True
) -> Batch:
    """A float64 batch as some other policy would have drawn it, a part of it not valid."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    shape = (tasks, samples, policy.action_dim)
    old = {"mean": draw(*shape), "log_std": 0.3 * draw(tasks, 1, policy.action_dim).expand(shape)}
    action = policy.sample(old, draw(*shape))
    valid = torch.ones(tasks, samples, dtype=torch.float64)
    if ragged:
        valid[:, samples - samples // 4 :] = 0.0
        valid[0, samples // 2 :] = 0.0
    return Batch(
        observation=draw(tasks, samples, policy.observation_dim),
        action=action,
        advantage=draw(tasks, samples) * valid,
        weight=valid / valid.sum(dim=1, keepdim=True),
        old_log_prob=policy.log_prob(old, action),
        old=old,
    )
