"""How well a meta-policy adapts: returns after 0 ... K inner steps on held-out tasks.

Returns after k steps come from episodes of their own: K steps take K + 1 samples. The policy is
adapted afresh on each task, by the same inner loop as in training. References stand beside it on
the same tasks and episodes' seeds: a random initialization always, others as given.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from metarl.config.options import available_threads
from metarl.config.resolve import reference_step_sizes
from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.domains.reinforcement import spaces_of
from metarl.envs.errors import NonFiniteError, UserError, check_one_of, check_whole, kind_of
from metarl.envs.family import Family, TaskFamily
from metarl.envs.supervised.family import SupervisedFamily
from metarl.envs.supervised.few_shot import FewShotFamily
from metarl.evaluation.reinforcement import PolicyProtocol, Sizes
from metarl.evaluation.results import REFERENCES, EvaluationResult
from metarl.evaluation.scratch import LEARNING_RATE
from metarl.evaluation.statistics import Floats
from metarl.evaluation.supervised import SupervisedProtocol
from metarl.models.settings import own_settings
from metarl.policies.loading import load
from metarl.policies.meta_policy import MetaPolicy, checked_step_sizes, random_meta_policy
from metarl.runs.fingerprint import changes
from metarl.runs.folder import alike, but_seed, group_names
from metarl.sampling.rollouts import RandomKey

What = MetaPolicy | str | Path

EPISODES = 20
"""A task, unless others are asked for."""

FACTORS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Of a policy's own step in training: sizes among which `tune_step_sizes` chooses."""


def grouped(what: Sequence[str | Path]) -> dict[str, dict[str, MetaPolicy]]:
    """Load policies; those that were trained alike but for the seed make one group.

    A group has the common beginning of its members' names, or is called by the reference that it
    is. The first group is a policy to look at: references go after it, if there is any other.

    Returns:
        by the group's name, its members by what they were loaded from.
    """
    names = list(map(str, what))
    loaded = [load(name) for name in names]
    groups = [{names[i]: loaded[i] for i in group} for group in alike([m.config for m in loaded])]
    found = [next(iter(group.values())).algorithm for group in groups]
    called = {}  # a reference by its name; a second one of its kind as others are
    for i, algorithm in enumerate(found):
        if algorithm.reference and algorithm.name not in called.values():
            called[i] = algorithm.name
    free = [i for i in range(len(groups)) if i not in called]
    given = group_names([list(groups[i]) for i in free], REFERENCES)
    called |= dict(zip(free, given, strict=True))
    named = {called[i]: group for i, group in enumerate(groups)}

    def is_reference(item: tuple[str, dict[str, MetaPolicy]]) -> bool:
        return next(iter(item[1].values())).algorithm.reference

    return dict(sorted(named.items(), key=is_reference))


_AnyProtocol = PolicyProtocol | SupervisedProtocol


def _tuned(protocol: _AnyProtocol, members: Sequence[MetaPolicy]) -> dict[float, float]:
    """Return the measure after one step, mean of tasks and seeds, by the factor of its size.

    None are tried where the policy learned its sizes, or takes no step. A factor whose step is not
    finite has the worst, minus or plus infinity.
    """
    algorithm = members[0].algorithm
    if algorithm.inner.learns_step_sizes or algorithm.task_conditioned:
        return {}
    returns = {}
    for factor in FACTORS:
        try:
            returns[factor] = protocol.curve(members, _scaled(factor)).returns[1]
        except NonFiniteError:
            returns[factor] = -math.inf * protocol.measure.sign
    return returns


def _scaled(factor: float) -> Callable[[MetaPolicy], Sequence[float]]:
    """Return the sizes of a policy's steps: a factor of its own in training, then half of that."""

    def sizes(policy: MetaPolicy) -> Sequence[float]:
        first = factor * policy.training_step_sizes[0]
        return (first, first / 2)

    return sizes


def _members(what: What | Sequence[What], name: str) -> list[MetaPolicy]:
    alone = isinstance(what, (MetaPolicy, str, os.PathLike)) or not isinstance(what, Iterable)
    given: Any = [what] if alone else what
    several: list[Any] = list(given)
    if not several:
        raise UserError(f"{name}: no policy given")
    members = [one if isinstance(one, MetaPolicy) else load(one) for one in several]
    configs = [but_seed(member.config) for member in members]
    if any(config != configs[0] for config in configs):
        raise UserError(f"{name}: policies that differ by more than the seed are no one's seeds")
    for member in members[1:]:
        if found := changes(members[0].trained_on, member.trained_on):
            raise UserError(
                f"{name}: policies of one {configs[0].family}, but trained when it was another:"
                f" {'; '.join(found)}; evaluate them one by one"
            )
    return members


def _check_spaces(family: Family, policies: Sequence[MetaPolicy]) -> None:
    """Raise UserError unless a family's environments have the spaces that policies know."""
    known = [policy for policy in policies if "actions" in policy.trained_on]
    if known and isinstance(family, TaskFamily):
        spaces = spaces_of(family)
        for policy in known:
            policy.check_spaces(*spaces)


@own_settings()
def evaluate(
    meta_policy: What | Sequence[What],
    *,
    tasks: int = 40,
    episodes: int = EPISODES,
    steps: int = 3,
    seed: int = 0,
    step_sizes: Sequence[float] | None = None,
    references: Mapping[str, What | Sequence[What]] | None = None,
    random_step_sizes: Sequence[float] | None = None,
    pretrained_step_sizes: Sequence[float] | None = None,
    tune_step_sizes: bool = False,
    deterministic: bool = False,
    drawn: bool = False,
    split: Literal["test", "validation"] = "test",
    threads: int | None = None,
    workers: int = 0,
    from_scratch: bool = False,
    scratch_learning_rate: float = LEARNING_RATE,
    name: str = "this policy",
    process_group: ProcessGroup = ALONE,
) -> EvaluationResult:
    """Measure a meta-policy's returns after 0 ... `steps` inner steps on held-out tasks.

    Returns:
        an `EvaluationResult`: `table()` and `verdict()` are text, `to_json()` is the content of
        evaluation.json, `curve.per_task` has the returns [tasks, steps + 1], and `references` a
        curve for each reference by name.

    Args:
        meta_policy: a meta-policy, or what `load` takes; or several seeds of one.
        tasks: number of held-out tasks. If there are fewer different ones, they are repeated.
        episodes: episodes per task, for each inner step and for each measured return.
        seed: seed of the episodes, and of drawn tasks; the same for every policy.
        step_sizes: one for each step, the last repeated; by default the policy's own.
        references: other policies of the family, evaluated on the same tasks. One of the algorithm
            random takes the place of the random initialization that is always there; with an
            oracle, which takes no steps, the gap closed is known.
        random_step_sizes: step sizes of the random initialization; by default its preset's, or the
            policy's.
        pretrained_step_sizes: step sizes of references of the algorithm pretrained; by default
            its preset's, or its own.
        tune_step_sizes: choose the first step's size for each policy, references included, by the
            return after it on as many validation tasks; later steps take half of it. Sizes that are
            given, or that a policy learned, are kept.
        deterministic: act by the mean instead of a sample, in the returns only.
        drawn: draw the tasks at random, as the papers do, instead of covering the test split
            evenly, which estimates the mean over the split with less variance.
        split: "validation" draws other tasks and episodes, for choosing between policies.
        threads: for physics and updates, by default one per available processor; results do not
            depend on their number.
        workers: processes for environments without a native backend; 0 steps them in this one.
        from_scratch: also train on each task from scratch, with the env steps of adaptation and
            with ten times as many; also by PPO of stable-baselines3, where it is installed.
        scratch_learning_rate: learning rate of the built-in training from scratch.
        name: what the policy is called in tables and pictures.
        ranks: processes that share the tasks; all return the whole result.

    Raises:
        UserError: a number is out of range, the family cannot be made, a reference is of another
            family, or adaptation leads to numbers that are not finite.
        CheckpointError: a policy cannot be loaded.
    """
    if references is not None and not isinstance(references, Mapping):
        raise UserError(f"references are policies by name, got {kind_of(references)}")
    members = _members(meta_policy, name)
    first = members[0]
    least_values = (("tasks", tasks, 1), ("episodes", episodes, 1), ("steps", steps, 0))
    for key, value, least in (*least_values, ("seed", seed, 0), ("workers", workers, 0)):
        check_whole(key, value, least)
    tasks, episodes, steps, seed, workers = map(int, (tasks, episodes, steps, seed, workers))
    check_one_of("split", split, ("test", "validation"))
    if tune_step_sizes and split == "validation":
        raise UserError("tune_step_sizes chooses on the validation tasks: evaluate on split 'test'")
    if not (math.isfinite(scratch_learning_rate) and scratch_learning_rate > 0.0):
        raise UserError(f"scratch_learning_rate must be positive, got {scratch_learning_rate}")
    if scratch_learning_rate != LEARNING_RATE and not from_scratch:
        raise UserError("scratch_learning_rate has no effect without from_scratch")
    step_sizes = checked_step_sizes("step_sizes", step_sizes)
    random_step_sizes = checked_step_sizes("random_step_sizes", random_step_sizes)
    pretrained_step_sizes = checked_step_sizes("pretrained_step_sizes", pretrained_step_sizes)
    family, config = first.source, first.config
    if isinstance(family, SupervisedFamily) and (deterministic or episodes != EPISODES):
        key = "deterministic" if deterministic else "episodes"
        raise UserError(f"{key} has no effect on the supervised tasks of {family.name}")
    if isinstance(family, SupervisedFamily) and process_group.size > 1:
        raise UserError(f"{family.name}: supervised tasks are evaluated on one rank")
    others = {key: _members(other, key) for key, other in (references or {}).items()}
    for key, reference in others.items():
        same = (reference[0].config.family, dict(reference[0].config.family_options))
        if same != (config.family, dict(config.family_options)):
            raise UserError(
                f"{key} was trained on {same[0]} {same[1]}, not on"
                f" {config.family} {dict(config.family_options)}: their returns do not compare"
            )
        if key == name:
            raise UserError(f"a reference and the policy are both called {key!r}")
        reference[0].check_family(family)
    _check_spaces(family, [first, *(reference[0] for reference in others.values())])
    if pretrained_step_sizes and not any(
        group[0].algorithm.name == "pretrained" for group in others.values()
    ):
        raise UserError("pretrained_step_sizes has no effect: no reference is a pretrained policy")
    start: list[MetaPolicy] = []
    if not any(m[0].algorithm.name == "random" for m in (members, *others.values())):
        start = [random_meta_policy(first, seed)]
    for key in (name, *others):
        made_here = key == "nearest prototype" or key.startswith("from scratch")
        if made_here or (key == "random" and start):
            raise UserError(f"{key!r} is what a row of the evaluation's own is called: rename it")

    def tasks_of(part: Literal["test", "validation"]) -> tuple[RandomKey, Floats]:
        address = RandomKey(seed, split=part)
        if part == "validation":
            if isinstance(family, FewShotFamily):
                return address, family.tasks.sample(address.tasks(), tasks, part)
            return address, family.tasks.sample(address.tasks(), tasks)
        if drawn:
            return address, family.tasks.sample(address.tasks(), tasks, "test")
        return address, family.tasks.grid(tasks)

    tried: dict[str, dict[float, float]] = {}

    def sizes_of(key: str, group: Sequence[MetaPolicy], given: Sizes, usual: Sizes) -> Sizes:
        if given or not tune_step_sizes or not steps:
            return given or usual or None
        tried[key] = _tuned(choosing, group)
        if not tried[key]:
            return None
        sign = choosing.measure.sign
        return _scaled(max(tried[key], key=lambda factor: sign * tried[key][factor]))

    address, goals = tasks_of(split)
    given = {"random": random_step_sizes, "pretrained": pretrained_step_sizes}
    count = available_threads() if threads is None else threads
    with process_group.errors_shared(), ChunkPool(count, process_group) as pool:

        def made(
            address: RandomKey, goals: Floats, steps: int, mode: bool, check: bool
        ) -> _AnyProtocol:
            if isinstance(family, SupervisedFamily):
                return SupervisedProtocol(family, goals, steps, address, pool)
            return PolicyProtocol(
                first.family, goals, episodes, steps, address, mode, pool, workers, check
            )

        protocol = choosing = made(address, goals, steps, deterministic, True)
        if tune_step_sizes:
            choosing = made(*tasks_of("validation"), 1, False, False)
        try:
            own = protocol.curve(members, sizes_of(name, members, step_sizes, None))
            results = {}
            for key, group in others.items():
                algorithm = group[0].algorithm.name
                usual = reference_step_sizes(group[0].config, algorithm)
                sizes = sizes_of(key, group, given.get(algorithm), usual)
                results[key] = protocol.curve(group, sizes)
            if start:
                usual = reference_step_sizes(config, "random") or step_sizes
                curve = protocol.curve(start, sizes_of("random", start, random_step_sizes, usual))
                results["random"] = dataclasses.replace(curve, algorithm="random")
            if from_scratch and steps:
                results |= protocol.scratch(first, scratch_learning_rate)
            if isinstance(protocol, SupervisedProtocol):
                results |= protocol.nearest_prototype()
            else:
                told = protocol.told_of({name: own, **results})
                own = told.pop(name)
                results = told
        except NonFiniteError as error:
            raise UserError(f"{family.name}: {error}") from error
        finally:
            protocol.close()
            choosing.close()

    setting = {
        "family": config.family,
        "family_options": dict(config.family_options),
        "preset": config.preset,
        "components": list(family.tasks.names),
        "units": dict(family.units),
        "tasks": goals.tolist(),
        **protocol.setting(),
        "seed": seed,
        "split": split,
        "drawn": drawn,
        "deterministic": deterministic,
        "trained": dict(first.provenance),
        "policy": first.digest,
        "tried_step_factors": {
            key: [[f, value if math.isfinite(value) else None] for f, value in returns.items()]
            for key, returns in tried.items()
        },
    }
    return EvaluationResult(own, results, setting, name)
