"""Networks as parts: built in by name, or any `torch.nn.Module` of a user."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

import gymnasium as gym
from torch import nn

from metarl.envs.errors import UserError, check_one_of, did_you_mean
from metarl.envs.gymnasium.observations import is_image
from metarl.envs.policy_spaces import image_size
from metarl.models.encoders import Encoder, FourBlocks, NatureCNN, SmallImpala
from metarl.models.modules import Factory, ModuleNetwork
from metarl.models.networks import MLP, Activation, Network
from metarl.models.recurrent import GRU, LSTM, RecurrentNetwork
from metarl.parts import Part, find_part, fixed


@dataclass(frozen=True, kw_only=True)
class NetworkPart(Part, ABC):
    """Base class of networks. The fields of a subclass are options `policy.*`."""

    section: ClassVar[str] = "policy"

    name: ClassVar[str] = ""
    structured: ClassVar[bool] = False
    """Whether it reads a Dict or Tuple unflattened."""

    @abstractmethod
    def make(self, space: gym.Space, outputs: int, context_dim: int = 0) -> Network:
        """Return the network for inputs of a space.

        Args:
            space: space of the inputs; a flat Box or an image unless `structured`.
            outputs: size of the output.
            context_dim: size of the context input; 0: none.

        Raises:
            UserError: the network does not support such inputs.
        """


@dataclass(frozen=True, kw_only=True)
class MLPPart(NetworkPart):
    """An MLP for vectors."""

    name: ClassVar[str] = "mlp"

    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""
    activation: Activation = "tanh"
    """Activation of the hidden layers."""
    output_scale: float = 1.0
    """Factor of the last layer's initial weights. With a small factor, mean actions start near
    zero, within the bounds, for every seed."""

    def __post_init__(self) -> None:
        check_one_of(self.key("activation"), self.activation, get_args(Activation))
        whole = all(isinstance(size, int) and size >= 1 for size in self.hidden)
        self.require("hidden", whole, "whole numbers of at least 1")
        self.require_positive("output_scale")

    def make(self, space: gym.Space, outputs: int, context_dim: int = 0) -> MLP:
        assert space.shape is not None
        encoder = self.encoder(space)
        if encoder is None and is_image(space):
            raise UserError(
                f"policy.network {self.name} reads vectors, but observations are images"
                f" {list(space.shape)}: use nature or impala, or flatten them"
                " (gym.wrappers.FlattenObservation)"
            )
        return MLP(
            inputs=tuple(space.shape),
            outputs=outputs,
            hidden=self.hidden,
            activation=self.activation,
            context_dim=context_dim,
            output_scale=self.output_scale,
            encoder=encoder,
            images=is_image(space),
        )

    def encoder(self, space: gym.Space) -> Encoder | None:
        """Return the network before the hidden layers, or None."""
        return None

    def require_image(self, space: gym.Space) -> tuple[int, ...]:
        """Return the shape of images; raise UserError for vectors."""
        shape = space.shape or ()
        if len(shape) < 2:
            raise UserError(
                f"policy.network {self.name} reads images, but inputs are {list(shape)} numbers:"
                " remove it"
            )
        return shape


@dataclass(frozen=True, kw_only=True)
class NaturePart(MLPPart):
    """The Nature CNN before the hidden layers, for images of at least 36 x 36 pixels."""

    name: ClassVar[str] = "nature"

    def encoder(self, space: gym.Space) -> Encoder:
        return NatureCNN(self.require_image(space))


@dataclass(frozen=True, kw_only=True)
class ImpalaPart(MLPPart):
    """A small residual network before the hidden layers, for images."""

    name: ClassVar[str] = "impala"

    def encoder(self, space: gym.Space) -> Encoder:
        return SmallImpala(self.require_image(space))


@dataclass(frozen=True, kw_only=True)
class AutoPolicyNetwork(MLPPart):
    """An MLP for vectors. For images, nature before it, or impala if the images are too small."""

    name: ClassVar[str] = "auto"

    def encoder(self, space: gym.Space) -> Encoder | None:
        if not is_image(space):
            return None
        shape = space.shape or ()
        fits = min(image_size(shape)[1:]) >= NatureCNN.least
        return NatureCNN(shape) if fits else SmallImpala(shape)


@dataclass(frozen=True, kw_only=True)
class GRUPart(NetworkPart):
    """A gated recurrent unit for vectors. Its state lasts for an episode."""

    name: ClassVar[str] = "gru"
    kind: ClassVar[type[RecurrentNetwork]] = GRU

    units: int = 64
    """Size of the recurrent state."""
    output_scale: float = 1.0
    """Factor of the last layer's initial weights. With a small factor, mean actions start near
    zero, within the bounds, for every seed."""

    def __post_init__(self) -> None:
        self.require_at_least(1, "units")
        self.require_positive("output_scale")

    def make(self, space: gym.Space, outputs: int, context_dim: int = 0) -> RecurrentNetwork:
        shape = space.shape or ()
        if len(shape) != 1:
            raise UserError(
                f"policy.network {self.name} reads vectors, but inputs are {list(shape)} numbers:"
                " use your own torch.nn.Module with initial_state, or flatten them"
                " (gym.wrappers.FlattenObservation)"
            )
        return self.kind(
            inputs=shape[0],
            outputs=outputs,
            units=self.units,
            context_dim=context_dim,
            output_scale=self.output_scale,
        )


@dataclass(frozen=True, kw_only=True)
class LSTMPart(GRUPart):
    """Long short-term memory for vectors. Its state lasts for an episode."""

    name: ClassVar[str] = "lstm"
    kind: ClassVar[type[RecurrentNetwork]] = LSTM


@dataclass(frozen=True, kw_only=True)
class Conv4Part(MLPPart):
    """The four blocks of few-shot classification before the hidden layers, for images."""

    name: ClassVar[str] = "conv4"

    filters: int = 64
    """Filters in each block of conv4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "filters")

    def encoder(self, space: gym.Space) -> Encoder | None:
        return FourBlocks(self.require_image(space), self.filters)


@dataclass(frozen=True, kw_only=True)
class AutoPredictorNetwork(Conv4Part):
    """An MLP for vectors, conv4 for images."""

    name: ClassVar[str] = "auto"

    def encoder(self, space: gym.Space) -> Encoder | None:
        if len(space.shape or ()) > 1:
            return super().encoder(space)
        if self.filters != Conv4Part.filters:
            raise UserError(f"policy.filters is an option of conv4, but inputs are {space.shape}")
        return None


@dataclass(frozen=True, kw_only=True)
class ModulePart(NetworkPart):
    """A `torch.nn.Module` from a user's factory."""

    structured: ClassVar[bool] = True

    factory: Factory = fixed(None)
    """Function of the observation space and the number of outputs that returns the module."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the factory."""
        if isinstance(self.factory, _Given):
            return type(self.factory.module).__name__
        return getattr(self.factory, "__qualname__", type(self.factory).__name__)

    def make(self, space: gym.Space, outputs: int, context_dim: int = 0) -> ModuleNetwork:
        return ModuleNetwork(self.factory, self.source or self.name, space, outputs, context_dim)


@dataclass(frozen=True)
class _Given:
    """Factory for a given module object: networks start at its parameters."""

    module: nn.Module

    def __call__(self, space: gym.Space, outputs: int) -> nn.Module:
        return copy.deepcopy(self.module)


POLICY_NETWORKS: dict[str, type[NetworkPart]] = {
    kind.name: kind
    for kind in (AutoPolicyNetwork, MLPPart, NaturePart, ImpalaPart, GRUPart, LSTMPart)
}
PREDICTOR_NETWORKS: dict[str, type[NetworkPart]] = {
    kind.name: kind for kind in (AutoPredictorNetwork, MLPPart, Conv4Part)
}


def find_network(what: Any, known: Mapping[str, type[NetworkPart]]) -> NetworkPart:
    """Return a network part.

    Args:
        what: the part, a name, `module:attribute`, a module, or a function or class that returns a
            module for an input space and an output size.
        known: parts by name.

    Raises:
        UserError: the value is something else.
    """
    made = find_part(what, NetworkPart, "network", known.get, _adapted)
    if made is None:
        raise UserError(
            f"policy.network must be one of {', '.join(known)}, module:attribute or a"
            f" torch.nn.Module, got {what!r}{did_you_mean(what, known)}"
        )
    return made


def _adapted(found: Any) -> Any:
    if isinstance(found, nn.Module):
        return ModulePart(factory=_Given(found))
    part = isinstance(found, NetworkPart) or (
        isinstance(found, type) and issubclass(found, NetworkPart)
    )
    return found if part or not callable(found) else ModulePart(factory=cast(Factory, found))
