"""Where a run's samples come from: rollouts in environments, or draws from a data set.

A source is opened for each meta-iteration. It then knows the tasks, gives the inner loop its
samples, support first, and says afterwards what was seen.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarl.algorithms.table import Algorithm
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import CHUNK, local_ranks
from metarl.envs import TaskFamily, guard
from metarl.envs.family import Family
from metarl.envs.supervised.family import Data, SupervisedFamily
from metarl.envs.tasks import Tasks
from metarl.learning.inner_update import Adapter
from metarl.learning.losses import task_losses
from metarl.learning.trajectories import Rollout
from metarl.models.networks import Model, Params
from metarl.models.policies import MLPPolicy
from metarl.models.predictors import Predictor
from metarl.models.samples import Examples
from metarl.policies.building import scaled_tasks, spaces_of
from metarl.sampling.rollouts import Address
from metarl.sampling.workers import AnyCollector, make_collector
from metarl.training.iterations import rollout_metrics
from metarl.training.memory import check_memory, need


@dataclass
class Opened(ABC):
    """A source, opened for one iteration."""

    address: Address
    tasks: Tasks
    context: Params
    """What the model observes of its task, as an entry of its parameters."""
    seconds: float = 0.0
    """Spent on sampling so far."""

    @abstractmethod
    def sample(self, params: Params, k: int) -> Rollout | Examples:
        """Return the samples of inner step k; see `Sampler`."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Environment steps, or examples, that were sampled here."""

    def observed(self, params: Params) -> Params:
        """Return meta-parameters with what was observed taken into their statistics."""
        return params

    @abstractmethod
    def metrics(self, before: Params, after: Params, stats: dict[str, Any]) -> dict[str, Any]:
        """Return what is recorded of the samples.

        Args:
            before: meta-parameters that the iteration began with.
            after: those it ends with.
            stats: what the outer step measured.
        """


class Source(ABC):
    """What a run's tasks and samples come from."""

    fixed: bool
    """Whether samples do not depend on parameters: then all are drawn before anything adapts."""

    def __init__(
        self, row: Algorithm, config: Config, family: Family, model: Model, block: slice
    ) -> None:
        self.row, self.config, self.family, self.model = row, config, family, model
        self.block = block

    def draw_tasks(self, address: Address) -> tuple[Tasks, Params]:
        """Return this rank's tasks of an iteration, and what is observed of them."""
        tasks, config = self.family.tasks, self.config
        draw = tasks.stratified if config.stratified else tasks.sample
        with guard.user_code():
            drawn = draw(address.tasks(), config.tasks)[self.block]
        told = self.row.observes_task
        return drawn, {"context": scaled_tasks(self.family, drawn)} if told else {}

    @abstractmethod
    def open(self, address: Address) -> Opened:
        """Open the source for an iteration."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""


# Environments -------------------------------------------------------------------------------------


class Environments(Source):
    """Episodes in a family's environments."""

    fixed = False
    family: TaskFamily
    model: MLPPolicy

    def __init__(
        self, row: Algorithm, config: Config, family: TaskFamily, model: MLPPolicy,
        pool: ChunkPool, block: slice,
    ) -> None:  # fmt: skip
        super().__init__(row, config, family, model, block)
        self.ranks, self.spaces = pool.ranks, spaces_of(family)
        self.action_space = self.spaces[1]
        self.collector: AnyCollector = make_collector(
            family, model, block.stop - block.start, config.episodes, pool, config.policy.action,
            workers=config.workers, timeout=config.worker_timeout, check=pool.ranks.is_main,
        )  # fmt: skip

    def open(self, address: Address) -> Episodes:
        return Episodes(address, *self.draw_tasks(address), source=self)

    def close(self) -> None:
        self.collector.close()


@dataclass
class Episodes(Opened):
    """An iteration's rollouts."""

    source: Environments = field(kw_only=True)
    rollouts: list[Rollout] = field(default_factory=list)

    def sample(self, params: Params, k: int) -> Rollout:
        begin = time.perf_counter()
        where = replace(self.address, inner_step=k)
        collect = self.source.collector.collect
        rollout = collect({**params, **self.context}, self.tasks, where)
        self.seconds += time.perf_counter() - begin
        self.rollouts.append(rollout)
        return rollout

    @property
    def count(self) -> int:
        return sum(rollout.env_steps for rollout in self.rollouts)

    def metrics(self, before: Params, after: Params, stats: dict[str, Any]) -> dict[str, Any]:
        source = self.source
        return rollout_metrics(
            source.row, source.config, source.model, after, source.action_space, self.rollouts,
            source.ranks,
        )  # fmt: skip

    def observed(self, params: Params) -> Params:
        source = self.source
        if not source.config.policy.normalize:
            return params
        chunks = slices(len(self.tasks), CHUNK)
        parts = [r.observation[c][r.valid[c]] for c in chunks for r in self.rollouts]
        return source.model.track_observations(params, parts, source.ranks)


# Data sets ----------------------------------------------------------------------------------------


class DataSet(Source):
    """Examples of a family of supervised tasks.

    All inner steps descend the same support, but Reptile's, which take minibatches of their own.
    """

    fixed = True
    family: SupervisedFamily
    model: Predictor

    def __init__(
        self, row: Algorithm, config: Config, family: SupervisedFamily, model: Predictor,
        adapter: Adapter, block: slice,
    ) -> None:  # fmt: skip
        super().__init__(row, config, family, model, block)
        self.adapter = adapter

    def open(self, address: Address) -> Draws:
        return Draws(address, *self.draw_tasks(address), source=self)

    def close(self) -> None:
        """Nothing is held but arrays."""


@dataclass
class Draws(Opened):
    """An iteration's examples."""

    source: DataSet = field(kw_only=True)
    _examples: list[Examples] = field(default_factory=list)
    _count: int = 0

    def sample(self, params: Params, k: int) -> Examples:
        steps = self.source.config.inner.steps
        if not self._examples:
            self._draw()
        return self._examples[-1] if k == steps else self._examples[min(k, len(self._examples) - 1)]

    def _draw(self) -> None:
        begin = time.perf_counter()
        source, steps = self.source, self.source.config.inner.steps
        minibatches = source.row.gradient == "displacement"
        supports = steps if minibatches else min(steps, 1)
        queries = 0 if minibatches else source.family.queries
        drawn = source.family.draw(
            self.tasks, self.address.examples(), supports=supports, queries=queries
        )
        context = self.context.get("context")
        self._examples = [make_examples(data, context) for data in drawn]
        self._count = sum(int(data.valid.sum()) for data in drawn)
        if not minibatches and steps > 1:
            self._examples = [self._examples[0]] * steps + self._examples[1:]
        self.seconds += time.perf_counter() - begin

    @property
    def count(self) -> int:
        return self._count

    def metrics(self, before: Params, after: Params, stats: dict[str, Any]) -> dict[str, Any]:
        adapter, model = self.source.adapter, self.source.model
        fast, slow, _ = adapter.split(before)
        with torch.no_grad():
            start = adapter.start(fast, slow, self._examples[0])
            query = self._examples[-1]
            output = adapter.output(start, slow, query)
            loss = float(task_losses(model.loss, model, output, query).mean())
        return {"loss_pre": loss, "loss_post": -stats.get("surrogate_before", math.nan)}


def make_examples(data: Data, context: Tensor | None = None) -> Examples:
    """Return drawn examples as tensors; every valid one of a task weighs the same."""
    count = data.valid.sum(axis=1, keepdims=True).clip(min=1)
    weight = (data.valid / count).astype(np.float32)
    return Examples(
        inputs=torch.tensor(data.inputs),  # a copy: a family may draw into the same arrays again
        targets=torch.tensor(data.targets),
        weight=torch.from_numpy(weight),
        classes=None if data.classes is None else torch.tensor(data.classes),
        context=context,
    )


def make_source(
    row: Algorithm, config: Config, family: Family, adapter: Adapter, pool: ChunkPool, block: slice
) -> Source:
    """Return the source of a run's samples; `block` are this rank's of the run's tasks."""
    model = adapter.model
    if isinstance(family, SupervisedFamily):
        assert isinstance(model, Predictor)
        return DataSet(row, config, family, model, adapter, block)
    assert isinstance(family, TaskFamily)
    assert isinstance(model, MLPPolicy)
    _check_memory(row, config, family, model, block.stop - block.start)
    return Environments(row, config, family, model, pool, block)


def _check_memory(
    row: Algorithm, config: Config, family: TaskFamily, policy: MLPPolicy, tasks: int
) -> None:
    second, trust_region = not row.first_order, row.outer == "trust-region"
    needed = need(
        policy,
        tasks=tasks,
        episodes=config.episodes,
        horizon=family.horizon,
        rollouts=config.inner.steps + 1,
        workers=0 if family.parallel else config.workers,
        chunks=config.threads if second else 1,
        fisher_fraction=config.trust_region.fisher_fraction if trust_region else 0.0,
        threads=config.threads,
    )
    check_memory(needed, config.family, local_ranks())
