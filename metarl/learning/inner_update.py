"""Inner updates as parts, with the options `inner.*`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from metarl.envs.errors import UserError, check_one_of
from metarl.learning.adapter import Adapter, Fast
from metarl.learning.losses import Loss, name_of, trait
from metarl.models.networks import Model
from metarl.parts import Part, fixed, tunable


def checked_sizes(name: str, sizes: Sequence[float] | NDArray | None) -> tuple[float, ...]:
    """Return an option's step sizes; () for None.

    Raises:
        UserError: they are not positive numbers, one for each step.
    """
    if sizes is None:
        return ()
    if isinstance(sizes, str) or not np.iterable(sizes):
        raise UserError(f"{name} takes one size for each step, such as ({sizes},), got {sizes!r}")
    for size in sizes:
        if not (isinstance(size, Real) and math.isfinite(size) and float(size) > 0.0):
            raise UserError(f"{name} must be positive, got {size}")
    return tuple(map(float, sizes))


@dataclass(frozen=True, kw_only=True)
class InnerUpdate(Part):
    """Base class of inner updates: adaptation of a task. Fields are the options `inner.*`."""

    section: ClassVar[str] = "inner"

    steps: int = 1
    """Inner steps per task in training, each on new episodes."""
    step_sizes: tuple[float, ...] = tunable((0.1,), 3e-3, 10.0, log=True)
    """Size of each inner step. The last size repeats for later steps."""
    test_step_sizes: tuple[float, ...] = ()
    """Size of each inner step in evaluation; by default the learned sizes, else the training
    sizes."""
    halve_in_evaluation: bool = False
    """Halve the steps after the first in evaluation, unless test_step_sizes are given."""
    loss: Loss | None = fixed(None)
    """Inner loss; None: the model's default, for policies the log-likelihood."""
    adapts: Fast = fixed("all")
    """Parameters that adapt: all, the upper layers, the head, or a context input."""

    def __post_init__(self) -> None:
        self.require_at_least(0, "steps")
        check_one_of(self.key("adapts"), self.adapts, get_args(Fast))
        if self.loss is not None and not callable(self.loss):
            raise UserError(
                f"{self.key('loss')} must be a function (model, output, samples) -> [tasks], got"
                f" {self.loss!r}"
            )
        training, evaluation = self.sizes_in_training, self.test_step_sizes
        if not training:
            raise UserError(f"{self.key('step_sizes')} must not be empty")
        for name, sizes in (("step_sizes", training), ("test_step_sizes", evaluation)):
            checked_sizes(self.key(name), sizes)

    @property
    def learns_step_sizes(self) -> bool:
        """Whether step sizes are meta-parameters."""
        return False

    @property
    def context_dim(self) -> int:
        """Size of a context input that adapts; 0 without one."""
        return 0

    @property
    def sizes_in_training(self) -> tuple[float, ...]:
        """Size of each inner step in training: given, or the initial value of learned sizes."""
        return self.step_sizes

    @property
    def sizes_in_evaluation(self) -> tuple[float, ...]:
        """Size of each inner step in evaluation; empty: as in training."""
        halved = self.halve_in_evaluation and len(self.sizes_in_training) == 1
        first = self.sizes_in_training[0]
        return self.test_step_sizes or ((first, first / 2) if halved else ())

    def adapter(self, model: Model, loss: Loss) -> Adapter:
        """Return the adapter of a model.

        Args:
            loss: inner loss if the part has none.
        """
        return Adapter(model, self.loss or loss, self.sizes_in_training, fast=self.adapts)


@dataclass(frozen=True, kw_only=True)
class GradientUpdate(InnerUpdate):
    """Gradient steps of given sizes, or of larger sizes fitted to a KL."""

    updates: int = 1
    """Gradient updates within an inner step, on the same batch. More than one on episodes requires
    an inner loss with likelihood ratios."""
    min_kl: float = tunable(0.0, 0.0, 1.0, of_policies=True)
    """Lower bound on the mean KL of the first inner step; 0: off. If step_sizes change policies
    less, training scales all sizes up to it, and the policy keeps the factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "updates")
        self.require_not_negative("min_kl")
        reusable = self.loss is not None and trait(self.loss, "reusable")
        if self.policies and self.updates > 1 and not reusable:
            raise UserError(
                f"{self.key('updates')} must be 1, got {self.updates}: the inner loss"
                f" {name_of(self.loss) if self.loss else 'log_likelihood'} has no likelihood ratio"
                " and no lower bound on a fixed sample"
            )

    def adapter(self, model: Model, loss: Loss) -> Adapter:
        fitted = self.policies and self.min_kl > 0.0
        adapter = super().adapter(model, loss)
        return dataclasses.replace(adapter, updates=self.updates, fitted=fitted)


@dataclass(frozen=True, kw_only=True)
class LearnedStepSizes(InnerUpdate):
    """Gradient steps whose sizes are meta-parameters."""

    per: Literal["layer", "parameter"] = fixed("layer")
    """One size for each layer and step, or for each scalar parameter."""
    halve_in_evaluation: bool = fixed(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(self.key("per"), self.per, ("layer", "parameter"))

    @property
    def learns_step_sizes(self) -> bool:
        return True

    @property
    def sizes_in_training(self) -> tuple[float, ...]:
        if self.per == "parameter":
            return self.step_sizes
        more = self.steps - len(self.step_sizes)  # later steps start at the last size
        return self.step_sizes + self.step_sizes[-1:] * more

    def adapter(self, model: Model, loss: Loss) -> Adapter:
        return dataclasses.replace(super().adapter(model, loss), learned=self.per)


@dataclass(frozen=True, kw_only=True)
class ProximalUpdate(InnerUpdate):
    """Gradient descent on iMAML's inner problem, L(theta) + lambda / 2 |theta - theta_0|^2.

    Rajeswaran et al. 2019, eq. 3 (arXiv:1909.04630).
    """

    step_sizes: tuple[float, ...] = ()
    """Size of each update; by default 0.5 / proximal."""
    updates: int = 8
    """Gradient updates within an inner step, on the same batch."""
    proximal: float = tunable(10.0, 0.1, 300.0, log=True)
    """Coefficient of the proximal term towards the initialization (lambda). If step_sizes are
    given, the default is half of the inverse of the first."""
    backtrack: bool = False
    """Reject an update that raises a task's inner objective, and halve the task's later updates."""

    def __post_init__(self) -> None:
        self.require_positive("proximal")
        super().__post_init__()
        self.require_at_least(1, "updates")

    def with_options(self, values: Mapping[str, Any]) -> Self:
        part = super().with_options(values)
        if part.step_sizes and part.step_sizes != self.step_sizes and "proximal" not in values:
            return dataclasses.replace(part, proximal=0.5 / part.step_sizes[0])
        return part

    @property
    def sizes_in_training(self) -> tuple[float, ...]:
        return self.step_sizes or (0.5 / self.proximal,)

    def adapter(self, model: Model, loss: Loss) -> Adapter:
        return dataclasses.replace(
            super().adapter(model, loss),
            updates=self.updates,
            proximal=self.proximal,
            backtrack=self.backtrack,
        )


@dataclass(frozen=True, kw_only=True)
class NoInnerUpdate(InnerUpdate):
    """No inner step, in training or in evaluation."""

    steps: int = fixed(0)
    step_sizes: tuple[float, ...] = fixed((0.1,))
    test_step_sizes: tuple[float, ...] = fixed(())
    halve_in_evaluation: bool = fixed(False)


@dataclass(frozen=True, kw_only=True)
class EvaluationUpdate(GradientUpdate):
    """No inner step in training; gradient steps in evaluation."""

    steps: int = fixed(0)
