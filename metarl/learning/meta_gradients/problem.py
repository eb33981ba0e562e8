"""What an outer optimizer sees of an iteration: the meta-objective, its gradient, its value.

Every problem gives the gradient of the meta-objective with respect to the meta-parameters. A
`QueryProblem` also gives the objective and the KL at other meta-parameters. Tasks are processed in
chunks of a fixed shape on a pool of threads; the results are summed in a fixed order, over all
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
from metarl.parts import Part

SupportTerm = Callable[[Any, Dist, Any, slice], Tensor]
"""(model, its output at iterate k, the samples that iterate k drew, the chunk of tasks) -> [T].
It is added to the meta-objective for each k = 0 ... K - 1."""

Regularizer = Callable[[Params], Tensor]
"""Meta-parameters -> a number that is added to the meta-objective."""


@dataclass(frozen=True)
class Objective:
    """The meta-objective of one iteration: the query loss, and what algorithms add to it."""

    outer_loss: Loss
    step_weights: tuple[float, ...] = ()
    """Weights of the losses of iterates 1 ... K (MAML++); empty: the last alone."""
    support_terms: Sequence[SupportTerm] = ()
    task_weights: Tensor | None = None
    """[T] of this process, with mean 1 over all tasks; None: all tasks weigh the same."""
    regularizer: Regularizer | None = None


@dataclass(frozen=True)
class Evaluation:
    """The meta-objective at some meta-parameters, means over tasks."""

    loss: float
    """Loss of the policies adapted to the support samples."""
    kl: float
    """Mean KL from the policies that drew the query samples."""


@dataclass
class Problem(ABC):
    """One iteration's samples and how meta-parameters adapt to them."""

    adapter: Adapter
    batches: Sequence[Samples]
    """K support batches, then the query batch if there is one."""
    pool: ChunkPool
    objective: Objective
    sampled_with: Params = field(default_factory=dict)
    """Meta-parameters that the samples were drawn with."""
    iterates: Sequence[Params] = ()
    """theta_1 ... theta_K that the inner loop found from `sampled_with`, stacked."""
    chunk: int = CHUNK
    device: str = "cpu"
    """Where the products are computed; what crosses back are vectors of the parameters' size."""

    @property
    def drawn(self) -> bool:
        """Whether policies drew the samples: other meta-parameters would have drawn others."""
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
        """Return the flat meta-gradient [P], and statistics: mean `loss` and `kl` where known.

        Args:
            meta: meta-parameters to take it at.
            iterates: theta_1 ... theta_K from `meta`, stacked, if they are known; otherwise, and if
                their graph is needed, they are computed again.
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
        """Return the losses [T] of a chunk of tasks times the tasks' weights."""
        weights = self.objective.task_weights
        return losses if weights is None else losses * weights[chunk].to(losses)

    def _regularized(
        self, meta: Params, gradient: Tensor, loss: float | None = None
    ) -> tuple[Tensor, float | None]:
        """Return gradient and loss with those of the regularizer added."""
        if self.objective.regularizer is None:
            return gradient, loss
        theta = {name: p.detach().requires_grad_() for name, p in meta.items()}
        value = self.objective.regularizer(theta)
        if not (isinstance(value, Tensor) and value.shape == () and value.requires_grad):
            raise UserError(
                "the regularizer must return one number, a tensor that depends on the"
                f" meta-parameters, got {value!r}"
            )
        own = flat_gradient(value, theta)
        return gradient + own, None if loss is None else loss + float(value.detach())


@dataclass
class QueryProblem(Problem):
    """A problem whose last batch was sampled with the adapted policies, to judge others by."""

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
            # What an iterate drew tells how good it is; of a data set the query examples do.
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
        """Return loss and KL over all samples at meta-parameters, adapted anew."""

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
    """One iteration's samples, and what a meta-gradient needs besides."""

    adapter: Adapter
    adapted: Adapted
    """What the inner loop sampled and found, from its `meta`."""
    pool: ChunkPool
    objective: Objective
    """Without what the meta-gradient itself adds."""
    progress: float = 0.0
    """Of the run, from 0 to 1."""
    chunk: int = CHUNK
    device: str = "cpu"
    permutation: Callable[[int], Tensor] = torch.randperm
    """Gives n numbers in a random order, the same at every call."""

    def common(self) -> dict[str, Any]:
        """Return the fields that every problem has."""
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
    """Base class of meta-gradients. Its fields are the options `meta.*`."""

    section: ClassVar[str] = "meta"
    needs_query: ClassVar[bool] = True
    """Whether episodes are sampled with the adapted policies, for the outer step."""
    needs_policy: ClassVar[bool] = False
    """Whether it works on the samples of policies only, not on examples of a data set."""

    @abstractmethod
    def problem(self, sampled: Sampled) -> Problem:
        """Return the problem that the outer optimizer is to solve."""

    def check(self, steps: int) -> None:
        """Raise UserError unless it works with a number of inner steps."""

    def change(self, planned: int, total: int, iteration: int) -> str:
        """Return what changes if a run ends at iteration `total` instead of `planned`, in words.

        Args:
            iteration: where the run is.
        """
        return ""


def flat_gradient(
    outputs: Tensor | Sequence[Tensor],
    leaves: Params,
    cotangents: Sequence[Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Return the gradient of outputs in all leaves as one vector, zero where they do not matter."""
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

    It is about the cosine of the gradients of two such samples: 0 or less, all is noise; 1, none.
    The noise is the variance of the mean, from the spread of its parts; of tasks that were drawn
    evenly that is too much.

    Args:
        parts: sums of the gradients of `sizes` tasks each, of this rank.
        mean: over all tasks.
        sizes: of the parts, in tasks.
        group: the processes that have the other parts.
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
