"""How a family gets to another process: packed here, made again there.

A family is pickled where that can be done; else it goes by its name and is made anew. Either way
the module that its name stands for is imported there first: what registers environments with
Gymnasium, or imports a package that does, does so again.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metarl.envs import guard
from metarl.envs.errors import UserError
from metarl.envs.family import TaskFamily
from metarl.envs.registry import import_source, make_family


@dataclass(frozen=True)
class Parcel:
    """A family on its way to another process."""

    name: str
    """What the family calls itself."""
    source: tuple[str, Mapping[str, Any]] | None
    """See `TaskFamily.source`."""
    pickled: bytes | None
    """None: the family is made again from its source."""


def pack(family: TaskFamily) -> Parcel:
    """Return a family as another process can make it again.

    Raises:
        UserError: it cannot be pickled and was not made by a name; or this program itself cannot
            be read by another process.
    """
    _check_program()
    source = None if family.source is None else (family.source[0], dict(family.source[1]))
    try:
        with guard.user_code():
            return Parcel(family.name, source, pickle.dumps(family))
    except Exception as error:  # whatever a user's objects raise
        if source is None:
            raise UserError(_cannot(family.name, error)) from error
        return Parcel(family.name, source, None)


def unpack(parcel: Parcel) -> TaskFamily:
    """Return the family of a parcel.

    Raises:
        UserError: it cannot be made here.
    """
    try:
        if parcel.pickled is None:
            assert parcel.source is not None
            return make_family(parcel.source[0], **parcel.source[1])
        if parcel.source is not None:
            import_source(parcel.source[0])
        with guard.user_code():
            return pickle.loads(parcel.pickled)
    except Exception as error:
        raise UserError(_cannot(parcel.name, error)) from error


def _cannot(name: str, error: Exception) -> str:
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return (
        f"{name} cannot be made again in a worker process: {said}; what the main program alone has"
        " set, a lambda, a nested function or an open file or simulator may be the cause: define"
        " the family, and the functions it uses, in a module and name it module:attribute, or use"
        " workers=0"
    )


def _check_program() -> None:
    """Raise UserError if a new process cannot read the program that runs here."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and file is not None and not os.path.exists(file):
        raise UserError(
            f"worker processes cannot read a program that came from {os.path.basename(file)}: use"
            " workers=0, which steps the environments in this process, or put the program into a"
            " file, or the family into a module"
        )
