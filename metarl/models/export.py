"""Policy as an ordinary `torch.nn.Module`, for use in other programs.

It returns the most likely action. It includes normalization of observations and the mapping of
actions to environment actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from metarl.models.distributions import Gaussian
from metarl.models.encoders import NATURE, Encoder, NatureCNN, channels_first
from metarl.models.inputs import Inputs
from metarl.models.modules import ModuleNetwork
from metarl.models.networks import MLP, Params
from metarl.models.policies import CLIP, PolicyModel
from metarl.models.recurrent import LSTM, RecurrentNetwork, flat_state, nested_state


class Pixels(nn.Module):
    """Convert images of bytes to [n, channels, height, width] in [0, 1]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(x.to(torch.float32), self.shape)


class Scale(nn.Module):
    """Normalize observations by their running mean and variance."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", (var + 1e-8).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.deviation).clamp(-CLIP, CLIP)


class Told(nn.Module):
    """Append the policy's observation of its task to every observation."""

    context: Tensor

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.register_buffer("context", context.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.context.expand(x.shape[0], -1)], dim=1)


class Residual(nn.Module):
    """x + path(x)."""

    def __init__(self, *path: nn.Module) -> None:
        super().__init__()
        self.path = nn.Sequential(*path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x)


class Bounded(nn.Module):
    """middle + spread * x, clipped to the bounds of a Box; rounded for integers, as a float."""

    middle: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, low: NDArray, high: NDArray, middle: ArrayLike = 0.0, spread: ArrayLike = 1.0
    ) -> None:
        super().__init__()
        self.whole = np.issubdtype(low.dtype, np.integer)
        parts = {"middle": middle, "spread": spread, "low": low, "high": high}
        for name, values in parts.items():
            self.register_buffer(name, torch.from_numpy(np.asarray(values, np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        action = self.middle + self.spread * x
        if self.whole:
            action = torch.round(action)
        return torch.minimum(torch.maximum(action, self.low), self.high)


class Chosen(nn.Module):
    """Categories as integers that count from `start`; [n], or [n, components]."""

    def __init__(self, start: Sequence[int], flat: bool) -> None:
        super().__init__()
        self.start, self.flat = list(start), flat

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.long() + torch.tensor(self.start)
        return chosen[:, 0] if self.flat else chosen


class Mode(nn.Module):
    """Most likely action of a network's output."""

    def __init__(self, policy: PolicyModel, params: Params) -> None:
        super().__init__()
        self.distribution = policy.distribution
        self.free = {name: params[name].detach().clone() for name in self.distribution.free()}

    def forward(self, x: Tensor) -> Tensor:
        return self.distribution.mode(self.distribution.parameters(x, self.free))


class Components(nn.Module):
    """Split observations into the components of a Dict or Tuple for a user's module."""

    context: Tensor | None

    def __init__(self, inputs: Inputs, context: Tensor | None) -> None:
        super().__init__()
        self.inputs = inputs
        self.register_buffer("context", None if context is None else context.clone())

    def forward(self, x: Tensor) -> Any:
        return self.inputs.split(x, self.context)


class Cell(nn.Module):
    """A built-in recurrent network: inputs and a state to outputs and the next state."""

    def __init__(self, network: RecurrentNetwork, params: Params) -> None:
        super().__init__()
        self.long = isinstance(network, LSTM)
        self.input, self.recurrent, self.output = (
            _linear(params, name) for name in ("input", "recurrent", "output")
        )

    def forward(self, x: Tensor, hidden: Tensor, *cell: Tensor) -> tuple[Tensor, ...]:
        x, h = self.input(x), self.recurrent(hidden)
        if self.long:
            enter, keep, leave, new = (x + h).chunk(4, dim=-1)
            kept = torch.sigmoid(keep) * cell[0] + torch.sigmoid(enter) * torch.tanh(new)
            hidden = torch.sigmoid(leave) * torch.tanh(kept)
            return self.output(hidden), hidden, kept
        (x_reset, x_update, x_new), (h_reset, h_update, h_new) = x.chunk(3, -1), h.chunk(3, -1)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
        hidden = new + torch.sigmoid(x_update + h_update) * (hidden - new)
        return self.output(hidden), hidden


class OwnCell(nn.Module):
    """A user's recurrent module, with the tensors of its state as arguments and results."""

    def __init__(self, network: ModuleNetwork, params: Params) -> None:
        super().__init__()
        self.module, self.like = network.module(params), network.state_like
        self.names = list(network.initial_state(params, (1,)))

    def forward(self, x: Any, *state: Tensor) -> tuple[Tensor, ...]:
        before = nested_state(self.like, dict(zip(self.names, state, strict=True)))
        output, after = self.module(x, before)
        return (output, *flat_state(after).values())


class WithState(nn.Module):
    """A recurrent policy: observations and the tensors of a state to actions and the next state."""

    def __init__(self, first: list[nn.Module], cell: nn.Module, last: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Sequential(*first), cell, nn.Sequential(*last)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        output, *after = self.cell(self.first(x), *state)
        return (self.last(output), *after)


_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def make_module(policy: PolicyModel, params: Params, *last: nn.Module) -> nn.Module:
    """Return a policy's network as a module, observations [n, *observation_shape] to actions.

    The module of a recurrent policy also maps the tensors of a state to the next ones.

    Args:
        params: parameters, not stacked.
        last: layers that map the network's output to actions: `Bounded` or `Chosen`, after a
            `Mode`.
    """
    layers: list[nn.Module] = []
    if policy.normalize:
        layers.append(Scale(params["norm.mean"], params["norm.var"]))
    network, mode = policy.network, []
    if type(policy.distribution) is not Gaussian:
        mode = [Mode(policy, params)]
    if isinstance(network, ModuleNetwork):
        layers.append(Components(network.inputs, params.get("context")))
        if network.recurrent:
            return WithState(layers, OwnCell(network, params), [*mode, *last]).eval()
        layers.append(network.module(params))
    elif isinstance(network, RecurrentNetwork):
        if network.context_dim:
            layers.append(Told(params["context"]))
        return WithState(layers, Cell(network, params), [*mode, *last]).eval()
    else:
        assert isinstance(network, MLP)
        layers += _layers(network, params)
    return nn.Sequential(*layers, *mode, *last).eval()


def _layers(network: MLP, params: Params) -> list[nn.Module]:
    layers: list[nn.Module] = []
    if network.encoder is not None:
        layers += [Pixels(network.encoder.shape), *_encoder(network.encoder, params), nn.Flatten()]
    if network.context_dim:
        layers.append(Told(params["context"]))
    for i in range(network.layers):
        layers.append(_linear(params, f"layer{i}"))
        if i < network.layers - 1:
            layers.append(_ACTIVATIONS[network.activation]())
    return layers


def _encoder(encoder: Encoder, params: Params) -> list[nn.Module]:
    if isinstance(encoder, NatureCNN):
        pairs = [
            (_conv(params, f"conv{i}", stride), nn.ReLU())
            for i, (_, _, stride) in enumerate(NATURE)
        ]
        return [layer for pair in pairs for layer in pair]
    layers: list[nn.Module] = []
    stage = 0
    while f"stage{stage}.weight" in params:
        first, second = (_conv(params, f"stage{stage}.residual{j}", 1, 1) for j in range(2))
        layers += [
            _conv(params, f"stage{stage}", 1, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
            Residual(nn.ReLU(), first, nn.ReLU(), second),
        ]
        stage += 1
    return [*layers, nn.ReLU()]


def _conv(params: Params, name: str, stride: int, padding: int = 0) -> nn.Conv2d:
    outputs, inputs, kernel, _ = params[f"{name}.weight"].shape
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    layer.load_state_dict({"weight": params[f"{name}.weight"], "bias": params[f"{name}.bias"]})
    return layer


def _linear(params: Params, name: str) -> nn.Linear:
    inputs, outputs = params[f"{name}.weight"].shape
    layer = nn.Linear(inputs, outputs)
    layer.load_state_dict({"weight": params[f"{name}.weight"].T, "bias": params[f"{name}.bias"]})
    return layer
