"""Baselines: state values that reduce the variance of policy gradients.

A baseline is fitted to each task's rollout, or keeps a state that it updates every iteration.
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
        """Return the state before the first iteration. It is part of every checkpoint."""
        return {}

    def peak_bytes(self, samples: int, observation_shape: tuple[int, ...], tasks: int) -> int:
        """Return the peak memory of a fit, in bytes; by default 0.

        Args:
            samples: number of samples of a task.
            tasks: number of tasks that are fitted at once.
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
            state: state from `init` or `update`.
            observation: [T, E, H, *observation_shape]. In trials, it has two more components, see
                `baseline_input`.
            valid: [T, E, H] bool; the other steps are zero.
        """

    def update(
        self,
        state: Params,
        rollouts: Sequence[Rollout],
        discount: float,
        process_group: ProcessGroup = ALONE,
    ) -> Params:
        """Return the state after an iteration's rollouts; unchanged by default.

        Args:
            rollouts: rollouts of this process's tasks, support first.
            process_group: group with the other tasks; all processes must return the same state.
        """
        return state


def features(observation: Tensor, time: Tensor) -> Tensor:
    """Features of the linear baseline, [..., 2 o + 4] from observations [..., o] at steps [...].

    Duan et al. 2016 (arXiv:1604.06778): o, o^2, t, t^2, t^3 and 1, with o clipped to +-10 and t in
    hundreds of steps; float64.
    """
    o = observation.clamp(-10.0, 10.0).double()
    t = time.double() / 100.0
    powers = torch.stack([t, t**2, t**3, torch.ones_like(t)], dim=-1)
    return torch.cat([o, o * o, powers.expand(*o.shape[:-1], 4)], dim=-1)


DUAL = 1024
"""Number of features above which the dual form may be used, if it exceeds the samples."""

_COARSE = 6  # places per side of the coarse image


def seen(observation: Tensor, rank: int) -> Tensor:
    """Return the baseline's input: vectors [..., o] unchanged, or a coarse copy of images.

    An image of bytes, [..., *rank axes], is averaged over at most 6 x 6 places and scaled to [0,
    1]. A third axis, for instance channels, is averaged.
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
    """Return the Cholesky factor of x^T x + ridge for each task; the ridge is raised if necessary.

    Args:
        x: [T, N, F] float64; masked rows are zero.
        ridge: smallest ridge; multiplied by ten while the sum is not positive definite.

    Returns:
        [T, F, F], lower triangular; NaN if a ridge 1e5 times as large is still too small.
    """
    gram = x.transpose(1, 2) @ x
    factors = None
    missing = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(6):
        damped = gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(ridge)
        # `info` is nonzero if a matrix is not positive definite in floating point.
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
        x: [T, N, F] float64; masked rows are zero.
        y: [T, N] float64.
        factor: [T, F, F] from `factor_gram`, which includes the ridge.

    Returns:
        [T, F]; zeros if the solution is not finite.
    """
    weights = torch.cholesky_solve(x.transpose(1, 2) @ y.unsqueeze(-1), factor)
    finite = torch.isfinite(weights).all(dim=1, keepdim=True)
    return torch.where(finite, weights, 0.0).squeeze(-1)


def fit_dual(x: Tensor, y: Tensor, factor: Tensor) -> Tensor:
    """Solve the problem of `fit_linear` in dual form: w = x^T (x x^T + ridge)^-1 y.

    The dual matrix is smaller if there are more features than samples (Woodbury's identity).

    Args:
        x: [T, N, F] float64; masked rows are zero.
        y: [T, N] float64; masked entries are zero.
        factor: [T, N, N], `factor_gram` of x^T.
    """
    weights = x.transpose(1, 2) @ torch.cholesky_solve(y.unsqueeze(-1), factor)
    finite = torch.isfinite(weights).all(dim=1, keepdim=True)
    return torch.where(finite, weights, 0.0).squeeze(-1)


def is_dual(samples: int, size: int) -> bool:
    """Whether to fit a task's baseline in dual form, with a matrix of samples instead of features.

    Small feature matrices always use the primal form, because both forms differ by rounding.
    """
    return size > max(samples, DUAL)


def feature_count(shape: tuple[int, ...]) -> int:
    """Return the number of features of the baseline for observations of a shape."""
    if len(shape) == 1:
        return 2 * shape[0] + 4
    return 2 * seen(torch.zeros((1, *shape), dtype=torch.uint8), len(shape)).shape[1] + 4


@dataclass(frozen=True, kw_only=True)
class LinearFeatures(Baseline):
    """Linear function of features of observation and time, fitted to each task's rollout.

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
        # Peak: two copies of the features during assembly; or the features, the matrix, the matrix
        # with its ridge, and the factor. Measured: 0.54 and 0.60 GB for two tasks of 2,900 and
        # 3,500 samples and 1,500 numbers.
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
