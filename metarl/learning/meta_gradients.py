"""Meta-gradients of one iteration's samples: unrolled, displacement and implicit.

A problem is what an outer optimizer sees. All give the gradient of the meta-objective with respect
to the meta-parameters. A `QueryProblem` also gives the objective and KL at other meta-parameters,
and `UnrolledProblem` the product of a vector with J' F J, J the Jacobian of the adapted policies'
distributions and F their Fisher metric. Tasks are processed in chunks of a fixed shape on a pool of
threads; what they give is summed in a fixed order, over all ranks.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import ALONE, CHUNK, Ranks
from metarl.learning.inner_update import Adapter
from metarl.learning.linear_solves import Product, conjugate_gradient_each
from metarl.learning.losses import (
    Batch,
    Loss,
    likelihood_ratio,
    log_ratio,
    mean_kl,
    task_losses,
)
from metarl.models.networks import Dist, Params, flatten, stack
from metarl.models.samples import Samples


@dataclass(frozen=True)
class Objective:
    """The meta-objective of one iteration: the query loss, and what algorithms add to it."""

    outer_loss: Loss = likelihood_ratio
    step_weights: tuple[float, ...] = ()
    """Weights of the losses of iterates 1 ... K on the samples they drew (MAML++); none: the last
    alone."""
    inner_kl: float = 0.0
    """Weight of the KL from the pre-update policies that drew the support samples (ProMP)."""
    credit: Tensor | None = None
    """[T]; what a task's support episodes earned afterwards, to multiply the score of drawing them
    (E-MAML)."""


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
    """K support batches, then the query batch where there is one."""
    pool: ChunkPool
    objective: Objective = field(default_factory=Objective)
    curvature: float = 1.0
    """Share of the inner steps' curvature in the meta-gradient, see `inner_step`."""
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
        return isinstance(self.batches[-1], Batch)

    def __post_init__(self) -> None:
        if self.device != "cpu":
            self.batches = [batch.map(lambda x: x.to(self.device)) for batch in self.batches]
        own = len(self.batches[-1].weight)
        self.tasks = self.pool.ranks.total(own)
        self._slices = slices(own, self.chunk)

    @abstractmethod
    def gradient(
        self, meta: Params, step: int = 0, iterates: Sequence[Params] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the flat meta-gradient [P], and statistics: mean `loss` and `kl` where known.

        Args:
            meta: meta-parameters to take it at.
            step: how many gradients were taken before on these samples; a problem with minibatches
                takes them in turn.
            iterates: theta_1 ... theta_K from `meta`, stacked, where they are known; where they are
                not, or their graph is needed, they are found anew.
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
        return self.pool.ranks.sum_in_order(parts) / self.tasks


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
        policy, last = adapter.model, len(batches) - 1
        dist = adapter.output(iterates[last], slow, batches[last])
        weights = objective.step_weights or (0.0,) * (last - 1) + (1.0,)
        loss = task_losses(objective.outer_loss, policy, dist, batches[last])
        if last:
            loss = weights[-1] * loss
        for k in range(last):
            # What an iterate drew tells how good it is; of a data set the query examples do.
            batch = batches[k] if self.drawn else batches[last]
            weight = weights[k - 1] if k else 0.0
            if not (weight or objective.inner_kl or objective.credit is not None):
                continue
            before = adapter.output(iterates[k], slow, batch)
            if weight:
                own = task_losses(objective.outer_loss, policy, before, batch)
                loss = loss + weight * own
            if objective.inner_kl:
                loss = loss + objective.inner_kl / last * mean_kl(policy, before, batch)
            if objective.credit is not None:
                credit = objective.credit[chunk].to(self.device)
                loss = loss - credit * log_ratio(policy, before, batch)
        return loss, dist

    def evaluate(self, meta: Params) -> Evaluation:
        """Return loss and KL over all samples at meta-parameters, adapted anew."""

        def one(chunk: slice) -> Tensor:
            batches = self._part(chunk)
            tasks = len(batches[-1].weight)
            iterates, slow = self._adapted(self._leaves(meta), batches[:-1], tasks)
            with torch.no_grad():
                loss, dist = self._loss(iterates, slow, batches, chunk)
                kl = mean_kl(self.adapter.model, dist, batches[-1])
                return torch.stack([loss.sum(), kl.sum()]).cpu()

        loss, kl = self._average(self.pool.map(one, self._slices)).tolist()
        return Evaluation(loss, kl)


@dataclass
class UnrolledProblem(QueryProblem):
    """MAML's meta-objective (Finn et al. 2017, algorithm 3), differentiated through the steps."""

    fisher_samples: Sequence[Tensor | None] = ()
    """For each batch the indices of the samples that Fisher products use, [T, ...], see
    `Batch.select`; None for all of it, none for all of all. `linearize` then needs the iterates."""
    minibatches: Sequence[Tensor] = ()
    """Indices of the samples that the gradient of each step uses, in turn; none for all of them,
    always. `sampled_with` and `iterates` must be given."""

    def gradient(
        self, meta: Params, step: int = 0, iterates: Sequence[Params] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        samples = None
        if self.minibatches:
            samples = self.minibatches[step % len(self.minibatches)].to(self.device)

        def one(chunk: slice) -> tuple[Tensor, Tensor]:
            batches, shifts = self._part(chunk), None
            if samples is not None:
                batches = [batch.select(samples) for batch in batches]
                shifts = self._shifts(chunk, batches[:-1])
            theta = self._leaves(meta)
            tasks = len(batches[-1].weight)
            found, slow = self._adapted(
                theta, batches[:-1], tasks, curvature=self.curvature, shifts=shifts
            )
            loss, dist = self._loss(found, slow, batches, chunk)
            gradient = flat_gradient(loss.sum(), theta)
            with torch.no_grad():
                kl = mean_kl(self.adapter.model, dist, batches[-1])
                numbers = torch.stack([loss.sum(), kl.sum()]).cpu()
            return gradient.cpu(), numbers

        parts = self.pool.map(one, self._slices)
        loss, kl = self._average([numbers for _, numbers in parts]).tolist()
        gradients = [g for g, _ in parts]
        mean = self._average(gradients)
        sizes = [s.stop - s.start for s in self._slices]
        found = agreement(gradients, sizes, mean, self.pool.ranks)
        return mean, {"loss": loss, "kl": kl, "gradient_agreement": found}

    def _shifts(self, chunk: slice, support: Sequence[Samples]) -> list[Params]:
        """Return theta_k minus what the inner step gives on a minibatch, at `sampled_with`.

        Added to the steps on the minibatch it makes them those on all samples at these
        meta-parameters, and is a control variate at others.
        """
        found = self._chunk_of(self.iterates, chunk)
        fast, slow, step_sizes = self.adapter.split(self._leaves(self.sampled_with))
        start = {name: p.detach() for name, p in stack(fast, len(support[0].weight)).items()}
        before, shifts = start, []
        for k, batch in enumerate(support):
            end = self.adapter.step(before, slow, step_sizes, batch, k, start=start)
            shifts.append({name: found[k][name] - p for name, p in end.items()})
            before = found[k]
        return shifts

    @contextlib.contextmanager
    def linearize(self, meta: Params, iterates: Sequence[Params] = ()) -> Iterator[Product]:
        """Give the product v -> J' F J v, both [P]; its graph is kept while in use.

        With phi the adapted distributions' parameters on the query samples and w a dummy
        cotangent, J'w is built with a graph; then J v = d(J'w . v)/dw and J'(F J v) is one more
        pass back.

        Args:
            meta: meta-parameters to take it at.
            iterates: theta_1 ... theta_K from `meta` on all samples, stacked. J is taken there,
                whatever part of the samples it is made of.
        """
        steps = len(self.batches) - 1
        if len(iterates) != steps and any(samples is not None for samples in self.fisher_samples):
            raise ValueError(f"a part of the samples needs the {steps} iterates on all of them")

        def build(chunk: slice) -> Product:
            batches = self._part(chunk)
            if self.fisher_samples:
                batches = [
                    batch if samples is None else batch.select(samples[chunk].to(self.device))
                    for batch, samples in zip(batches, self.fisher_samples, strict=True)
                ]
            *support, query = batches
            theta = self._leaves(meta)
            at = self._chunk_of(iterates, chunk) or None
            found, slow = self._adapted(
                theta, support, len(query.weight), curvature=self.curvature, at=at
            )
            dist = self.adapter.output(found[-1], slow, query)
            names = list(dist)
            phi = [dist[name] for name in names]
            fixed = {name: x.detach() for name, x in dist.items()}
            dummy = [torch.zeros_like(x, requires_grad=True) for x in phi]
            back = flat_gradient(phi, theta, dummy, create_graph=True)
            weight = query.weight.unsqueeze(-1)
            policy: Any = self.adapter.model  # a trust region is a policy's

            def product(v: Tensor) -> Tensor:
                tangent = torch.autograd.grad(back, dummy, v.to(self.device), retain_graph=True)
                metric = policy.fisher(fixed, dict(zip(names, tangent, strict=True)))
                cotangent = [weight * metric[name] for name in names]
                return flat_gradient(phi, theta, cotangent, retain_graph=True).cpu()

            return product

        products = self.pool.map(build, self._slices)

        def apply(v: Tensor) -> Tensor:
            return self._average(self.pool.map(lambda product: product(v), products))

        try:
            yield apply
        finally:
            products.clear()


@dataclass
class DisplacementProblem(Problem):
    """Reptile (Nichol et al. 2018, arXiv:1803.02999): theta - theta_K serves as the gradient.

    All batches are support: nothing is sampled with theta_K.
    """

    def gradient(
        self, meta: Params, step: int = 0, iterates: Sequence[Params] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        def one(chunk: slice) -> Tensor:
            batches, found = self._part(chunk), self._chunk_of(iterates, chunk)
            tasks = len(batches[-1].weight)
            fast, slow, step_sizes = self.adapter.split(self._leaves(meta))
            start = {name: p.detach() for name, p in stack(fast, tasks).items()}
            if not found:
                found = self.adapter.adapt(start, slow, step_sizes, batches)
            moved = {n: (start[n] - found[-1][n]).sum(0) for n in start}
            gradient = {n: moved.get(n, torch.zeros_like(p)) for n, p in meta.items()}
            return flatten(gradient).cpu()

        return self._average(self.pool.map(one, self._slices)), {}


@dataclass
class ImplicitProblem(QueryProblem):
    """iMAML (Rajeswaran et al. 2019, eq. 6, arXiv:1909.04630): (I + H / lambda)^-1 grad L_query.

    H is the Hessian of the support loss at the solution of the proximal inner problem. Each task's
    system is solved by conjugate gradient on its own. A task whose curvature I + H / lambda is not
    positive stands at no minimum, and its solution has no derivative; where it is nearly zero, the
    derivative is all but infinite: such a task gives the first-order gradient, grad L_query. One
    whose inner problem was not solved at all gives none: it may be anywhere. Statistics: the
    relative residual of the solve and of the inner problem's stationarity, and the shares of both
    kinds of tasks.
    """

    iterations: int = 10
    least_curvature: float = 0.25
    """Of I + H / lambda, for a task to be solved; 1 without any of H."""
    worst_residual: float = 1.0
    """Of the inner problem's stationarity, as a share of the pull, for a task to count."""

    def gradient(
        self, meta: Params, step: int = 0, iterates: Sequence[Params] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        strength = self.adapter.proximal

        def one(chunk: slice) -> tuple[Tensor, Tensor]:
            support, query = self._part(chunk)
            tasks = len(query.weight)
            fast, slow, step_sizes = self.adapter.split(self._leaves(meta))
            start = {name: p.detach() for name, p in stack(fast, tasks).items()}
            found = self._chunk_of(iterates, chunk)
            if not found:
                found = self.adapter.adapt(start, slow, step_sizes, [support])
            theta = {name: p.detach().requires_grad_() for name, p in found[-1].items()}
            dist = self.adapter.output(theta, slow, query)
            loss = task_losses(self.objective.outer_loss, self.adapter.model, dist, query).sum()
            b = rows(torch.autograd.grad(loss, list(theta.values())))
            inner = self.adapter.inner_loss(theta, slow, support).sum()
            slope = torch.autograd.grad(inner, list(theta.values()), create_graph=True)

            def product(v: Tensor) -> Tensor:
                parts = v.split([p[0].numel() for p in theta.values()], dim=1)
                vs = [x.view_as(p) for x, p in zip(parts, theta.values(), strict=True)]
                image = torch.autograd.grad(slope, list(theta.values()), vs, retain_graph=True)
                return v + rows(image) / strength

            x, residual, curved = conjugate_gradient_each(
                product, b, self.iterations, self.least_curvature
            )
            x = torch.where(curved.unsqueeze(1), b, x)
            pull = rows([strength * (theta[n] - start[n]) for n in theta])
            stationary = (rows(slope) + pull).norm(dim=1) / pull.norm(dim=1).clamp(min=1e-12)
            unsolved = ~(stationary <= self.worst_residual)  # NaN is none either
            x = torch.where(unsolved.unsqueeze(1), 0.0, x)
            parts = x.sum(0).split([p[0].numel() for p in theta.values()])
            solved = dict(zip(theta, parts, strict=True))
            gradient = torch.cat(
                [solved.get(n, torch.zeros_like(p).reshape(-1)) for n, p in meta.items()]
            )
            sums = [n.sum() for n in (residual, stationary, curved, unsolved)]
            return gradient.detach().cpu(), torch.stack(
                [n.detach().float() for n in (loss, *sums)]
            ).cpu()

        parts = self.pool.map(one, self._slices)
        means = self._average([n for _, n in parts]).tolist()
        loss, residual, stationary, curved, unsolved = means
        stats = {
            "loss": loss,
            "implicit_residual": residual,
            "inner_residual": stationary,
            "low_curvature": curved,
            "unsolved": unsolved,
        }
        return self._average([g for g, _ in parts]), stats


def rows(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors [T, ...] side by side, [T, P]."""
    return torch.cat([x.flatten(1) for x in tensors], dim=1)


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
    parts: Sequence[Tensor], sizes: Sequence[int], mean: Tensor, ranks: Ranks = ALONE
) -> float:
    """Return the share of a mean gradient's square that is signal, 1 - noise / |mean|^2.

    It is about the cosine of the gradients of two such samples: 0 or less, all is noise; 1, none.
    The noise is the variance of the mean, from the spread of its parts; of tasks that were drawn
    evenly that is too much.

    Args:
        parts: sums of the gradients of `sizes` tasks each, of this rank.
        mean: over all tasks.
        ranks: that have other parts.
    """
    pairs = zip(parts, sizes, strict=True)
    spreads = [float((part - size * mean).square().sum()) for part, size in pairs]
    known = ranks.gather(torch.tensor([spreads, sizes], dtype=torch.float64).T)
    count = len(known)
    if count < 2:
        return math.nan
    spread, tasks = (sum(column) for column in known.T.tolist())
    noise = spread * count / (count - 1) / tasks**2
    square = float(mean.square().sum())
    return 1.0 - noise / square if square else math.nan


def annealed_weights(steps: int, progress: float) -> tuple[float, ...]:
    """Return MAML++'s weights of the losses of iterates 1 ... K (Antoniou et al. 2019, section 4).

    Uniform at progress 0; by progress 1 all the weight is on the last.
    """
    progress = min(max(progress, 0.0), 1.0)
    early = (1.0 - progress) / max(steps, 1)
    return (early,) * (steps - 1) + (1.0 - early * (steps - 1),) if steps else ()


def cosine(progress: float) -> float:
    """Return a factor that falls from 1 at progress 0 to 0 at progress 1 along a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
