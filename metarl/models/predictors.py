"""Models of supervised tasks: regressors and classifiers as functions of (parameters, examples)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from metarl.envs.errors import check_one_of
from metarl.models.networks import (
    MLP,
    Dist,
    Model,
    Network,
    Params,
    affine,
    initial,
    tanh,
)
from metarl.models.samples import Examples

Head = Literal["meta", "prototypes", "generated"]
"""Initial last layer of a classifier: meta-parameters, class means of the support, or generated
from the support by a network."""


def squared_error(model: Any, output: Dist, examples: Examples) -> Tensor:
    """Mean squared error, summed over the target's components, [T]."""
    error = (output["prediction"] - examples.targets).square().sum(dim=-1)
    return (examples.weight * error).sum(dim=1)


def cross_entropy(model: Any, output: Dist, examples: Examples) -> Tensor:
    """Mean of -log p(class), [T]; softmax over the classes of the task."""
    log = output["logits"].log_softmax(dim=-1)
    picked = log.gather(-1, examples.targets.unsqueeze(-1)).squeeze(-1)
    # Padded examples have a class that does not belong to their task.
    return -torch.where(examples.weight > 0, examples.weight * picked, 0.0).sum(dim=1)


def accuracy(model: Any, output: Dist, examples: Examples) -> Tensor:
    """Share of the examples whose class has the largest logit, [T]."""
    right = output["logits"].argmax(dim=-1) == examples.targets
    return (examples.weight * right).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Predictor(Model):
    """Base class of models for labelled examples, with their loss."""

    network: Network

    @property
    @abstractmethod
    def loss(self) -> Callable[[Any, Dist, Examples], Tensor]:
        """Loss of both inner and outer steps."""


@dataclass(frozen=True, kw_only=True)
class Regressor(Predictor):
    """Predicts a vector; squared error."""

    @property
    def loss(self) -> Callable[[Any, Dist, Examples], Tensor]:
        return squared_error

    def output(self, params: Params, samples: Examples) -> Dist:
        found = self.in_context(params, samples)
        return {"prediction": self.network.forward(found, samples.inputs, samples.weight)}


@dataclass(frozen=True, kw_only=True)
class Classifier(Predictor):
    """Predicts one of the classes of a task; cross-entropy."""

    head: Head = "meta"

    def __post_init__(self) -> None:
        check_one_of("head", self.head, get_args(Head))

    @property
    def loss(self) -> Callable[[Any, Dist, Examples], Tensor]:
        return cross_entropy

    @property
    def _mlp(self) -> MLP:
        """The network, whose last layer `start` generates."""
        assert isinstance(self.network, MLP)
        return self.network

    @property
    def generated(self) -> tuple[str, ...]:
        return () if self.head == "meta" else self._mlp.last

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {n: shape for n, shape in super().shapes().items() if n not in self.generated}
        if self.head == "generated":
            size = self._mlp.embedding
            shapes |= {"generator0.weight": (size, size), "generator0.bias": (size,)}
            shapes |= {"generator1.weight": (size, size + 1), "generator1.bias": (size + 1,)}
        return shapes

    def init(self, rng: np.random.Generator) -> Params:
        return super().init(rng) if self.head == "meta" else initial(self.shapes(), rng)

    def start(self, params: Params, support: Examples) -> Params:
        """Return the last layer, weight [T, size, C] and bias [T, C], generated from the support.

        With prototypes c_k, the means of each class's embeddings: W_k = 2 c_k, b_k = -|c_k|^2. The
        logits are then -|x - c_k|^2 + |x|^2 (ProtoMAML; Triantafillou et al. 2020, section 3,
        arXiv:1903.03096). Generated: a tanh network maps each embedding to an output, and the mean
        over a class's examples is (W_k, b_k) (LEOPARD; Bansal et al. 2020, section 3.1,
        arXiv:1911.03863).
        """
        if self.head == "meta":
            return {}
        found = self.in_context(params, support)
        x = self._mlp.embed(found, support.inputs, support.weight)
        if self.head == "generated":
            for i in range(2):
                x = affine(x, params[f"generator{i}.weight"], params[f"generator{i}.bias"])
                x = x if i else tanh(x)
        classes = self._mlp.outputs if support.classes is None else support.classes.shape[1]
        means = class_means(x, support, classes)
        if self.head == "prototypes":
            made = 2.0 * means.transpose(1, 2), -means.square().sum(-1)
        else:
            made = means[..., :-1].transpose(1, 2), means[..., -1]
        return dict(zip(self.generated, made, strict=True))

    def output(self, params: Params, samples: Examples) -> Dist:
        found = self.in_context(params, samples)
        logits = self.network.forward(found, samples.inputs, samples.weight)
        if samples.classes is not None:
            logits = logits.masked_fill(~samples.classes.unsqueeze(1), -torch.inf)
        return {"logits": logits}


def class_means(x: Tensor, examples: Examples, classes: int) -> Tensor:
    """Return the mean of [T, N, size] over each class's valid examples, [T, classes, size].

    A class without examples has mean 0.
    """
    own = torch.nn.functional.one_hot(examples.targets, classes).to(x.dtype)
    own = own * (examples.weight > 0).unsqueeze(-1).to(x.dtype)
    count = own.sum(dim=1).clamp(min=1.0).unsqueeze(-1)
    return own.transpose(1, 2) @ x / count
