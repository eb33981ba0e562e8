"""Families by name: registered here, offered by installed packages, or `module:attribute`.

Installed packages offer families through entry points of the group `metarl.families`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, overload

import gymnasium as gym

from metarl.envs import guard
from metarl.envs.errors import UnexpectedKeyword, UserError, check_name, did_you_mean
from metarl.envs.family import Family, TaskFamily
from metarl.envs.supervised.family import SupervisedFamily

Factory = Callable[..., Family]
F = TypeVar("F", bound=Factory)
ENTRY_POINTS = "metarl.families"
_factories: dict[str, Factory] = {}
_data_sets: dict[str, Any] = {}
# Keys are the id of a family or function and the options. The object is kept, so its id is unique.
_kinds: dict[tuple[int, str], tuple[Any, tuple[str, Mapping[str, Any]]]] = {}
_MORE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@overload
def register(factory: F) -> F: ...


@overload
def register(*, gymnasium_id: str, max_episode_steps: int | None = None) -> Callable[[F], F]: ...


def register(
    factory: F | None = None, *, gymnasium_id: str = "", max_episode_steps: int | None = None
) -> F | Callable[[F], F]:
    """Register a function that returns a family under its own name, with '-' for '_' (decorator).

    Args:
        factory: the function.
        gymnasium_id: also register the family with Gymnasium, for `gym.make` and `gym.make_vec`.
        max_episode_steps: horizon of the family with its default options, for `gym.spec`.

    Raises:
        UserError: another function has that name already.
    """

    def add(factory: F) -> F:
        name = _free_name(factory)
        _factories[name] = factory
        if gymnasium_id and gymnasium_id not in gym.registry:
            built_in = is_built_in(name)  # has its own checks, without the time of two wrappers
            gym.register(
                id=gymnasium_id,
                entry_point="metarl.envs:make_env",
                vector_entry_point="metarl.envs:make_vec_env",
                max_episode_steps=max_episode_steps,
                order_enforce=not built_in,
                disable_env_checker=built_in,
                kwargs={"family": name},
            )
        return factory

    return add if factory is None else add(factory)


def _free_name(factory: Any) -> str:
    """Return the registered name of a function; raise UserError if another one has it."""
    name = factory.__name__.replace("_", "-")
    before = _factories.get(name) or _data_sets.get(name) or factory
    if (before.__module__, before.__qualname__) != (factory.__module__, factory.__qualname__):
        raise UserError(f"{before.__module__} already has a family {name!r}; use another name")
    return name


def register_data(training: Mapping[str, Any]) -> Callable[[F], F]:
    """Register a function that returns a family of supervised tasks (decorator).

    Args:
        training: default config values of runs on the family, see `training_values`.
    """

    def add(factory: F) -> F:
        _data_sets[_free_name(factory)] = factory
        factory.training = training  # type: ignore[attr-defined]
        return factory

    return add


def family_names() -> list[str]:
    """Return the sorted names of families of environments, registered here or by a package."""
    return sorted({*_factories, *_offered()})


def is_built_in(name: str) -> bool:
    """Return whether a name belongs to a family of environments of this package."""
    factory = _factories.get(name)
    return factory is not None and factory.__module__.startswith("metarl.envs.")


def data_names() -> list[str]:
    """Return the sorted names of families of supervised tasks."""
    return sorted(_data_sets)


def description(name: str) -> str:
    """Return the first line of a registered family's docstring."""
    return (inspect.getdoc(_find(name)) or "").partition("\n")[0]


def training_values(name: str, options: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Return the default config values of runs on a family, by dotted key.

    An entry that is a mapping has the values of the algorithm that is its key. The result is empty
    if the family cannot be loaded or made; making it raises the error.
    """
    return _kind(name, options or {})[1]


def domain_name(name: str, options: Mapping[str, Any] | None = None) -> str | None:
    """Return the domain of a family by its name, or None if it cannot be loaded or made."""
    return _kind(name, options or {})[0]


def _kind(name: str, options: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Return the domain of a family and its default config values."""
    try:
        found = _find(name)
        if name in _data_sets:
            return SupervisedFamily.domain, found.training
        if name in _factories:
            return TaskFamily.domain, {}
        # Only the returned family tells its domain; making it may take long.
        key = id(found), repr(options)
        if key not in _kinds:
            family = find_family(name, **options)
            _kinds[key] = found, (family.domain, getattr(family, "training", {}))
        return _kinds[key][1]
    except UserError:
        return None, {}


def make_family(name: str, **options: Any) -> TaskFamily:
    """Return a family of environments by its name, or by `module:attribute`, as `find_family` does.

    Args:
        name: a name that `metarl families` lists, or `module:attribute`.
        options: options of the family.

    Raises:
        UserError: as in `find_family`, or the family has supervised tasks.
    """
    family = find_family(name, **options)
    if not isinstance(family, TaskFamily):
        raise UserError(f"{name} has supervised tasks, but this needs environments")
    return family


def find_family(name: str, **options: Any) -> Family:
    """Return a family by its name, or by `module:attribute`.

    The name stands for a family, or for a function that takes the options and returns a family. The
    current folder is searched last, so a user's files never shadow an installed package.

    Raises:
        UserError: the name or an option is unknown, or the options do not make a family.
    """
    factory = _find(name)
    if not isinstance(factory, Family) and not callable(factory):
        raise UserError(
            f"{name} must be a TaskFamily or a function that returns one,"
            f" got {type(factory).__name__}"
        )
    if isinstance(factory, Family):
        if options:
            raise UserError(f"{name} is a family, not a function, and takes no options")
        family = factory
    else:
        known = _parameters(factory)
        needed = [key for key, default in known.items() if default is inspect.Parameter.empty]
        if missing := [key for key in needed if key not in options]:
            raise UserError(
                f"{name} needs {', '.join(missing)}; give --family-options or a default, or name"
                " the function that returns the family"
            )
        for option in () if _takes_any(factory) else options:
            if option not in known:
                raise UnexpectedKeyword.of(name, option, known)
        for option, value in options.items():
            if isinstance(known.get(option), bool) and not isinstance(value, bool):
                raise UserError(f"{name}: {option} must be True or False, got {value!r}")
        try:
            with guard.user_code():
                family = factory(**options)
        except UserError:
            raise
        except Exception as error:
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            how = f" with {given}" if given else ""
            raise UserError(f"{name} cannot be made{how}: {_blamed(error)}") from error
        if not isinstance(family, Family):
            raise UserError(f"{name} must return a TaskFamily, got {type(family).__name__}")
    return dataclasses.replace(family, source=(name, dict(options)))


def import_source(name: str) -> None:
    """Import the module of a family's name, as `make_family` does, without making the family.

    Raises:
        UserError: the name is unknown, or the module cannot be imported.
    """
    _find(name)


def keywords_of(name: str) -> list[str] | None:
    """Return the names of a family's options, or None if it takes any.

    Raises:
        UserError: the name is unknown, or the module cannot be imported.
    """
    factory = _find(name)
    if not callable(factory):
        return []
    return None if _takes_any(factory) else list(_parameters(factory))


def option_defaults(name: str) -> dict[str, Any]:
    """Return the options of a family and their defaults.

    Raises:
        UserError: the name is unknown, or the module cannot be imported.
    """
    factory = _find(name)
    return _parameters(factory) if callable(factory) else {}


def _parameters(factory: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters.items()
    return {name: p.default for name, p in parameters if p.kind not in _MORE}


def _takes_any(factory: Callable[..., Any]) -> bool:
    kinds = [p.kind for p in inspect.signature(factory).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return {"low": 0.5} for ("low=0.5",). A value that is not a Python literal is a string.

    The words true and false mean True and False.

    Raises:
        UserError: a text has no '=', or an option is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"a family option must be name=value, got {text!r}")
        key = key.replace("-", "_")
        if key in options:
            raise UserError(f"the family option {key} is given twice")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = {"true": True, "false": False}.get(value, value)
    return options


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the families that installed packages offer, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _check_one_offer(name: str) -> None:
    """Raise UserError if installed packages offer different families under one name."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)
    if len(values := sorted({point.value for point in points})) > 1:
        raise UserError(f"several packages have a family {name!r}; use one of {', '.join(values)}")


SUCH_AS = (
    "such as 'half-cheetah-dir', or 'module:attribute' for your own family ('my_family:mine' is"
    " the family or function mine in my_family.py)"
)
"""Examples of names of families, for messages."""


def _find(name: str) -> Any:
    """Return the family or factory of a name; raise UserError if the name is unknown."""
    check_name("a family", name, SUCH_AS)
    if ":" in name:
        return import_attribute(name, "a family")
    ours = _data_sets.get(name) or _factories.get(name)
    if ours is not None:
        return ours
    point = _offered().get(name)
    _check_one_offer(name)
    if point is None:
        hint = did_you_mean(name, [*family_names(), *data_names()])
        if os.path.exists(f"{name}.py"):
            hint = f"; for a family in {name}.py write {name}:ITS_NAME"
        raise UserError(f"unknown task family {name!r}{hint} (metarl families lists them)")
    try:
        with guard.user_code():
            return point.load()
    except (ImportError, AttributeError) as error:
        package = point.dist.name if point.dist is not None else "an installed package"
        raise UserError(f"{name} of {package} cannot be loaded: {error}") from error


def _blamed(error: Exception) -> str:
    """Describe an error with its file and line."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({os.path.basename(error.filename or '')}, line {error.lineno})"
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(last.filename)}, line {last.lineno}"
    return f"{type(error).__name__}: {error} ({place})"


def import_attribute(name: str, what: str) -> Any:
    """Return the object `module:attribute`; the current folder is searched last.

    Args:
        name: module and attribute.
        what: expected kind of object for messages, such as "a family".

    Raises:
        UserError: the attribute does not exist, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{what} must be named module:attribute, got {name!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    if module_name.endswith(".py"):
        raise UserError(f"{what} must be named without .py: {name.replace('.py:', ':')}")
    try:
        with guard.user_code():
            module = importlib.import_module(module_name)
    except UserError as error:
        named = f"{module_name} cannot be imported"
        raise UserError(f"{named}: {error}", f"{named}: {error.command}") from error
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"no module {module_name!r} here or among the installed packages; run this in its"
                " folder, or add that folder to PYTHONPATH"
            ) from error
        raise UserError(f"{module_name} cannot be imported: {_blamed(error)}") from error
    if not hasattr(module, attribute):
        hint = did_you_mean(attribute, vars(module))
        raise UserError(f"module {module_name!r} has no {attribute!r}{hint}")
    return getattr(module, attribute)
