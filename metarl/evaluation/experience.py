"""Returns against experience: what a method reaches after some episodes on a new task.

An inner step can use few episodes or many: few come soon, many give a less noisy step. So each
number of episodes per step has its own curve. Adaptation with few episodes is repeated with other
random numbers, so that all curves are means of as many returns.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metarl.evaluation.curves import Curve, Experience
from metarl.evaluation.evaluator import Evaluator, Options, Sizes
from metarl.plain_json import finite
from metarl.policies.meta_policy import MetaPolicy


@dataclass(frozen=True)
class ExperienceCurve:
    """Returns of one method against experience on the task."""

    method: str
    """Name of the method, such as the name of a policy."""
    curve: Curve
    """Its `experience` is known."""
    episodes_per_step: int | None = None
    """Episodes per inner step; None for a method without inner steps."""

    @property
    def experience(self) -> Experience:
        """Episodes and env steps before each return."""
        assert self.curve.experience is not None
        return self.curve.experience

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a number that is not finite is null."""
        curve = self.curve
        return finite(
            {
                "method": self.method,
                "algorithm": curve.algorithm,
                "role": curve.role,
                "seeds": curve.seeds,
                "episodes_per_step": self.episodes_per_step,
                "episodes": self.experience.episodes,
                "env_steps": self.experience.env_steps,
                "returns": curve.returns,
                "ci95": [list(pair) for pair in curve.ci95],
                "per_task": curve.per_task.tolist(),
            }
        )


def experience_curves(
    make: Callable[[Options], Evaluator],
    options: Options,
    rows: Mapping[str, Sequence[MetaPolicy]],
    sizes: Mapping[str, Sizes],
) -> list[ExperienceCurve]:
    """Return the curves of policies up to the experience in `options`.

    A policy with memory takes no inner step. Its steps are episodes, and it has one curve. An
    oracle has none.

    Args:
        make: makes an evaluator.
        rows: seeds of each policy, by name.
        sizes: sizes of the inner steps, by name.
    """
    found = []
    for name, members in rows.items():
        algorithm = members[0].algorithm
        if algorithm.takes_inner_steps:
            for n in options.step_episodes():
                few = replace(options, episodes=n, steps=options.experience // n)
                with contextlib.closing(make(few)) as evaluator:
                    repeats = range(-(-options.episodes // n))
                    each = [evaluator.repeated(r).curve(members, sizes[name]) for r in repeats]
                found.append(ExperienceCurve(name, mean_curve(each), n))
        elif not algorithm.task_conditioned:
            episodes = replace(options, steps=options.experience)
            with contextlib.closing(make(episodes)) as evaluator:
                found.append(ExperienceCurve(name, evaluator.curve(members, None)))
    return found


def mean_curve(repeats: Sequence[Curve]) -> Curve:
    """Return the mean over independent repeats of an adaptation, with the returns of all episodes.

    A repeat whose every episode diverged is left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # from a mean over no values
        means = np.nanmean([curve.per_seed for curve in repeats], axis=0)
    episodes = [curve.per_episode for curve in repeats if curve.per_episode is not None]
    spent = [curve.experience for curve in repeats if curve.experience is not None]
    first = repeats[0]
    return Curve(
        first.step_sizes, means, first.algorithm, first.seeds, role=first.role,
        measure=first.measure, per_episode=np.concatenate(episodes, axis=3),
        experience=Experience(
            spent[0].episodes, np.mean([one.env_steps for one in spent], axis=0).tolist()
        ),
    )  # fmt: skip
