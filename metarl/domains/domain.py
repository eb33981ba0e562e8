"""Common interface of reinforcement and supervised learning: models, losses, samples, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.algorithms import Algorithm
from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs import TaskFamily, guard
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.tasks import Tasks
from metarl.learning.adapter import Adapter
from metarl.learning.losses import Loss
from metarl.models.network_parts import NetworkPart
from metarl.models.networks import Model, Params
from metarl.models.policies import PolicyModel
from metarl.models.predictors import Predictor
from metarl.models.samples import Samples
from metarl.parts import Part, fixed
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.trajectories import Rollout


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Part):
    """Options of the model: a network and the domain's additions. The options are `policy.*`."""

    section: ClassVar[str] = "policy"

    network: NetworkPart = fixed(None)

    @property
    def parts(self) -> dict[str, Part]:
        """Return the nested parts, by the option that names them."""
        return {"policy.network": self.network}


@dataclass
class TaskSamples(ABC):
    """Samples of one iteration, on request of the inner loop, and what was observed."""

    key: RandomKey
    tasks: Tasks
    """[T, task_dim] of this process."""
    context: Params
    """Observation of the task by a task-conditioned model, as an entry of its parameters."""
    seconds: float = 0.0
    """Seconds spent on sampling so far."""
    rollouts: list[Rollout] = field(default_factory=list)
    """Rollouts so far, support first; empty for a data set."""

    @abstractmethod
    def sample(self, params: Params, k: int) -> Samples:
        """Return the samples of inner step k, see `Sampler`."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of sampled environment steps or examples."""

    def observed(self, params: Params) -> Params:
        """Return meta-parameters whose running statistics include the observations."""
        return params

    def updated_baseline(self) -> Params:
        """Return the state of the baseline after the iteration."""
        return {}

    def mean_returns(self) -> Tensor | None:
        """Return each task's mean return after adaptation, [T] float64; None for a data set."""
        return None

    @abstractmethod
    def metrics(self, before: Params, after: Params, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics of the samples.

        Args:
            before: meta-parameters at the start of the iteration.
            after: meta-parameters at its end.
            stats: statistics of the outer step.
        """


class TaskSource(ABC):
    """Source of a run's tasks and samples."""

    spaces: tuple[gym.Space, gym.Space] | None = None
    """Observation and action space of the environments; None for a data set."""
    independent_of_policy: ClassVar[bool]
    """Whether samples do not depend on parameters. Then all are drawn before adaptation."""

    def __init__(
        self,
        family: Family,
        algorithm: Algorithm,
        adapter: Adapter,
        pool: ChunkPool,
        *,
        tasks: int,
        stratified: bool,
    ) -> None:
        self.family, self.algorithm, self.adapter, self.pool = family, algorithm, adapter, pool
        self.count, self.stratified = tasks, stratified
        self.block = pool.process_group.block(tasks)

    @property
    def tasks(self) -> int:
        """Number of tasks of this process in an iteration."""
        return self.block.stop - self.block.start

    def draw_tasks(self, key: RandomKey, tasks: Tasks | None = None) -> tuple[Tasks, Params]:
        """Return this process's tasks of an iteration, and the model's observation of them.

        Args:
            key: key of the random stream.
            tasks: all tasks of the iteration, [T, task_dim]; by default they are sampled.
        """
        distribution = self.family.tasks
        draw = distribution.stratified if self.stratified else distribution.sample
        if tasks is None:
            with guard.user_code():
                tasks = draw(key.tasks(), self.count)
        drawn = tasks[self.block]
        conditioned = self.algorithm.task_conditioned
        return drawn, {"context": scaled_tasks(self.family, drawn)} if conditioned else {}

    @abstractmethod
    def open(self, key: RandomKey, baseline: Params, tasks: Tasks | None = None) -> TaskSamples:
        """Start an iteration.

        Args:
            key: key of the random streams.
            baseline: state of the baseline.
            tasks: all tasks of the iteration, [T, task_dim]; by default they are sampled.
        """

    @abstractmethod
    def chunk(self, batches: list[Samples], device: str) -> int:
        """Return the number of tasks that are differentiated together."""

    def close(self) -> None:  # noqa: B027  (most have no resources)
        """Release resources."""


class Domain(ABC):
    """Reinforcement or supervised learning."""

    name: ClassVar[str]
    measure: ClassVar[str]
    """Measure of adaptation: return, or loss."""
    unit: ClassVar[str]
    """Unit of samples: env steps, or examples."""

    @abstractmethod
    def algorithm(self, algorithm: Algorithm, family: str) -> Algorithm:
        """Return an algorithm adjusted to this domain.

        Raises:
            UserError: the domain does not support the algorithm. The message names the family.
        """

    @property
    @abstractmethod
    def networks(self) -> Mapping[str, type[NetworkPart]]:
        """Networks by name."""

    @abstractmethod
    def model_options(self) -> ModelOptions:
        """Return the options of the model."""

    @abstractmethod
    def model(self, algorithm: Algorithm, options: ModelOptions, family: Family) -> Model:
        """Return the model for a family's tasks.

        Raises:
            UserError: the model does not fit the family.
        """

    def environments(self, family: Family) -> TaskFamily:
        """Return a family as a family of environments.

        Raises:
            UserError: its tasks are supervised.
        """
        raise UserError(f"{family.name} has supervised tasks, but environments are needed here")

    def policy(self, model: Model) -> PolicyModel:
        """Return a model as a policy.

        Raises:
            UserError: it is a predictor.
        """
        raise UserError("a policy is needed here, got a predictor of supervised tasks")

    def predictor(self, model: Model) -> Predictor:
        """Return a model as a predictor.

        Raises:
            UserError: it is a policy.
        """
        raise UserError("supervised tasks are needed here, got a policy for environments")

    @abstractmethod
    def inner_loss(self, model: Model) -> Loss:
        """Return the inner loss for algorithms that do not define one."""

    @abstractmethod
    def outer_loss(self, model: Model) -> Loss:
        """Return the outer loss for algorithms that do not define one."""

    def adapter(self, algorithm: Algorithm, model: Model) -> Adapter:
        """Return the adapter of an algorithm and a model."""
        return algorithm.inner.adapter(model, self.inner_loss(model))

    def check(  # noqa: B027  (there may be nothing to check)
        self, adapter: Adapter, pool: ChunkPool, fast: Params, slow: Params, samples: Samples
    ) -> None:
        """Raise UserError if learning sees other densities of the first samples than sampling.

        Args:
            fast: theta_0, stacked; `fast` and `slow` are the parameters that drew the samples.
        """

    @abstractmethod
    def source(
        self,
        family: Family,
        algorithm: Algorithm,
        adapter: Adapter,
        pool: ChunkPool,
        **options: Any,
    ) -> TaskSource:
        """Return the source of samples; see the implementations for the options."""


def scaled_tasks(family: Family, tasks: NDArray) -> Tensor:
    """Return tasks [T, task_dim] with their training bounds mapped onto [-1, 1], float32."""
    low, high = family.tasks.bounds()
    scaled = (2.0 * tasks - low - high) / np.where(high > low, high - low, 1.0)
    return torch.from_numpy(scaled.astype(np.float32))


def context_dim(algorithm: Algorithm, task_dim: int) -> int:
    """Return the size of the context input of an algorithm's model."""
    return task_dim if algorithm.task_conditioned else algorithm.inner.context_dim
