"""Transfer of meta-parameters from one policy to another run, on other tasks or settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metarl.envs.errors import UserError
from metarl.learning.adapter import is_step_size
from metarl.learning.baselines import Baseline
from metarl.models.networks import Params, copied
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.fingerprint import sizes_changed

_NOT_OF_THE_FUNCTION = ("policy.output_scale", "policy.initial_std", "policy.min_std")
"""Network options that affect only its initial values or a bound."""


def origin(name: str, policy: MetaPolicy, baseline: Baseline | None) -> dict[str, Any]:
    """Return a run's record of the policy that it starts from.

    Args:
        name: path or name of the policy; empty for an object.
        policy: the policy.
        baseline: baseline of the run. If the policy's is equal and has a state, the run starts with
            this state, and the record contains its names.
    """
    algorithm, family = policy.algorithm.name, policy.setup.family
    kept = list(policy.baseline) if policy.algorithm.baseline == baseline else []
    return {
        **({"baseline": kept} if kept else {}),
        "policy": name or f"{algorithm} on {family}",
        "family": family,
        "algorithm": algorithm,
        "iteration": policy.provenance.get("iteration"),
        "sha256": policy.digest,
    }


def transferred(policy: MetaPolicy, start: MetaPolicy, name: str) -> tuple[Params, list[str]]:
    """Return meta-parameters with the values of a policy, and its unused parameter names.

    `start` gives the parameters that the policy does not have, such as learned step sizes.

    Args:
        policy: policy to start from.
        start: random start of the new run.
        name: name of the policy, for messages.

    Raises:
        UserError: the policy has another network, or other sizes of observations or actions.
    """
    family = start.setup.family
    if policy.domain is not start.domain:
        raise UserError(
            f"init {name} is for {policy.domain.name} learning, but {family} is for"
            f" {start.domain.name} learning"
        )
    there, here = (_function(p.setup.options()) for p in (policy, start))
    for option in {**there, **here}:
        if there.get(option) != here.get(option):
            wanted, flag = _words(there, option), option.replace("_", "-")
            differs = f"init {name} has {option} {wanted}, but this run {_words(here, option)}"
            same = f"{differs}: use the same in the run"
            raise UserError(same, f"{same}, with --{flag} {wanted}")
    found = dict(start.params)
    for key, value in start.params.items():
        given = policy.params.get(key)
        if given is None and (is_step_size(key) or key == "log_std"):
            continue
        if given is None or given.shape != value.shape:
            shape = None if given is None else list(given.shape)
            reasons = sizes_changed(policy.trained_on, start.trained_on)
            raise UserError(
                f"init {name} does not fit {start.algorithm.name} on {family}: {key} is"
                f" {shape} there and {list(value.shape)} here"
                + (f" ({'; '.join(reasons)})" if reasons else "")
            )
        found[key] = given
    return copied(found), [key for key in policy.params if key not in found]


def _function(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that determine the function of the policy."""
    policy = {k: v for k, v in options.items() if k.startswith("policy.")}
    return {k: v for k, v in policy.items() if k not in _NOT_OF_THE_FUNCTION}


def _words(options: Mapping[str, Any], name: str) -> str:
    value = options.get(name, "none")
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
