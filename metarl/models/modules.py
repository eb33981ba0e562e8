"""Users' networks: any `torch.nn.Module` as a pure function of its parameters.

A module is called for one task at a time, with plain batches [samples, ...]. Results therefore do
not depend on the number of tasks that are computed together.

A module with a method `initial_state` is recurrent. `initial_state(samples)` returns the state at
the start of episodes: a tensor [samples, ...], or a dict or tuple of them. The forward pass maps
inputs and a state to outputs and the next state.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarl.envs import guard
from metarl.envs.errors import UserError
from metarl.models.inputs import Inputs
from metarl.models.networks import Network, Params, Part, State
from metarl.models.recurrent import (
    StateModule,
    checked_output,
    first_state,
    flat_state,
    nested_state,
)

Factory = Callable[[gym.Space, int], nn.Module]
"""(space of the inputs, size of the output) -> module; also a class of modules."""

PREFIX = "network."
"""Prefix of the names of a module's parameters."""

_TRIED = 2  # number of inputs in a test call of a module


class ModuleNetwork(Network):
    """A `torch.nn.Module` that reads inputs [samples, ...] and returns [samples, outputs].

    A recurrent module, see above, also reads and returns its state, structured like `state_like`.
    The module is used as the factory returns it, in training mode. Its buffers are constants. The
    submodule `head`, if it exists, is the last layer for algorithms that adapt only the last layer.
    Inputs of a Dict or Tuple are passed unflattened, with one tensor for each component. A context
    input is appended to a vector; it is the last component of a Tuple, and `context` in a Dict.

    Args:
        factory: factory of the module.
        label: name of the module, for messages.
        space: space of the inputs as the environment returns them.
        outputs: size of the output.
        context_dim: size of a context input.

    Raises:
        UserError: the module cannot be created, or is not such a function.
    """

    def __init__(
        self, factory: Factory, label: str, space: gym.Space, outputs: int, context_dim: int = 0
    ) -> None:
        self.factory, self.label, self.space = factory, label, space
        self.context_dim = context_dim
        self._outputs = outputs
        self.inputs = Inputs(space, context_dim, label)
        self._template = self._make(np.random.default_rng(0))
        parameters = dict(self._template.named_parameters())
        self._shapes = {PREFIX + name: tuple(p.shape) for name, p in parameters.items()}
        self._frozen = {PREFIX + name for name, p in parameters.items() if not p.requires_grad}
        self._local = threading.local()
        self.state_like: Any = None
        self._check_layers()
        self._check_buffers()
        self._activations = self._tried()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ModuleNetwork)
            and (self.factory, self.label, self._outputs, self.context_dim)
            == (other.factory, other.label, other._outputs, other.context_dim)
            and self.space == other.space
        )

    def __hash__(self) -> int:
        return hash((self.label, self._outputs, self.context_dim))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.inputs.shape

    @property
    def input_dtype(self) -> type[np.generic]:
        return np.uint8 if self.inputs.images else np.float32

    @property
    def output_dim(self) -> int:
        return self._outputs

    @property
    def activations(self) -> int:
        return self._activations

    @property
    def recurrent(self) -> bool:
        return hasattr(self._template, "initial_state")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def init(self, rng: np.random.Generator) -> Params:
        """Return the parameters of a new module, whose torch generator is seeded from `rng`."""
        made = self._make(rng)
        return {
            PREFIX + name: p.detach().to(torch.float32).clone()
            for name, p in made.named_parameters()
        }

    def forward(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        if self.recurrent:
            raise TypeError("a recurrent module has no output without its state: use step")
        own, context = self._own(params)
        if x.dim() == len(self.input_shape) + 1:
            return self._call(own, self.inputs.split(x, context))
        if weight is not None:
            weight = weight.expand(x.shape[: x.dim() - len(self.input_shape)])
        outputs = []
        for task, inputs in enumerate(x):
            one, known = self._of_task(own, context, task)
            valid = None if weight is None or bool((weight[task] > 0).all()) else weight[task] > 0
            if valid is not None:
                inputs = inputs[valid]
            found = self._call(one, self.inputs.split(inputs, known))
            if valid is not None:
                found = found.new_zeros(len(valid), self._outputs).index_put((valid,), found)
            outputs.append(found)
        return torch.stack(outputs)

    def _own(self, params: Params) -> tuple[Params, Tensor | None]:
        """Return the module's own parameters and its context input."""
        own = {n: params[n].detach() if n in self._frozen else params[n] for n in self._shapes}
        return own, params.get("context") if self.context_dim else None

    def _of_task(
        self, own: Params, context: Tensor | None, task: int
    ) -> tuple[Params, Tensor | None]:
        """Return the parameters and the context of one task."""
        stacked = {name for name, p in own.items() if p.dim() > len(self._shapes[name])}
        one = {name: p[task] if name in stacked else p for name, p in own.items()}
        return one, context if context is None or context.dim() == 1 else context[task]

    def initial_state(self, params: Params, samples: tuple[int, ...]) -> State:
        if not self.recurrent:
            return {}
        own, _ = self._own(params)
        if len(samples) == 1:
            return flat_state(self._call(own, samples[0], start=True))
        tasks = range(samples[0])
        each = [self.initial_state(self._of_task(own, None, t)[0], samples[1:]) for t in tasks]
        return {name: torch.stack([state[name] for state in each]) for name in each[0]}

    def step(self, params: Params, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.recurrent:
            return self.forward(params, x), state
        own, context = self._own(params)
        if x.dim() == len(self.input_shape) + 1:
            inputs = self.inputs.split(x, context)
            output, new = self._call(own, inputs, nested_state(self.state_like, state))
            return output, flat_state(new)
        outputs, states = [], []
        for task, inputs in enumerate(x):
            one, known = self._of_task(own, context, task)
            before = nested_state(self.state_like, {name: s[task] for name, s in state.items()})
            output, new = self._call(one, self.inputs.split(inputs, known), before)
            outputs.append(output)
            states.append(flat_state(new))
        return torch.stack(outputs), {n: torch.stack([s[n] for s in states]) for n in states[0]}

    def adapts(self, name: str, part: Part) -> bool:
        if part == "upper":
            raise UserError(
                f"policy.network {self.label} has no known upper layers: use an algorithm"
                " that adapts all parameters, such as maml-trpo"
            )
        if part == "head" and not hasattr(self._template, "head"):
            raise UserError(
                f"policy.network {self.label} must name its last layer head for an algorithm that"
                " adapts only the last layer: self.head = torch.nn.Linear(...)"
            )
        own = name.removeprefix(PREFIX)
        inside = part == "all" or own == "head" or own.startswith("head.")
        return name not in self._frozen and inside

    def module(self, params: Params) -> nn.Module:
        """Return a module of the given parameters, [...] each."""
        made = self._copy()
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(params[PREFIX + name])
        return made

    def _make(self, rng: np.random.Generator) -> nn.Module:
        with _apart(), guard.user_code():
            torch.manual_seed(int(rng.integers(2**63 - 1)))
            try:
                made = self.factory(self.inputs.given, self._outputs)
                if isinstance(made, nn.Module) and any(map(is_lazy, made.parameters())):
                    made(self._example(_TRIED), *first_state(made, _TRIED))
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"policy.network {self.label} cannot be created for {self.inputs.given} and"
                    f" {self._outputs} outputs: {type(error).__name__}: {error}"
                ) from error
        if not isinstance(made, nn.Module):
            raise UserError(
                f"policy.network {self.label} must return a torch.nn.Module, got"
                f" {type(made).__name__}"
            )
        if isinstance(made, torch.jit.ScriptModule) or hasattr(made, "_orig_mod"):
            raise UserError(
                f"policy.network {self.label} is a compiled module, which has no second derivative:"
                " give the module itself"
            )
        if not any(p.requires_grad for p in made.parameters()):
            raise UserError(f"policy.network {self.label} has no parameters to learn")
        return made.to(torch.float32)

    def _copy(self) -> nn.Module:
        """Return a copy of the template. Its tensors can be used with and without gradients."""
        try:
            with torch.inference_mode(False):
                return copy.deepcopy(self._template)
        except RuntimeError as error:  # tensors of the graph, as torch's old weight_norm keeps them
            raise UserError(
                f"policy.network {self.label} cannot be copied: {error}; take"
                " torch.nn.utils.parametrizations"
            ) from error

    def _example(self, count: int) -> Any:
        context = torch.zeros(self.context_dim) if self.context_dim else None
        return self.inputs.split(self.inputs.example(count), context)

    def _check_layers(self) -> None:
        """Refuse layers whose output is random or depends on earlier calls."""
        for name, layer in self._template.named_modules():
            where = f"policy.network {self.label}: {name} is {layer}"
            if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0.0:
                raise UserError(f"{where}: sampling and learning would differ; remove it")
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats:
                raise UserError(
                    f"{where}: with running statistics, sampling and learning would differ; use"
                    " LayerNorm or GroupNorm"
                )

    def _check_buffers(self) -> None:
        """Refuse random buffers, because checkpoints would not contain them."""
        other = dict(self._make(np.random.default_rng(1)).named_buffers())
        for name, buffer in self._template.named_buffers():
            if name not in other or not torch.equal(buffer, other[name]):
                raise UserError(
                    f"policy.network {self.label}: buffer {name} is random: make it a parameter"
                    " with requires_grad=False, which checkpoints contain"
                )

    def _tried(self) -> int:
        """Return how many numbers a forward pass keeps for one input.

        Raises:
            UserError: the output depends on more than one sample and the parameters.
        """
        kept = [math.prod(self.input_shape)]

        def count(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kept.append(output.numel() // _TRIED)

        module = self._copy()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # a layer that starts at zero would hide what is below it
            for p in module.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=generator))
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        hooks = [layer.register_forward_hook(count) for layer in module.modules()]
        found = self._output_of(module, self.inputs.example(_TRIED))
        for hook in hooks:
            hook.remove()
        if not any(isinstance(x, nn.modules.batchnorm._BatchNorm) for x in module.modules()):
            self._output_of(module, self.inputs.example(1))
        again = self._output_of(module, self.inputs.example(_TRIED))
        if not torch.allclose(found, again, rtol=1e-4, atol=1e-5):
            raise UserError(
                f"policy.network {self.label} gives two outputs for one input: it must depend on"
                " nothing but its input and its parameters"
            )
        for name, buffer in module.named_buffers():
            if not torch.equal(buffer, before[name]):
                raise UserError(
                    f"policy.network {self.label} changes its buffer {name}: a buffer must be a"
                    " constant"
                )
        return sum(kept)

    def _output_of(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the output for inputs, once it is seen to be one that can be learned."""
        given = x.clone()
        context = torch.zeros(self.context_dim, requires_grad=True) if self.context_dim else None
        try:
            with _apart(), torch.enable_grad(), guard.user_code():
                start = first_state(module, len(x))
                found = module(self.inputs.split(given, context), *start)
                if start:
                    found, self.state_like = checked_output(self.label, found, start[0], len(x))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"policy.network {self.label} cannot read inputs of {self.inputs.given}:"
                f" {type(error).__name__}: {error}"
            ) from error
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != [len(x), self._outputs]:
            raise UserError(
                f"policy.network {self.label} must return [samples, {self._outputs}], got {shape}"
                f" for {len(x)} samples"
            )
        if not torch.equal(x, given):
            raise UserError(f"policy.network {self.label} changes its input in place")
        groups = {"its parameters": [p for p in module.parameters() if p.requires_grad]}
        if context is not None:
            groups["the context input"] = [context]  # type: ignore[list-item]
        for name, group in groups.items():
            slopes: tuple[Tensor | None, ...] = ()
            if found.requires_grad:
                slopes = torch.autograd.grad(
                    found.sum(), group, retain_graph=True, allow_unused=True
                )
            if not any(slope is not None and bool(slope.any()) for slope in slopes):
                raise UserError(
                    f"policy.network {self.label}: the output has no gradient with respect to"
                    f" {name}"
                )
        return found.detach()

    def _call(self, params: Params, *inputs: Any, start: bool = False) -> Any:
        """Return the module's result, or its initial state for a number of samples."""
        # functional_call swaps parameters in and out, which threads must not do on a shared module.
        module = getattr(self._local, "module", None)
        if module is None:
            module = self._local.module = self._copy()
        own = {name.removeprefix(PREFIX): p for name, p in params.items()}
        if start:
            own = {f"module.{name}": p for name, p in own.items()}
            return functional_call(StateModule(module), own, inputs)
        found = functional_call(module, own, inputs)
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            return found
        # A parameter that these samples do not use, as an expert of a mixture, has gradient 0.
        used = [p for p in params.values() if p.requires_grad]
        if not used:
            return found
        nothing = 0.0 * torch.stack([p.sum() for p in used]).sum()
        return (found[0] + nothing, found[1]) if self.recurrent else found + nothing


def is_lazy(parameter: nn.Parameter) -> bool:
    """Whether a parameter gets its shape at the first forward pass."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Compute with gradients and a random generator that leaves torch's own as it is."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        yield


def check_normalized(network: Network) -> None:
    """Raise UserError if the inputs of a network cannot be normalized."""
    if isinstance(network, ModuleNetwork) and not network.inputs.all_floats:
        raise UserError(
            f"policy.normalize scales floating-point numbers, but policy.network {network.label}"
            f" reads {network.space}: scale them in the network"
        )
