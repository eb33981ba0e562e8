"""Setup of a policy: its task family, algorithm and model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from metarl.algorithms import Algorithm, algorithms, find_algorithm
from metarl.algorithms.algorithm import SECTIONS
from metarl.algorithms.named_parts import find_baseline, find_outer
from metarl.domains.domain import Domain, ModelOptions
from metarl.domains.lookup import DOMAINS, domain_named
from metarl.domains.reinforcement import PolicyOptions
from metarl.envs.errors import UserError, did_you_mean
from metarl.models.distributions import find_distribution
from metarl.models.network_parts import find_network
from metarl.parts import Part
from metarl.plain_json import plain
from metarl.sampling.spaces import ActionMode

CHOICES = ("outer", "baseline", "policy.network", "policy.distribution")
"""Parts that are options themselves: a name, `module:attribute` or an object."""


def owners(key: str) -> str:
    """Return "; it is an option of promp" for an option of other algorithms, else ""."""
    names = [
        name
        for name, found in algorithms().items()
        if any(key in map(part.key, part.option_fields()) for part in found.sections().values())
    ]
    return f"; it is an option of {', '.join(names[:3])}" if names else ""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Task family, algorithm and model of a policy."""

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

    def __post_init__(self) -> None:
        # As in a file of the run: tuples become lists there.
        object.__setattr__(self, "family_options", plain(self.family_options))

    @staticmethod
    def of(
        family: str,
        algorithm: str | Algorithm,
        family_options: Mapping[str, Any] | None = None,
        preset: str | None = None,
    ) -> Setup:
        """Return the setup with the defaults of an algorithm on a family."""
        domain = domain_named(family, family_options)
        found, policy = domain.algorithm(find_algorithm(algorithm), family), domain.model_options()
        if found.network:
            network = find_network(found.network, domain.networks)
            policy = dataclasses.replace(policy, network=network)
        return Setup(
            family=family,
            family_options=family_options or {},
            preset=preset,
            algorithm=found,
            policy=policy,
        )

    @property
    def domain(self) -> Domain:
        """Reinforcement or supervised learning."""
        return DOMAINS["reinforcement" if self.policy.policies else "supervised"]

    @property
    def action_mode(self) -> ActionMode:
        """Mapping of a policy's actions to the environment's bounds."""
        assert isinstance(self.policy, PolicyOptions)
        return self.policy.action

    def sections(self) -> dict[str, Part]:
        """Return the parts with options: the policy and its parts, and the algorithm's parts."""
        return {**self.policy.parts, "policy": self.policy, **self.algorithm.sections()}

    def options(self) -> dict[str, Any]:
        """Return every option's value by key, such as "inner.steps"."""
        values: dict[str, Any] = {}
        for name, part in self.sections().items():
            if name in CHOICES:
                values[name] = part.source or part.name  # type: ignore[attr-defined]
            values |= {part.key(option): value for option, value in part.options().items()}
        return values

    def with_options(
        self, values: Mapping[str, Any], *, known_only: bool = False, other: Collection[str] = ()
    ) -> Setup:
        """Return the setup with other values, by key.

        Args:
            values: values by key, such as "inner.steps".
            known_only: ignore the values of options that the setup does not have.
            other: keys of options that are not part of the setup, for suggestions.

        Raises:
            UserError: an option is unknown, or a value has another type or is out of range.
        """
        setup = self
        for name in CHOICES:  # a part first, then its options
            if name in values and name in setup.sections():
                setup = setup._with_part(name, values[name])
        sections = setup.sections()
        owner = {part.key(o): name for name, part in sections.items() for o in part.option_fields()}
        chosen = [name for name in CHOICES if name in sections]
        changed: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            if key in owner:
                changed.setdefault(owner[key], {})[key.rpartition(".")[2]] = value
            elif key not in chosen and not known_only:
                known = [*other, *chosen, *owner]
                hint = owners(key) or did_you_mean(key, known)
                raise UserError(f"unknown option {key!r}{hint}")
        return setup._with_parts({n: sections[n].with_options(v) for n, v in changed.items()})

    def _with_part(self, name: str, what: Any) -> Setup:
        """Return the setup with another part. Options that both parts share keep their values."""
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

    def _with_parts(self, parts: Mapping[str, Part]) -> Setup:
        inside = {n.partition(".")[2]: p for n, p in parts.items() if n in self.policy.parts}
        policy = dataclasses.replace(parts.get("policy", self.policy), **inside)
        algorithm = {n: p for n, p in parts.items() if n in SECTIONS}
        return dataclasses.replace(
            self, policy=policy, algorithm=dataclasses.replace(self.algorithm, **algorithm)
        )

    def to_json(self, run: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the setup as plain JSON values.

        Args:
            run: other options by key, which come first.
        """
        return plain(
            {
                "family": self.family,
                "family_options": self.family_options,
                "preset": self.preset,
                "algorithm": self.algorithm.source if self.is_named else self.algorithm.name,
                "named": self.is_named,
                **({"unnamed_parts": unnamed} if (unnamed := self._unnamed_parts()) else {}),
                "options": {**(run or {}), **self.options()},
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
        found = Setup.of(self.family, source, self.family_options)
        own = {k: v for k, v in self.options().items() if k.partition(".")[0] in SECTIONS}
        try:
            return found.with_options(own).algorithm == self.algorithm
        except UserError:  # a part of a named algorithm was replaced
            return False
