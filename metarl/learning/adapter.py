"""Adapter and inner update: theta' = theta - alpha grad L(theta), `updates` times on each batch.

All tasks adapt at once. Their losses are summed, never averaged. A parameter leaf has a task axis,
so the gradient of the sum contains each task's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metarl.envs.errors import check_one_of
from metarl.learning.losses import Loss, task_losses
from metarl.models.networks import Dist, Model, Params, stack
from metarl.models.samples import Samples

StepSizes = dict[str, Tensor]
"""For each fast parameter [K, ...]: one entry per inner step, broadcast against the leaf."""

Fast = Literal["all", "upper", "head", "context"]
Learned = Literal["no", "layer", "parameter"]

_STEP = "step_size."  # prefix of learned step sizes among the meta-parameters
FACTOR = "step_factor"  # name of the fitted factor of all step sizes


def is_step_size(name: str) -> bool:
    """Whether a meta-parameter is a learned step size, or the fitted factor of step sizes."""
    return name.startswith(_STEP) or name == FACTOR


def size_at(sizes: Tensor | Sequence[float], k: int) -> Any:
    """Return the size of step k. The last size repeats for later steps."""
    return sizes[min(k, len(sizes) - 1)]


@dataclass(frozen=True)
class Adapter:
    """The parameters that adapt, the inner loss and the step sizes.

    MAML adapts all parameters. ANIL (Raghu et al. 2020, arXiv:1909.09157) adapts the last layer.
    CAVIA (Zintgraf et al. 2019, arXiv:1810.03642) adapts a context input that starts at zero. Step
    sizes are given or learned. Learned sizes exist for each layer and step (MAML++, Antoniou et al.
    2019, arXiv:1810.09502) or for each scalar parameter (Meta-SGD, Li et al. 2017,
    arXiv:1707.09835).
    """

    model: Model
    loss: Loss
    step_sizes: tuple[float, ...]
    fast: Fast = "all"
    learned: Learned = "no"
    updates: int = 1
    """Gradient steps on each batch."""
    proximal: float = 0.0
    """Coefficient of the proximal term towards the initialization."""
    backtrack: bool = False
    """Whether to reject updates that raise a task's inner objective, see `proximal_descent`."""
    fitted: bool = False
    """Whether the meta-parameters contain a factor of the step sizes, which has no gradient."""

    def __post_init__(self) -> None:
        check_one_of("fast", self.fast, get_args(Fast))
        check_one_of("learned", self.learned, get_args(Learned))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the model's parameters and of the learned step sizes."""
        own = self.model.shapes()
        shapes = dict(own)
        if self.learned != "no":
            count = len(self.step_sizes)
            for name, leaf in own.items():
                if self._is_fast(name):
                    more = leaf if self.learned == "parameter" else ()
                    shapes[_STEP + name] = (count, *more)
            if self.fast == "context":
                more = (self.model.context_dim,) if self.learned == "parameter" else ()
                shapes[_STEP + "context"] = (count, *more)
            for name in self.model.generated:
                shapes[_STEP + name] = (count,)
        if self.fitted:
            shapes[FACTOR] = (1,)
        return shapes

    def init(self, params: Params) -> Params:
        """Return meta-parameters: a model's parameters, and step sizes if they are learned."""
        meta = dict(params)
        for name, shape in self.shapes().items():
            if name.startswith(_STEP):
                sizes = torch.tensor(self.step_sizes, dtype=next(iter(params.values())).dtype)
                meta[name] = sizes.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
            elif name == FACTOR:
                meta[name] = torch.ones(shape)
        return meta

    def split(self, meta: Params) -> tuple[Params, Params, StepSizes]:
        """Return the fast parameters (they adapt), the slow parameters and the step sizes."""
        params = {n: p for n, p in meta.items() if not (n.startswith(_STEP) or n == FACTOR)}
        fast = {name: p for name, p in params.items() if self._is_fast(name)}
        slow = {name: p for name, p in params.items() if not self._is_fast(name)}
        like = next(iter(params.values()))
        if self.fast == "context":
            fast["context"] = like.new_zeros(self.model.context_dim)
        given = like.new_tensor(self.step_sizes)
        if self.fitted:
            given = given * meta[FACTOR].detach()
        return (
            fast,
            slow,
            {name: meta.get(_STEP + name, given) for name in (*fast, *self.model.generated)},
        )

    def mean_step_sizes(self, meta: Params, steps: int) -> list[float]:
        """Return the sizes of `steps` steps: given, fitted, or the mean of learned sizes."""
        sizes = list(self.step_sizes)
        if self.fitted:
            sizes = [float(meta[FACTOR]) * size for size in sizes]
        if self.learned != "no":
            learned = [p.view(len(p), -1) for n, p in meta.items() if n.startswith(_STEP)]
            sizes = torch.cat(learned, dim=1).mean(dim=1).tolist()
        return [size_at(sizes, k) for k in range(steps)]

    def without_gradient(self, meta: Params) -> Params:
        """Return the entries without gradient: the fitted factor and running statistics."""
        return {
            name: p
            for name, p in meta.items()
            if name == FACTOR or not (name.startswith(_STEP) or self.model.adapts(name, "all"))
        }

    def _is_fast(self, name: str) -> bool:
        return self.fast != "context" and self.model.adapts(name, self.fast)

    def start(self, fast: Params, slow: Params, support: Samples) -> Params:
        """Return theta_0, stacked, including the parameters generated from the support."""
        generated = self.model.start({**slow, **fast}, support)
        if not generated:
            return fast
        # `view_as` creates new nodes, so gradients exclude the path through the generated layer.
        return {**{name: p.view_as(p) for name, p in fast.items()}, **generated}

    def params(self, fast: Params, slow: Params, tasks: int) -> Params:
        """Return all parameters of the model, stacked, [tasks, ...] each."""
        return {**stack(slow, tasks), **fast}

    def output(self, fast: Params, slow: Params, samples: Samples) -> Dist:
        """Return the model's output for samples, [T, N, ...] each."""
        return self.model.output({**slow, **fast}, samples)

    def step(
        self,
        fast: Params,
        slow: Params,
        step_sizes: StepSizes,
        batch: Samples,
        k: int,
        *,
        start: Params,
        curvature: float | None = None,
    ) -> Params:
        """Return iterate k + 1 of the fast parameters from iterate k, stacked; see `inner_step`."""
        common: dict[str, Any] = {"updates": self.updates, "proximal": self.proximal}
        sizes = {name: size_at(sizes, k) for name, sizes in step_sizes.items()}

        def loss(theta: Params, batch: Samples) -> Tensor:
            return self.inner_loss(theta, slow, batch)

        if self.backtrack:
            assert curvature is None
            return proximal_descent(loss, fast, sizes, batch, start=start, **common)
        return inner_step(loss, fast, sizes, batch, start=start, curvature=curvature, **common)

    def adapt(
        self,
        fast: Params,
        slow: Params,
        step_sizes: StepSizes,
        batches: Sequence[Samples],
        *,
        curvature: float | None = None,
        at: Sequence[Params] | None = None,
    ) -> list[Params]:
        """Return the iterates theta_0 ... theta_K of K inner steps, each on its own batch.

        Args:
            fast: theta_0, stacked, [T, ...] each.
            slow: the parameters that do not adapt.
            step_sizes: see `StepSizes`.
            batches: K batches; an empty sequence gives only theta_0.
            curvature: see `inner_step`.
            at: values of theta_1 ... theta_K at which to differentiate. If the batches are a subset
                of the samples, only the derivative of a step uses the subset; its value uses all
                samples.
        """
        iterates = [fast]
        for k, batch in enumerate(batches):
            new = self.step(
                iterates[k], slow, step_sizes, batch, k, start=fast, curvature=curvature
            )
            if at is not None:
                new = {name: at[k][name] + (p - p.detach()) for name, p in new.items()}
            iterates.append(new)
        return iterates

    def inner_loss(self, fast: Params, slow: Params, batch: Samples) -> Tensor:
        """Return the inner loss of each task, [T]."""
        return task_losses(self.loss, self.model, self.output(fast, slow, batch), batch)


def inner_step(
    loss: Callable[[Params, Samples], Tensor],
    params: Params,
    sizes: Params,
    batch: Samples,
    *,
    start: Params,
    curvature: float | None = None,
    updates: int = 1,
    proximal: float = 0.0,
) -> Params:
    """Return theta_{k+1} = theta_k - alpha grad L(theta_k), after `updates` such updates.

    Finn et al. 2017, eq. 1 (arXiv:1703.03400); with `proximal`, gradient descent on the inner
    problem of iMAML, Rajeswaran et al. 2019, eq. 3 (arXiv:1909.04630).

    Args:
        loss: (stacked parameters, batch) -> [T].
        params: theta_k, stacked, [T, ...] each.
        sizes: alpha of each parameter, broadcast against it.
        batch: samples of the T tasks.
        start: theta_0, the target of `proximal` at every step.
        curvature: factor c in the Jacobian of theta_{k+1} by theta_k, I - c alpha H. H is the
            Hessian of L. 1 is exact, 0 is first order. None keeps no graph.
        updates: gradient updates on the batch.
        proximal: strength lambda of lambda / 2 |theta - theta_0|^2, added to the loss.
    """
    current = params
    for _ in range(updates):
        theta = current
        if not curvature:
            theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
        elif not all(p.requires_grad for p in theta.values()):  # a context that starts at zero
            theta = current = {
                name: p if p.requires_grad else p.detach().requires_grad_()
                for name, p in theta.items()
            }
        slope = torch.autograd.grad(
            loss(theta, batch).sum(), list(theta.values()), create_graph=bool(curvature)
        )
        new = {}
        for (name, p), g in zip(current.items(), slope, strict=True):
            if curvature and curvature != 1.0:
                g = g.detach() + curvature * (g - g.detach())  # same value, scaled derivative
            if proximal:
                g = g + proximal * (p - start[name])
            new[name] = p - sizes[name] * g
        if curvature is None:
            new = {name: p.detach() for name, p in new.items()}
        current = new
    return current


def proximal_descent(
    loss: Callable[[Params, Samples], Tensor],
    params: Params,
    sizes: Params,
    batch: Samples,
    *,
    start: Params,
    updates: int,
    proximal: float,
) -> Params:
    """Solve iMAML's inner problem by gradient descent with backtracking, without a graph.

    The objective is L(theta) + lambda / 2 |theta - theta_0|^2 (Rajeswaran et al. 2019, eq. 3,
    arXiv:1909.04630). If an update raises a task's objective or makes it non-finite, it is
    rejected, and the task's later updates are half as large. The implicit gradient does not depend
    on the solution method. The arguments are as in `inner_step`.
    """

    def at(theta: Params) -> tuple[Tensor, list[Tensor]]:
        leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
        value = loss(leaves, batch)
        slope = torch.autograd.grad(value.sum(), list(leaves.values()))
        pull = [p.detach() - start[name].detach() for name, p in theta.items()]
        squares = torch.stack([x.square().flatten(1).sum(1) for x in pull]).sum(0)
        slope = [g + proximal * x for g, x in zip(slope, pull, strict=True)]
        return value.detach() + 0.5 * proximal * squares, slope

    def by_task(values: Tensor, like: Tensor) -> Tensor:
        return values.view(-1, *[1] * (like.dim() - 1))

    current = {name: p.detach() for name, p in params.items()}
    value, slope = at(current)
    share = torch.ones_like(value)
    for _ in range(updates):
        new = {
            name: p - by_task(share, p) * sizes[name] * g
            for (name, p), g in zip(current.items(), slope, strict=True)
        }
        found, new_slope = at(new)
        lower = found <= value  # False for NaN
        share = torch.where(lower, share, 0.5 * share)
        value = torch.where(lower, found, value)
        slope = [
            torch.where(by_task(lower, g), h, g) for g, h in zip(slope, new_slope, strict=True)
        ]
        current = {n: torch.where(by_task(lower, p), new[n], p) for n, p in current.items()}
    return current
