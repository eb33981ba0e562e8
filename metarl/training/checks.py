"""What goes together in a config, and what has no effect."""

from __future__ import annotations

import re

import torch

from metarl.algorithms.table import Algorithm
from metarl.config.options import Config
from metarl.config.resolve import resolve
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.supervised.family import SupervisedFamily
from metarl.learning.losses import dice, log_likelihood
from metarl.policies.building import predictor_network

_ADAM = ("adam", "clipped")


def check_combination(row: Algorithm, config: Config, family: Family) -> None:
    """Raise UserError where options do not go together, or have no effect."""
    network = config.policy.network
    if isinstance(family, SupervisedFamily):
        _check_supervised(row, config, family)
        network = predictor_network(config, family)
    base = _base(config)
    name, inner, meta = row.name, config.inner, config.meta
    for section in ("adam", "trust_region"):
        used = row.outer == "trust-region" if section == "trust_region" else row.outer in _ADAM
        if not used and getattr(config, section) != getattr(base, section):
            raise UserError(f"{section} has no effect with {name}, whose outer step is {row.outer}")
    if network != "conv4" and config.policy.filters != base.policy.filters:
        raise UserError("policy.filters has no effect without the network conv4")
    if row.outer != "clipped" and config.adam.clip != base.adam.clip:
        raise UserError(f"adam.clip has no effect with {name}, whose objective is not clipped")
    if row.gradient == "displacement" and config.adam.max_kl != base.adam.max_kl:
        raise UserError(f"adam.max_kl has no effect with {name}, which draws no query samples")
    if config.advantage.targets != base.advantage.targets and config.advantage.trace == 1.0:
        raise UserError("advantage.targets has no effect with advantage.trace 1: both are returns")
    if config.adam.minibatches > 1:
        if row.gradient != "unrolled":
            raise UserError(f"adam.minibatches must be 1 with {name}, whose inner loop needs all")
        if meta.credit:
            raise UserError(
                "adam.minibatches must be 1 with meta.credit, which is the whole batch's"
            )
    if inner.loss != "auto" and row.whole_episodes:
        raise UserError(f"inner.loss must be auto with {name}, which is its own inner loss")
    if inner.loss != base.inner.loss and (
        row.gradient == "displacement" or row.outer == "none" or not inner.steps
    ):
        # The inner step is the same with either; nothing here goes through its curvature.
        raise UserError(f"inner.loss has no effect with {name}")
    inner_loss = row.with_inner_loss(inner.loss).inner_loss
    own_loss = isinstance(family, SupervisedFamily)
    if not own_loss and inner.updates > 1 and inner_loss in (log_likelihood, dice):
        which = "its inner loss" if inner.loss == "auto" else f"inner.loss {inner.loss}"
        raise UserError(
            f"inner.updates is {inner.updates}, but {name} takes one step on each batch: {which}"
            " is no likelihood ratio and has no lower bound on a fixed sample"
        )
    if row.inner_loss is not dice and inner.dice_decay != base.inner.dice_decay:
        raise UserError(f"inner.dice_decay has no effect with {name}")
    if row.gradient != "unrolled" and (meta.credit or meta.inner_kl):
        raise UserError(f"meta.credit and meta.inner_kl have no effect with {name}")
    if row.gradient == "implicit" and (inner.steps != 1 or not inner.proximal):
        raise UserError(f"{name} needs inner.steps 1 and inner.proximal above 0")
    if inner.backtrack and row.gradient != "implicit":
        raise UserError(
            f"inner.backtrack has no effect with {name}, which differentiates its steps"
        )
    if row.gradient == "displacement" and inner.steps < 1:
        raise UserError(f"{name} needs inner.steps of at least 1, got {inner.steps}")
    if inner.kl and (row.learned_steps != "no" or row.gradient == "implicit"):
        raise UserError(f"inner.kl must be 0 with {name}, which does not take the sizes as given")
    if meta.curvature != base.meta.curvature and not (row.uses_curvature and inner.steps):
        why = f"{name}, which takes no inner step" if row.uses_curvature else name
        raise UserError(f"meta.curvature has no effect with {why}")
    if meta.anneal_fraction and not row.annealed:
        raise UserError(f"meta.anneal_fraction has no effect with {name}")
    if meta.cosine != base.meta.cosine and row.outer == "none":
        raise UserError(f"meta.cosine has no effect with {name}, which takes no outer step")
    if meta.credit and not inner.steps:
        raise UserError("meta.credit needs inner.steps of at least 1, got 0")
    if config.policy.context != base.policy.context and row.fast != "context":
        raise UserError(f"policy.context has no effect with {name}")
    if row.defaults.get("inner", {}).get("steps") == 0 and inner.steps:
        raise UserError(f"{name} does not adapt in training: inner.steps must be 0")


_OF_POLICIES = (
    "episodes", "policy.initial_std", "policy.min_std", "policy.action", "policy.normalize",
    "inner.kl", "inner.loss", "inner.dice_decay", "meta.credit", "meta.inner_kl", "advantage",
    "adam.clip", "adam.max_kl", "adam.minibatches",
)  # fmt: skip
"""Options without effect on supervised tasks."""


def _base(config: Config) -> Config:
    """Return what the config is where nobody chose a value."""
    options = {"family_options": dict(config.family_options)}
    return resolve(config.preset, config.family, config.algorithm, options)


def _check_supervised(row: Algorithm, config: Config, family: SupervisedFamily) -> None:
    base = _base(config)
    for key in _OF_POLICIES:
        section, _, name = key.rpartition(".")
        ours, usual = (getattr(c, section) if section else c for c in (config, base))
        if getattr(ours, name) != getattr(usual, name):
            raise UserError(f"{key} has no effect on the supervised tasks of {family.name}")
    if row.head != "meta" and not config.inner.steps:
        raise UserError(
            f"{row.name} needs inner.steps of at least 1: its last layer is the support's"
        )


def check_device(device: str) -> None:
    """Raise UserError unless torch has the device."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"device must be cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch finds no GPU; use cpu")
    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"device {device!r} is not there: torch finds {count} GPU(s)")
