"""Families by name: those registered here, those of installed packages, `module:attribute`.

Installed packages offer theirs by an entry point of the group `metarl.families`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.family import Family, TaskFamily

Factory = Callable[..., Family]
ENTRY_POINTS = "metarl.families"
_factories: dict[str, Factory] = {}
_data_sets: dict[str, Factory] = {}


def register(factory: Factory) -> Factory:
    """Offer a function that returns a family under its own name, '_' read as '-' (decorator)."""
    _factories[factory.__name__.replace("_", "-")] = factory
    return factory


def register_data(training: Mapping[str, Any]) -> Callable[[Factory], Factory]:
    """Offer a function that returns a family of supervised tasks, as `register` does (decorator).

    Args:
        training: values of the config that a run on it starts from, see `training_values`.
    """

    def add(factory: Factory) -> Factory:
        _data_sets[factory.__name__.replace("_", "-")] = factory
        factory.training = training  # type: ignore[attr-defined]
        return factory

    return add


def family_names() -> list[str]:
    """Return the names of families of environments, registered here or by a package, sorted."""
    return sorted({*_factories, *_offered()})


def data_names() -> list[str]:
    """Return the names of families of supervised tasks, sorted."""
    return sorted(_data_sets)


def description(name: str) -> str:
    """Return the first line of what documents a registered family."""
    return (inspect.getdoc(_find(name)) or "").partition("\n")[0]


def training_values(name: str) -> Mapping[str, Any]:
    """Return the values of the config that a run on a family starts from, by dotted key.

    An entry that is a mapping holds those of the algorithm that is its key. None, where the family
    cannot be loaded, which is told where it is made.
    """
    try:
        return getattr(_find(name), "training", {})
    except UserError:
        return {}


def make_family(name: str, **options: Any) -> TaskFamily:
    """Return a family of environments by its name, or by `module:attribute`; see `find_family`.

    Raises:
        UserError: besides, its tasks are supervised ones.
    """
    family = find_family(name, **options)
    if not isinstance(family, TaskFamily):
        raise UserError(f"{name} has supervised tasks, and this needs environments")
    return family


def find_family(name: str, **options: Any) -> Family:
    """Return a family by its name, or by `module:attribute`.

    What is named is a family, or a function that returns one and takes the options. The current
    folder is searched last, so that a user's own files never shadow an installed package.

    Raises:
        UserError: the name or an option is unknown, or the options do not make a family.
    """
    factory = _find(name)
    if factory is None:
        hint = did_you_mean(name, [*family_names(), *data_names()])
        raise UserError(f"no task family {name!r}{hint} (metarl families lists them)")
    if not isinstance(factory, Family) and not callable(factory):
        raise UserError(
            f"{name} must be a TaskFamily or a function that returns one,"
            f" got {type(factory).__name__}"
        )
    if isinstance(factory, Family):
        if options:
            raise UserError(f"{name} is a family, not a function: it takes no options")
        family = factory
    else:
        for option in options:
            known = _parameters(factory)
            if option not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise UserError(
                    f"{name} has no option {option!r}{did_you_mean(option, known)} ({takes})"
                )
        try:
            family = factory(**options)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError) or not options:
                raise
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise UserError(f"{name} cannot be made with {given}: {error}") from error
        if not isinstance(family, Family):
            raise UserError(f"{name} must return a TaskFamily, got {type(family).__name__}")
    return dataclasses.replace(family, source=(name, dict(options)))


def import_source(name: str) -> None:
    """Import what a family's name stands for, as `make_family` does, and make nothing of it.

    Raises:
        UserError: it cannot be imported.
    """
    _find(name)


def option_defaults(name: str) -> dict[str, Any]:
    """Return the options that a family's name takes and their defaults, {} if it is not known."""
    factory = _find(name)
    return _parameters(factory) if callable(factory) else {}


def _parameters(factory: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(factory).parameters.items()}


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return {"low": 0.5} for ("low=0.5",); a value that is no Python literal is a string.

    true and false are taken as True and False.

    Raises:
        UserError: a text has no '='.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"a family option is written name=value, got {text!r}")
        try:
            options[key.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.replace("-", "_")] = {"true": True, "false": False}.get(value, value)
    return options


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    """Families of installed packages; a name of ours is ours."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _find(name: str) -> Any:
    """Return the family or factory of a name, None if there is none."""
    if ":" in name:
        return _import_attribute(name)
    ours = _data_sets.get(name) or _factories.get(name)
    if ours is not None or (point := _offered().get(name)) is None:
        return ours
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        package = point.dist.name if point.dist is not None else "an installed package"
        raise UserError(f"{name} of {package} cannot be loaded: {error}") from error


def _import_attribute(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"a family is named module:attribute, got {name!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # a module that the user's module needs, not the one asked for
        raise UserError(f"no module {module_name!r} here or among the installed ones") from error
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, vars(module))
        raise UserError(f"module {module_name!r} has no {attribute!r}{hint}")
    return getattr(module, attribute)
