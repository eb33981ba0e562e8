"""Networks as pure functions of (parameters, inputs); the interface of models; the MLP.

Parameters are a dict of tensors. If they are stacked over tasks, each leaf has a leading task axis
and inputs are [tasks, samples, ...]; otherwise, inputs are [samples, ...]. Adaptation never
modifies a module.
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
"""Output of a model: parameters of a distribution, [..., samples, size] each."""
State = dict[str, Tensor]
"""State of a recurrent network, [..., samples, *size] each; empty for other networks."""

Activation = Literal["tanh", "relu"]
Part = Literal["head", "upper", "all"]
"""Part of a network: its last layer, the upper layers, all layers."""


class _Tanh(torch.autograd.Function):
    """tanh with NumPy's vectorized kernel, 10 x as fast as torch's on AVX-512 (2.8 to 0.25 ns).

    The derivative, 1 - tanh^2, is a function of the output, so it is differentiable again.
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
            # A batch of one uses another kernel with different last bits, and the number of tasks
            # that are sampled together depends on the number of threads, workers and ranks.
            both = (bias.expand(2, -1).unsqueeze(1), x.expand(2, -1, -1), weight.expand(2, -1, -1))
            return torch.baddbmm(*both)[:1]
        return torch.baddbmm(bias.unsqueeze(1), x, weight)
    return x @ weight + bias


class Model(ABC):
    """Base class of adaptable models: a pure function of parameters and samples."""

    network: Network
    """Network of the model."""

    @property
    def context_dim(self) -> int:
        """Size of the network's context input; 0: none."""
        return self.network.context_dim

    @property
    def recurrent(self) -> bool:
        """Whether an output depends on the earlier samples of its episode."""
        return self.network.recurrent

    @property
    def generated(self) -> tuple[str, ...]:
        """Names of parameters that `start` generates from the support, not meta-learned."""
        return ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, without the generated ones."""
        return self.network.shapes()

    def init(self, rng: np.random.Generator) -> Params:
        """Draw parameters, float32."""
        return self.network.init(rng)

    @abstractmethod
    def output(self, params: Params, samples: Any) -> Dist:
        """Return the model's output for the samples of T tasks, [T, N, size] each."""

    def confined(self, params: Params) -> Params:
        """Return meta-parameters of the same model with nonzero gradients."""
        return params

    def start(self, params: Params, support: Any) -> Params:
        """Return the generated parameters, [T, ...] each, a differentiable function of `params`."""
        return {}

    def adapts(self, name: str, part: Part) -> bool:
        """Whether a parameter belongs to a part: the last layer, the upper layers, all layers."""
        return self.network.adapts(name, part)

    def in_context(self, params: Params, samples: Any) -> Params:
        """Return the parameters with the context of task-conditioned samples."""
        if not self.context_dim or "context" in params:
            return params
        assert samples.context is not None
        return {**params, "context": samples.context}


class Network(ABC):
    """A network for one kind of input, such as observations: maps parameters and inputs to outputs.

    If `context_dim` is not 0, the entry `context` of the parameters, [context_dim] or [tasks,
    context_dim], is an additional input for every sample.
    """

    context_dim: int
    """Size of the context input; 0: none."""

    @property
    def recurrent(self) -> bool:
        """Whether the network has a state. Then it has no `forward`, only `step` and `replay`."""
        return False

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the context."""

    @property
    def input_dtype(self) -> type[np.generic]:
        """Storage type of inputs: float32, or uint8 for images."""
        return np.float32

    @property
    @abstractmethod
    def output_dim(self) -> int:
        """Size of one output."""

    @property
    @abstractmethod
    def activations(self) -> int:
        """Number of stored activations of a forward pass per input."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter."""

    @abstractmethod
    def init(self, rng: np.random.Generator) -> Params:
        """Draw parameters, float32."""

    @abstractmethod
    def forward(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the outputs, [..., samples, output_dim].

        Args:
            params: leaves [...] or [tasks, ...]; some may be stacked and others not.
            x: [samples, *input_shape], or [tasks, samples, *input_shape].
            weight: [..., samples]; an input of weight 0 is excluded from batch statistics.
        """

    def initial_state(self, params: Params, samples: tuple[int, ...]) -> State:
        """Return the state at the start of sequences, [*samples, *size] each."""
        return {}

    def step(self, params: Params, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the outputs of one step of sequences, and the state after it.

        Args:
            params, x: see `forward`.
            state: state before the step.
        """
        return self.forward(params, x), state

    def replay(self, params: Params, x: Tensor, state: State) -> Tensor:
        """Return the outputs of whole sequences, [tasks, sequences x time, output_dim].

        Args:
            x: [tasks, sequences, time, *input_shape].
            state: state before the first step, [tasks, sequences, *size] each.
        """
        outputs = []
        for one in x.unbind(2):
            output, state = self.step(params, one, state)
            outputs.append(output)
        return torch.stack(outputs, dim=2).flatten(1, 2)

    @abstractmethod
    def adapts(self, name: str, part: Part) -> bool:
        """Whether a parameter belongs to a part: the last layer, the upper layers, all layers.

        Raises:
            UserError: the network has no such part.
        """


@dataclass(frozen=True, kw_only=True)
class MLP(Network):
    """An MLP of vectors, or of the features that an encoder computes from images."""

    inputs: tuple[int, ...]
    """Shape of one input."""
    outputs: int
    """Size of one output."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""
    activation: Activation = "tanh"
    """Activation of the hidden layers."""
    context_dim: int = 0
    """Size of the context input; 0: none."""
    output_scale: float = 1.0
    """Factor of the last layer's initial weights."""
    encoder: Encoder | None = None
    """Network before the hidden layers; None: inputs are vectors."""
    images: bool = False
    """Whether inputs are stored as bytes."""

    def __post_init__(self) -> None:
        check_one_of("activation", self.activation, get_args(Activation))

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.inputs

    @property
    def input_dtype(self) -> type[np.generic]:
        return np.uint8 if self.images else np.float32

    @property
    def output_dim(self) -> int:
        return self.outputs

    @property
    def input_dim(self) -> int:
        """Size of the MLP's input, without the context."""
        return math.prod(self.inputs) if self.encoder is None else self.encoder.features

    @property
    def embedding(self) -> int:
        """Size of the last layer's input."""
        return self.hidden[-1] if self.hidden else self.input_dim + self.context_dim

    @property
    def layers(self) -> int:
        """Number of affine layers."""
        return len(self.hidden) + 1

    @property
    def last(self) -> tuple[str, str]:
        """Names of the last layer's parameters."""
        return f"layer{self.layers - 1}.weight", f"layer{self.layers - 1}.bias"

    @property
    def activations(self) -> int:
        images = 0 if self.encoder is None else self.encoder.activations
        return images + self.input_dim + 2 * sum(self.hidden) + self.outputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        sizes = (self.input_dim + self.context_dim, *self.hidden, self.outputs)
        shapes = {} if self.encoder is None else self.encoder.shapes()
        for i in range(self.layers):
            shapes[f"layer{i}.weight"] = (sizes[i], sizes[i + 1])
            shapes[f"layer{i}.bias"] = (sizes[i + 1],)
        return shapes

    def init(self, rng: np.random.Generator) -> Params:
        """Draw Xavier-uniform weights, zero biases; the last weights times `output_scale`."""
        return initial(self.shapes(), rng, {self.last[0]: self.output_scale})

    def embed(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the last layer's inputs, [..., samples, embedding]; see `forward`."""
        if self.encoder is not None:
            x = self.encoder.encode(params, x, weight)
        elif len(self.inputs) > 1:
            x = x.flatten(-len(self.inputs))
        if self.context_dim:
            context = params["context"].unsqueeze(-2).expand(*x.shape[:-1], self.context_dim)
            x = torch.cat([x, context], dim=-1)
        activation = _ACTIVATIONS[self.activation]
        for i in range(self.layers - 1):
            x = activation(affine(x, params[f"layer{i}.weight"], params[f"layer{i}.bias"]))
        return x

    def forward(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weights, bias = self.last
        return affine(self.embed(params, x, weight), params[weights], params[bias])

    def adapts(self, name: str, part: Part) -> bool:
        check_one_of("part", part, get_args(Part))
        if part == "all":
            return True
        number = int(name[5 : name.index(".")]) if name.startswith("layer") else -1
        if part == "head":
            return number == self.layers - 1
        lower = 0 if self.encoder is not None else (self.layers - 1) // 2
        return number >= lower


def initial(
    shapes: Mapping[str, tuple[int, ...]],
    rng: np.random.Generator,
    factors: Mapping[str, float] | None = None,
) -> Params:
    """Draw Xavier-uniform weights (Glorot & Bengio 2010, eq. 16); biases 0, scales 1; float32.

    In a convolution's [out, in, k, k], each of the k x k places counts as an input and an output.

    Args:
        factors: factors of weights, by name.
    """
    params: Params = {}
    for name, shape in shapes.items():
        if name.endswith("weight"):
            bound = math.sqrt(6.0 / (sum(shape[:2]) * math.prod(shape[2:])))
            values = rng.uniform(-bound, bound, shape) * (factors or {}).get(name, 1.0)
        else:
            values = np.full(shape, 1.0 if name.endswith(".scale") else 0.0)
        params[name] = torch.from_numpy(values.astype(np.float32))
    return params


def copied(params: Mapping[str, Tensor]) -> Params:
    """Return copies of parameters that share no memory with them."""
    return {name: p.detach().clone() for name, p in params.items()}


def stack(params: Params, tasks: int) -> Params:
    """Return views of the parameters with a leading task axis, [tasks, ...] each."""
    return {name: p.expand(tasks, *p.shape) for name, p in params.items()}


def flatten(params: Params) -> Tensor:
    """Return all parameters as one vector, in the order of the dict."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """Return a vector in the shapes and order of parameters."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}
