"""JSON of user values: NumPy numbers and arrays, tuples and paths become plain values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from metarl.envs.errors import UserError


def plain(value: Any) -> Any:
    """Return a value after a JSON round trip: strings, numbers, lists and dicts."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value  # NumPy


def finite(value: Any) -> Any:
    """Return JSON values, with null for each number that is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def json_text(data: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return data as JSON text.

    Raises:
        UserError: the data contain other types than strings, numbers, lists and dicts of these.
    """
    return json.dumps(plain(data), indent=indent, sort_keys=sort_keys, default=_refuse)


def _refuse(value: Any) -> Any:
    raise UserError(f"{value!r} cannot be saved: use numbers, strings, or lists and dicts of these")
