"""Parts of a run: frozen dataclasses whose fields are the options of the run.

A part is chosen by name, by `module:attribute`, or given as an object. Its options have the keys
`SECTION.FIELD`, such as `outer.max_kl`. Options of parts that were not chosen are unknown.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from typing_extensions import Self

from metarl.envs.errors import UserError, did_you_mean, raised
from metarl.envs.registry import import_attribute


def fixed(default: Any) -> Any:
    """Return a dataclass field that belongs to the definition of a part and is not an option.

    Args:
        default: default value of the field.
    """
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: default, metadata={"option": False})
    return dataclasses.field(default=default, metadata={"option": False})


@dataclass(frozen=True)
class Range:
    """Range of values that a search for better options draws from."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Draw the logarithm uniformly."""


def tunable(
    default: Any, low: float, high: float, *, log: bool = False, of_policies: bool = False
) -> Any:
    """Return a dataclass field that is an option with a range to search.

    Args:
        default: default value of the field.
        low, high: bounds of the search, both included. Other values are allowed. In a tuple, they
            bound the first entry.
        log: draw the logarithm uniformly.
        of_policies: the option exists only if policies draw the samples, see `Part`.
    """
    metadata = {"range": Range(low, high, log), "of_policies": of_policies}
    return dataclasses.field(default=default, metadata=metadata)


def of_policies(default: Any) -> Any:
    """Return a dataclass field that is an option only if policies draw the samples, see `Part`.

    Args:
        default: default value of the field.
    """
    return dataclasses.field(default=default, metadata={"of_policies": True})


@dataclass(frozen=True, kw_only=True)
class Part:
    """Base class of parts. Subclasses are frozen dataclasses; each field is an option.

    A part that is used without policies, on examples of a data set, has no options that need
    policies, for instance for a KL. `without_policies` returns such a part.
    """

    section: ClassVar[str] = ""
    """First part of the options' keys."""

    policies: bool = fixed(True)
    """Whether policies draw the samples."""
    source: str = dataclasses.field(default="", compare=False, metadata={"option": False})
    """Name that the part was chosen by, such as `module:attribute`; empty for its `name`."""

    def without_policies(self) -> Self:
        """Return the part for examples of a data set."""
        return dataclasses.replace(self, policies=False)

    def option_fields(self) -> dict[str, dataclasses.Field[Any]]:
        """Return the fields that are options, by name."""
        return {
            f.name: f
            for f in dataclasses.fields(self)
            if f.metadata.get("option", True)
            and (self.policies or not f.metadata.get("of_policies", False))
        }

    def options(self) -> dict[str, Any]:
        """Return the values of the options by name."""
        return {name: getattr(self, name) for name in self.option_fields()}

    def ranges(self) -> dict[str, Range]:
        """Return the ranges of the options that have one, by name."""
        fields = self.option_fields().items()
        return {name: f.metadata["range"] for name, f in fields if "range" in f.metadata}

    def with_options(self, values: Mapping[str, Any]) -> Self:
        """Return the part with other values of its options.

        Raises:
            UserError: an option is unknown, or its value is of another type or out of range.
        """
        known = self.option_fields()
        checked = {}
        for name, value in values.items():
            key = self.key(name)
            if name not in known:
                raise UserError(f"unknown option {key!r}{did_you_mean(name, known)}")
            checked[name] = converted(key, value, getattr(self, name), str(known[name].type))
        return dataclasses.replace(self, **checked)

    def own_options(self) -> dict[str, Any]:
        """Return the options whose values differ from the defaults of the class."""
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        return {k: v for k, v in self.options().items() if v != usual[k]}

    def key(self, name: str) -> str:
        """Return the key of an option."""
        return f"{self.section}.{name}" if self.section else name

    def require(self, name: str, holds: bool, what: str) -> None:
        """Raise UserError with the option's key and value if a condition does not hold."""
        if not holds:
            raise UserError(f"{self.key(name)} must be {what}, got {getattr(self, name)}")

    def require_positive(self, *names: str) -> None:
        """Raise UserError if one of these options is not positive and finite."""
        for name in names:
            self.require(name, 0.0 < getattr(self, name) < math.inf, "positive and finite")

    def require_not_negative(self, *names: str) -> None:
        """Raise UserError if one of these options is not finite or is negative."""
        for name in names:
            self.require(name, 0.0 <= getattr(self, name) < math.inf, "finite and not negative")

    def require_fraction(self, *names: str) -> None:
        """Raise UserError if one of these options is outside [0, 1]."""
        for name in names:
            self.require(name, 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")

    def require_at_least(self, least: int, *names: str) -> None:
        """Raise UserError if one of these options is below a minimum."""
        for name in names:
            self.require(name, getattr(self, name) >= least, f"at least {least}")


P = TypeVar("P", bound=Part)
T = TypeVar("T")


def find_part(
    what: Any,
    base: type[P],
    label: str,
    known: Callable[[str], Any],
    adapt: Callable[[Any], Any] = lambda found: found,
) -> P | None:
    """Return a part with the name that it was chosen by; a class is instantiated.

    Args:
        what: a name, `module:attribute`, or the part itself.
        base: base class of the part.
        label: kind of part, for messages.
        known: returns the part of a name without a module.
        adapt: converts other objects to a part.

    Returns:
        None if `what` is something else.

    Raises:
        UserError: the module cannot be imported.
    """
    if isinstance(what, str):
        source = what if ":" in what else ""
        found = import_attribute(what, f"the {label}") if source else known(what)
    else:
        source, found = importable_name(what), what
    found = adapt(found)
    try:
        if isinstance(found, type) and issubclass(found, base):
            found = found()
        if not isinstance(found, base):
            return None
        return dataclasses.replace(found, source=source) if source else found
    except TypeError as error:
        name = source or getattr(what, "__name__", type(what).__name__)
        raise UserError(
            f"{label} {name} must be a dataclass, @dataclass(frozen=True, kw_only=True), whose"
            f" fields have defaults, and define every abstract method: {error}"
        ) from error


def importable_name(what: Any) -> str:
    """Return `module:attribute` of a user's class or function, or "" if it has no such name."""
    module, name = getattr(what, "__module__", None), getattr(what, "__qualname__", "")
    if module in (None, "__main__") or module.split(".")[0] in ("metarl", "torch"):
        return ""
    return f"{module}:{name}" if getattr(sys.modules.get(module), name, None) is what else ""


def called(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that may be a user's.

    Raises:
        UserError: a user's function raised another error; the message names both.
    """
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        inside: Any = function
        while isinstance(inside, partial):
            inside = inside.func
        if (getattr(inside, "__module__", None) or "").partition(".")[0] == "metarl":
            raise  # a bug of ours, or no memory
        raise UserError(f"{what} raised {raised(error)}") from error


_KINDS: Mapping[type, tuple[str, tuple[type, ...]]] = {
    bool: ("True or False", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a text", (str,)),
    tuple: ("numbers", (tuple, list)),
}


def converted(key: str, value: Any, like: Any, annotation: str = "") -> Any:
    """Return an option's value as plain Python: NumPy scalars and lists become numbers and tuples.

    Args:
        key: key of the option, for messages.
        value: given value.
        like: another value of the option; it determines the type.
        annotation: type of the option as text; "| None" also allows None.

    Raises:
        UserError: the value has another type.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None and "None" in annotation:
        return None
    if isinstance(like, tuple) and not isinstance(value, (tuple, list)):
        raise UserError(f"{key} takes several values, such as ({value},), got {value!r}")
    said, allowed = _KINDS.get(type(like), ("", (object,)))
    inside: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else ()
    good = isinstance(value, allowed) and isinstance(value, bool) <= isinstance(like, bool)
    if not good or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in inside):
        raise UserError(f"{key} must be {said}, got {value!r}")
    return inside if isinstance(like, tuple) else value
