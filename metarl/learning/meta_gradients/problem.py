"""Problem of an outer step: the meta-objective of one iteration, its value and its gradient.

Every problem returns the gradient of the meta-objective with respect to the meta-parameters. A
`QueryProblem` also evaluates the objective and the KL at other meta-parameters. A pool of threads
processes the tasks in chunks of a fixed shape. The results are summed in a fixed order, over all
processes of the group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import ALONE, CHUNK, ProcessGroup
from metarl.envs.errors import UserError
from metarl.learning.adapter import Adapter
from metarl.learning.inner_loop import Adapted
from metarl.learning.losses import Loss, task_losses
from metarl.models.networks import Dist, Params, stack
from metarl.models.samples import Samples
from metarl.parts import Part, called

SupportTerm = Callable[[Any, Dist, Any, slice], Tensor]
"""(model, its output at iterate k, the samples of iterate k, the chunk of tasks) -> [T].
It is added to the meta-objective for each k = 0 ... K - 1."""

Regularizer = Callable[[Params], Tensor]
"""Meta-parameters -> a number that is added to the meta-objective."""


@dataclass(frozen=True)
class Objective:
    """Meta-objective of one iteration: the query loss and additional terms of the algorithm."""

    outer_loss: Loss
    """Loss of the adapted models on the query samples."""
    step_weights: tuple[float, ...] = ()
    """Weights of the losses of iterates 1 ... K (MAML++); empty: only the last."""
    support_terms: Sequence[SupportTerm] = ()
    """Terms on the support samples that are added to the loss, such as ProMP's penalty."""
    task_weights: Tensor | None = None
    """[T] of this process, with mean 1 over all tasks; None: equal weights."""
    regularizer: Regularizer | None = None
    """Function of the meta-parameters that is added to the meta-objective."""


@dataclass(frozen=True)
class Evaluation:
    """Value of the meta-objective at given meta-parameters, means over tasks."""

    loss: float
    """Loss of the policies adapted to the support samples."""
    kl: float
    """Mean KL from the policies that drew the query samples."""


@dataclass
class Problem(ABC):
    """Samples of one iteration, with the adaptation of meta-parameters to them."""

    adapter: Adapter
    """Inner update of the model."""
    batches: Sequence[Samples]
    """K support batches, then the query batch if there is one."""
    pool: ChunkPool
    """Threads that share the chunks of tasks."""
    objective: Objective
    """Meta-objective of the iteration."""
    sampled_with: Params = field(default_factory=dict)
    """Meta-parameters that the samples were drawn with."""
    iterates: Sequence[Params] = ()
    """theta_1 ... theta_K of the inner loop from `sampled_with`, stacked."""
    chunk: int = CHUNK
    """Number of tasks that are differentiated together."""
    device: str = "cpu"
    """Device of the products. Only vectors of the size of the parameters are copied back."""

    @property
    def drawn(self) -> bool:
        """Whether policies drew the samples, so that they depend on the meta-parameters."""
        return self.batches[-1].drawn

    def __post_init__(self) -> None:
        if self.device != "cpu":
            self.batches = [batch.map(lambda x: x.to(self.device)) for batch in self.batches]
        own = len(self.batches[-1].weight)
        self.tasks = self.pool.process_group.total(own)
        self._slices = slices(own, self.chunk)

    @abstractmethod
    def gradient(
        self, meta: Params, iterates: Sequence[Params] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the flat meta-gradient [P] and statistics: mean `loss`, and `kl` if available.

        Args:
            meta: meta-parameters at which to differentiate.
            iterates: theta_1 ... theta_K from `meta`, stacked, if known. Otherwise, or if their
                graph is needed, they are computed again.
        """

    def _part(self, chunk: slice) -> list[Samples]:
        return [batch.map(lambda x: x[chunk]) for batch in self.batches]

    def _chunk_of(self, iterates: Sequence[Params], chunk: slice) -> list[Params]:
        return [
            {name: p[chunk].detach().to(self.device) for name, p in iterate.items()}
            for iterate in iterates
        ]

    def _leaves(self, meta: Params) -> Params:
        return {name: p.detach().to(self.device).requires_grad_() for name, p in meta.items()}

    def _average(self, parts: Sequence[Tensor]) -> Tensor:
        return self.pool.process_group.sum_in_order(parts) / self.tasks

    def _weighted(self, losses: Tensor, chunk: slice) -> Tensor:
        """Return the losses [T] of a chunk of tasks times the weights of the tasks."""
        weights = self.objective.task_weights
        return losses if weights is None else losses * weights[chunk].to(losses)

    def _regularized(
        self, meta: Params, gradient: Tensor, loss: float | None = None
    ) -> tuple[Tensor, float | None]:
        """Return gradient and loss with the regularizer added."""
        if self.objective.regularizer is None:
            return gradient, loss
        theta = {name: p.detach().requires_grad_() for name, p in meta.items()}
        value = called("the regularizer", self.objective.regularizer, theta)
        if not (isinstance(value, Tensor) and value.shape == () and value.requires_grad):
            raise UserError(
                "the regularizer must return one number, a tensor that depends on the"
                f" meta-parameters, got {value!r}"
            )
        own = flat_gradient(value, theta)
        return gradient + own, None if loss is None else loss + float(value.detach())


@dataclass
class QueryProblem(Problem):
    """Problem whose last batch is a query batch, sampled with the adapted policies."""

    def _adapted(
        self, theta: Params, support: Sequence[Samples], tasks: int, **options: Any
    ) -> tuple[list[Params], Params]:
        fast, slow, step_sizes = self.adapter.split(theta)
        start = stack(fast, tasks)
        if support:
            start = self.adapter.start(start, slow, support[0])
        return self.adapter.adapt(start, slow, step_sizes, support, **options), slow

    def _loss(
        self, iterates: list[Params], slow: Params, batches: list[Samples], chunk: slice
    ) -> tuple[Tensor, Dist]:
        """Return the objective of each task [T], and the adapted distributions at the query."""
        adapter, objective = self.adapter, self.objective
        model, last = adapter.model, len(batches) - 1
        dist = adapter.output(iterates[last], slow, batches[last])
        weights = objective.step_weights or (0.0,) * (last - 1) + (1.0,)
        loss = task_losses(objective.outer_loss, model, dist, batches[last])
        if last:
            loss = weights[-1] * loss
        for k in range(last):
            # Samples of an iterate measure its quality. With a data set, the query examples do.
            batch = batches[k] if self.drawn else batches[last]
            weight = weights[k - 1] if k else 0.0
            if not (weight or objective.support_terms):
                continue
            before = adapter.output(iterates[k], slow, batch)
            if weight:
                loss = loss + weight * task_losses(objective.outer_loss, model, before, batch)
            for term in objective.support_terms:
                loss = loss + term(model, before, batch, chunk)
        return self._weighted(loss, chunk), dist

    def evaluate(self, meta: Params) -> Evaluation:
        """Adapt meta-parameters again and return loss and KL over all samples."""

        def one(chunk: slice) -> Tensor:
            batches = self._part(chunk)
            tasks = len(batches[-1].weight)
            iterates, slow = self._adapted(self._leaves(meta), batches[:-1], tasks)
            with torch.no_grad():
                loss, dist = self._loss(iterates, slow, batches, chunk)
                kl = batches[-1].kl(self.adapter.model, dist)
                return torch.stack([loss.sum(), kl.sum()]).cpu()

        loss, kl = self._average(self.pool.map(one, self._slices)).tolist()
        if self.objective.regularizer is not None:
            loss += float(self.objective.regularizer(meta))
        return Evaluation(loss, kl)


@dataclass(frozen=True)
class Sampled:
    """Samples of one iteration, and further inputs of a meta-gradient."""

    adapter: Adapter
    """Inner update of the model."""
    adapted: Adapted
    """Result of the inner loop from its `meta`."""
    pool: ChunkPool
    """Threads that share the chunks of tasks."""
    objective: Objective
    """Objective without the terms of the meta-gradient itself."""
    progress: float = 0.0
    """Progress of the run, from 0 to 1."""
    chunk: int = CHUNK
    """Number of tasks that are differentiated together."""
    device: str = "cpu"
    """Device of the update."""
    permutation: Callable[[int], Tensor] = torch.randperm
    """Function of n that returns 0 ... n - 1 in a random order, the same at every call."""

    def common(self) -> dict[str, Any]:
        """Return the fields that all problems share."""
        return {
            "adapter": self.adapter,
            "batches": self.adapted.batches,
            "pool": self.pool,
            "objective": self.objective,
            "sampled_with": self.adapted.meta,
            "iterates": self.adapted.iterates[1:],
            "chunk": self.chunk,
            "device": self.device,
        }


@dataclass(frozen=True, kw_only=True)
class MetaGradient(Part, ABC):
    """Base class of meta-gradients. The fields are the options `meta.*`."""

    section: ClassVar[str] = "meta"
    needs_query: ClassVar[bool] = True
    """Whether query episodes are sampled with the adapted policies, for the outer step."""
    needs_policy: ClassVar[bool] = False
    """Whether it supports only samples of policies, not examples of a data set."""

    @abstractmethod
    def problem(self, sampled: Sampled) -> Problem:
        """Return the problem for the outer optimizer."""

    def check(self, steps: int) -> None:
        """Raise UserError if it does not support a number of inner steps."""

    def change(self, planned: int, total: int, iteration: int) -> str:
        """Return, in words, what changes if a run ends at iteration `total` instead of `planned`.

        Args:
            iteration: current iteration of the run.
        """
        return ""


def flat_gradient(
    outputs: Tensor | Sequence[Tensor],
    leaves: Params,
    cotangents: Sequence[Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Return the gradient of outputs in all leaves as one vector, zero for unused leaves."""
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), cotangents, allow_unused=True, **options
    )
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for g, p in zip(grads, leaves.values(), strict=True)
        ]
    )


def agreement(
    parts: Sequence[Tensor], sizes: Sequence[int], mean: Tensor, group: ProcessGroup = ALONE
) -> float:
    """Return the share of a mean gradient's square that is signal, 1 - noise / |mean|^2.

    It approximates the cosine between the gradients of two such samples. At 0 or below, all is
    noise; at 1, all is signal. The noise is the variance of the mean, estimated from the spread
    of its parts. If tasks were drawn evenly, this overestimates the noise.

    Args:
        parts: sums of the gradients of `sizes` tasks each, on this rank.
        mean: mean gradient over all tasks.
        sizes: numbers of tasks of the parts.
        group: process group with the other parts.
    """
    pairs = zip(parts, sizes, strict=True)
    spreads = [float((part - size * mean).square().sum()) for part, size in pairs]
    known = group.gather(torch.tensor([spreads, sizes], dtype=torch.float64).T)
    count = len(known)
    if count < 2:
        return math.nan
    spread, tasks = (sum(column) for column in known.T.tolist())
    noise = spread * count / (count - 1) / tasks**2
    square = float(mean.square().sum())
    return 1.0 - noise / square if square else math.nan
