"""Meta-gradient of MAML: through the inner updates, exactly, partly or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metarl.learning.linear_solves import Product
from metarl.learning.losses import trait
from metarl.learning.meta_gradients.problem import (
    MetaGradient,
    Objective,
    QueryProblem,
    Sampled,
    agreement,
    flat_gradient,
)
from metarl.models.networks import Params
from metarl.models.samples import Samples
from metarl.parts import tunable


@dataclass
class UnrolledProblem(QueryProblem):
    """MAML's meta-objective (Finn et al. 2017, algorithm 3), differentiated through the steps."""

    curvature: float = 1.0
    """Weight of the inner steps' curvature in the meta-gradient, see `inner_step`."""
    permutation: Callable[[int], Tensor] = torch.randperm
    """Function of n that returns 0 ... n - 1 in a random order, the same at every call."""

    def whole_episodes(self, batch: Samples) -> int:
        """Return the number of episodes of a task if the samples must stay whole, else 0.

        A recurrent policy and some inner losses need whole episodes.
        """
        needed = self.adapter.model.recurrent or trait(self.adapter.loss, "whole_episodes")
        return getattr(batch, "episodes", 0) if needed else 0

    def gradient(
        self, meta: Params, iterates: Sequence[Params] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        def one(chunk: slice) -> tuple[Tensor, Tensor]:
            batches = self._part(chunk)
            theta = self._leaves(meta)
            tasks = len(batches[-1].weight)
            found, slow = self._adapted(theta, batches[:-1], tasks, curvature=self.curvature)
            loss, dist = self._loss(found, slow, batches, chunk)
            gradient = flat_gradient(loss.sum(), theta)
            with torch.no_grad():
                kl = batches[-1].kl(self.adapter.model, dist)
                numbers = torch.stack([loss.sum(), kl.sum()]).cpu()
            return gradient.cpu(), numbers

        parts = self.pool.map(one, self._slices)
        loss, kl = self._average([numbers for _, numbers in parts]).tolist()
        gradients = [g for g, _ in parts]
        mean = self._average(gradients)
        sizes = [s.stop - s.start for s in self._slices]
        found = agreement(gradients, sizes, mean, self.pool.process_group)
        mean, loss = self._regularized(meta, mean, loss)
        return mean, {"loss": loss, "kl": kl, "gradient_agreement": found}

    @contextlib.contextmanager
    def linearize(
        self,
        meta: Params,
        iterates: Sequence[Params] = (),
        samples: Sequence[Tensor | None] = (),
    ) -> Iterator[Product]:
        """Yield the product v -> J' F J v, both [P]. Its graph is kept inside the context.

        phi denotes the adapted distributions' parameters on the query samples, and w a dummy
        cotangent. J'w is computed with a graph. Then J v = d(J'w . v)/dw, and J'(F J v) is one more
        backward pass.

        Args:
            meta: meta-parameters at which to differentiate.
            iterates: theta_1 ... theta_K from `meta` on all samples, stacked. J is taken there,
                even if it uses only a part of the samples.
            samples: for each batch the indices of the samples to use, [T, ...], see `Batch.select`.
                None: the whole batch; empty: all of every batch. A part needs the iterates.
        """
        steps = len(self.batches) - 1
        if len(iterates) != steps and any(some is not None for some in samples):
            raise ValueError(f"a part of the samples needs the {steps} iterates on all of them")

        def build(chunk: slice) -> Product:
            batches = self._part(chunk)
            if samples:
                batches = [
                    batch if some is None else batch.select(some[chunk].to(self.device))
                    for batch, some in zip(batches, samples, strict=True)
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
            policy: Any = self.adapter.model  # a trust region needs a policy

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


@dataclass(frozen=True, kw_only=True)
class FirstOrder(MetaGradient):
    """Meta-gradient with the identity as the Jacobian of the inner steps.

    Finn et al. 2017, section 5.2 (arXiv:1703.03400).
    """

    def curvature(self, progress: float) -> float:
        """Return the weight of the inner steps' curvature at a progress of the run in [0, 1]."""
        return 0.0

    def objective(self, sampled: Sampled) -> Objective:
        """Return the meta-objective including the algorithm's additional terms."""
        return sampled.objective

    def problem(self, sampled: Sampled) -> UnrolledProblem:
        sampled = replace(sampled, objective=self.objective(sampled))
        return UnrolledProblem(
            **sampled.common(),
            curvature=self.curvature(sampled.progress),
            permutation=sampled.permutation,
        )


@dataclass(frozen=True, kw_only=True)
class Unrolled(FirstOrder):
    """Meta-gradient through the inner steps (Finn et al. 2017, algorithm 3)."""

    second_order: float = tunable(1.0, 0.0, 1.0)
    """Weight of the inner steps' curvature in the meta-gradient: 1 is exact, 0 is first order."""

    def __post_init__(self) -> None:
        self.require_fraction("second_order")

    def curvature(self, progress: float) -> float:
        return self.second_order
