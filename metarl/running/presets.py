"""Named hyper-parameters with their source, by preset, family and algorithm; what goes together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from metarl.envs.errors import UserError
from metarl.envs.family import did_you_mean, option_defaults
from metarl.learning.algorithms import find_algorithm
from metarl.learning.objectives import dice, log_likelihood
from metarl.learning.trust_region import TrustRegionConfig
from metarl.running.config import Config, InnerConfig, PolicyConfig


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of a paper."""

    source: str
    values: Mapping[str, Any]
    families: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What differs for a family."""
    references: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """Step sizes that reference algorithms are evaluated with, by family; there are none for a
    family that the paper does not have."""


_ICML_POLICY = PolicyConfig(hidden=(100, 100), activation="relu")
_ICML_INNER = InnerConfig(step_sizes=(0.1,), test_step_sizes=(0.1, 0.05))

# The authors' evaluation takes other sizes on velocity than elsewhere; on navigation the policy's.
_ICML_REFERENCES = {"pretrained": (0.2, 0.1), "random": (1.0, 0.5)}
_ICML_VELOCITY_REFERENCES = {"pretrained": (0.02, 0.01), "random": (0.1, 0.05)}

# Common to all: discount 0.99, trace 1, 40 tasks of 20 episodes, 10 iterations of conjugate
# gradient with damping 1e-5, a line search of 15 steps by 0.8; they are the defaults.
PRESETS = {
    "icml2017": Preset(
        "Finn et al. 2017, arXiv:1703.03400, and its code (rllab)",
        {"policy": _ICML_POLICY, "inner": _ICML_INNER},
        {
            # The published policies: direction at iteration 100 of a run with max KL 0.02,
            # velocity at iteration 475 of one with 10 episodes.
            "half-cheetah-dir": {"trust_region": TrustRegionConfig(max_kl=0.02)},
            "half-cheetah-vel": {"episodes": 10, "iterations": 475},
            "navigation-2d": {"inner": InnerConfig(step_sizes=(0.5,), test_step_sizes=(0.5, 0.25))},
        },
        {
            "half-cheetah-dir": _ICML_REFERENCES,
            "half-cheetah-vel": _ICML_VELOCITY_REFERENCES,
            "ant-dir": _ICML_REFERENCES,
            "ant-vel": _ICML_REFERENCES,
        },
    ),
    "promp2019": Preset(
        "Rothfuss et al. 2019, arXiv:1810.06784, and its code (MAML-TRPO)",
        {"iterations": 500},
    ),
    "pearl2019": Preset(
        "tasks of Rakelly et al. 2019, arXiv:1903.08254; hyper-parameters of promp2019",
        {"iterations": 500},
    ),
}


def preset_config(preset: str | None, family: str, algorithm: str = "maml-trpo") -> Config:
    """Return a preset's config for a family and algorithm; None gives the defaults.

    A family that has a `scale` is made at the preset's. What an algorithm needs of its own goes
    before the preset's values.

    Raises:
        UserError: there is no such preset or algorithm.
    """
    config = _family_config(preset, family)
    row = find_algorithm(algorithm)
    sections = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in row.defaults.items()
    }
    if "step_sizes" in row.defaults.get("inner", {}) or row.learned_steps != "no":
        # Sizes of the algorithm's own, or learned, are those of evaluation too.
        inner = sections.get("inner", config.inner)
        sections["inner"] = dataclasses.replace(inner, test_step_sizes=())
    elif row.gradient == "implicit":
        # A pull of 1 / size lets a task go as far as a step of that size would; updates of half
        # the size then halve what is left of the way.
        inner = sections.get("inner", config.inner)
        sections["inner"] = dataclasses.replace(
            inner,
            step_sizes=tuple(size / 2 for size in inner.step_sizes),
            test_step_sizes=tuple(size / 2 for size in inner.test_step_sizes),
            proximal=1.0 / inner.step_sizes[0],
        )
    return dataclasses.replace(config, algorithm=algorithm, **sections)


def _family_config(preset: str | None, family: str) -> Config:
    if preset is None:
        return Config(family=family)
    if preset not in PRESETS:
        raise UserError(
            f"no preset {preset!r}{did_you_mean(preset, PRESETS)} (presets: {', '.join(PRESETS)})"
        )
    values = {**PRESETS[preset].values, **PRESETS[preset].families.get(family, {})}
    options = {"scale": preset} if "scale" in option_defaults(family) else {}
    return dataclasses.replace(
        Config(family=family, preset=preset, family_options=options), **values
    )


def reference_step_sizes(config: Config, algorithm: str) -> tuple[float, ...]:
    """Return the sizes of the inner steps that a reference algorithm is evaluated with.

    They are the preset's for it; none, where the preset has none or the config goes its own way.
    """
    if config.preset is None:
        return ()
    preset = PRESETS[config.preset]
    same = (
        config.inner.test_step_sizes
        == _family_config(config.preset, config.family).inner.test_step_sizes
    )
    return preset.references.get(config.family, {}).get(algorithm, ()) if same else ()


_ADAM = ("adam", "clipped")


def check_combination(config: Config) -> None:
    """Raise UserError where options do not go together, or have no effect."""
    row = find_algorithm(config.algorithm)
    base = preset_config(config.preset, config.family, config.algorithm)
    name, inner, meta = row.name, config.inner, config.meta
    for section in ("adam", "trust_region"):
        used = row.outer == "trust-region" if section == "trust_region" else row.outer in _ADAM
        if not used and getattr(config, section) != getattr(base, section):
            raise UserError(f"{section} has no effect with {name}, whose outer step is {row.outer}")
    if config.adam.minibatches > 1:
        if row.gradient != "unrolled":
            raise UserError(f"adam.minibatches must be 1 with {name}, whose inner loop needs all")
        if meta.credit:
            raise UserError(
                "adam.minibatches must be 1 with meta.credit, which is the whole batch's"
            )
    if inner.updates > 1 and row.inner_loss in (log_likelihood, dice):
        raise UserError(
            f"inner.updates is {inner.updates}, but {name} takes one step on each batch: its inner"
            " loss is no likelihood ratio and has no lower bound on a fixed sample"
        )
    if row.inner_loss is not dice and inner.dice_decay != base.inner.dice_decay:
        raise UserError(f"inner.dice_decay has no effect with {name}")
    if row.gradient != "unrolled" and (meta.credit or meta.inner_kl):
        raise UserError(f"meta.credit and meta.inner_kl have no effect with {name}")
    if row.gradient == "implicit" and (inner.steps != 1 or not inner.proximal):
        raise UserError(f"{name} needs inner.steps 1 and inner.proximal above 0")
    if row.gradient == "displacement" and inner.steps < 1:
        raise UserError(f"{name} needs inner.steps of at least 1, got {inner.steps}")
    if meta.anneal_fraction and not row.annealed:
        raise UserError(f"meta.anneal_fraction has no effect with {name}")
    if meta.cosine and row.outer == "none":
        raise UserError(f"meta.cosine has no effect with {name}, which takes no outer step")
    if meta.credit and not inner.steps:
        raise UserError("meta.credit needs inner.steps of at least 1, got 0")
    if config.policy.context != base.policy.context and row.fast != "context":
        raise UserError(f"policy.context has no effect with {name}")
    if row.name in ("pretrained", "oracle") and inner.steps:
        raise UserError(f"{name} does not adapt in training: inner.steps must be 0")


def check_device(device: str) -> None:
    """Raise UserError unless torch has the device."""
    if device != "cpu" and not device.startswith("cuda"):
        raise UserError(f"device must be cpu or cuda, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there: torch finds no GPU; use cpu")
