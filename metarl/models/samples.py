"""Samples of tasks as losses see them. Samples of policies are `Batch`, in `learning/losses`.

Their weights sum to 1 over a task's valid samples, and are 0 for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


class Samples:
    """N samples of each of T tasks, a dataclass of tensors [T, N, ...]."""

    weight: Tensor
    """[T, N]; sums to 1 over the valid samples of a task, 0 where not valid."""

    of_tasks: ClassVar[tuple[str, ...]] = ("context",)
    """Fields that are a task's, [T, ...], not a sample's."""
    drawn: ClassVar[bool] = False
    """Whether policies drew the samples, so that other parameters would have drawn others."""

    def kl(self, model: Any, output: Any) -> Tensor:
        """Return the mean KL from the policy that drew the samples to an output, [T].

        It is 0 for the examples of a data set.
        """
        return torch.zeros_like(self.weight[:, 0])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the samples with a function applied to every tensor."""
        # ruff's rule on dataclasses cannot know that each kind of samples is one.
        new = {f.name: _map(function, getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**new)

    def select(self, samples: Tensor) -> Self:
        """Return some of the samples of every task, weights summing to 1 again.

        Args:
            samples: indices of single samples, whose order is lost, [N'] for all tasks alike or
                [T, N'] for each; or those of whole episodes, [T, episodes', horizon].
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
    """Labelled examples: what a data set gives, whatever the parameters are."""

    inputs: Tensor
    """[T, N, *shape]"""
    targets: Tensor
    """[T, N, size] to regress on, or [T, N] class numbers of 0 ... C - 1 (int64)."""
    weight: Tensor
    classes: Tensor | None = None
    """[T, C] bool; which classes a task has. None: all of them."""
    context: Tensor | None = None
    """[T, context_dim]; what the model is told of its task, where it is told."""

    of_tasks: ClassVar[tuple[str, ...]] = ("classes", "context")


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(x) for name, x in value.items()}
    return function(value) if isinstance(value, Tensor) else value
