"""The meta-gradient through adaptation, and Fisher products through it.

`UnrolledProblem` is what an outer optimizer sees of one iteration's samples: the gradient of the
post-adaptation loss with respect to the meta-parameters, the loss and KL at other meta-parameters,
and the product of a vector with J' F J, J the Jacobian of the adapted policies' distributions and
F their Fisher metric. Tasks are processed in chunks of a fixed shape on a pool of threads; what
they give is summed in a fixed order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from metarl.adaptation import StepSizes, adapt
from metarl.objectives import Batch, Loss, likelihood_ratio, mean_kl, ratio_surrogate
from metarl.parallel import ChunkPool, slices
from metarl.policies import GaussianMLP, Params, flatten, stack


@dataclass(frozen=True)
class Evaluation:
    """The outer objective at some meta-parameters, means over tasks."""

    loss: float
    """Surrogate loss of the query samples under the policies adapted to the support samples."""
    kl: float
    """Mean KL from the policies that drew the query samples."""


Product = Callable[[Tensor], Tensor]


@dataclass
class UnrolledProblem:
    """MAML's meta-objective (Finn et al. 2017, algorithm 3) on one iteration's samples."""

    policy: GaussianMLP
    batches: Sequence[Batch]
    """K support batches, then the query batch."""
    step_sizes: StepSizes
    pool: ChunkPool
    inner_loss: Loss
    outer_loss: Loss = likelihood_ratio
    order: int = 2
    chunk: int = 4
    """Tasks a chunk: the working set stays in cache."""
    fisher_samples: Tensor | None = None
    """Indices of the samples that Fisher products use; None for all."""
    device: str = "cpu"
    """Where the products are computed; what crosses back are vectors of the parameters' size."""

    def __post_init__(self) -> None:
        if self.device != "cpu":
            self.batches = [batch.map(lambda x: x.to(self.device)) for batch in self.batches]
            self.step_sizes = {name: x.to(self.device) for name, x in self.step_sizes.items()}
        self.tasks = len(self.batches[-1].weight)
        self._slices = slices(self.tasks, self.chunk)
        self._iterates: list[list[Params]] = []
        self._loss = partial(self.inner_loss, self.policy)

    def _part(self, chunk: slice) -> list[Batch]:
        return [batch.map(lambda x: x[chunk]) for batch in self.batches]

    def _leaves(self, meta: Params) -> Params:
        return {name: p.detach().to(self.device).requires_grad_() for name, p in meta.items()}

    def gradient(self, meta: Params) -> tuple[Tensor, float]:
        """Return the flat gradient [P] of the mean outer loss, and that loss."""

        def one(chunk: slice) -> tuple[Tensor, Tensor, list[Params]]:
            *support, query = self._part(chunk)
            theta = self._leaves(meta)
            stacked = stack(theta, len(query.weight))
            iterates = adapt(self._loss, stacked, self.step_sizes, support, order=self.order)
            loss = self.outer_loss(self.policy, iterates[-1], query).sum()
            grads = torch.autograd.grad(loss, list(theta.values()))
            adapted = [{name: p.detach() for name, p in it.items()} for it in iterates[1:]]
            return torch.cat([g.reshape(-1) for g in grads]).cpu(), loss.detach().cpu(), adapted

        parts = self.pool.map(one, self._slices)
        self._iterates = [adapted for _, _, adapted in parts]
        gradient = sum_in_order([g for g, _, _ in parts]) / self.tasks
        return gradient, float(sum_in_order([loss for _, loss, _ in parts])) / self.tasks

    def evaluate(self, meta: Params) -> Evaluation:
        """Return loss and KL over all samples at meta-parameters, adapted anew."""

        def one(chunk: slice) -> Tensor:
            *support, query = self._part(chunk)
            stacked = stack(self._leaves(meta), len(query.weight))
            iterates = adapt(self._loss, stacked, self.step_sizes, support, order=0)
            with torch.no_grad():
                dist = self.policy.distribution(iterates[-1], query.observation)
                loss = ratio_surrogate(self.policy, dist, query).sum()
                return torch.stack([loss, mean_kl(self.policy, dist, query).sum()]).cpu()

        loss, kl = (sum_in_order(self.pool.map(one, self._slices)) / self.tasks).tolist()
        return Evaluation(loss, kl)

    @contextlib.contextmanager
    def linearize(self, meta: Params) -> Iterator[Product]:
        """Give the product v -> J' F J v, both [P]; its graph is kept while in use.

        With phi the adapted distributions' parameters on the query samples and w a dummy
        cotangent, J'w is built with a graph; then J v = d(J'w . v)/dw and J'(F J v) is one more
        pass back. `gradient` must have been called at the same meta-parameters.
        """

        def build(index: int) -> Product:
            *support, query = self._part(self._slices[index])
            if self.fisher_samples is not None:
                samples = self.fisher_samples.to(self.device)
                support = [batch.select(samples) for batch in support]
                query = query.select(samples)
            theta = self._leaves(meta)
            leaves = list(theta.values())
            stacked = stack(theta, len(query.weight))
            iterates = adapt(
                self._loss, stacked, self.step_sizes, support,
                order=self.order, at=self._iterates[index],
            )  # fmt: skip
            dist = self.policy.distribution(iterates[-1], query.observation)
            names = list(dist)
            phi = [dist[name] for name in names]
            fixed = {name: x.detach() for name, x in dist.items()}
            dummy = [torch.zeros_like(x, requires_grad=True) for x in phi]
            back = flatten(
                dict(enumerate(torch.autograd.grad(phi, leaves, dummy, create_graph=True)))  # type: ignore[arg-type]
            )
            weight = query.weight.unsqueeze(-1)

            def product(v: Tensor) -> Tensor:
                tangent = torch.autograd.grad(back, dummy, v.to(self.device), retain_graph=True)
                metric = self.policy.fisher(fixed, dict(zip(names, tangent, strict=True)))
                cotangent = [weight * metric[name] for name in names]
                pulled = torch.autograd.grad(phi, leaves, cotangent, retain_graph=True)
                return torch.cat([g.reshape(-1) for g in pulled]).cpu()

            return product

        products = self.pool.map(build, range(len(self._slices)))

        def apply(v: Tensor) -> Tensor:
            return sum_in_order(self.pool.map(lambda product: product(v), products)) / self.tasks

        try:
            yield apply
        finally:
            products.clear()


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors, added from first to last."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
