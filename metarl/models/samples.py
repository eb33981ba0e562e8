"""Samples of tasks for losses. Samples of policies are `Batch`, in `learning/losses`.

The weights of a task's valid samples sum to 1; other samples have weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self


class Samples:
    """N samples of each of T tasks, a dataclass of tensors [T, N, ...]."""

    weight: Tensor
    """[T, N]; sums to 1 over the valid samples of a task, 0 where not valid."""

    of_tasks: ClassVar[tuple[str, ...]] = ("context",)
    """Fields per task, [T, ...], not per sample."""
    drawn: ClassVar[bool] = False
    """Whether policies drew the samples, so that they depend on the parameters."""

    def kl(self, model: Any, output: Any) -> Tensor:
        """Return the mean KL from the sampling policy to an output, [T].

        It is 0 for the examples of a data set.
        """
        return torch.zeros_like(self.weight[:, 0])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the samples with a function applied to every tensor."""
        # ruff's rule on dataclasses does not see that all kinds of samples are dataclasses.
        new = {f.name: _map(function, getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**new)

    def select(self, samples: Tensor) -> Self:
        """Return some of the samples of every task, with weights that sum to 1 again.

        Args:
            samples: indices of single samples, whose order is lost: [N'] for all tasks or [T, N']
                for each. Or indices of whole episodes, [T, episodes', horizon].
        """
        each = samples.flatten(1) if samples.ndim > 1 else samples.expand(len(self.weight), -1)
        task = torch.arange(len(each), device=each.device).unsqueeze(1)
        kept = {name: getattr(self, name) for name in self.of_tasks}
        part = replace(self, **dict.fromkeys(kept)).map(lambda x: x[task, each])  # type: ignore[type-var]
        total = part.weight.sum(dim=1, keepdim=True)
        weight = part.weight / total.clamp(min=torch.finfo(total.dtype).tiny)
        return replace(part, weight=weight, **kept)


@dataclass(frozen=True)
class Examples(Samples):
    """Labelled examples of a data set. They do not depend on the parameters."""

    inputs: Tensor
    """[T, N, *shape]"""
    targets: Tensor
    """[T, N, size] for regression, or [T, N] class numbers of 0 ... C - 1 (int64)."""
    weight: Tensor
    """[T, N]; sums to 1 for each task, and is 0 for examples that do not exist."""
    classes: Tensor | None = None
    """[T, C] bool; mask of a task's classes. None: all classes."""
    context: Tensor | None = None
    """[T, context_dim]; the model's observation of its task, if it has one."""

    of_tasks: ClassVar[tuple[str, ...]] = ("classes", "context")


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(x) for name, x in value.items()}
    return function(value) if isinstance(value, Tensor) else value
