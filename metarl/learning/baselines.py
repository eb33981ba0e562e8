"""Baselines: values of states, which make policy gradients less noisy.

A baseline is fitted to a rollout of each task, or keeps a state that learns from iteration to
iteration.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.models.networks import Params
from metarl.parts import Part
from metarl.sampling.trajectories import Rollout

Fit = Callable[[Tensor], Tensor]
"""Targets [T, E, H] float64 -> values [T, E, H] float64."""


@dataclass(frozen=True, kw_only=True)
class Baseline(Part, ABC):
    """Base class of baselines. Its fields are the options `baseline.*`."""

    section: ClassVar[str] = "baseline"
    name: ClassVar[str]
    """Name of `--baseline`."""

    def init(self, observation_shape: tuple[int, ...], rng: np.random.Generator) -> Params:
        """Return the state before the first iteration; it is a part of every checkpoint."""
        return {}

    def peak_bytes(self, samples: int, observation_shape: tuple[int, ...], tasks: int) -> int:
        """Return the memory that fitting takes at its peak, in bytes; by default none.

        Args:
            samples: of a task.
            tasks: fitted at a time.
        """
        return 0

    @property
    def label(self) -> str:
        """Name for messages."""
        return self.source or self.name or type(self).__name__

    @abstractmethod
    def fit(self, state: Params, observation: Tensor, valid: Tensor) -> Fit:
        """Return a function that fits values to targets on a rollout of some tasks.

        Args:
            state: from `init` or `update`.
            observation: [T, E, H, *observation_shape].
            valid: [T, E, H] bool; steps that are not valid hold zeros.
        """

    def update(
        self,
        state: Params,
        rollouts: Sequence[Rollout],
        discount: float,
        process_group: ProcessGroup = ALONE,
    ) -> Params:
        """Return the state after an iteration's rollouts; by default unchanged.

        Args:
            rollouts: of this process's tasks, support first.
            process_group: has the other tasks; the state must be the same in all processes.
        """
        return state


def features(observation: Tensor, time: Tensor) -> Tensor:
    """Features of the linear baseline, [..., 2 o + 4] from observations [..., o] at steps [...].

    Duan et al. 2016 (arXiv:1604.06778): o, o^2, t, t^2, t^3 and 1, with o clipped to +-10 and t in
    hundreds of steps; float64.
    """
    o = observation.clamp(-10.0, 10.0).double()
    t = (time.double() / 100.0).expand(o.shape[:-1])
    return torch.cat([o, o * o, torch.stack([t, t**2, t**3, torch.ones_like(t)], dim=-1)], dim=-1)


DUAL = 1024
"""Features above which a baseline with more features than samples is solved samples x samples."""

_COARSE = 6  # places each way of what the baseline sees of an image


def seen(observation: Tensor, rank: int) -> Tensor:
    """Return what the baseline sees of observations: [..., o] of vectors, a coarse copy of images.

    An image of bytes, [..., *rank axes], becomes its means over at most 6 x 6 places (a third axis
    is averaged over, be it channels or a side), scaled to [0, 1].
    """
    if rank == 1:
        return observation
    images = observation.flatten(0, -rank - 1).float() / 255.0
    if rank == 3:
        axis = 1 if images.shape[1] < images.shape[3] else 3
        images = images.mean(axis)
    height, width = (min(_COARSE, n) for n in images.shape[1:])
    coarse = torch.nn.functional.adaptive_avg_pool2d(images.unsqueeze(1), (height, width))
    return coarse.flatten(1).unflatten(0, observation.shape[:-rank])


def factor_gram(x: Tensor, ridge: float = 1e-5) -> Tensor:
    """Cholesky factor of x^T x + ridge for each task, the ridge raised until there is one.

    Args:
        x: [T, N, F] float64; rows to leave out are zero.
        ridge: smallest ridge; multiplied by ten where the sum is not positive definite.

    Returns:
        [T, F, F], lower triangular; NaN where no ridge up to 1e5 times as large was enough.
    """
    gram = x.transpose(1, 2) @ x
    factors = None
    missing = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(6):
        damped = gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(ridge)
        # It says by `info` where a matrix is not positive definite in floating point.
        factor, info = torch.linalg.cholesky_ex(damped)
        if factors is None and not info.any():
            return factor
        factors = torch.full_like(gram, math.nan) if factors is None else factors
        factors = torch.where((missing & (info == 0))[:, None, None], factor, factors)
        missing &= info != 0
        if not missing.any():
            break
        ridge *= 10.0
    assert factors is not None
    return factors


def fit_linear(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    """Solve min_w |x w - y|^2 + ridge |w|^2 for each task.

    Args:
        x: [T, N, F] float64; rows to leave out are zero.
        y: [T, N] float64.
        factor: [T, F, F] of `factor_gram`, which holds the ridge.

    Returns:
        [T, F]; zeros where the solution is not finite.
    """
    weights = torch.cholesky_solve(x.transpose(1, 2) @ y.unsqueeze(-1), factor)
    finite = torch.isfinite(weights).all(dim=1, keepdim=True)
    return torch.where(finite, weights, 0.0).squeeze(-1)


def fit_dual(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    """Solve what `fit_linear` does by a matrix of samples: w = x^T (x x^T + ridge)^-1 y.

    It is the smaller one if there are more features than samples (Woodbury's identity).

    Args:
        x: [T, N, F] float64; rows to leave out are zero.
        y: [T, N] float64, zero there.
        factor: [T, N, N], `factor_gram` of x^T.
    """
    weights = x.transpose(1, 2) @ torch.cholesky_solve(y.unsqueeze(-1), factor)
    finite = torch.isfinite(weights).all(dim=1, keepdim=True)
    return torch.where(finite, weights, 0.0).squeeze(-1)


def is_dual(samples: int, size: int) -> bool:
    """Whether the baseline of a task is solved by a matrix of samples, not of `size` features.

    Small matrices of features always stay: both forms differ by rounding.
    """
    return size > max(samples, DUAL)


def feature_count(shape: tuple[int, ...]) -> int:
    """Return how many features the baseline has for observations of a shape."""
    if len(shape) == 1:
        return 2 * shape[0] + 4
    return 2 * seen(torch.zeros((1, *shape), dtype=torch.uint8), len(shape)).shape[1] + 4


@dataclass(frozen=True, kw_only=True)
class LinearFeatures(Baseline):
    """A linear function of features of observation and time, fitted to each task's own rollout.

    Duan et al. 2016 (arXiv:1604.06778).
    """

    name: ClassVar[str] = "linear"

    ridge: float = 1e-5
    """Ridge regularization."""

    def __post_init__(self) -> None:
        self.require_positive("ridge")

    def peak_bytes(self, samples: int, observation_shape: tuple[int, ...], tasks: int) -> int:
        size = feature_count(observation_shape)
        matrix = samples if is_dual(samples, size) else size
        # The features twice while they are put together; or once, the matrix, that with its ridge,
        # and the factor. As measured: 0.54 and 0.60 GB for two tasks of 2,900 and 3,500 samples and
        # 1,500 numbers.
        return tasks * 8 * (samples * size + max(samples * size, 3 * matrix**2))

    def fit(self, state: Params, observation: Tensor, valid: Tensor) -> Fit:
        x = features(seen(observation, observation.dim() - 3), torch.arange(valid.shape[-1]))
        if not bool(valid.all()):
            x *= valid.unsqueeze(-1)
        flat = x.flatten(1, 2)
        dual = is_dual(*flat.shape[1:])
        factor = factor_gram(flat.transpose(1, 2) if dual else flat, self.ridge)
        solve = fit_dual if dual else fit_linear

        def fitted(target: Tensor) -> Tensor:
            weights = solve(flat, target.flatten(1), factor).unsqueeze(-1)
            return (flat @ weights).view_as(target)

        return fitted


@dataclass(frozen=True, kw_only=True)
class ZeroBaseline(Baseline):
    """No baseline: every value is zero."""

    name: ClassVar[str] = "zero"

    def fit(self, state: Params, observation: Tensor, valid: Tensor) -> Fit:
        return torch.zeros_like
