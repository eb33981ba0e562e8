"""Handwritten-like characters made from a seed, for few-shot classification without a download.

A character is a program of strokes, as in Lake et al. 2015 (doi:10.1126/science.aab3050), but much
simpler: quadratic curves with points of a coarse grid. A drawing moves the points a little and then
applies a random affine map.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import UserError
from metarl.envs.registry import register_data
from metarl.envs.supervised.few_shot import TRAINING, FewShotFamily

_POINTS = 24  # along a stroke
_JITTER = 0.035  # of a stroke's points, relative to the character's size


@functools.lru_cache(maxsize=4)
def draw_characters(
    classes: int = 400, drawings: int = 20, size: int = 28, seed: int = 0
) -> NDArray[np.uint8]:
    """Return drawings of characters, white on black, [classes, drawings, size, size].

    Equal arguments give equal drawings. A character does not depend on the number of classes.
    """
    if min(classes, drawings) < 1 or size < 8:
        raise UserError(
            "characters need classes and drawings of at least 1 and a size of at least 8, got"
            f" {classes}, {drawings} and {size}"
        )
    images = np.stack(
        [_drawings(np.random.default_rng([seed, c]), drawings, size) for c in range(classes)]
    )
    images.flags.writeable = False  # later calls return the same array
    return images


def _drawings(rng: np.random.Generator, drawings: int, size: int) -> NDArray[np.uint8]:
    """Return drawings of one character, [drawings, size, size]."""
    strokes = int(rng.integers(2, 5))
    # Each stroke is a curve between two points of a 4 x 4 grid, bent towards a third point.
    grid = rng.integers(0, 4, size=(strokes, 3, 2)) / 3.0 - 0.5
    points = grid + rng.normal(0.0, _JITTER, (drawings, strokes, 3, 2))
    t = np.linspace(0.0, 1.0, _POINTS)[:, None]
    weights = np.concatenate([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)  # [points, 3]
    curves = np.einsum("pk,dskx->dspx", weights, points).reshape(drawings, -1, 2)
    angle = rng.normal(0.0, 0.12, drawings)
    shear, stretch = rng.normal(0.0, 0.12, drawings), rng.normal(0.0, 0.12, drawings)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    form = np.array([[np.exp(stretch), shear], [np.zeros(drawings), np.exp(-stretch)]])
    affine = np.einsum("ijd,jkd->dik", rotation, form) * rng.uniform(0.6, 0.8, (drawings, 1, 1))
    shift = rng.normal(0.0, 0.04, (drawings, 1, 2))
    curves = np.einsum("dij,dpj->dpi", affine, curves) + shift
    pixels = (np.arange(size) + 0.5) / size - 0.5
    width = rng.uniform(0.025, 0.04, drawings)[:, None, None]
    # The distance of each pixel to the nearest point, by rows and columns.
    gaps = [(pixels - curves[:, :, axis, None]) ** 2 for axis in (1, 0)]
    squares = (gaps[0][:, :, :, None] + gaps[1][:, :, None, :]).min(axis=1)
    ink = np.clip(1.5 - np.sqrt(squares) / width, 0.0, 1.0)
    return (255.0 * ink).astype(np.uint8)


@register_data(TRAINING)
def characters(
    ways: int | tuple[int, int] = 5,
    shots: int = 1,
    queries: int = 5,
    test_queries: int = 15,
    classes: int = 400,
    drawings: int = 20,
    size: int = 28,
    alphabet: int = 0,
) -> FewShotFamily:
    """Handwritten-like characters made from the seed `alphabet`; ways=5, or ways=(3,8) for a range.

    With 400 classes, 256 are for training, 64 for validation and 80 for test tasks.
    """
    images = draw_characters(classes, drawings, size, alphabet)
    return FewShotFamily(
        images.reshape(-1, size, size),
        np.repeat(np.arange(classes), drawings),
        ways,
        shots,
        queries=queries,
        test_queries=test_queries,
        name="characters",
        description="few-shot classification of handwritten-like characters",
    )
