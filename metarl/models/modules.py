"""Users' networks: any `torch.nn.Module` as a pure function of its parameters.

A module is called for one task at a time, with plain batches [samples, ...]. Results therefore do
not depend on the number of tasks that are computed together.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarl.envs import guard
from metarl.envs.errors import UserError
from metarl.envs.gymnasium.observations import components, is_image
from metarl.models.networks import Network, Params, Part

Factory = Callable[[gym.Space, int], nn.Module]
"""(space of the inputs, size of the output) -> module; also a class of modules."""

PREFIX = "network."
"""Prefix of the names of a module's parameters."""

_TRIED = 2  # number of inputs in a test call of a module


class ModuleNetwork(Network):
    """A `torch.nn.Module` that reads inputs [samples, ...] and returns [samples, outputs].

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
        self._local = threading.local()
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = self._template.named_parameters()
        return {PREFIX + name: tuple(p.shape) for name, p in found}

    def init(self, rng: np.random.Generator) -> Params:
        """Return the parameters of a new module, whose torch generator is seeded from `rng`."""
        made = self._make(rng)
        return {
            PREFIX + name: p.detach().to(torch.float32).clone()
            for name, p in made.named_parameters()
        }

    def forward(self, params: Params, x: Tensor, weight: Tensor | None = None) -> Tensor:
        shapes = self.shapes()
        own = {name: params[name] for name in shapes}
        frozen = {n for n, p in self._template.named_parameters() if not p.requires_grad}
        own = {n: p.detach() if n.removeprefix(PREFIX) in frozen else p for n, p in own.items()}
        context = params.get("context") if self.context_dim else None
        if x.dim() == len(self.input_shape) + 1:
            return self._call(own, self.inputs.split(x, context))
        stacked = {name for name, p in own.items() if p.dim() > len(shapes[name])}
        outputs = []
        for task, inputs in enumerate(x):
            one = {name: p[task] if name in stacked else p for name, p in own.items()}
            known = context if context is None or context.dim() == 1 else context[task]
            valid = None if weight is None or bool((weight[task] > 0).all()) else weight[task] > 0
            if valid is not None:
                inputs = inputs[valid]
            found = self._call(one, self.inputs.split(inputs, known))
            if valid is not None:
                found = found.new_zeros(len(valid), self._outputs).index_put((valid,), found)
            outputs.append(found)
        return torch.stack(outputs)

    def adapts(self, name: str, part: Part) -> bool:
        if part == "upper":
            raise UserError(
                f"policy.network {self.label} has no known upper layers: use an algorithm"
                " that adapts all parameters, such as maml-trpo"
            )
        parameter = self._template.get_parameter(name.removeprefix(PREFIX))
        if part == "head" and not hasattr(self._template, "head"):
            raise UserError(
                f"policy.network {self.label} must name its last layer head for an algorithm that"
                " adapts only the last layer: self.head = torch.nn.Linear(...)"
            )
        inside = part == "all" or name.startswith(f"{PREFIX}head.")
        return parameter.requires_grad and inside

    def module(self, params: Params) -> nn.Module:
        """Return a module with the given parameters, [...] each."""
        made = copy.deepcopy(self._template)
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(params[PREFIX + name])
        return made

    def _make(self, rng: np.random.Generator) -> nn.Module:
        with torch.random.fork_rng(devices=[]), guard.user_code():
            torch.manual_seed(int(rng.integers(2**63 - 1)))
            try:
                made = self.factory(self.inputs.given, self._outputs)
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
        if not any(p.requires_grad for p in made.parameters()):
            raise UserError(f"policy.network {self.label} has no parameters to learn")
        return made.to(torch.float32)

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
        """Return the activations of a forward pass per input; refuse wrong output shapes."""
        kept = [math.prod(self.input_shape)]

        def count(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kept.append(output.numel() // _TRIED)

        module = copy.deepcopy(self._template)
        hooks = [layer.register_forward_hook(count) for layer in module.modules()]
        x = self.inputs.example(_TRIED)
        context = torch.zeros(self.context_dim) if self.context_dim else None
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), guard.user_code():
                found = module(self.inputs.split(x, context))
        except Exception as error:
            raise UserError(
                f"policy.network {self.label} cannot read inputs of {self.inputs.given}:"
                f" {type(error).__name__}: {error}"
            ) from error
        for hook in hooks:
            hook.remove()
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != [_TRIED, self._outputs]:
            raise UserError(
                f"policy.network {self.label} must return [samples, {self._outputs}], got {shape}"
                f" for {_TRIED} samples"
            )
        return sum(kept)

    def _call(self, params: Params, inputs: Any) -> Tensor:
        # functional_call swaps parameters in and out, which threads must not do on a shared module.
        module = getattr(self._local, "module", None)
        if module is None:
            module = self._local.module = copy.deepcopy(self._template)
        own = {name.removeprefix(PREFIX): p for name, p in params.items()}
        return functional_call(module, own, (inputs,))


class Inputs:
    """Inputs of a module: converts the stored array of a rollout to the components of the space.

    Args:
        space: space of the inputs, before flattening.
        context_dim: size of a context input.
        label: name of the network, for messages.
    """

    def __init__(self, space: gym.Space, context_dim: int, label: str) -> None:
        self.space, self.context_dim = space, context_dim
        self.images = is_image(space)
        self.flat = isinstance(space, gym.spaces.Box) and (
            self.images or len(space.shape) == 1 or space.dtype == np.float32
        )
        shape = space.shape if self.flat else (gym.spaces.flatdim(space),)
        assert shape is not None
        self.shape: tuple[int, ...] = tuple(shape)
        if context_dim and self.images:
            raise UserError(
                f"policy.network {label} reads images, to which a task's context cannot be appended"
                ": use Dict observations, which get the entry context"
            )

    @property
    def given(self) -> gym.Space:
        """Input space of the module: the inputs with the context."""
        if not self.context_dim:
            return self.space
        more = gym.spaces.Box(-np.inf, np.inf, (self.context_dim,), np.float32)
        if isinstance(self.space, gym.spaces.Dict):
            return gym.spaces.Dict([*self.space.items(), ("context", more)])
        if isinstance(self.space, gym.spaces.Tuple):
            return gym.spaces.Tuple([*self.space, more])
        size = int(math.prod(self.shape)) + self.context_dim
        return gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    @property
    def all_floats(self) -> bool:
        """Whether all components are floating-point numbers."""
        return all(
            isinstance(leaf, gym.spaces.Box) and np.issubdtype(leaf.dtype, np.floating)
            for _, leaf in components(self.space)
        )

    def example(self, count: int) -> Tensor:
        """Return example inputs from the space, [count, *shape] each."""
        space = copy.deepcopy(self.space)
        space.seed(0)
        drawn = [space.sample() for _ in range(count)]
        dtype = np.uint8 if self.images else np.float32
        flat = drawn if self.flat else [gym.spaces.flatten(space, x) for x in drawn]
        return torch.from_numpy(np.stack([np.asarray(x, dtype) for x in flat]))

    def split(self, x: Tensor, context: Tensor | None) -> Any:
        """Return inputs [samples, *shape] in the module's format."""
        if context is not None:
            context = context.expand(len(x), self.context_dim)
        if self.flat:
            return x if context is None else torch.cat([x.flatten(1), context], dim=1)
        found, end = _split(self.space, x, 0)
        assert end == x.shape[1]
        if context is None:
            return found
        if isinstance(found, dict):
            return {**found, "context": context}
        return (*found, context) if isinstance(found, tuple) else torch.cat([found, context], 1)


def check_normalized(network: Network) -> None:
    """Raise UserError if the inputs of a network cannot be normalized."""
    if isinstance(network, ModuleNetwork) and not network.inputs.all_floats:
        raise UserError(
            f"policy.normalize scales floating-point numbers, but policy.network {network.label}"
            f" reads {network.space}: scale them in the network"
        )


def _split(space: gym.Space, x: Tensor, start: int) -> tuple[Any, int]:
    """Return the part of flat inputs [samples, size] that belongs to a space, and its end."""
    if isinstance(space, gym.spaces.Dict):
        found = {}
        for name, inner in space.items():
            found[name], start = _split(inner, x, start)
        return found, start
    if isinstance(space, gym.spaces.Tuple):
        parts = []
        for inner in space:
            part, start = _split(inner, x, start)
            parts.append(part)
        return tuple(parts), start
    end = start + gym.spaces.flatdim(space)
    part = x[:, start:end]
    if isinstance(space, gym.spaces.Discrete):  # stored as one-hot vectors
        return part.argmax(1) + int(space.start), end
    if isinstance(space, gym.spaces.MultiDiscrete):
        sizes = [int(n) for n in space.nvec.flatten()]
        digits = torch.stack([one.argmax(1) for one in part.split(sizes, dim=1)], dim=1)
        digits = digits + torch.from_numpy(np.asarray(space.start, np.int64).flatten())
        return digits.unflatten(1, space.nvec.shape), end
    assert space.shape is not None
    part = part.unflatten(1, space.shape) if space.shape else part[:, 0]
    if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8:
        return part.to(torch.uint8), end
    return part, end
