"""Named hyper-parameters with their source, and the config that follows from what a user said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metarl.algorithms.table import Algorithm, find_algorithm
from metarl.config.options import Config, check_type, config_keys
from metarl.envs.errors import UserError, check_name, did_you_mean, kind_of
from metarl.envs.registry import (
    SUCH_AS,
    import_source,
    is_supervised,
    option_defaults,
    training_values,
)


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of a paper or of this package, by dotted key."""

    source: str
    values: Mapping[str, Any]
    algorithms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What differs for an algorithm."""
    families: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What differs for a family, whatever the algorithm; a mapping by an algorithm's name: with it
    alone."""
    scale: str = ""
    """The family's scale, where it has one."""
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What differs at another scale."""
    halved_in_evaluation: bool = False
    """Evaluation takes a first step as in training, then half of it."""
    supervised: bool = False
    """Whether it is of supervised tasks, and not of policies."""
    references: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """Step sizes that reference algorithms are evaluated with, by family; there are none for a
    family that the paper does not have."""
    usual_for: tuple[str, ...] = ()
    """Families that `metarl train` takes it for, if no preset is named."""


# The authors' evaluation takes other sizes on velocity than elsewhere; on navigation the policy's.
_ICML_REFERENCES = {"pretrained": (0.2, 0.1), "random": (1.0, 0.5)}
_ICML_VELOCITY_REFERENCES = {"pretrained": (0.02, 0.01), "random": (0.1, 0.05)}

# Support episodes say more of an ant's task with a shorter trace and a baseline fitted to its
# targets, and the outer step gains from them too (docs/results.md).
_ANT = {
    "advantage.trace": 0.9,
    "advantage.targets": "lambda-returns",
    "maml-trpo": {"meta.curvature": 0.5},
}

# Common to all: discount 0.99, trace 1, 40 tasks of 20 episodes, 10 iterations of conjugate
# gradient with damping 1e-5, a line search of 15 steps by 0.8; they are the defaults.
PRESETS = {
    "metarl2026": Preset(
        "this package: what learns from every seed (docs/results.md)",
        {
            "tasks": 20,
            "stratified": True,
            "policy.normalize": True,
            "policy.output_scale": 0.1,
            "inner.step_sizes": (0.1, 0.05),
            "inner.kl": 0.5,
            "advantage.trace": 0.95,
            "trust_region.max_kl": 0.05,
        },
        # A small last layer weakens what a context changes, too far to learn it. Steps that are
        # learned, and iMAML's (half of what stands here), are not fitted to a KL: with so small a
        # layer they have to be larger.
        algorithms={
            "cavia": {"policy.output_scale": 1.0},
            "imaml": {"inner.step_sizes": (0.4,)},
            "maml++": {"inner.step_sizes": (1.0,)},
            "meta-sgd": {"inner.step_sizes": (1.0,)},
        },
        families={
            # Adapted policies gain faster by the first-order gradient; the curvature keeps what
            # support episodes tell of the direction. Half of it does both (docs/results.md).
            "half-cheetah-dir": {"maml-trpo": {"meta.curvature": 0.5}},
            # How far off the goal is shows in the size of the gradient, which one scale of the
            # advantages for all tasks keeps; the outer step has to become small in the end.
            "half-cheetah-vel": {
                "iterations": 200,
                "inner.step_sizes": (0.02, 0.01),
                "advantage.normalize": False,
                "meta.cosine": True,
            },
            # A step of that KL overshoots where a point has but to learn a direction. Many goals
            # an iteration keep the second step from leading away from some (docs/results.md).
            "navigation-2d": {
                "tasks": 160,
                "episodes": 5,
                "iterations": 54,
                "policy.normalize": False,
                "policy.initial_std": 0.8,
                "inner.step_sizes": (0.42, 0.18),
                "inner.kl": 0.0,
                "advantage.trace": 0.9,
                "trust_region.max_kl": 0.007,
            },
            "ant-dir": _ANT,
            "ant-vel": _ANT,
        },
        scale="icml2017",
        # Actions reach to 10 there: a standard deviation of 1 explores a tenth of them.
        scales={name: {"policy.initial_std": 4.0} for name in ("promp2019", "pearl2019")},
        usual_for=("half-cheetah-dir", "half-cheetah-vel", "ant-dir", "ant-vel", "navigation-2d"),
    ),
    "icml2017": Preset(
        "Finn et al. 2017, arXiv:1703.03400, and its code (rllab)",
        {
            "policy.hidden": (100, 100),
            "policy.activation": "relu",
            "inner.step_sizes": (0.1,),
        },
        families={
            # The published policies: direction at iteration 100 of a run with max KL 0.02,
            # velocity at iteration 475 of one with 10 episodes.
            "half-cheetah-dir": {"trust_region.max_kl": 0.02},
            "half-cheetah-vel": {"episodes": 10, "iterations": 475},
            "navigation-2d": {"inner.step_sizes": (0.5,)},
        },
        scale="icml2017",
        halved_in_evaluation=True,
        references={
            "half-cheetah-dir": _ICML_REFERENCES,
            "half-cheetah-vel": _ICML_VELOCITY_REFERENCES,
            "ant-dir": _ICML_REFERENCES,
            "ant-vel": _ICML_REFERENCES,
        },
    ),
    "promp2019": Preset(
        "Rothfuss et al. 2019, arXiv:1810.06784, and its code (MAML-TRPO)",
        {"iterations": 500},
        scale="promp2019",
    ),
    "reptile2018": Preset(
        "Nichol et al. 2018, arXiv:1803.02999, and its code, on sinusoids: phases of up to 2 pi",
        {
            "iterations": 30000,
            "policy.hidden": (64, 64),
            "policy.activation": "tanh",
            "inner.steps": 5,
            "inner.step_sizes": (0.02,),
        },
        supervised=True,
    ),
    "pearl2019": Preset(
        "tasks of Rakelly et al. 2019, arXiv:1903.08254; hyper-parameters of promp2019",
        {"iterations": 500},
        scale="pearl2019",
    ),
}


def usual_preset(family: str) -> str | None:
    """Return the preset that `metarl train` takes if none is named.

    It is this package's own on the families that it is recorded on. On three of other kinds it had
    no clear lead (docs/results.md).
    """
    return next((name for name, preset in PRESETS.items() if family in preset.usual_for), None)


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UserError: there is none.
    """
    check_name("a preset", name, "such as 'icml2017', or None for none")
    if name not in PRESETS:
        raise UserError(
            f"no preset {name!r}{did_you_mean(name, PRESETS)}"
            f" (presets: {', '.join(PRESETS)}; None for none)"
        )
    return PRESETS[name]


def resolve(
    preset: str | None,
    family: str,
    algorithm: str = "maml-trpo",
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Return the config of a run: defaults, preset, algorithm and overrides, in this order.

    Later ones override earlier ones. A family of supervised tasks has defaults of its own: the
    preset overrides the general ones, and those for an algorithm override the algorithm's.

    Values that follow from others are computed last, unless they are given: the step sizes of
    evaluation, iMAML's step sizes and proximal strength. A family that has a `scale` is made at the
    preset's, unless its options say otherwise.

    Args:
        preset: a name in `PRESETS`, such as "icml2017"; None: no preset.
        family: a name that `metarl families` lists, or "module:attribute" for one of your own.
        algorithm: a name that `metarl algorithms` lists.
        overrides: values by key, those of a section as "inner.step_sizes"; `family_options` is a
            mapping that is added to the preset's.

    Raises:
        UserError: there is no such family, preset, algorithm or key, a value is out of range, or
            the preset is not for this kind of family.
    """
    check_name("a family", family, SUCH_AS)
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UserError(
            f"overrides are values by key, such as {{'inner.steps': 2}}, got {kind_of(overrides)}"
        )
    # A command's help may have none yet, and a user's own file is imported where it is made.
    if family and ":" not in family:
        import_source(family)
    row = find_algorithm(algorithm)
    said = dict(overrides or {})
    options = dict(said.pop("family_options", {}))
    usual = training_values(family, options)
    config = _preset_values(preset, family, algorithm, options, _of_all(usual))
    for section, values in row.defaults.items():
        config = _replaced(config, {f"{section}.{key}": value for key, value in values.items()})
    chosen = {**usual.get(algorithm, {}), **said}
    config = _replaced(config, chosen)
    return _replaced(config, _derived(config, row, chosen))


def _preset_values(
    name: str | None,
    family: str,
    algorithm: str,
    given: Mapping[str, Any],
    usual: Mapping[str, Any],
) -> Config:
    if name is None:
        config = Config(family=family, algorithm=algorithm, family_options=given)
        return _replaced(config, usual)
    preset = find_preset(name)
    # One that cannot be made, as without an option that comes later, is not judged.
    if is_supervised(family, given) is (not preset.supervised):
        kind = "supervised tasks" if preset.supervised else "reinforcement learning"
        raise UserError(f"preset {name} is for {kind}, which {family} is not: leave it out")
    takes_scale = bool(family) and "scale" in option_defaults(family)
    options = {"scale": preset.scale} if takes_scale else {}
    options |= given
    config = Config(family=family, preset=name, algorithm=algorithm, family_options=options)
    of_family = preset.families.get(family, {})
    own = {
        **preset.values,
        **preset.scales.get(str(options.get("scale")), {}),
        **preset.algorithms.get(algorithm, {}),
        **_of_all(of_family),
        **of_family.get(algorithm, {}),
    }
    return _replaced(_replaced(config, usual), own)


def _of_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a family's values but for those of one algorithm alone."""
    return {key: value for key, value in values.items() if not isinstance(value, Mapping)}


def _replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a config with other values, by dotted key."""
    keys = config_keys(config)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in keys:
            raise UserError(f"no config key {key!r}{did_you_mean(key, keys)}")
        section, _, name = key.rpartition(".")
        before = getattr(getattr(config, section) if section else config, name)
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy
        if isinstance(before, tuple):
            if not isinstance(value, (tuple, list)):
                raise UserError(f"{key} takes several values, such as ({value},), got {value!r}")
            value = tuple(value)
        check_type(key, value, before)
        sections.setdefault(section, {})[name] = value
    changed = sections.pop("", {})
    for section, part in sections.items():
        changed[section] = dataclasses.replace(getattr(config, section), **part)
    return dataclasses.replace(config, **changed)


def _derived(config: Config, row: Algorithm, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what follows from a config's other values, but for what was given or chosen."""
    sizes, derived = config.inner.step_sizes, {}
    if "inner.kl" not in said and (row.learned_steps != "no" or row.gradient == "implicit"):
        derived["inner.kl"] = 0.0  # their sizes are learned, or those of the proximal problem
    if row.gradient == "implicit" and "inner.proximal" not in said:
        # A pull of 1 / size lets a task go as far as a step of that size would; updates of half
        # the size then halve what is left of the way.
        if "inner.step_sizes" not in said:
            sizes = tuple(size / 2 for size in sizes)
            derived["inner.step_sizes"] = sizes
        derived["inner.proximal"] = 0.5 / sizes[0]
    elif row.gradient == "implicit" and "inner.step_sizes" not in said:
        sizes = (0.5 / config.inner.proximal,)
        derived["inner.step_sizes"] = sizes
    if row.learned_steps == "layer":  # each step learns its own, from the last that is given
        sizes += sizes[-1:] * (config.inner.steps - len(sizes))
        derived["inner.step_sizes"] = sizes
    # Sizes of the algorithm's own, or learned, are those of evaluation too.
    own = row.learned_steps != "no" or "step_sizes" in row.defaults.get("inner", {})
    halved = config.preset is not None and PRESETS[config.preset].halved_in_evaluation
    if halved and not own and len(sizes) == 1 and "inner.test_step_sizes" not in said:
        derived["inner.test_step_sizes"] = (sizes[0], sizes[0] / 2)
    return derived


def reference_step_sizes(config: Config, algorithm: str) -> tuple[float, ...]:
    """Return the sizes of the inner steps that a reference algorithm is evaluated with.

    They are the preset's for it; none, where the preset has none or the config goes its own way.
    """
    if config.preset is None:
        return ()
    preset = PRESETS[config.preset]
    usual = resolve(config.preset, config.family).inner.test_step_sizes
    if config.inner.test_step_sizes != usual:
        return ()
    return preset.references.get(config.family, {}).get(algorithm, ())
