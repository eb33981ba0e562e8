"""What is wrong with a task family, in words that say what to do.

`check_task_family` plays a few episodes and returns all that it found, nothing where all is well.
The checks stand in `CHECKS`, in order, each with those that it builds on: it is left out where one
of them found a fault.
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
    """A name in `CHECKS`."""
    message: str
    severity: Severity = "fault"
    """"warning": training is possible, and the message names the consequence or the doubt."""

    def __post_init__(self) -> None:
        check_one_of("severity", self.severity, get_args(Severity))

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


@dataclass(frozen=True)
class Check:
    """A row of `CHECKS`."""

    words: str
    """What is so where nothing is found."""
    messages: Callable[[TaskFamily], Iterator[str]]
    """Gives what it finds; a `Doubt` is a warning."""
    needs: Sequence[str] = ()
    """Checks that must have found no fault."""


CHECKS = {
    "tasks": Check("drawn by the generator they are given, finite, not all the same", check_tasks),
    "environment": Check("can be made, reset and stepped", check_environment, ("tasks",)),
    "spaces": Check("a policy reads and acts in them, and every task has the same", check_spaces,
                    ("environment",)),
    "episodes": Check("are finite, within the spaces, and end at the horizon", check_episodes,
                      ("spaces",)),
    "seeding": Check("the same seed and actions give the same episode", check_seeding,
                     ("spaces",)),
    "gymnasium": Check("reset and step keep Gymnasium's rules", check_gymnasium,
                       ("episodes", "seeding")),
    "copies": Check("share no state", check_copies, ("episodes", "seeding")),
    "batch": Check("make_vec plays what make plays", check_batch, ("copies",)),
    "dependence": Check("observations or rewards depend on the task", check_dependence,
                        ("copies",)),
    "pickling": Check("the family can be sent to a worker process", check_pickling),
    "worker": Check("plays the same there", check_worker, ("environment", "pickling")),
}  # fmt: skip
"""What is checked, in order, by name."""


@dataclass(frozen=True)
class Checked:
    """What became of one check."""

    name: str
    findings: list[Finding]
    left_out: str | None = None
    """The check whose fault is the reason why this one was not made."""


def checks(family: TaskFamily) -> Iterator[Checked]:
    """Make all checks of a family that can be made, one after the other."""
    if not isinstance(family, TaskFamily):
        raise UserError(
            "check_task_family takes a TaskFamily (make_family gives that of a name), got"
            f" {kind_of(family)}"
        )
    told: list[str] = []
    blamed: dict[str, str] = {}  # by check: that whose fault stands in its way
    for name, check in CHECKS.items():
        reasons = [blamed[needed] for needed in check.needs if needed in blamed]
        if reasons:
            blamed[name] = reasons[0]
            yield Checked(name, [], reasons[0])
            continue
        findings = []
        try:
            with guard.user_code(), warnings.catch_warnings(), kept():
                warnings.simplefilter("ignore")  # Gymnasium's are heard in a check of their own
                for message in check.messages(family):
                    doubt = isinstance(message, Doubt)
                    findings.append(Finding(name, message, "warning" if doubt else "fault"))
        except Exception as error:  # a user's code may raise anything; the finding names it
            findings.append(Finding(name, raised(error)))
        # A worker process meets what was met here.
        findings = [f for f in findings if not any(message in f.message for message in told)]
        told += [finding.message for finding in findings]
        if any(finding.severity == "fault" for finding in findings):
            blamed[name] = name
        yield Checked(name, findings)


def check_task_family(family: TaskFamily) -> list[Finding]:
    """Return the faults of a family and warnings about it; an empty list if there are none.

    The `severity` of each says which it is. A family that only has warnings may be trained. The
    checks take seconds: they play episodes in this process and in a worker process.
    """
    return [finding for checked in checks(family) for finding in checked.findings]
