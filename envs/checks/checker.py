"""Checks of a task family; each finding says how to fix it.

`check_task_family` plays a few episodes and returns all findings. `CHECKS` lists the checks in
order, each with the checks that it needs. A check is skipped if one of these found a fault.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from metarl.envs import guard
from metarl.envs.checks.copies import check_copies, check_seeding
from metarl.envs.checks.environments import check_episodes, check_spaces, check_tasks
from metarl.envs.checks.global_generators import kept
from metarl.envs.checks.interface import check_environment, check_gymnasium
from metarl.envs.checks.tasks import (
    check_batch,
    check_dependence,
    check_pickling,
    check_worker,
)
from metarl.envs.checks.traces import Doubt, raised
from metarl.envs.errors import UserError, check_one_of, kind_of
from metarl.envs.family import TaskFamily

Severity = Literal["fault", "warning"]


@dataclass(frozen=True)
class Finding:
    """One fault of a family, or a warning about it, and how to fix it."""

    check: str
    """Name in `CHECKS`."""
    message: str
    """The fault and the remedy, in one line."""
    severity: Severity = "fault"
    """With "warning", training is possible; the message names the consequence or the doubt."""

    def __post_init__(self) -> None:
        check_one_of("severity", self.severity, get_args(Severity))

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


@dataclass(frozen=True)
class Check:
    """One check."""

    words: str
    """Statement that is true if the check finds nothing."""
    messages: Callable[[TaskFamily], Iterator[str]]
    """Yields messages of findings; a `Doubt` is a warning."""
    needs: Sequence[str] = ()
    """Checks that must find no fault first."""


CHECKS = {
    "tasks": Check("drawn by the given generator, finite, not all the same", check_tasks),
    "environment": Check("can be made, reset and stepped", check_environment, ("tasks",)),
    "spaces": Check("policies support them, and every task has the same", check_spaces,
                    ("environment",)),
    "episodes": Check("are finite, within the spaces, and end at the horizon", check_episodes,
                      ("spaces",)),
    "seeding": Check("the same seed and actions give the same episode", check_seeding,
                     ("spaces",)),
    "gymnasium": Check("reset and step keep Gymnasium's rules", check_gymnasium,
                       ("episodes", "seeding")),
    "copies": Check("share no state", check_copies, ("episodes", "seeding")),
    "batch": Check("make_vec and make give the same episodes", check_batch, ("copies",)),
    "dependence": Check("observations or rewards depend on the task", check_dependence,
                        ("copies",)),
    "pickling": Check("the family can be sent to a worker process", check_pickling),
    "worker": Check("gives the same episodes there", check_worker, ("environment", "pickling")),
}  # fmt: skip
"""All checks in order, by name."""


@dataclass(frozen=True)
class Checked:
    """Result of one check."""

    name: str
    findings: list[Finding]
    left_out: str | None = None
    """Check whose fault is the reason why this one was skipped."""


def checks(family: TaskFamily) -> Iterator[Checked]:
    """Run all possible checks of a family in order and yield their results."""
    if not isinstance(family, TaskFamily):
        raise UserError(
            "check_task_family needs a TaskFamily (make_family returns one by its name), got"
            f" {kind_of(family)}"
        )
    told: list[str] = []
    blamed: dict[str, str] = {}  # by check: the check whose fault prevents it
    for name, check in CHECKS.items():
        reasons = [blamed[needed] for needed in check.needs if needed in blamed]
        if reasons:
            blamed[name] = reasons[0]
            yield Checked(name, [], reasons[0])
            continue
        findings = []
        try:
            with guard.user_code(), warnings.catch_warnings(), kept():
                warnings.simplefilter("ignore")  # a separate check reports Gymnasium's warnings
                for message in check.messages(family):
                    doubt = isinstance(message, Doubt)
                    findings.append(Finding(name, message, "warning" if doubt else "fault"))
        except Exception as error:  # a user's code may raise anything; the finding names it
            findings.append(Finding(name, raised(error)))
        # A worker process finds the same faults again.
        findings = [f for f in findings if not any(message in f.message for message in told)]
        told += [finding.message for finding in findings]
        if any(finding.severity == "fault" for finding in findings):
            blamed[name] = name
        yield Checked(name, findings)


def check_task_family(family: TaskFamily) -> list[Finding]:
    """Return the findings about a family: faults and warnings, by their `severity`.

    A family that only has warnings may be trained. The checks take seconds, because they play
    episodes in this process and in a worker process.

    Args:
        family: the family; `make_family` returns one by its name.
    """
    return [finding for checked in checks(family) for finding in checked.findings]
