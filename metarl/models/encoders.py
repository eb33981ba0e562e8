"""Convolutional encoders of image observations to feature vectors, as pure functions of parameters.

As in `policies`, each parameter leaf may be stacked over tasks or not. A convolution with weights
per task runs task by task. On a CPU, this is faster than a grouped convolution, in the forward pass
and in both derivatives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from metarl.envs.errors import UserError
from metarl.envs.policy_spaces import LEAST_IMAGE, image_size


def channels_first(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return images [..., *shape] of bytes as [..., C, H, W], scaled to [0, 1].

    Floating-point images keep their type and values.
    """
    x = image if image.is_floating_point() else image.to(torch.get_default_dtype())
    return _planes(x, shape) / 255.0


def _planes(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return images [..., *shape] as [..., C, H, W]."""
    if len(shape) == 2:
        return image.unsqueeze(-3)
    if image_size(shape)[0] != shape[0] or shape[0] == shape[-1]:
        return image.movedim(-1, -3)
    return image


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int = 0) -> Tensor:
    """Cross-correlation of images [samples, C, H, W] or [tasks, samples, C, H, W].

    Args:
        weight: [out, C, k, k] or [tasks, out, C, k, k].
        bias: [out] or [tasks, out]
    """
    if weight.dim() == 5:
        parts = zip(x, weight, bias, strict=True)
        return torch.stack([functional.conv2d(a, w, b, stride, padding) for a, w, b in parts])
    y = functional.conv2d(x.flatten(0, -4), weight, bias, stride, padding)
    return y.unflatten(0, x.shape[:-3])


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Encoder(ABC):
    """Convolutional network that maps an image to a vector of `features` numbers."""

    shape: tuple[int, ...]
    """Shape of one image, see `image_size`."""

    least: ClassVar[int]
    """Minimum height and width of an image, in pixels."""

    def __post_init__(self) -> None:
        if min(image_size(self.shape)[1:]) < self.least:
            raise UserError(
                f"images of {list(self.shape)} are too small for this network, which needs"
                f" {self.least} pixels per side: use --policy.network impala, or flatten them"
                " (gym.wrappers.FlattenObservation)"
            )

    @property
    @abstractmethod
    def features(self) -> int:
        """Size of the feature vector."""

    @property
    @abstractmethod
    def activations(self) -> int:
        """Number of activations in a forward pass of one image."""

    @abstractmethod
    def shapes(self) -> Shapes:
        """Return the shape of each parameter."""

    @abstractmethod
    def encode(
        self, params: dict[str, Tensor], image: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Return the features of images [..., samples, *shape], [..., samples, features].

        Args:
            weight: [..., samples]; images of weight 0 are excluded from batch statistics.
        """


def _convolution(name: str, outputs: int, inputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride


@dataclass(frozen=True)
class NatureCNN(Encoder):
    """Three convolutions with ReLU (Mnih et al. 2015, doi:10.1038/nature14236)."""

    least: ClassVar[int] = 36

    @property
    def features(self) -> int:
        return self._sizes()[-1]

    @property
    def activations(self) -> int:
        return math.prod(self.shape) + 2 * sum(self._sizes())

    def _sizes(self) -> list[int]:
        """Number of outputs of each convolution."""
        _, height, width = image_size(self.shape)
        sizes = []
        for channels, kernel, stride in NATURE:
            height, width = ((size - kernel) // stride + 1 for size in (height, width))
            sizes.append(channels * height * width)
        return sizes

    def shapes(self) -> Shapes:
        shapes, inputs = {}, image_size(self.shape)[0]
        for i, (outputs, kernel, _) in enumerate(NATURE):
            shapes |= _convolution(f"conv{i}", outputs, inputs, kernel)
            inputs = outputs
        return shapes

    def encode(
        self, params: dict[str, Tensor], image: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        x = channels_first(image, self.shape)
        for i, (_, _, stride) in enumerate(NATURE):
            x = convolve(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride).relu()
        return x.flatten(-3)


_IMPALA = (16, 32)  # channels of each stage


@dataclass(frozen=True)
class SmallImpala(Encoder):
    """Stages of a convolution, 3x3 max pooling with stride 2, and a residual block.

    The residual network of Espeholt et al. 2018 (fig. 3, arXiv:1802.01561), with two stages of one
    block each instead of three stages of two.
    """

    least: ClassVar[int] = LEAST_IMAGE

    @property
    def features(self) -> int:
        return self._sizes()[-1][1]

    @property
    def activations(self) -> int:
        return math.prod(self.shape) + sum(before + 6 * after for before, after in self._sizes())

    def _sizes(self) -> list[tuple[int, int]]:
        """Number of activations of each stage before and after its max pooling."""
        _, height, width = image_size(self.shape)
        sizes = []
        for channels in _IMPALA:
            before = channels * height * width
            height, width = (height + 1) // 2, (width + 1) // 2
            sizes.append((before, channels * height * width))
        return sizes

    def shapes(self) -> Shapes:
        shapes, inputs = {}, image_size(self.shape)[0]
        for i, outputs in enumerate(_IMPALA):
            shapes |= _convolution(f"stage{i}", outputs, inputs, 3)
            for j in range(2):
                shapes |= _convolution(f"stage{i}.residual{j}", outputs, outputs, 3)
            inputs = outputs
        return shapes

    def encode(
        self, params: dict[str, Tensor], image: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        def layer(x: Tensor, name: str) -> Tensor:
            return convolve(x, params[f"{name}.weight"], params[f"{name}.bias"], 1, padding=1)

        x = channels_first(image, self.shape)
        for i in range(len(_IMPALA)):
            x = layer(x, f"stage{i}")
            pooled = functional.max_pool2d(x.flatten(0, -4), 3, stride=2, padding=1)
            x = pooled.unflatten(0, x.shape[:-3])
            y = layer(x.relu(), f"stage{i}.residual0")
            x = x + layer(y.relu(), f"stage{i}.residual1")
        return x.relu().flatten(-3)


@dataclass(frozen=True)
class FourBlocks(Encoder):
    """Four blocks: 3x3 convolution, batch normalization, ReLU, 2x2 max pooling.

    The embedding of few-shot classification (Vinyals et al. 2016, arXiv:1606.04080; Finn et al.
    2017). Means and variances are computed per task from the batch itself, both in training and in
    evaluation. The papers use no running statistics. Images are not rescaled.
    """

    filters: int = 64

    least: ClassVar[int] = 8
    blocks: ClassVar[int] = 4

    @property
    def features(self) -> int:
        return self._sizes()[-1][1]

    @property
    def activations(self) -> int:
        return math.prod(self.shape) + sum(3 * before + after for before, after in self._sizes())

    def _sizes(self) -> list[tuple[int, int]]:
        """Number of activations of each block before and after its max pooling."""
        _, height, width = image_size(self.shape)
        sizes = []
        for _ in range(self.blocks):
            before = self.filters * height * width
            if min(height, width) > 1:
                height, width = height // 2, width // 2
            sizes.append((before, self.filters * height * width))
        return sizes

    def shapes(self) -> Shapes:
        shapes, inputs = {}, image_size(self.shape)[0]
        for i in range(self.blocks):
            shapes |= _convolution(f"block{i}", self.filters, inputs, 3)
            shapes[f"block{i}.scale"] = shapes[f"block{i}.shift"] = (self.filters,)
            inputs = self.filters
        return shapes

    def encode(
        self, params: dict[str, Tensor], image: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        x = _planes(image, self.shape)
        for i in range(self.blocks):
            x = convolve(x, params[f"block{i}.weight"], params[f"block{i}.bias"], 1, padding=1)
            x = normalize_batch(x, params[f"block{i}.scale"], params[f"block{i}.shift"], weight)
            x = x.relu()
            if min(x.shape[-2:]) > 1:
                x = functional.max_pool2d(x.flatten(0, -4), 2).unflatten(0, x.shape[:-3])
        return x.flatten(-3)


def normalize_batch(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) with statistics of the batch.

    Args:
        x: [..., samples, C, H, W]; each of the leading axes is a separate batch.
        scale: [C] or [tasks, C].
        shift: [C] or [tasks, C].
        weight: [..., samples]; samples of weight 0 are excluded.
    """
    axes = (-4, -2, -1)
    if weight is None or bool((weight > 0).all()):
        mean = x.mean(axes, keepdim=True)
        var = (x - mean).square().mean(axes, keepdim=True)
    else:
        share = (weight > 0).to(x.dtype)
        share = (share / share.sum(-1, keepdim=True).clamp(min=1.0))[..., None, None, None]
        share = share / (x.shape[-2] * x.shape[-1])
        mean = (share * x).sum(axes, keepdim=True)
        var = (share * (x - mean).square()).sum(axes, keepdim=True)
    factor = (var + 1e-5).rsqrt() * scale[..., None, :, None, None]
    return (x - mean) * factor + shift[..., None, :, None, None]
