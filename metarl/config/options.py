"""Config of a run: its own options and the options of its parts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from metarl.algorithms import Algorithm, find_algorithm
from metarl.algorithms.algorithm import SECTIONS
from metarl.algorithms.named_parts import find_baseline, find_outer
from metarl.distributed.process_group import local_ranks
from metarl.domains.domain import Domain, ModelOptions
from metarl.domains.lookup import DOMAINS, domain_named
from metarl.domains.reinforcement import PolicyOptions
from metarl.envs.errors import UserError, did_you_mean
from metarl.learning.advantages import Advantages
from metarl.learning.baselines import Baseline
from metarl.learning.inner_update import InnerUpdate
from metarl.learning.meta_gradients.problem import MetaGradient
from metarl.learning.outer import OuterOptimizer
from metarl.models.distributions import find_distribution
from metarl.models.network_parts import find_network
from metarl.parts import Part, converted
from metarl.plain_json import plain
from metarl.sampling.spaces import ActionMode
from metarl.sampling.trials import Trials

CHOICES = ("outer", "baseline", "policy.network", "policy.distribution")
"""Parts that are options themselves: a name, `module:attribute` or an object."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Config of a training run.

    `metarl.resolve` returns the config of a preset, a family and an algorithm.

    Raises:
        UserError: a value is out of range.
    """

    family: str = ""
    """Task family: a name that `metarl families` lists, or module:attribute."""
    family_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the family; --family-options on the command line."""
    preset: str | None = None
    """Preset that sets the defaults; None: no preset."""
    algorithm: Algorithm = field(default_factory=lambda: find_algorithm("maml-trpo"))
    """Meta-learning algorithm: a name that `metarl algorithms` lists, or module:attribute. Its
    parts have the options inner.*, meta.*, outer.*, advantage.* and baseline.*."""
    policy: ModelOptions = field(default_factory=PolicyOptions)
    """Model of the policy or predictor, with the options policy.*."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Policy that the run started from, its iteration and checksum; empty: a random start."""
    iterations: int = 100
    """Meta-iterations in total, including those before a resume."""
    tasks: int = 40
    """Tasks per meta-iteration."""
    stratified: bool = False
    """Spread the tasks of an iteration evenly over their distribution instead of sampling them
    independently."""
    episodes: int = 20
    """Episodes per task, for each inner step and for the outer step."""
    seed: int = 0
    """Seed of all random numbers."""
    threads: int = field(default_factory=lambda: available_threads())
    """Threads for physics and update. Results do not depend on their number."""
    workers: int = 0
    """Worker processes for environments without a native backend; 0 steps them in this process.
    Results do not depend on their number."""
    worker_timeout: float = 60.0
    """Seconds after which an environment that does not return from a step is considered dead."""
    device: str = "cpu"
    """Device of the update: cpu, or cuda on a GPU."""
    checkpoint_every: int = 10
    """Iterations between kept checkpoints; the newest one is always kept."""

    own: ClassVar[tuple[str, ...]] = (
        "iterations", "tasks", "stratified", "episodes", "seed", "threads", "workers",
        "worker_timeout", "device", "checkpoint_every",
    )  # fmt: skip
    """Options of the run itself."""

    def __post_init__(self) -> None:
        for name in ("iterations", "tasks", "episodes", "threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0.0 < self.worker_timeout < math.inf:
            raise UserError(f"worker_timeout must be positive, got {self.worker_timeout}")
        # As in a file of the run: tuples become lists there.
        object.__setattr__(self, "family_options", plain(self.family_options))

    @property
    def inner(self) -> InnerUpdate:
        """The algorithm's inner update."""
        return self.algorithm.inner

    @property
    def meta(self) -> MetaGradient:
        """The algorithm's meta-gradient."""
        return self.algorithm.meta

    @property
    def outer(self) -> OuterOptimizer:
        """The algorithm's outer optimizer."""
        return self.algorithm.outer

    @property
    def advantage(self) -> Advantages | None:
        """Estimation of advantages; None on data sets."""
        return self.algorithm.advantage

    @property
    def baseline(self) -> Baseline | None:
        """The baseline; None on data sets."""
        return self.algorithm.baseline

    @property
    def trial(self) -> Trials | None:
        """Sampling of trials; None for single episodes."""
        return self.algorithm.trial

    @property
    def domain(self) -> Domain:
        """Reinforcement or supervised learning."""
        return DOMAINS["reinforcement" if self.policy.policies else "supervised"]

    @property
    def action_mode(self) -> ActionMode:
        """Mapping of a policy's actions to the environment's bounds."""
        assert isinstance(self.policy, PolicyOptions)
        return self.policy.action

    @property
    def hidden_options(self) -> tuple[str, ...]:
        """Options of the run that do not exist for its family."""
        return () if self.policy.policies else ("episodes", "workers", "worker_timeout")

    def sections(self) -> dict[str, Part]:
        """Return the parts with options: the policy and its parts, and the algorithm's parts."""
        return {**self.policy.parts, "policy": self.policy, **self.algorithm.sections()}

    def options(self) -> dict[str, Any]:
        """Return every option's value by key; options of parts have keys like "inner.steps"."""
        values = {k: getattr(self, k) for k in self.own if k not in self.hidden_options}
        for name, part in self.sections().items():
            if name in CHOICES:
                values[name] = part.source or part.name  # type: ignore[attr-defined]
            values |= {part.key(option): value for option, value in part.options().items()}
        return values

    def with_options(self, values: Mapping[str, Any], *, known_only: bool = False) -> Config:
        """Return the config with other values by key.

        Args:
            known_only: ignore the values of options that the config does not have.

        Raises:
            UserError: an option is unknown, or a value has another type or is out of range.
        """
        config = self
        for name in CHOICES:  # a part first, then its options
            if name in values and name in config.sections():
                config = config._with_part(name, values[name])
        known = config.options()
        owner = {
            part.key(option): name
            for name, part in config.sections().items()
            for option in part.option_fields()
        }
        run: dict[str, Any] = {}
        changed: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            if key not in known:
                if known_only:
                    continue
                raise UserError(f"unknown option {key!r}{did_you_mean(key, known)}")
            if key in owner:
                changed.setdefault(owner[key], {})[key.rpartition(".")[2]] = value
            elif key not in CHOICES:
                run[key] = converted(key, value, known[key])
        parts = {n: config.sections()[n].with_options(v) for n, v in changed.items()}
        return dataclasses.replace(config._with_parts(parts), **run)

    def _with_part(self, name: str, what: Any) -> Config:
        """Return the config with another part. Options that both parts share keep their values."""
        old = self.sections()[name]
        if what == (old.source or old.name):  # type: ignore[attr-defined]
            return self
        if name == "policy.network":
            part: Part = find_network(what, self.domain.networks)
        elif name == "policy.distribution":
            part = find_distribution(what)
        else:
            part = find_outer(what) if name == "outer" else find_baseline(what)
            domain = domain_named(self.family, self.family_options)
            algorithm = dataclasses.replace(self.algorithm, **{name: part})
            return dataclasses.replace(self, algorithm=domain.algorithm(algorithm, self.family))
        kept = {k: v for k, v in old.own_options().items() if k in part.option_fields()}
        return self._with_parts({name: part.with_options(kept | part.own_options())})

    def _with_parts(self, parts: Mapping[str, Part]) -> Config:
        inside = {n.partition(".")[2]: p for n, p in parts.items() if n in self.policy.parts}
        policy = dataclasses.replace(parts.get("policy", self.policy), **inside)
        algorithm = {n: p for n, p in parts.items() if n in SECTIONS}
        return dataclasses.replace(
            self, policy=policy, algorithm=dataclasses.replace(self.algorithm, **algorithm)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the config as plain JSON values."""
        origin = {"origin": self.origin} if self.origin else {}
        return plain(
            {
                "family": self.family,
                "family_options": self.family_options,
                "preset": self.preset,
                "algorithm": self.algorithm.source if self.is_named else self.algorithm.name,
                "named": self.is_named,
                **({"unnamed_parts": unnamed} if (unnamed := self._unnamed_parts()) else {}),
                **origin,
                "options": self.options(),
            }
        )

    def _unnamed_parts(self) -> list[str]:
        """Return the parts of the policy that cannot be found again by name."""
        unnamed = []
        fresh = dataclasses.replace(self, policy=self.domain.model_options())
        for name, part in self.policy.parts.items():
            try:
                found = fresh.with_options({name: self.options()[name]}).sections()[name]
                same = found.with_options(part.options()) == part
            except UserError:
                same = False
            if not same:
                unnamed.append(name)
        return unnamed

    @cached_property
    def is_named(self) -> bool:
        """Whether the algorithm can be found again by its name."""
        source = self.algorithm.source
        if not source:
            return False
        found = Config.of(self.family, source, self.family_options)
        own = {k: v for k, v in self.options().items() if k.partition(".")[0] in SECTIONS}
        try:
            return found.with_options(own).algorithm == self.algorithm
        except UserError:  # a part of a named algorithm was replaced
            return False

    @staticmethod
    def from_json(data: Mapping[str, Any], given: Config | None = None) -> Config:
        """Return the config from the result of `to_json`.

        Args:
            given: config with the algorithm and the parts that were given as objects.

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
        config = base.with_options(options)
        return dataclasses.replace(config, origin=data.get("origin", {}))

    @staticmethod
    def of(
        family: str,
        algorithm: str | Algorithm,
        family_options: Mapping[str, Any] | None = None,
        preset: str | None = None,
    ) -> Config:
        """Return the config with the defaults of an algorithm on a family."""
        domain = domain_named(family, family_options)
        found, policy = domain.algorithm(find_algorithm(algorithm), family), domain.model_options()
        if found.network:
            network = find_network(found.network, domain.networks)
            policy = dataclasses.replace(policy, network=network)
        return Config(
            family=family,
            family_options=family_options or {},
            preset=preset,
            algorithm=found,
            policy=policy,
        )


def _given_as_object(what: str, name: str, option: str) -> UserError:
    return UserError(
        f"{what} {name} was given as an object and cannot be imported: pass the config to"
        f" metarl.load, or train with {option} module:attribute"
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
