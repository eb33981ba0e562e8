"""Meta-gradient of iMAML: implicit differentiation of a proximal inner problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarl.envs.errors import UserError
from metarl.learning.linear_solves import conjugate_gradient_each
from metarl.learning.losses import task_losses
from metarl.learning.meta_gradients.problem import (
    MetaGradient,
    QueryProblem,
    Sampled,
)
from metarl.models.networks import Params, stack


@dataclass
class ImplicitProblem(QueryProblem):
    """iMAML (Rajeswaran et al. 2019, eq. 6, arXiv:1909.04630): (I + H / lambda)^-1 grad L_query.

    H is the Hessian of the support loss at the solution of the proximal inner problem. Conjugate
    gradient solves the system of each task separately.

    If the curvature I + H / lambda of a task is not positive, the solution is not a minimum and has
    no derivative. If it is almost zero, the derivative is almost infinite. Such a task contributes
    the first-order gradient, grad L_query. A task whose inner problem was not solved contributes
    zero.

    Statistics: the relative residuals of the linear solve and of the inner problem's stationarity,
    and the shares of both kinds of tasks.
    """

    iterations: int = 10
    least_curvature: float = 0.25
    """Smallest curvature of I + H / lambda for which a task is solved; 1 corresponds to H = 0."""
    worst_residual: float = 1.0
    """Largest residual of the inner problem's stationarity, relative to the proximal term."""

    def gradient(
        self, meta: Params, iterates: Sequence[Params] = ()
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
            each = task_losses(self.objective.outer_loss, self.adapter.model, dist, query)
            loss = self._weighted(each, chunk).sum()
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
            unsolved = ~(stationary <= self.worst_residual)  # NaN counts as unsolved
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
        stats: dict[str, Any] = {
            "loss": loss,
            "implicit_residual": residual,
            "inner_residual": stationary,
            "low_curvature": curved,
            "unsolved": unsolved,
        }
        mean, stats["loss"] = self._regularized(meta, self._average([g for g, _ in parts]), loss)
        return mean, stats


def rows(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors [T, ...] concatenated, [T, P]."""
    return torch.cat([x.flatten(1) for x in tensors], dim=1)


@dataclass(frozen=True, kw_only=True)
class Implicit(MetaGradient):
    """Implicit gradient at the solution of the proximal inner problem."""

    cg_iterations: int = 10
    """Iterations of the conjugate gradient method for each task."""

    def __post_init__(self) -> None:
        self.require_at_least(1, "cg_iterations")

    def problem(self, sampled: Sampled) -> ImplicitProblem:
        return ImplicitProblem(**sampled.common(), iterations=self.cg_iterations)

    def check(self, steps: int) -> None:
        if steps != 1:
            raise UserError(f"imaml needs inner.steps 1, got {steps}")
