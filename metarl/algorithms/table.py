"""Algorithms, one row each: an inner loss, a meta-gradient, an outer optimizer, and their paper.

To add one is to add a row and, where none of the functions fits, one pure function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from metarl.envs.errors import UserError, check_name, check_one_of, did_you_mean
from metarl.learning.inner_update import Fast, Learned
from metarl.learning.losses import Loss, dice, likelihood_ratio, log_likelihood
from metarl.models.predictors import Head

INNER_LOSSES: Mapping[str, Loss] = {
    "log-likelihood": log_likelihood,
    "likelihood-ratio": likelihood_ratio,
}


Gradient = Literal["unrolled", "displacement", "implicit"]
Outer = Literal["trust-region", "adam", "clipped", "none"]

_CHOICES: Mapping[str, Any] = {
    "gradient": Gradient,
    "outer": Outer,
    "fast": Fast,
    "learned_steps": Learned,
    "head": Head,
}
_FLAGS = ("whole_episodes", "first_order", "annealed", "observes_task", "reference")


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What one meta-learning algorithm is made of.

    Raises:
        UserError: a value is unknown, or the outer step cannot use the meta-gradient.
    """

    name: str
    description: str
    source: str
    inner_loss: Loss = log_likelihood
    whole_episodes: bool = False
    """The inner loss needs the samples of an episode together and in order."""
    gradient: Gradient = "unrolled"
    first_order: bool = False
    """The meta-gradient takes the inner steps' Jacobian for the identity."""
    outer: Outer = "trust-region"
    fast: Fast = "all"
    """What adapts: all parameters, the last layer, or a context input."""
    learned_steps: Learned = "no"
    """Step sizes learned with the initialization: one a layer and step, or one a parameter."""
    annealed: bool = False
    """Multi-step loss, and first order at first; both give way over `meta.anneal_fraction`."""
    head: Head = "meta"
    """Where the last layer starts, in few-shot classification alone."""
    observes_task: bool = False
    """The policy sees the task vector, and takes no inner step in evaluation."""
    reference: bool = False
    """Not a meta-learner, but what one stands beside."""
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Values of config sections that the algorithm starts from."""

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            check_one_of(f"{self.name}: {key}", getattr(self, key), get_args(choices))
        for key in _FLAGS:
            check_one_of(f"{self.name}: {key}", getattr(self, key), (True, False))
        if not callable(self.inner_loss):
            raise UserError(
                f"{self.name}: inner_loss must be a function (model, output, samples) -> [tasks],"
                f" got {self.inner_loss!r}"
            )
        if self.outer == "trust-region" and self.gradient != "unrolled":
            raise UserError(
                f"{self.name}: outer trust-region needs gradient unrolled, got {self.gradient}:"
                " use outer adam"
            )
        if self.outer == "clipped" and self.gradient == "displacement":
            raise UserError(
                f"{self.name}: outer clipped needs query samples, and gradient displacement draws"
                " none: use outer adam"
            )

    def with_inner_loss(self, name: str) -> Algorithm:
        """Return the row with an inner loss by name; "auto" leaves its own."""
        check_one_of("inner.loss", name, ("auto", *INNER_LOSSES))
        return self if name == "auto" else replace(self, inner_loss=INNER_LOSSES[name])

    @property
    def uses_curvature(self) -> bool:
        """Whether the meta-gradient goes through the curvature of the inner steps."""
        return self.gradient == "unrolled" and not (self.first_order or self.reference)

    @property
    def needs_policy(self) -> str:
        """What it needs a policy for, in words; nothing: it takes supervised tasks too."""
        if self.outer == "clipped":
            return "the likelihood ratios of its clipped objective"
        if self.whole_episodes:
            return "the order of actions in an episode"
        return "the credit of its samples" if "credit" in self.defaults.get("meta", {}) else ""

    def with_adam(self) -> Algorithm:
        """Return the row with Adam in place of a trust region, which bounds a policy's KL."""
        return replace(self, outer="adam") if self.outer == "trust-region" else self


_FINN = "Finn et al. 2017, arXiv:1703.03400"

ALGORITHMS = {
    row.name: row
    for row in (
        Algorithm(
            name="maml-trpo",
            description="policy-gradient inner steps, exact second-order meta-gradient, TRPO",
            source=_FINN,
        ),
        Algorithm(
            name="maml-reinforce",
            description="as maml-trpo, the outer step by Adam on the policy gradient",
            source=_FINN,
            outer="adam",
            defaults={"adam": {"learning_rate": 3e-3}},
        ),
        Algorithm(
            name="maml-ppo",
            description="as maml-trpo, five outer steps by Adam on PPO's clipped objective",
            source=f"{_FINN}; Schulman et al. 2017, arXiv:1707.06347",
            outer="clipped",
            defaults={"adam": {"learning_rate": 1e-3, "steps": 5}},
        ),
        Algorithm(
            name="fomaml-trpo",
            description="as maml-trpo, the inner steps' Jacobian taken for the identity",
            source="Finn et al. 2017, section 5.2; Nichol et al. 2018, arXiv:1803.02999",
            first_order=True,
        ),
        Algorithm(
            name="fomaml-reinforce",
            description="as maml-reinforce, the inner steps' Jacobian taken for the identity",
            source="Finn et al. 2017, section 5.2; Nichol et al. 2018, arXiv:1803.02999",
            first_order=True,
            outer="adam",
            defaults={"adam": {"learning_rate": 3e-3}},
        ),
        Algorithm(
            name="reptile",
            description="moves towards the adapted parameters; samples no query episodes",
            source="Nichol et al. 2018, arXiv:1803.02999",
            inner_loss=likelihood_ratio,
            gradient="displacement",
            outer="adam",
            # With one step it is joint training: what differs are further steps on fresh samples.
            defaults={"adam": {"learning_rate": 3e-3}, "inner": {"steps": 4}},
        ),
        Algorithm(
            name="e-maml",
            description="adds what pre-update sampling earns for the post-update return",
            source="Stadie et al. 2018, arXiv:1803.01118; Al-Shedivat et al. 2018",
            # 1 is the paper's weight, unbiased, with the variance of the score of all samples of a
            # task. What this row did before, returns scaled over tasks and divided by a task's
            # number of samples, was about 1/300 of it on half-cheetah-vel.
            defaults={"meta": {"credit": 1.0}},
        ),
        Algorithm(
            name="promp",
            description="low-variance-curvature inner surrogate, clipped objective, inner KL",
            # Five steps on the whole batch, as the authors' code does.
            source="Rothfuss et al. 2019, arXiv:1810.06784",
            inner_loss=likelihood_ratio,
            outer="clipped",
            defaults={
                "adam": {"learning_rate": 1e-3, "steps": 5, "clip": 0.3},
                "meta": {"inner_kl": 5e-4},
            },
        ),
        Algorithm(
            name="dice-maml",
            description="loaded DiCE inner objective: higher-order terms, unbiased at decay 1",
            source="Foerster et al. 2018, arXiv:1802.05098; Farquhar et al. 2019, 1909.10549",
            inner_loss=dice,
            whole_episodes=True,
            # Unbiased, its variance at 200 steps kept it from learning (docs/results.md).
            defaults={"inner": {"dice_decay": 0.8}},
        ),
        Algorithm(
            name="imaml",
            description="proximal inner problem, implicit meta-gradient by conjugate gradient",
            source="Rajeswaran et al. 2019, arXiv:1909.04630",
            inner_loss=likelihood_ratio,
            gradient="implicit",
            outer="adam",
            defaults={
                "adam": {"learning_rate": 3e-3},
                "inner": {"updates": 8, "proximal": 10.0},
            },
        ),
        Algorithm(
            name="maml++",
            description="step sizes a layer and step, multi-step loss, order annealed, cosine",
            source="Antoniou et al. 2019, arXiv:1810.09502",
            learned_steps="layer",
            annealed=True,
            outer="adam",
            defaults={
                "adam": {"learning_rate": 3e-3},
                "inner": {"steps": 2},
                "meta": {"anneal_fraction": 0.3, "cosine": True},
            },
        ),
        Algorithm(
            name="meta-sgd",
            description="a step size, and its sign, for every parameter, learned",
            source="Li et al. 2017, arXiv:1707.09835",
            learned_steps="parameter",
        ),
        Algorithm(
            name="anil",
            description="only the last layer adapts, not the standard deviation",
            source="Raghu et al. 2020, arXiv:1909.09157",
            fast="head",
            # A part of the parameters goes as far as all with a larger step.
            defaults={"inner": {"step_sizes": (0.5,)}},
        ),
        Algorithm(
            name="cavia",
            description="only a context vector adapts, an input that starts at zero",
            source="Zintgraf et al. 2019, arXiv:1810.03642",
            fast="context",
            defaults={"inner": {"step_sizes": (10.0,)}},
        ),
        Algorithm(
            name="protomaml",
            description="the last layer starts at the prototypes of the support's classes",
            source="Triantafillou et al. 2020, arXiv:1903.03096",
            head="prototypes",
            outer="adam",
        ),
        Algorithm(
            name="leopard",
            description="the last layer is generated from the support; upper layers adapt",
            source="Bansal et al. 2020, arXiv:1911.03863",
            head="generated",
            fast="upper",
            learned_steps="layer",
            outer="adam",
        ),
        Algorithm(
            name="pretrained",
            description="reference: one policy for all tasks, no adaptation in training",
            source=_FINN,
            reference=True,
            defaults={"inner": {"steps": 0}},
        ),
        Algorithm(
            name="random",
            description="reference: the random initialization, which training leaves as it is",
            source=_FINN,
            reference=True,
            outer="none",
        ),
        Algorithm(
            name="oracle",
            description="reference: the policy sees the task vector",
            source=_FINN,
            reference=True,
            observes_task=True,
            defaults={"inner": {"steps": 0}},
        ),
    )
}


def find_algorithm(name: str) -> Algorithm:
    """Return a row by name.

    Raises:
        UserError: there is none.
    """
    check_name("an algorithm", name, "such as 'maml-trpo'")
    if name not in ALGORITHMS:
        raise UserError(
            f"no algorithm {name!r}{did_you_mean(name, ALGORITHMS)}"
            f" (algorithms: {', '.join(ALGORITHMS)})"
        )
    return ALGORITHMS[name]
