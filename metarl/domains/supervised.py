"""Supervised learning: regressors and classifiers, examples of data sets, losses."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from metarl.algorithms import Algorithm
from metarl.algorithms.named_parts import find_outer
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.domain import (
    Domain,
    ModelOptions,
    TaskSamples,
    TaskSource,
    context_dim,
)
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.supervised.family import Data, SupervisedFamily
from metarl.envs.tasks import Tasks
from metarl.learning.adapter import Adapter
from metarl.learning.inner_loop import check_finite
from metarl.learning.losses import (
    Loss,
    likelihood_ratio,
    log_likelihood,
    name_of,
    task_losses,
    trait,
)
from metarl.learning.trust_region import TrustRegion
from metarl.models.network_parts import (
    PREDICTOR_NETWORKS,
    AutoPredictorNetwork,
    NetworkPart,
)
from metarl.models.networks import MLP, Model, Params
from metarl.models.predictors import Classifier, Predictor, Regressor
from metarl.models.samples import Examples, Samples
from metarl.parts import fixed
from metarl.sampling.rollouts import RandomKey


@dataclass(frozen=True, kw_only=True)
class PredictorOptions(ModelOptions):
    """Network of a regressor or classifier."""

    network: NetworkPart = fixed(AutoPredictorNetwork())


_USUAL = (log_likelihood, likelihood_ratio)
"""Losses of policies that the model's own loss replaces."""


def _needs_policies(loss: Loss | None) -> bool:
    return loss is not None and loss not in _USUAL and trait(loss, "of_policies")


class Supervised(Domain):
    """Regressors and classifiers that adapt to labelled examples."""

    name: ClassVar[str] = "supervised"
    measure: ClassVar[str] = "loss"
    unit: ClassVar[str] = "examples"

    def algorithm(self, algorithm: Algorithm, family: str) -> Algorithm:
        """Return an algorithm without the parts that need policies.

        Adam replaces a trust region. The model's loss replaces the default losses of policies.
        """
        inner, loss, last = algorithm.inner, algorithm.inner.loss, algorithm.outer_loss
        outer = algorithm.outer
        if isinstance(outer, TrustRegion):
            outer = find_outer("adam")
        reasons = {
            "the likelihood ratios of its clipped objective": outer.needs_policy,
            "its meta-gradient": algorithm.meta.needs_policy,
            f"its inner loss {loss and name_of(loss)}": _needs_policies(loss),
            f"its outer loss {last and name_of(last)}": _needs_policies(last),
            "its task weights": algorithm.task_weights is not None,
            "its trials": algorithm.trial is not None,
        }
        for reason, needed in reasons.items():
            if needed:
                raise UserError(
                    f"{algorithm.name} needs a policy, for {reason}; the tasks of {family} are"
                    " supervised: use another algorithm, such as maml-trpo"
                )
        if loss in _USUAL:
            inner = dataclasses.replace(inner, policies=False, loss=None)
        return dataclasses.replace(
            algorithm,
            inner=inner.without_policies(),
            meta=algorithm.meta.without_policies(),
            outer=outer.without_policies(),
            outer_loss=None if last in _USUAL else last,
            advantage=None,
            baseline=None,
        )

    @property
    def networks(self) -> Mapping[str, type[NetworkPart]]:
        return PREDICTOR_NETWORKS

    def model_options(self) -> PredictorOptions:
        return PredictorOptions(policies=False)

    def model(self, algorithm: Algorithm, options: ModelOptions, family: Family) -> Predictor:
        assert isinstance(family, SupervisedFamily)
        assert isinstance(options, PredictorOptions)
        classes = family.kind == "classification"
        name, shape = algorithm.name, family.input_shape
        if algorithm.head != "meta" and not classes:
            raise UserError(f"{name} is for few-shot classification; {family.name} is regression")
        if algorithm.head != "meta" and not algorithm.inner.steps:
            raise UserError(
                f"inner.steps must be at least 1 with {name}, got 0: its last layer comes from the"
                " support"
            )
        if algorithm.task_conditioned and classes:
            raise UserError(
                f"{name} does not support classification: it has no task vector to condition on"
            )
        inputs = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        context = context_dim(algorithm, family.tasks.dim)
        network = options.network.make(inputs, family.outputs, context)
        if network.recurrent:
            raise UserError(
                f"policy.network {options.network.source or options.network.name} is recurrent, but"
                f" the examples of {family.name} have no order: use a network without initial_state"
            )
        if not classes:
            return Regressor(network=network)
        if algorithm.head == "meta":
            return Classifier(network=network)
        if not isinstance(network, MLP):
            raise UserError(
                f"{name} creates the last layer itself, but policy.network"
                f" {options.network.source or options.network.name} has its own: use another"
                " algorithm, such as maml-trpo"
            )
        if algorithm.head == "prototypes" and not (network.encoder or network.hidden):
            raise UserError(
                f"{name} creates the last layer from the support, and learns the layers below it:"
                f" set policy.hidden, such as 64, for inputs of {list(shape)}"
            )
        return Classifier(network=network, head=algorithm.head)

    def predictor(self, model: Model) -> Predictor:
        assert isinstance(model, Predictor)
        return model

    def inner_loss(self, model: Model) -> Loss:
        return self.predictor(model).loss

    def outer_loss(self, model: Model) -> Loss:
        return self.inner_loss(model)

    def source(
        self,
        family: Family,
        algorithm: Algorithm,
        adapter: Adapter,
        pool: ChunkPool,
        **options: Any,
    ) -> DataSource:
        assert isinstance(family, SupervisedFamily)
        if pool.process_group.size > 1:
            raise UserError(
                f"{family.name}: supervised tasks train on one rank, got {pool.process_group.size}"
            )
        return DataSource(family, algorithm, adapter, pool, **options)


class DataSource(TaskSource):
    """Examples of a family of supervised tasks.

    All inner steps use the same support. Exception: with a meta-gradient without query, each step
    uses a new minibatch.
    """

    independent_of_policy: ClassVar[bool] = True
    family: SupervisedFamily

    def open(self, key: RandomKey, baseline: Params, tasks: Tasks | None = None) -> ExampleSamples:
        return ExampleSamples(key, *self.draw_tasks(key, tasks), source=self)

    def chunk(self, batches: list[Samples], device: str) -> int:
        """Return the number of tasks per call: enough to hide call overhead, within the cache."""
        model = self.adapter.model
        assert isinstance(model, Predictor)
        if device != "cpu":
            return self.count
        each = max(batch.weight.shape[1] for batch in batches) * model.network.activations
        return min(max(_CACHED // each, 1), self.count)


_CACHED = 1 << 18  # number of activations, 1 MB


@dataclass
class ExampleSamples(TaskSamples):
    """Examples of one iteration."""

    source: DataSource = field(kw_only=True)
    _examples: list[Examples] = field(default_factory=list)
    _count: int = 0

    def sample(self, params: Params, k: int) -> Examples:
        steps = self.source.algorithm.inner.steps
        if not self._examples:
            self._draw()
        drawn = (
            self._examples[-1] if k == steps else self._examples[min(k, len(self._examples) - 1)]
        )
        check_finite({"inputs": drawn.inputs, "targets": drawn.targets})
        return drawn

    def _draw(self) -> None:
        begin = time.perf_counter()
        source, steps = self.source, self.source.algorithm.inner.steps
        minibatches = not source.algorithm.meta.needs_query
        supports = steps if minibatches else min(steps, 1)
        queries = 0 if minibatches else source.family.queries
        drawn = source.family.draw(
            self.tasks, self.key.examples(), supports=supports, queries=queries
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

    def metrics(self, before: Params, after: Params, stats: Mapping[str, Any]) -> dict[str, Any]:
        adapter, model = self.source.adapter, self.source.adapter.model
        assert isinstance(model, Predictor)
        fast, slow, _ = adapter.split(before)
        with torch.no_grad():
            start = adapter.start(fast, slow, self._examples[0])
            query = self._examples[-1]
            output = adapter.output(start, slow, query)
            loss = float(task_losses(model.loss, model, output, query).mean())
        return {"loss_pre": loss, "loss_post": -stats.get("surrogate_before", math.nan)}


def make_examples(data: Data, context: Tensor | None = None) -> Examples:
    """Return examples as tensors. All valid examples of a task have the same weight."""
    count = data.valid.sum(axis=1, keepdims=True).clip(min=1)
    weight = (data.valid / count).astype(np.float32)
    return Examples(
        inputs=torch.tensor(data.inputs),  # a copy: a family may reuse its arrays
        targets=torch.tensor(data.targets),
        weight=torch.from_numpy(weight),
        classes=None if data.classes is None else torch.tensor(data.classes),
        context=context,
    )
