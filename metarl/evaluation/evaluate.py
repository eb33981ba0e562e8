"""Evaluation of adaptation: returns after 0 ... K inner steps on held-out tasks.

Returns after k steps come from separate episodes: K steps take K + 1 samples. The policy adapts to
each task with the same inner loop as in training. References are evaluated on the same tasks with
the same random numbers. A random initialization is always included, other references on request.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from numpy.typing import ArrayLike

from metarl.config.options import available_threads
from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.envs.errors import NonFiniteError, UserError
from metarl.envs.family import Family
from metarl.envs.registry import find_family
from metarl.evaluation.curves import Curve
from metarl.evaluation.evaluator import EPISODES, STEPS, Evaluator, Options, Sizes
from metarl.evaluation.experience import ExperienceCurve, experience_curves
from metarl.evaluation.groups import START, What, references_of, seeds_of
from metarl.evaluation.reinforcement import PolicyEvaluator
from metarl.evaluation.results import EvaluationResult
from metarl.evaluation.scratch import LEARNING_RATE
from metarl.evaluation.step_sizes import StepSizes
from metarl.evaluation.supervised import PredictorEvaluator
from metarl.evaluation.tasks import Split, TaskChoice
from metarl.learning.inner_update import checked_sizes
from metarl.models.settings import own_settings
from metarl.policies.loading import random_meta_policy
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.fingerprint import fingerprint

EVALUATORS: Mapping[str, type[Evaluator]] = {
    "reinforcement": PolicyEvaluator,
    "supervised": PredictorEvaluator,
}
"""By the domain of a family."""


@own_settings()
def evaluate(
    meta_policy: What | Sequence[What],
    *,
    tasks: int | ArrayLike = 40,
    family_options: Mapping[str, Any] | None = None,
    episodes: int = EPISODES,
    steps: int | None = None,
    seed: int = 0,
    step_sizes: Sequence[float] | None = None,
    references: Mapping[str, What | Sequence[What]] | None = None,
    random_step_sizes: Sequence[float] | None = None,
    pretrained_step_sizes: Sequence[float] | None = None,
    tune_step_sizes: bool = False,
    deterministic: bool = False,
    drawn: bool = False,
    split: Split = "test",
    threads: int | None = None,
    workers: int = 0,
    experience: int = 0,
    episodes_per_step: Sequence[int] | None = None,
    from_scratch: bool = False,
    scratch_learning_rate: float = LEARNING_RATE,
    name: str = "this policy",
    process_group: ProcessGroup = ALONE,
) -> EvaluationResult:
    """Measure a meta-policy's returns after 0 ... `steps` inner steps on held-out tasks.

    A policy of RL^2 takes no inner steps. Its returns after k steps are those of the episode after
    k episodes of a trial; `episodes` counts trials.

    Returns:
        an `EvaluationResult`. `table()` and `verdict()` return text, `to_json()` returns the
        content of evaluation.json, `to_frame()` has a row for each episode. `curve.per_task`
        contains the returns [tasks, steps + 1], `references` the curves of references by name.

    Args:
        meta_policy: a meta-policy, or an argument of `load`; or several seeds of one.
        tasks: number of held-out tasks; repeated if fewer different tasks exist. Or chosen tasks,
            [n, task_dim]; they may lie outside the training tasks.
        family_options: options of the family that differ from training, for instance another
            horizon or task range. Observations, actions and task components must stay the same.
        episodes: episodes per task, for each inner step and for each measured return.
        steps: number of inner steps; by default 3, or the episodes of a training trial, less one.
        seed: seed of the episodes and of drawn tasks; the same for every policy.
        step_sizes: one for each step, the last repeated; by default the policy's step sizes.
        references: other policies of the family, evaluated on the same tasks. An untrained one
            replaces the default random initialization. With an oracle, which takes no steps, the
            gap closed is known.
        random_step_sizes: step sizes of the random initialization; by default its preset's, or the
            policy's.
        pretrained_step_sizes: step sizes of pretrained references; by default their preset's, or
            their own.
        tune_step_sizes: choose the first step size for each policy, including references, by the
            return after the first step on the same number of validation tasks. Later steps use half
            of it. Given or learned sizes are kept.
        deterministic: act with the mean instead of a sample, only for the measured returns.
        drawn: sample the tasks at random, as in the papers. By default, they cover the test split
            evenly, which estimates the mean over the split with less variance.
        split: "validation" uses other tasks and episodes, for choosing between policies.
        threads: threads for physics and updates; by default one per available processor. Results do
            not depend on their number.
        workers: processes for environments without a native backend; 0 steps them in this process.
        experience: also measure returns against experience, up to this number of episodes on each
            task; training from scratch has ten times as much. 0: not measured.
        episodes_per_step: numbers of episodes per inner step, each with its own curve against
            experience; by default 1, 5, 10 and 20, up to `experience`. Adaptation with fewer than
            `episodes` is repeated until as many returns are measured. The step sizes are the same.
        from_scratch: also train on each task from scratch, with the env steps of adaptation and
            with ten times as many. Also train with PPO of stable-baselines3, if it is installed.
        scratch_learning_rate: learning rate of the built-in training from scratch.
        name: name of the policy in tables and figures.
        process_group: processes that share the tasks; all return the complete result.

    Raises:
        UserError: a number is out of range, the family cannot be created, a reference belongs to
            another family, or adaptation leads to numbers that are not finite.
        CheckpointError: a policy cannot be loaded.
    """
    members = seeds_of(meta_policy, name)
    first = members[0]
    if steps is None:
        steps = STEPS if first.algorithm.trial is None else first.algorithm.trial.episodes - 1
    options = Options(
        episodes=episodes, steps=steps, seed=seed, deterministic=deterministic, workers=workers,
        experience=experience, episodes_per_step=episodes_per_step,
    )  # fmt: skip
    if tune_step_sizes and split == "validation":
        raise UserError("tune_step_sizes uses the validation tasks: evaluate on split 'test'")
    _check_learning_rate(scratch_learning_rate, from_scratch)
    given = {
        "step_sizes": step_sizes, "random_step_sizes": random_step_sizes,
        "pretrained_step_sizes": pretrained_step_sizes,
    }  # fmt: skip
    sizes = StepSizes({key: checked_sizes(key, value) for key, value in given.items()})
    rows = {name: members, **references_of(references, first, name)}
    policies = [group[0] for group in rows.values()]
    sizes.check(policies[1:])
    if options.experience and all(p.algorithm.role == "oracle" for p in policies):
        raise UserError("experience has no effect: an oracle observes its task and learns nothing")
    family, changes = _evaluated_family(policies, family_options)
    kind = EVALUATORS[family.domain]
    kind.require(family, options, process_group)
    choice = TaskChoice.of(family.tasks, tasks, seed=options.seed, drawn=drawn, split=split)
    used, key = choice.tasks(split)
    threads = available_threads() if threads is None else threads
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group.errors_shared())
        pool = stack.enter_context(ChunkPool(threads, process_group))
        new = partial(kind, family, used, key)
        evaluator = new(options, pool)
        stack.callback(evaluator.close)
        if tune_step_sizes and options.steps:
            one_step = replace(options, steps=1, deterministic=False)
            sizes.tuner = kind(family, *choice.tasks("validation"), one_step, pool, check=False)
            stack.callback(sizes.tuner.close)
        try:
            sizes_of = _sizes(sizes, rows)
            curves = _policies(evaluator, sizes, sizes_of, rows)
            against = []
            if options.experience:
                few = partial(new, pool=pool, check=False)
                against += experience_curves(few, options, rows, sizes_of)
            if from_scratch and (options.steps or options.experience):
                trained, longer = evaluator.scratch(first, scratch_learning_rate)
                curves |= trained
                against += [ExperienceCurve(key, curve) for key, curve in longer.items()]
            curves = evaluator.settled(curves | evaluator.own_rows())
        except NonFiniteError as error:
            raise UserError(f"{family.name}: {error}") from error
    setting = {
        "family": first.config.family,
        "family_options": {**first.config.family_options, **(family_options or {})},
        "family_overrides": dict(family_options or {}),
        "family_changes": changes,
        "preset": first.config.preset,
        "components": list(family.tasks.names),
        "units": dict(family.units),
        "unit": first.config.domain.unit,
        "tasks": used.tolist(),
        "chosen": choice.chosen is not None,
        "outside_training": (~first.source.tasks.contains(used)).tolist(),
        **evaluator.setting(),
        "seed": options.seed,
        "split": split,
        "drawn": drawn,
        "deterministic": deterministic,
        "trained": dict(first.provenance),
        "policy": first.digest,
        "tried_step_factors": sizes.to_json(),
    }
    if first.algorithm.trial is not None:
        each = f"{options.steps + 1} episodes of {setting['horizon']} steps"
        setting["samples"] = f"{options.episodes} trials of {each}"
    if options.experience:
        setting["experience"] = options.experience
        setting["episodes_per_step"] = options.step_episodes()
    return EvaluationResult(curves.pop(name), curves, setting, name, against)


def _check_learning_rate(rate: float, used: bool) -> None:
    if not (math.isfinite(rate) and rate > 0.0):
        raise UserError(f"scratch_learning_rate must be positive, got {rate}")
    if rate != LEARNING_RATE and not used:
        raise UserError("scratch_learning_rate has no effect without from_scratch")


def _evaluated_family(
    policies: Sequence[MetaPolicy], overrides: Mapping[str, Any] | None
) -> tuple[Family, list[str]]:
    """Return the evaluation family and its differences from training, in words.

    Args:
        overrides: options that differ from training.

    Raises:
        UserError: a policy cannot be used with it.
    """
    given = overrides or {}
    if not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
        raise UserError(f"family_options must be values by name, got {overrides!r}")
    first = policies[0]
    family = first.source
    spaces_of = EVALUATORS[family.domain].spaces
    if overrides:
        # Files of older versions contain no fingerprint of the family.
        before = fingerprint(family, spaces_of(family))
        policies = [replace(p, trained_on={**before, **p.trained_on}) for p in policies]
        config = first.config
        family = find_family(config.family, **{**config.family_options, **overrides})
    else:
        for policy in policies[1:]:
            policy.check_family(family)
    spaces = spaces_of(family) if any("actions" in p.trained_on for p in policies) else None
    changes = [policy.family_changes(family, spaces) for policy in policies]
    return family, changes[0]


def _sizes(sizes: StepSizes, rows: Mapping[str, Sequence[MetaPolicy]]) -> dict[str, Sizes]:
    """Return the step sizes of policies by name; the first one is the evaluated policy."""
    (name, own), *others = rows.items()
    return {name: sizes.own(name, own)} | {k: sizes.reference(k, group) for k, group in others}


def _policies(
    evaluator: Evaluator,
    sizes: StepSizes,
    sizes_of: Mapping[str, Sizes],
    rows: Mapping[str, Sequence[MetaPolicy]],
) -> dict[str, Curve]:
    """Return the curves of policies by name; add a random initialization if all are trained."""
    curves = {key: evaluator.curve(members, sizes_of[key]) for key, members in rows.items()}
    own = next(iter(rows.values()))
    if all(members[0].algorithm.role != "untrained" for members in rows.values()):
        start = random_meta_policy(own[0], evaluator.options.seed)
        curve = evaluator.curve([start], sizes.start(start))
        curves[START] = replace(curve, algorithm=START, role="untrained")
    return curves
