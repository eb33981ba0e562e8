"""Config of a run: its own options, and the setup of the policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metarl.algorithms import Algorithm
from metarl.config.setup import Setup
from metarl.distributed.process_group import local_ranks
from metarl.envs.errors import UserError
from metarl.parts import Part, of_policies


@dataclass(frozen=True, kw_only=True)
class RunOptions(Part):
    """Options of the run itself: its length, its samples and the machine."""

    iterations: int = 100
    """Meta-iterations in total, including those before a resume."""
    tasks: int = 40
    """Tasks per meta-iteration."""
    stratified: bool = False
    """Spread the tasks of an iteration evenly over their distribution instead of sampling them
    independently."""
    episodes: int = of_policies(20)
    """Episodes per task, for each inner step and for the outer step."""
    seed: int = 0
    """Seed of all random numbers."""
    threads: int = field(default_factory=lambda: available_threads())
    """Threads for physics and update. Results do not depend on their number."""
    workers: int = of_policies(0)
    """Worker processes for environments without a native backend; 0 steps them in this process.
    Results do not depend on their number."""
    worker_timeout: float = of_policies(60.0)
    """Seconds after which an environment that does not return from a step is considered dead."""
    device: str = "cpu"
    """Device of the update: cpu, or cuda on a GPU."""
    checkpoint_every: int = 10
    """Iterations between kept checkpoints; the newest one is always kept."""

    def __post_init__(self) -> None:
        self.require_at_least(1, "iterations", "tasks", "episodes", "threads", "checkpoint_every")
        self.require_at_least(0, "workers", "seed")
        self.require_positive("worker_timeout")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Config of a training run.

    `metarl.resolve` returns the config of a preset, a family and an algorithm.

    Raises:
        UserError: a value is out of range.
    """

    setup: Setup = field(default_factory=Setup)
    """Task family, algorithm and model."""
    run: RunOptions = field(default_factory=RunOptions)
    """Options of the run itself."""

    @staticmethod
    def of(
        family: str,
        algorithm: str | Algorithm,
        family_options: Mapping[str, Any] | None = None,
        preset: str | None = None,
    ) -> Config:
        """Return the config with the defaults of an algorithm on a family."""
        setup = Setup.of(family, algorithm, family_options, preset)
        return Config(setup=setup, run=RunOptions(policies=setup.policy.policies))

    def sections(self) -> dict[str, Part]:
        """Return the parts with options: the run, the policy, the algorithm, and their parts."""
        return {"run": self.run, **self.setup.sections()}

    def options(self) -> dict[str, Any]:
        """Return every option's value by key; options of parts have keys like "inner.steps"."""
        return {**self.run.options(), **self.setup.options()}

    def with_options(self, values: Mapping[str, Any], *, known_only: bool = False) -> Config:
        """Return the config with other values, by key.

        Args:
            values: values by key; options of parts have keys like "inner.steps".
            known_only: ignore the values of options that the config does not have.

        Raises:
            UserError: an option is unknown, or a value has another type or is out of range.
        """
        own = self.run.option_fields()
        rest = {key: value for key, value in values.items() if key not in own}
        setup = self.setup.with_options(rest, known_only=known_only, other=own)
        run = self.run.with_options({k: v for k, v in values.items() if k in own})
        return Config(setup=setup, run=run)

    def to_json(self) -> dict[str, Any]:
        """Return the config as plain JSON values."""
        return self.setup.to_json(self.run.options())

    @staticmethod
    def from_json(data: Mapping[str, Any], given: Setup | None = None) -> Config:
        """Return the config from the result of `to_json`.

        Args:
            given: setup with the algorithm and the parts that were given as objects.

        Raises:
            UserError: the algorithm or an option is unknown, or a value is not allowed.
        """
        for key in ("family", "algorithm", "options"):
            if key not in data:
                raise UserError(f"the config has no {key!r}")
        algorithm, options = data["algorithm"], dict(data["options"])
        if not data.get("named", True):
            if given is None or given.algorithm.name != algorithm:
                raise _given_as_object("the algorithm", algorithm, "--algorithm")
            algorithm = given.algorithm
        for name in data.get("unnamed_parts", ()):
            label = options.pop(name)
            if given is None or given.options().get(name) != label:
                raise _given_as_object(name, label, f"--{name}")
            options[name] = given.sections()[name]
        base = Config.of(
            data["family"], algorithm, data.get("family_options", {}), data.get("preset")
        )
        return base.with_options(options)


def _given_as_object(what: str, name: str, option: str) -> UserError:
    return UserError(
        f"{what} {name} was given as an object and cannot be imported: give metarl.load or"
        f" metarl.load_policy the setup of the config that trained it, setup=config.setup, or train"
        f" with {option} module:attribute"
    )


def available_threads() -> int:
    """Return the number of processors that this process may use, including container limits.

    Processes of a group on the same machine share them.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="utf-8") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count or 1, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max((count or 1) // local_ranks(), 1)


def default_workers() -> int:
    """Return the default number of workers of a command, which can always start them."""
    processors = available_threads()
    return processors if processors > 1 else 0
