"""Transfer of a family to another process: it is packed here and made again there.

A family is pickled if possible. Otherwise its name is sent and the family is made again. In both
cases the other process first imports the module of the family's name. Environments that this module
registers with Gymnasium are then registered there, too.
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
    """Name of the family."""
    source: tuple[str, Mapping[str, Any]] | None
    """See `TaskFamily.source`."""
    pickled: bytes | None
    """None: the family is made again from its source."""


def pack(family: TaskFamily) -> Parcel:
    """Return a parcel from which another process can make the family again.

    Raises:
        UserError: the family cannot be pickled and was not made by name, or another process cannot
            read this program.
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
        UserError: the family cannot be made here.
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
        f"{name} cannot be made again in a worker process: {said}. Possible causes are values set"
        " only in the main program, a lambda, a nested function, an open file or a simulator."
        " Define the family and its functions in a module and name it module:attribute, or use"
        " workers=0"
    )


def _check_program() -> None:
    """Raise UserError if a new process cannot read the program that runs here."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and file is not None and not os.path.exists(file):
        raise UserError(
            f"worker processes cannot read a program that came from {os.path.basename(file)}. Use"
            " workers=0 to step the environments in this process, or put the program into a file,"
            " or the family into a module"
        )
