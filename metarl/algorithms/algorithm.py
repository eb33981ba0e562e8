"""Algorithm: an inner update, a meta-gradient and an outer optimizer, with their options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from metarl.algorithms.named_parts import find_baseline, find_outer
from metarl.envs import TaskFamily
from metarl.envs.errors import UserError, check_one_of
from metarl.learning.advantages import Advantages
from metarl.learning.baselines import Baseline, LinearFeatures
from metarl.learning.inner_update import GradientUpdate, InnerUpdate
from metarl.learning.losses import Loss
from metarl.learning.meta_gradients.problem import MetaGradient, Regularizer
from metarl.learning.meta_gradients.unrolled import FirstOrder, Unrolled
from metarl.learning.outer import OuterOptimizer
from metarl.learning.trust_region import TrustRegion
from metarl.models.predictors import Head
from metarl.parts import Part
from metarl.sampling.trajectories import Rollout
from metarl.sampling.trials import CLOCK, Trials, episodes_of

TaskWeights = Callable[[Tensor], Tensor]
"""Mean returns of all tasks after adaptation, [T] float64 -> task weights, [T]."""

Role = Literal["meta-learner", "pretrained", "untrained", "oracle"]
"""Role in an evaluation. All roles except meta-learner are references: one policy trained on all
tasks, a random initialization, a policy that observes its task."""

SECTIONS = ("inner", "meta", "outer", "advantage", "baseline", "trial")


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Meta-learning algorithm.

    Raises:
        UserError: a part has the wrong type, or the parts are incompatible.
    """

    name: str
    """Name of `--algorithm`, and in tables and figures."""
    summary: str = ""
    """One line for `metarl algorithms`."""
    citation: str = ""
    """Paper, with its arXiv identifier."""
    inner: InnerUpdate = field(default_factory=GradientUpdate)
    """Adaptation to one task."""
    meta: MetaGradient = field(default_factory=Unrolled)
    """Gradient of the meta-objective."""
    outer: OuterOptimizer = field(default_factory=TrustRegion)
    """An outer optimizer, the name of one, or a class of torch.optim."""
    advantage: Advantages | None = field(default_factory=Advantages)
    """Estimation of advantages; None on data sets."""
    baseline: Baseline | None = field(default_factory=LinearFeatures)
    """Values that are subtracted from returns, or the name of a baseline; None on data sets."""
    trial: Trials | None = None
    """Sampling of trials, several episodes of a task in a row. Such a policy takes no inner step.
    None: single episodes."""
    outer_loss: Loss | None = None
    """Loss of the adapted policies on the query samples. None: the likelihood ratio for policies,
    or the inner loss for a data set."""
    task_weights: TaskWeights | None = None
    """Task weights in the meta-objective, for instance for a worst case or CVaR; scaled to mean 1.
    None: equal weights."""
    regularizer: Regularizer | None = None
    """Meta-parameters -> a number that is added to the meta-objective."""
    network: str = ""
    """Default of `policy.network`; empty: the default of all algorithms."""
    head: Head = "meta"
    """Source of the initial last layer of a classifier."""
    task_conditioned: bool = False
    """The policy observes the task vector and takes no inner step in evaluation."""
    role: Role = "meta-learner"
    """Role in an evaluation, see `Role`."""
    source: str = field(default="", compare=False)
    """Name for `find_algorithm`; empty for an algorithm without one."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"an algorithm's name must be a string, got {self.name!r}")
        object.__setattr__(self, "outer", find_outer(self.outer))
        if self.baseline is not None:
            object.__setattr__(self, "baseline", find_baseline(self.baseline))
        kinds = {
            "inner": InnerUpdate, "meta": MetaGradient, "outer": OuterOptimizer,
            "advantage": Advantages | None, "baseline": Baseline | None, "trial": Trials | None,
        }  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                expected = getattr(kind, "__name__", str(kind))
                raise UserError(f"{self.name}: {name} must be a {expected}, got {value!r}")
        for name in ("outer_loss", "task_weights", "regularizer"):
            if (value := getattr(self, name)) is not None and not callable(value):
                raise UserError(f"{self.name}: {name} must be a function, got {value!r}")
        check_one_of(f"{self.name}: head", self.head, get_args(Head))
        check_one_of(f"{self.name}: role", self.role, get_args(Role))
        if not isinstance(self.task_conditioned, bool):
            raise UserError(
                f"{self.name}: task_conditioned must be True or False, got"
                f" {self.task_conditioned!r}"
            )
        if isinstance(self.outer, TrustRegion) and not isinstance(self.meta, FirstOrder):
            raise UserError(
                f"{self.name}: a trust region needs an unrolled meta-gradient, got"
                f" {type(self.meta).__name__}: use another outer optimizer, such as adam"
            )
        if self.outer.needs_policy and not self.meta.needs_query:
            raise UserError(
                f"{self.name}: outer {self.outer.name} needs samples of the adapted policies, and"
                f" {type(self.meta).__name__} draws none: use another outer optimizer, such as"
                " adam"
            )
        if self.outer_loss is not None and self.outer.loss(self.outer_loss) is not self.outer_loss:
            raise UserError(f"{self.name}: outer {self.outer.name} has its own outer loss")
        if self.trial is not None and (self.inner.steps or self.task_conditioned):
            raise UserError(f"{self.name}: trials need inner.steps 0, and no task_conditioned")
        if not self.meta.needs_query and self.outer.policies:
            # No samples of adapted policies: there is no KL to bound.
            object.__setattr__(self, "outer", self.outer.without_policies())
        self.meta.check(self.inner.steps)

    @property
    def takes_inner_steps(self) -> bool:
        """Whether policies take inner steps in evaluation."""
        return not self.task_conditioned and self.trial is None

    def played(self, family: TaskFamily) -> TaskFamily:
        """Return the family that policies play: of trials if there are any."""
        return family if self.trial is None else self.trial.family(family)

    def measured(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """Return the rollouts whose returns show adaptation: one per inner step, or per episode."""
        return rollouts if self.trial is None else episodes_of(rollouts[-1], self.trial.episodes)

    def baseline_shape(self, observation_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a baseline's observations, see `baseline_input`."""
        if self.trial is None:
            return observation_shape
        return (observation_shape[0] + CLOCK,)

    @property
    def reference(self) -> bool:
        """Whether it is a reference for meta-learners."""
        return self.role != "meta-learner"

    @property
    def estimator(self) -> tuple[Advantages, Baseline]:
        """Advantages and baseline of an algorithm for policies."""
        assert self.advantage is not None
        assert self.baseline is not None
        return self.advantage, self.baseline

    def sections(self) -> dict[str, Part]:
        """Return the parts with options, by the section of their keys."""
        parts = {name: getattr(self, name) for name in SECTIONS}
        return {name: part for name, part in parts.items() if part is not None}

    def option(self, key: str) -> Any:
        """Return the value of an option by its key; None without such an option."""
        section, _, name = key.rpartition(".")
        return getattr(self.sections().get(section), name, None)

    def own_options(self) -> dict[str, Any]:
        """Return the options that the algorithm sets, by key."""
        return {
            part.key(name): value
            for part in self.sections().values()
            for name, value in part.own_options().items()
        }
