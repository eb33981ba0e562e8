"""Public names by page of the API reference."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import metarl
import metarl.envs
from metarl.algorithms import algorithms


@dataclass(frozen=True)
class Group:
    """Public names of one page."""

    title: str
    names: tuple[str, ...] = ()
    """Dotted names, in their order on the page."""
    bases: tuple[str, ...] = ()
    """Dotted names of classes whose public subclasses in metarl are on the page too."""


GROUPS = {
    "training": Group(
        "Training",
        (
            "metarl.train",
            "metarl.resolve",
            "metarl.Config",
            "metarl.Setup",
            "metarl.config.options.RunOptions",
            "metarl.RunError",
            "metarl.CheckpointError",
            "metarl.UserError",
            "metarl.envs.errors.NonFiniteError",
            "metarl.distributed.process_group.ProcessGroupError",
        ),
    ),
    "policies": Group(
        "Policies",
        (
            "metarl.load",
            "metarl.MetaPolicy",
            "metarl.load_policy",
            "metarl.Policy",
            "metarl.OnlineAdapter",
            "metarl.policies.adapted_predictor.AdaptedPredictor",
        ),
    ),
    "evaluation": Group(
        "Evaluation",
        (
            "metarl.evaluate",
            "metarl.EvaluationResult",
            "metarl.Curve",
            "metarl.evaluation.curves.Difference",
            "metarl.evaluation.curves.Measure",
        ),
    ),
    "callbacks": Group(
        "Callbacks",
        (
            "metarl.Callback",
            "metarl.training.callbacks.Iteration",
            "metarl.training.callbacks.Run",
            "metarl.EarlyStopping",
            "metarl.KeepBest",
        ),
    ),
    "families": Group(
        "Task families",
        (
            "metarl.envs.family.Family",
            "metarl.envs.TaskFamily",
            "metarl.envs.GymnasiumFamily",
            "metarl.envs.MujocoFamily",
            "metarl.envs.SupervisedFamily",
            "metarl.envs.FunctionFamily",
            "metarl.envs.FewShotFamily",
            "metarl.envs.TrialFamily",
            "metarl.envs.TaskDistribution",
            "metarl.envs.Uniform",
            "metarl.envs.Finite",
            "metarl.envs.register",
            "metarl.envs.make_family",
            "metarl.envs.family_names",
            "metarl.check_task_family",
            "metarl.envs.Finding",
            "metarl.envs.TaskVectorEnv",
            "metarl.envs.mujoco.simulation.Sim",
            "metarl.envs.mujoco.simulation.Step",
        ),
    ),
    "algorithms": Group(
        "Algorithms",
        (
            "metarl.Algorithm",
            "metarl.algorithms.algorithms",
            "metarl.algorithms.find_algorithm",
            "metarl.parts.Part",
            "metarl.parts.fixed",
            "metarl.parts.Range",
            "metarl.parts.tunable",
        ),
    ),
    "inner": Group("Inner updates", bases=("metarl.learning.inner_update.InnerUpdate",)),
    "losses": Group(
        "Losses and samples",
        (
            "metarl.learning.losses.log_likelihood",
            "metarl.learning.losses.likelihood_ratio",
            "metarl.learning.losses.clipped_ratio",
            "metarl.learning.losses.dice",
            "metarl.models.samples.Samples",
            "metarl.learning.losses.Batch",
            "metarl.models.samples.Examples",
            "metarl.sampling.trajectories.Rollout",
        ),
    ),
    "meta-gradients": Group(
        "Meta-gradients",
        (
            "metarl.learning.meta_gradients.problem.Problem",
            "metarl.learning.meta_gradients.problem.Objective",
            "metarl.learning.meta_gradients.problem.Sampled",
            "metarl.learning.meta_gradients.problem.Evaluation",
        ),
        ("metarl.learning.meta_gradients.problem.MetaGradient",),
    ),
    "outer": Group("Outer optimizers", bases=("metarl.learning.outer.OuterOptimizer",)),
    "baselines": Group(
        "Advantages and baselines",
        (
            "metarl.learning.advantages.Advantages",
            "metarl.learning.advantages.gae",
        ),
        ("metarl.learning.baselines.Baseline",),
    ),
    "distributions": Group("Distributions", bases=("metarl.Distribution",)),
    "networks": Group(
        "Networks",
        ("metarl.models.modules.ModuleNetwork", "metarl.models.networks.MLP"),
        ("metarl.models.network_parts.NetworkPart",),
    ),
}
"""Pages of the API reference, by file name."""


def find(name: str) -> Any:
    """Return the object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def names_of(group: Group) -> list[str]:
    """Return all names of a page: those that it lists, then the base classes and subclasses."""
    algorithms()  # parts are also defined in the files of algorithms
    found = list(group.names)
    for base in group.bases:
        found.append(base)
        found += [
            name
            for kind in _subclasses(find(base))
            if (name := f"{kind.__module__}.{kind.__qualname__}") not in found
        ]
    return found


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        module, name = sys.modules[child.__module__], child.__qualname__
        public = child.__module__.startswith("metarl.") and not name.startswith("_")
        if public and getattr(module, name, None) is child:  # not one that was made in a function
            yield child
        yield from _subclasses(child)


def exported() -> set[str]:
    """Return the names that `metarl` and `metarl.envs` export."""
    of_metarl = {f"metarl.{name}" for name in metarl.__all__}
    of_envs = {f"metarl.envs.{name}" for name in metarl.envs.__all__}
    return of_metarl | {name for name in of_envs if name.replace(".envs", "") not in of_metarl}
