"""Models: outputs as pure functions of (parameters, samples); and the network inside them, an MLP.

Parameters are a dict of tensors. Stacked over tasks, each leaf has a leading task axis and inputs
are [tasks, samples, ...]; without it, [samples, ...]. Nothing is ever swapped into a module to
adapt it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from metarl.envs.errors import check_one_of
from metarl.models.encoders import Encoder

Params = dict[str, Tensor]
Dist = dict[str, Tensor]
"""What a model gives: parameters of a distribution, [..., samples, size] each."""

Activation = Literal["tanh", "relu"]
Part = Literal["head", "upper", "all"]
"""Of a network: its last layer, the upper layers, all layers."""


class _Tanh(torch.autograd.Function):
    """tanh by NumPy's vectorised kernel, ten times as fast as torch's on AVX-512 (2.8 to 0.25 ns).

    The derivative, 1 - tanh^2, is a function of the output and so differentiable again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grads[0], y)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, differentiable any number of times."""
    if x.device.type != "cpu":
        return torch.tanh(x)
    if torch.is_inference_mode_enabled():  # sampling: a third of the time
        return torch.from_numpy(np.tanh(x.numpy()))
    return _Tanh.apply(x)  # type: ignore[return-value]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": tanh, "relu": torch.relu}


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b; x is [samples, in] or [tasks, samples, in], W [in, out] or [tasks, in, out]."""
    if weight.dim() == 3:
        if len(weight) == 1 and torch.is_inference_mode_enabled():
            # A batch of one takes another kernel, whose last bits differ; and how many tasks are
            # sampled together depends on the number of threads, workers and ranks.
            both = (bias.expand(2, -1).unsqueeze(1), x.expand(2, -1, -1), weight.expand(2, -1, -1))
            return torch.baddbmm(*both)[:1]
        return torch.baddbmm(bias.unsqueeze(1), x, weight)
    return x @ weight + bias


class Model(ABC):
    """What adapts: a pure function of parameters and samples."""

    context_dim: int
    """Size of an input beside the samples, the entry `context` of the parameters; 0: none."""

    @property
    def generated(self) -> tuple[str, ...]:
        """Names of parameters that are no meta-parameters: `start` makes them of the support."""
        return ()

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, the generated ones left out."""

    @abstractmethod
    def init(self, rng: np.random.Generator) -> Params:
        """Draw parameters, float32."""

    @abstractmethod
    def output(self, params: Params, samples: Any) -> Dist:
        """Return what the model gives for the samples of T tasks, [T, N, size] each."""

    def confined(self, params: Params) -> Params:
        """Return meta-parameters that give the same model, and from where gradients lead on."""
        return params

    def start(self, params: Params, support: Any) -> Params:
        """Return the generated parameters, [T, ...] each, a differentiable function of `params`."""
        return {}

    @abstractmethod
    def adapts(self, name: str, part: Part) -> bool:
        """Whether a parameter belongs to a part: the last layer, the upper layers, all layers."""


@dataclass(frozen=True, kw_only=True)
class MLP(Model):
    """An MLP of vectors, or of what an encoder makes of images.

    With a `context_dim`, an entry `context` of the parameters, [context_dim] or
    [tasks, context_dim], is a further input at every sample.
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    context_dim: int = 0
    output_scale: float = 1.0
    """Factor of the last layer's initial weights."""
    encoder: Encoder | None = None

    def __post_init__(self) -> None:
        check_one_of("activation", self.activation, get_args(Activation))

    @property
    @abstractmethod
    def input_dim(self) -> int:
        """Size of what the MLP reads: the encoder's features, where there is one."""

    @property
    @abstractmethod
    def output_dim(self) -> int:
        """Size of the network's output."""

    @property
    def layers(self) -> int:
        """Number of affine layers."""
        return len(self.hidden) + 1

    @property
    def activations(self) -> int:
        """Numbers that a forward pass makes of one input."""
        images = 0 if self.encoder is None else self.encoder.activations
        return images + self.input_dim + 2 * sum(self.hidden) + self.output_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        sizes = (self.input_dim + self.context_dim, *self.hidden, self.output_dim)
        shapes = {} if self.encoder is None else self.encoder.shapes()
        for i in range(self.layers):
            shapes[f"layer{i}.weight"] = (sizes[i], sizes[i + 1])
            shapes[f"layer{i}.bias"] = (sizes[i + 1],)
        return shapes

    def init(self, rng: np.random.Generator) -> Params:
        """Draw Xavier-uniform weights (Glorot & Bengio 2010, eq. 16), zero biases; float32.

        Of a convolution's [out, in, k, k] each of the k x k places is an input and an output. Those
        of the last layer are multiplied by `output_scale`.
        """
        last = f"layer{self.layers - 1}.weight"
        params: Params = {}
        for name, shape in self.shapes().items():
            if name.endswith("weight"):
                bound = math.sqrt(6.0 / (sum(shape[:2]) * math.prod(shape[2:])))
                values = rng.uniform(-bound, bound, shape)
                values *= self.output_scale if name == last else 1.0
            else:
                values = np.full(shape, self.initial(name))
            params[name] = torch.from_numpy(values.astype(np.float32))
        return params

    def initial(self, name: str) -> float:
        """Return what a parameter other than a weight starts from."""
        return 1.0 if name.endswith(".scale") else 0.0

    def features(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return what the MLP reads of inputs, [..., samples, input_dim]."""
        return x if self.encoder is None else self.encoder.encode(params, x, weight)

    def embed(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return what the last layer reads of inputs, [..., samples, size].

        Args:
            params: leaves [...] or [tasks, ...]; some may be stacked and others not.
            x: [samples, ...], or [tasks, samples, ...].
            weight: [..., samples]; an input of weight 0 counts in no statistics of a batch.
        """
        x = self.features(params, x, weight)
        if self.context_dim:
            context = params["context"].unsqueeze(-2).expand(*x.shape[:-1], self.context_dim)
            x = torch.cat([x, context], dim=-1)
        activation = _ACTIVATIONS[self.activation]
        for i in range(self.layers - 1):
            x = activation(affine(x, params[f"layer{i}.weight"], params[f"layer{i}.bias"]))
        return x

    def forward(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the network's output, [..., samples, output_dim]; see `embed`."""
        last = f"layer{self.layers - 1}"
        x = self.embed(params, x, weight)
        return affine(x, params[f"{last}.weight"], params[f"{last}.bias"])

    def adapts(self, name: str, part: Part) -> bool:
        check_one_of("part", part, get_args(Part))
        if part == "all":
            return True
        number = int(name[5 : name.index(".")]) if name.startswith("layer") else -1
        if part == "head":
            return number == self.layers - 1
        lower = 0 if self.encoder is not None else (self.layers - 1) // 2
        return number >= lower


def copied(params: Mapping[str, Tensor]) -> Params:
    """Return parameters of the same values that share no memory with others."""
    return {name: p.detach().clone() for name, p in params.items()}


def stack(params: Params, tasks: int) -> Params:
    """Return views of the parameters with a leading task axis, [tasks, ...] each."""
    return {name: p.expand(tasks, *p.shape) for name, p in params.items()}


def flatten(params: Params) -> Tensor:
    """Return all parameters as one vector, in the order of the dict."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """Return a vector in the shapes (and order) of parameters."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}
