"""Algorithms, one row each: an inner loss, a meta-gradient and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from envs.errors import UserError
from envs.family import did_you_mean
from metarl.objectives import Loss, log_likelihood


@dataclass(frozen=True)
class Algorithm:
    """What one meta-learning algorithm is made of."""

    name: str
    description: str
    source: str
    inner_loss: Loss
    order: int
    """Order of the meta-gradient through the inner steps; 1 ignores their curvature."""


ALGORITHMS = {
    row.name: row
    for row in (
        Algorithm(
            "maml-trpo",
            "policy-gradient inner steps, exact second-order meta-gradient, TRPO outside",
            "Finn et al. 2017, arXiv:1703.03400",
            inner_loss=log_likelihood,
            order=2,
        ),
        Algorithm(
            "fomaml-trpo",
            "as maml-trpo, the inner steps' Jacobian taken for the identity",
            "Finn et al. 2017, section 5.2; Nichol et al. 2018, arXiv:1803.02999",
            inner_loss=log_likelihood,
            order=1,
        ),
    )
}


def find_algorithm(name: str) -> Algorithm:
    """Return a row by name.

    Raises:
        UserError: there is none.
    """
    if name not in ALGORITHMS:
        raise UserError(
            f"no algorithm {name!r}{did_you_mean(name, ALGORITHMS)}"
            f" (algorithms: {', '.join(ALGORITHMS)})"
        )
    return ALGORITHMS[name]
