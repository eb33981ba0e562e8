"""Predictor adapted to one task's examples, as users call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError
from metarl.models.networks import Params, copied
from metarl.models.predictors import Classifier, Predictor
from metarl.models.samples import Examples


@dataclass(frozen=True)
class AdaptedPredictor:
    """Regressor or classifier of one task."""

    model: Predictor
    """The predictor as a function of its parameters."""
    params: Params
    """Parameters, not stacked."""
    classes: torch.Tensor | None = None
    """[1, C]; classes that the examples had. Only these are predicted; None: all classes."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Training and adaptation that it comes from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", copied(self.params))

    def predict(self, inputs: ArrayLike) -> NDArray[Any]:
        """Return predictions for inputs [n, *shape]: values [n, size], or classes [n].

        With the `conv4` network, inputs of one call are normalized together.

        Raises:
            UserError: the inputs have another shape or are not finite.
        """
        x = as_inputs(self.model, inputs)
        weight = torch.full((1, len(x)), 1.0 / len(x))
        examples = Examples(x[None], torch.zeros(1, len(x)), weight, self.classes)
        stacked = {name: p[None] for name, p in self.params.items()}
        with torch.no_grad():
            output = self.model.output(stacked, examples)
        if isinstance(self.model, Classifier):
            return output["logits"][0].argmax(-1).numpy()
        return output["prediction"][0].numpy()


def as_inputs(model: Predictor, inputs: ArrayLike) -> torch.Tensor:
    """Return inputs as a tensor [n, *shape], bytes scaled to [0, 1].

    Raises:
        UserError: the inputs have another shape or are not finite.
    """
    values, shape = np.asarray(inputs), model.network.input_shape
    if values.shape[1:] != shape or not len(values):
        raise UserError(f"inputs must be [n, {list(shape)}], got {list(values.shape)}")
    x = torch.from_numpy(values.astype(np.float32) / (255.0 if values.dtype == np.uint8 else 1.0))
    if not torch.isfinite(x).all():
        raise UserError("inputs must be finite numbers")
    return x


def as_examples(model: Predictor, inputs: ArrayLike, targets: ArrayLike) -> Examples:
    """Return one task's labelled examples, stacked.

    Raises:
        UserError: inputs and targets do not fit each other or the model.
    """
    x, y = as_inputs(model, inputs), np.asarray(targets)
    outputs = model.network.output_dim
    if isinstance(model, Classifier):
        known = y.dtype.kind in "iu" and y.shape == (len(x),)
        if not known or y.min() < 0 or (not model.generated and y.max() >= outputs):
            raise UserError(
                f"targets must be {len(x)} class numbers of 0 to {outputs - 1}, got {y!r}"
            )
        labels = torch.from_numpy(y.astype(np.int64))
    else:
        if y.reshape(len(y), -1).shape != (len(x), outputs) or not np.isfinite(y).all():
            raise UserError(
                f"targets must be finite numbers [{len(x)}, {outputs}], got {list(y.shape)}"
            )
        labels = torch.from_numpy(y.reshape(len(x), -1).astype(np.float32))
    weight = torch.full((1, len(x)), 1.0 / len(x))
    classes = None
    if isinstance(model, Classifier):
        count = int(labels.max()) + 1 if model.generated else outputs
        shown = torch.bincount(labels, minlength=count) > 0
        # As in training: a class without examples does not belong to the task.
        classes = shown[None] if model.generated or not shown.all() else None
    return Examples(x[None], labels[None], weight, classes)
