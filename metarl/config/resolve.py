"""Config from a recipe, a family, an algorithm and a user's values."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from metarl.algorithms import Algorithm, algorithms, find_algorithm
from metarl.config.options import Config
from metarl.config.setup import Setup
from metarl.envs.errors import UserError, check_name, did_you_mean, kind_of
from metarl.envs.registry import (
    SUCH_AS,
    domain_name,
    import_source,
    option_defaults,
    training_values,
)

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a paper or of this package, from a file in `recipes`.

    Values are by key. A key such as `outer.trust-region.max_kl` belongs to an option of one part.
    """

    source: str
    variant: str = ""
    """Variant of the family, if it has variants."""
    domain: str = "reinforcement"
    usual_for: tuple[str, ...] = ()
    """Families for which `metarl train` uses it if no preset is given."""
    options: Values = field(default_factory=dict)
    variants: Mapping[str, Values] = field(default_factory=dict)
    algorithms: Mapping[str, Values] = field(default_factory=dict)
    families: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    references: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    """Step sizes of reference algorithms in evaluation, by family."""

    def values(self, family: str, variant: str, algorithm: Algorithm) -> dict[str, Any]:
        """Return the values for a family and an algorithm; later ones override earlier ones."""
        tables = (
            self.options,
            self.variants.get(variant, {}),
            self.algorithms.get(algorithm.name, {}),
            self.families.get(family, {}).get("options", {}),
        )
        return _merged(tables, algorithm)

    def own_values(self, family: str, algorithm: Algorithm) -> dict[str, Any]:
        """Return the values for exactly this algorithm on this family."""
        tables = self.families.get(family, {}).get("algorithms", {})
        return _merged([tables.get(algorithm.name, {})], algorithm)


def _merged(tables: Iterable[Values], algorithm: Algorithm) -> dict[str, Any]:
    """Return the values of tables that apply to the parts of an algorithm."""
    found: dict[str, Any] = {}
    for table in tables:
        for key, value in _flat(table).items():
            section, *scope, name = key.split(".") if "." in key else ("", key)
            if scope and scope != [getattr(algorithm, section).name]:
                continue
            found[f"{section}.{name}" if section else name] = value
    return found


def _flat(values: Values, prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


@cache
def recipes() -> dict[str, Recipe]:
    """Return the recipes by name."""
    folder = resources.files("metarl.config") / "recipes"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".toml"):
            data = tomllib.loads(file.read_text("utf-8"))
            data["usual_for"] = tuple(data.get("usual_for", ()))
            found[file.name.removesuffix(".toml")] = Recipe(**data)
    return found


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        UserError: it does not exist.
    """
    check_name("a preset", name, "such as 'icml2017', or None for none")
    known = recipes()
    if name not in known:
        raise UserError(
            f"unknown preset {name!r}{did_you_mean(name, known)} (presets: {', '.join(known)}; None"
            " for none)"
        )
    return known[name]


def usual_preset(family: str) -> str | None:
    """Return the preset that `metarl train` uses for a family if none is given."""
    return next((name for name, recipe in recipes().items() if family in recipe.usual_for), None)


def resolve(
    preset: str | None,
    family: str,
    algorithm: str | Algorithm = "maml-trpo",
    overrides: Values | None = None,
) -> Config:
    """Return the config of a run.

    Later values override earlier ones: the defaults, the family's values (supervised tasks), the
    preset's, the algorithm's, the preset's for this algorithm on this family, and the overrides. A
    family with variants uses the preset's variant, unless its options select another.

    Args:
        preset: the name of a recipe, such as "icml2017"; None: no preset.
        family: a name that `metarl families` lists, or "module:attribute".
        algorithm: a name that `metarl algorithms` lists, "module:attribute", or the algorithm.
        overrides: values by key; options of parts have keys like "inner.step_sizes".
            `family_options` is a mapping that is added to the preset's.

    Raises:
        UserError: the family, preset, algorithm or option does not exist, a value is out of range,
            or the preset is for another kind of family.
    """
    check_name("a family", family, SUCH_AS)
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UserError(
            f"overrides must be values by key, as in {{'inner.steps': 2}}, got {kind_of(overrides)}"
        )
    # A command's help may have no family yet. A user's file is imported with its family.
    if family and ":" not in family:
        import_source(family)
    said = dict(overrides or {})
    options = dict(said.pop("family_options", {}))
    recipe = None if preset is None else find_recipe(preset)
    if recipe is not None:
        # A family that cannot be created, for instance without a later option, is not checked.
        if (domain := domain_name(family, options)) not in (None, recipe.domain):
            raise UserError(
                f"preset {preset} is for {recipe.domain} learning, but {family} is {domain}"
            )
        if recipe.variant and family and "variant" in option_defaults(family):
            options = {"variant": recipe.variant, **options}
    chosen = find_algorithm(algorithm)
    config = Config.of(family, chosen, options, preset)
    usual = training_values(family, options)
    of_all = {key: value for key, value in usual.items() if not isinstance(value, Mapping)}
    config = config.with_options(of_all, known_only=True)
    if recipe is not None:
        variant = str(options.get("variant"))
        values = recipe.values(family, variant, config.setup.algorithm)
        config = config.with_options(values, known_only=True)
    config = config.with_options(chosen.own_options(), known_only=True)
    config = config.with_options(usual.get(chosen.name, {}), known_only=True)
    if recipe is not None and (found := recipe.own_values(family, chosen)):
        named = algorithms()[chosen.name]
        same = {k: v for k, v in found.items() if chosen.option(k) == named.option(k)}
        config = config.with_options(same, known_only=True)  # what a user changed remains
    return config.with_options(said)


def reference_step_sizes(setup: Setup, algorithm: str) -> tuple[float, ...]:
    """Return the inner step sizes for the evaluation of a reference algorithm.

    These are the preset's step sizes. Empty if the preset has none or the setup differs from it.
    """
    if setup.preset is None:
        return ()
    usual = resolve(setup.preset, setup.family).setup.algorithm.inner.sizes_in_evaluation
    if setup.algorithm.inner.sizes_in_evaluation != usual:
        return ()
    found = find_recipe(setup.preset).references.get(setup.family, {})
    return tuple(found.get(algorithm, ()))
