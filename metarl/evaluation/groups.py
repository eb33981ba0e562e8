"""Policies of an evaluation. Seeds of one policy share a row; references come last."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metarl.algorithms import algorithms
from metarl.envs.errors import UserError, kind_of
from metarl.policies.loading import load
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.fingerprint import changes
from metarl.runs.folder import alike, but_seed, group_names

What = MetaPolicy | str | Path

START = "random"
"""Name of the row of the random initialization that an evaluation adds."""


def grouped(what: Sequence[str | Path]) -> dict[str, dict[str, MetaPolicy]]:
    """Load policies. Policies that differ only in the training seed form one group.

    The name of a group is the common prefix of its members' names, or the reference's name. The
    first group is not a reference, if there is another group.

    Returns:
        for each group by name, its members by the argument that they were loaded from.
    """
    names = list(map(str, what))
    loaded = [load(name) for name in names]
    same = alike(list(map(_setting, loaded)), [member.run_options.seed for member in loaded])
    groups = [{names[i]: loaded[i] for i in group} for group in same]
    found = [next(iter(group.values())).algorithm for group in groups]
    called = {}  # a reference has its own name; a second one is named like other policies
    for i, algorithm in enumerate(found):
        if algorithm.reference and algorithm.name not in called.values():
            called[i] = algorithm.name
    free = [i for i in range(len(groups)) if i not in called]
    taken = {name for name, algorithm in algorithms().items() if algorithm.reference}
    given = group_names([list(groups[i]) for i in free], taken)
    called |= dict(zip(free, given, strict=True))
    named = {called[i]: group for i, group in enumerate(groups)}

    def is_reference(item: tuple[str, dict[str, MetaPolicy]]) -> bool:
        return next(iter(item[1].values())).algorithm.reference

    return dict(sorted(named.items(), key=is_reference))


def seeds_of(what: What | Sequence[What], name: str) -> list[MetaPolicy]:
    """Load the seeds of one policy.

    Raises:
        UserError: no policy is given, or policies differ in more than the seed.
        CheckpointError: a policy cannot be loaded.
    """
    alone = isinstance(what, (MetaPolicy, str, os.PathLike)) or not isinstance(what, Iterable)
    given: Any = [what] if alone else what
    several: list[Any] = list(given)
    if not several:
        raise UserError(f"{name}: no policy given")
    members = [one if isinstance(one, MetaPolicy) else load(one) for one in several]
    if any(_setting(member) != _setting(members[0]) for member in members):
        raise UserError(f"{name}: these policies differ in more than the seed")
    for member in members[1:]:
        if found := changes(members[0].trained_on, member.trained_on):
            raise UserError(
                f"{name}: policies trained on different versions of {members[0].setup.family}:"
                f" {'; '.join(found)}; evaluate them one by one"
            )
    return members


def _setting(policy: MetaPolicy) -> Any:
    """Return what seeds of one policy have in common. An algorithm may have no importable name."""
    return but_seed(policy.record["config"]), policy.setup


def references_of(
    references: Mapping[str, What | Sequence[What]] | None, first: MetaPolicy, name: str
) -> dict[str, list[MetaPolicy]]:
    """Load references by name.

    Args:
        first: policy for the comparison.
        name: name of its row.

    Raises:
        UserError: a reference belongs to another family, or its name is used by another row.
        CheckpointError: a reference cannot be loaded.
    """
    if references is not None and not isinstance(references, Mapping):
        raise UserError(f"references must be policies by name, got {kind_of(references)}")
    others = {key: seeds_of(other, key) for key, other in (references or {}).items()}
    family, options = first.setup.family, dict(first.setup.family_options)
    for key, group in others.items():
        setup = group[0].setup
        if (setup.family, dict(setup.family_options)) != (family, options):
            raise UserError(
                f"{key} was trained on {setup.family} {dict(setup.family_options)}, not on"
                f" {family} {options}: their returns are not comparable"
            )
        if key == name:
            raise UserError(f"a reference and the policy are both called {key!r}")
    adds = all(g[0].algorithm.role != "untrained" for g in ([first], *others.values()))
    for key in (name, *others):
        made_here = key == "nearest prototype" or key.startswith("from scratch")
        if made_here or (key == START and adds):
            raise UserError(f"{key!r} is the name of a row that the evaluation adds: rename it")
    return others
