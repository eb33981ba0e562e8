"""Meta-parameters of one policy as the start of another run, on other tasks or settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metarl.config.options import Config
from metarl.envs.errors import UserError
from metarl.learning.adapter import is_step_size
from metarl.models.networks import Params, copied
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.fingerprint import Fingerprint, sizes_changed

_NOT_OF_THE_FUNCTION = ("policy.output_scale", "policy.initial_std", "policy.min_std")
"""Options of the network that only its start, or a bound, depends on."""


def origin(name: str, policy: MetaPolicy) -> dict[str, Any]:
    """Return what a run records of the policy that it starts from.

    Args:
        name: path or name that it was given by; empty for an object.
        policy: the policy.
    """
    config = policy.config
    return {
        "policy": name or f"{config.algorithm.name} on {config.family}",
        "family": config.family,
        "algorithm": config.algorithm.name,
        "iteration": policy.provenance.get("iteration"),
        "sha256": policy.digest,
    }


def transferred(
    policy: MetaPolicy, config: Config, meta: Params, family: Fingerprint
) -> tuple[Params, list[str]]:
    """Return meta-parameters with the values of a policy, and the names that it alone has.

    What the policy does not have, such as learned step sizes, stays as it is.

    Args:
        policy: to start from.
        config: of the new run; its origin says what the policy is called.
        meta: meta-parameters at the start of the new run.
        family: what identifies the family of the new run.

    Raises:
        UserError: the policy has another network, or observations or actions of other sizes.
    """
    name, before = config.origin["policy"], policy.config
    if before.domain is not config.domain:
        raise UserError(
            f"init {name} is of {before.domain.name} learning, and {config.family} is of"
            f" {config.domain.name} learning"
        )
    there, here = (_function(c.options()) for c in (before, config))
    for option in {**there, **here}:
        if there.get(option) != here.get(option):
            wanted, flag = _words(there, option), option.replace("_", "-")
            differs = f"init {name} has {option} {wanted}, and this run {_words(here, option)}"
            same = f"{differs}: give the run the same"
            raise UserError(same, f"{same}, as by --{flag} {wanted}")
    found = dict(meta)
    for key, value in meta.items():
        given = policy.params.get(key)
        if given is None and (is_step_size(key) or key == "log_std"):
            continue
        if given is None or given.shape != value.shape:
            shape = None if given is None else list(given.shape)
            reasons = sizes_changed(policy.trained_on, family)
            raise UserError(
                f"init {name} does not fit {config.algorithm.name} on {config.family}: {key} is"
                f" {shape} there and {list(value.shape)} here"
                + (f" ({'; '.join(reasons)})" if reasons else "")
            )
        found[key] = given
    return copied(found), [key for key in policy.params if key not in meta]


def _function(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide what the policy computes."""
    policy = {k: v for k, v in options.items() if k.startswith("policy.")}
    return {k: v for k, v in policy.items() if k not in _NOT_OF_THE_FUNCTION}


def _words(options: Mapping[str, Any], name: str) -> str:
    value = options.get(name, "none")
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
