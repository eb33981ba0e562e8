"""Conjugate gradient (Hestenes & Stiefel 1952) for one system, or for one system per task.

A matrix is given by its products with vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""v -> A v"""


def conjugate_gradient(
    product: Product, b: Tensor, iterations: int, tolerance: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """Return an approximate solution x of A x = b, and b - A x; A symmetric and positive definite.

    Hestenes & Stiefel 1952.

    Args:
        product: v -> A v.
        b: [P]
        iterations: maximum number of products.
        tolerance: stop if |residual|^2 / |b|^2 falls below this.
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = residual @ residual
    enough = tolerance * squared
    for _ in range(iterations):
        if squared <= enough:
            break
        image = product(direction)
        step = squared / (direction @ image)
        x = x + step * direction
        residual = residual - step * image
        new = residual @ residual
        direction = residual + (new / squared) * direction
        squared = new
    return x, residual


def conjugate_gradient_each(
    product: Product, b: Tensor, iterations: int, least_curvature: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximate solutions x_t of A_t x_t = b_t for every task t; A_t symmetric.

    Args:
        product: [T, P] -> [T, P], each row by its own symmetric A_t.
        b: [T, P]
        iterations: maximum number of products.
        least_curvature: bound on the curvature d . A d / d . d of a direction d.

    Returns:
        x [T, P]; relative residuals |b - A x| / |b| [T]; a mask [T] of the tasks that met a
        direction with curvature at or below the bound. The iteration of such a task stops there.
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = (residual * residual).sum(1, keepdim=True)
    scale = squared.clamp(min=1e-30)
    curved = torch.zeros_like(squared, dtype=torch.bool)
    for _ in range(iterations):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        live = squared > 1e-20 * scale
        least = least_curvature * (direction * direction).sum(1, keepdim=True)
        curved = curved | (live & (curvature <= least))
        live = live & ~curved
        if not live.any():
            break
        step = torch.where(live, squared / torch.where(live, curvature, 1.0), 0.0)
        x = x + step * direction
        residual = residual - step * image
        new = (residual * residual).sum(1, keepdim=True)
        ratio = torch.where(live, new / squared.clamp(min=1e-30), 0.0)
        direction = torch.where(live, residual + ratio * direction, direction)
        squared = torch.where(live, new, squared)
    return x, (squared / scale).sqrt().squeeze(1), curved.squeeze(1)
