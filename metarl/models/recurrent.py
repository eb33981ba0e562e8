"""Recurrent networks: a GRU and an LSTM as pure functions of (parameters, inputs, state).

The matrix products are batched over the tasks' parameters, as in `networks.MLP`. torch.nn.GRU has
no batching rule, and its kernels on a GPU have no second derivative.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metarl.envs.errors import UserError
from metarl.models.networks import Network, Params, Part, State, affine, initial, tanh


def sigmoid(x: Tensor) -> Tensor:
    """Logistic function, from `tanh`: the same bits at every place of an array."""
    return 0.5 * tanh(0.5 * x) + 0.5


@dataclass(frozen=True, kw_only=True)
class RecurrentNetwork(Network):
    """A recurrent layer of vectors, and a linear output."""

    inputs: int
    """Size of one input, without the context."""
    outputs: int
    units: int = 64
    """Size of the hidden state."""
    context_dim: int = 0
    output_scale: float = 1.0
    """Factor of the output's initial weights."""

    gates: ClassVar[int]
    """Number of gates of the layer, including the candidate."""

    @property
    def recurrent(self) -> bool:
        return True

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.inputs,)

    @property
    def output_dim(self) -> int:
        return self.outputs

    @property
    def activations(self) -> int:
        return self.inputs + (3 * self.gates + 4) * self.units + self.outputs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        inputs, gates = self.inputs + self.context_dim, self.gates * self.units
        return {
            "input.weight": (inputs, gates),
            "input.bias": (gates,),
            "recurrent.weight": (self.units, gates),
            "recurrent.bias": (gates,),
            "output.weight": (self.units, self.outputs),
            "output.bias": (self.outputs,),
        }

    def init(self, rng: np.random.Generator) -> Params:
        """Draw Xavier-uniform weights for each gate, orthogonal recurrent weights, zero biases."""
        shapes = self.shapes()
        params = initial(shapes, rng, {"output.weight": self.output_scale})
        inputs = shapes["input.weight"][0]
        gates = [initial({"weight": (inputs, self.units)}, rng) for _ in range(self.gates)]
        params["input.weight"] = torch.cat([gate["weight"] for gate in gates], dim=1)
        drawn = rng.standard_normal((self.gates, self.units, self.units))
        square = np.hstack([np.linalg.qr(one)[0] for one in drawn])
        params["recurrent.weight"] = torch.from_numpy(square.astype(np.float32))
        return params

    def forward(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        raise TypeError("a recurrent network has no output without its state: use step or replay")

    def step(self, params: Params, x: Tensor, state: State) -> tuple[Tensor, State]:
        hidden, state = self.advance(params, self._projected(params, x), state)
        return affine(hidden, params["output.weight"], params["output.bias"]), state

    def replay(self, params: Params, x: Tensor, state: State) -> Tensor:
        projected = self._projected(params, x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        hidden = []
        for gates in projected.unbind(2):
            now, state = self.advance(params, gates, state)
            hidden.append(now)
        flat = torch.stack(hidden, dim=2).flatten(1, 2)
        return affine(flat, params["output.weight"], params["output.bias"])

    def _projected(self, params: Params, x: Tensor) -> Tensor:
        """Return the inputs' part of the gates, [..., samples, gates]."""
        if self.context_dim:
            context = params["context"].unsqueeze(-2).expand(*x.shape[:-1], self.context_dim)
            x = torch.cat([x, context], dim=-1)
        return affine(x, params["input.weight"], params["input.bias"])

    def _recurrent(self, params: Params, hidden: Tensor) -> Tensor:
        """Return the hidden state's part of the gates, [..., samples, gates]."""
        return affine(hidden, params["recurrent.weight"], params["recurrent.bias"])

    @abstractmethod
    def advance(self, params: Params, gates: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the hidden state after one step, and the whole state.

        Args:
            gates: the inputs' part of the gates, [..., samples, gates * units].
            state: state before the step, [..., samples, units] each.
        """

    def adapts(self, name: str, part: Part) -> bool:
        return part == "all" or name.startswith("output.")


@dataclass(frozen=True, kw_only=True)
class GRU(RecurrentNetwork):
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), as torch.nn.GRU computes it.

    r, z = sigmoid(W x + U h), n = tanh(W_n x + r (U_n h)), h' = n + z (h - n).
    """

    gates: ClassVar[int] = 3

    def initial_state(self, params: Params, samples: tuple[int, ...]) -> State:
        return {"hidden": params["output.weight"].new_zeros(*samples, self.units)}

    def advance(self, params: Params, gates: Tensor, state: State) -> tuple[Tensor, State]:
        hidden = state["hidden"]
        sizes = (2 * self.units, self.units)
        x, x_new = gates.split(sizes, dim=-1)
        h, h_new = self._recurrent(params, hidden).split(sizes, dim=-1)
        reset, update = sigmoid(x + h).chunk(2, dim=-1)
        new = tanh(x_new + reset * h_new)
        hidden = new + update * (hidden - new)
        return hidden, {"hidden": hidden}


@dataclass(frozen=True, kw_only=True)
class LSTM(RecurrentNetwork):
    """Long short-term memory (Hochreiter & Schmidhuber 1997), as torch.nn.LSTM computes it.

    i, f, o = sigmoid(W x + U h), g = tanh(W_g x + U_g h), c' = f c + i g, h' = o tanh(c').
    The bias of f starts at 1 (Jozefowicz et al. 2015).
    """

    gates: ClassVar[int] = 4

    def init(self, rng: np.random.Generator) -> Params:
        params = super().init(rng)
        params["input.bias"][self.units : 2 * self.units] = 1.0
        return params

    def initial_state(self, params: Params, samples: tuple[int, ...]) -> State:
        zeros = params["output.weight"].new_zeros(*samples, self.units)
        return {"hidden": zeros, "cell": zeros}

    def advance(self, params: Params, gates: Tensor, state: State) -> tuple[Tensor, State]:
        total = gates + self._recurrent(params, state["hidden"])
        squashed, candidate = total.split((3 * self.units, self.units), dim=-1)
        enter, keep, leave = sigmoid(squashed).chunk(3, dim=-1)
        cell = keep * state["cell"] + enter * tanh(candidate)
        hidden = leave * tanh(cell)
        return hidden, {"hidden": hidden, "cell": cell}


def flat_state(state: Any, path: str = "state") -> State:
    """Return the tensors of a state by name. The state is a tensor, or a dict or tuple of states.

    Raises:
        TypeError: the state contains something else.
    """
    if isinstance(state, Tensor):
        return {path: state}
    if isinstance(state, dict):
        parts = [(f"{path}.{name}", part) for name, part in state.items()]
    elif isinstance(state, (tuple, list)):
        parts = [(f"{path}.{i}", part) for i, part in enumerate(state)]
    else:
        raise TypeError(f"a state is a tensor, or a dict or tuple of them, got {state!r}")
    return {name: x for where, part in parts for name, x in flat_state(part, where).items()}


def nested_state(like: Any, state: State, path: str = "state") -> Any:
    """Return the state of `flat_state` in the structure of another one."""
    if isinstance(like, dict):
        return {name: nested_state(part, state, f"{path}.{name}") for name, part in like.items()}
    if isinstance(like, (tuple, list)):
        parts = [nested_state(part, state, f"{path}.{i}") for i, part in enumerate(like)]
        return tuple(parts) if isinstance(like, tuple) else parts
    return state[path]


class StateModule(nn.Module):
    """The initial state of a user's recurrent module, as a forward pass."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, samples: int) -> Any:
        return self.module.initial_state(samples)


def first_state(module: Any, samples: int) -> tuple[Any, ...]:
    """Return the initial state of a user's module as additional arguments: one, or none."""
    return (module.initial_state(samples),) if hasattr(module, "initial_state") else ()


def checked_output(label: str, found: Any, start: Any, samples: int) -> tuple[Any, Any]:
    """Return the output of a user's recurrent module, and the structure of its state.

    Args:
        label: name of the module, for messages.
        found: result of its forward pass.
        start: its initial state.

    Raises:
        UserError: the result is not an output and a state, or the state changes its structure.
    """
    said = f"policy.network {label}"
    if not (isinstance(found, tuple) and len(found) == 2):
        raise UserError(
            f"{said} has initial_state, so forward must return an output and a state, got"
            f" {type(found).__name__}"
        )
    shapes = []
    for state in (start, found[1]):
        try:
            shapes.append({name: list(x.shape) for name, x in flat_state(state).items()})
        except TypeError as error:
            raise UserError(f"{said}: {error}") from error
    if shapes[0] != shapes[1] or any(shape[:1] != [samples] for shape in shapes[0].values()):
        raise UserError(
            f"{said}: initial_state({samples}) and forward must return states of the same"
            f" shapes, [{samples}, ...] each, got {shapes[0]} and {shapes[1]}"
        )
    return found[0], nested_state(start, flat_state(start))
