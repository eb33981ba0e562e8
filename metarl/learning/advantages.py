"""Returns, generalized advantages and the linear feature baseline, masked and in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.envs.errors import UserError, check_one_of
from metarl.learning.trajectories import Rollout

_CHUNK = 2  # tasks; their features stay in cache
_BLOCK = 1024  # steps whose discounts are one matrix
_REFITS = 3  # to lambda-returns, after the first fit
DUAL = 1024
"""Features above which a baseline with more features than samples is solved samples x samples."""

Targets = Literal["returns", "lambda-returns"]


def discounted_sum(x: Tensor, factor: float) -> Tensor:
    """Discounted sum of what is to come, y[t] = sum_l factor^l x[t + l].

    An episode fills the front of its row and zeros follow, so the sum needs no mask. Long rows are
    summed block by block from the end, in memory that grows with H and not with its square.

    Args:
        x: [..., H]

    Returns:
        [..., H]
    """
    if x.shape[-1] > _BLOCK:
        parts, rest = [], torch.zeros_like(x[..., :1])
        for part in reversed(x.split(_BLOCK, dim=-1)):
            left = torch.arange(part.shape[-1], 0, -1, device=x.device)  # steps to the block's end
            powers = torch.as_tensor(factor, dtype=x.dtype, device=x.device) ** left
            parts.append(discounted_sum(part, factor) + powers * rest)
            rest = parts[-1][..., :1]
        return torch.cat(parts[::-1], dim=-1)
    steps = torch.arange(x.shape[-1], device=x.device)
    ahead = steps[:, None] - steps[None, :]  # how far row s lies ahead of column t
    powers = torch.as_tensor(factor, dtype=x.dtype, device=x.device) ** ahead.clamp(min=0)
    return x @ torch.where(ahead >= 0, powers, 0.0)


def gae(reward: Tensor, value: Tensor, discount: float, trace: float) -> Tensor:
    """Generalized advantages, A[t] = sum_l (discount * trace)^l delta[t + l].

    Schulman et al. 2016, eq. 16 (arXiv:1506.02438), with
    delta[t] = r[t] + discount V[t + 1] - V[t]. The horizon is the end of the task: no value follows
    the last step.

    Args:
        reward, value: [..., H], zero where not valid; real steps come first.
        discount, trace: gamma and lambda.

    Returns:
        [..., H], zero where not valid.
    """
    following = torch.nn.functional.pad(value[..., 1:], (0, 1))
    return discounted_sum(reward + discount * following - value, discount * trace)


def features(observation: Tensor, time: Tensor) -> Tensor:
    """Features of the linear baseline, [..., 2 o + 4] from observations [..., o] at steps [...].

    Duan et al. 2016 (arXiv:1604.06778): o, o^2, t, t^2, t^3 and 1, with o clipped to +-10 and t in
    hundreds of steps; float64.
    """
    o = observation.clamp(-10.0, 10.0).double()
    t = (time.double() / 100.0).expand(o.shape[:-1])
    return torch.cat([o, o * o, torch.stack([t, t**2, t**3, torch.ones_like(t)], dim=-1)], dim=-1)


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


def baseline_bytes(samples: int, shape: tuple[int, ...], tasks: int, threads: int) -> int:
    """Return the memory that fitting the baselines takes at its peak, in bytes.

    Args:
        samples: of a task.
        shape: of an observation.
        tasks: fitted in all.
        threads: that fit, `_CHUNK` tasks each at a time.
    """
    size = feature_count(shape)
    matrix = samples if is_dual(samples, size) else size
    # The features twice while they are put together; or once, the matrix, that with its ridge, and
    # the factor. As measured: 0.54 and 0.60 GB for two tasks of 2,900 and 3,500 samples and 1,500
    # numbers.
    numbers = samples * size + max(samples * size, 3 * matrix**2)
    return min(_CHUNK * threads, tasks) * 8 * numbers


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How advantages are estimated."""

    discount: float = 0.99
    """Discount of future rewards (gamma)."""
    trace: float = 1.0
    """Trace decay of generalized advantage estimation (lambda); 1 uses whole returns."""
    ridge: float = 1e-5
    """Ridge regularization of the linear feature baseline."""
    targets: Targets = "returns"
    """What the baseline is fitted to: the discounted returns, as in the papers, or lambda-returns,
    which have less noise where few episodes are drawn."""
    normalize: bool = True
    """Scale each task's advantages to mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        for name in ("discount", "trace"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"advantage.{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0.0 < self.ridge < math.inf:
            raise UserError(f"advantage.ridge must be positive and finite, got {self.ridge}")
        check_one_of("advantage.targets", self.targets, get_args(Targets))


def estimate(rollout: Rollout, config: AdvantageConfig, pool: ChunkPool) -> tuple[Tensor, Tensor]:
    """Return the advantages of a rollout, [T, E, H] float32, zero where not valid; and their scale.

    The baseline is fitted to each task's own discounted returns in this rollout. With targets
    "lambda-returns" it is then fitted anew to those of the baseline before, value + advantage, of
    the same trace decay: they lean on the fit where the rewards to come are noise (Sutton & Barto
    2018, section 12.1). Advantages are normalized over a task's valid steps, by the standard
    deviation; what they were divided by is their scale, [T] float64.
    """
    steps = torch.arange(rollout.valid.shape[-1])
    whole = bool(rollout.valid.all())
    rank = rollout.observation.dim() - 3

    def one(chunk: slice) -> tuple[Tensor, Tensor]:
        valid, reward = rollout.valid[chunk], rollout.reward[chunk].double()
        x = features(seen(rollout.observation[chunk], rank), steps)
        if not whole:
            x *= valid.unsqueeze(-1)
        flat = x.flatten(1, 2)
        dual = is_dual(*flat.shape[1:])
        factor = factor_gram(flat.transpose(1, 2) if dual else flat, config.ridge)
        fit = fit_dual if dual else fit_linear

        def fitted(target: Tensor) -> tuple[Tensor, Tensor]:
            weights = fit(flat, target.flatten(1), factor).unsqueeze(-1)
            value = (flat @ weights).view_as(reward)
            return value, gae(reward, value, config.discount, config.trace)

        value, advantage = fitted(discounted_sum(reward, config.discount))
        for _ in range(_REFITS if config.targets == "lambda-returns" else 0):
            value, advantage = fitted(value + advantage)
        scale = torch.ones(len(valid), dtype=torch.float64)
        if config.normalize:
            advantage, scale = normalize(advantage, valid)
        return advantage.float(), scale

    advantages, scales = zip(*pool.map(one, slices(len(rollout.valid), _CHUNK)), strict=True)
    return torch.cat(advantages), torch.cat(scales)


def normalize(advantage: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale each task's valid advantages to mean 0, standard deviation 1.

    Args:
        advantage, valid: [T, E, H].

    Returns:
        [T, E, H], and what each task's were divided by, [T].
    """
    count = valid.sum(dim=(1, 2), keepdim=True).clamp(min=1)
    mean = advantage.sum(dim=(1, 2), keepdim=True) / count
    centred = torch.where(valid, advantage - mean, 0.0)
    scale = (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt() + 1e-8
    return centred / scale, scale.flatten()
