"""Conversion and validation of the results of `reset` and `step`.

Numbers may be Python numbers, NumPy numbers or arrays without axes. Flags may be 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metarl.envs.errors import UserError

NUMBERS = frozenset({float, int, np.float64, np.float32})
FLAGS = frozenset({bool, np.bool_})
"""Types that need no conversion."""


def number(value: Any) -> float | None:
    """Return a value as a float, or None if it is not a number: an array with axes, None, text."""
    if type(value) in NUMBERS or type(value) in FLAGS:
        return float(value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor that cannot be read here
        return None
    return float(array) if array.shape == () and array.dtype.kind in "biuf" else None


def plain_step(
    reward: Any, terminated: Any, truncated: Any, info: Any
) -> tuple[float, bool, bool, Mapping[str, Any]]:
    """Return reward, flags and info of a step as plain values.

    Raises:
        UserError: one of them has a wrong type; the message names the expected type.
    """
    paid, ended, cut = map(number, (reward, terminated, truncated))
    faults = []
    if paid is None:
        faults.append(f"a number as reward, got {_said(reward)}")
    for name, flag, value in (("terminated", ended, terminated), ("truncated", cut, truncated)):
        if flag not in (0.0, 1.0):
            faults.append(f"True or False as {name}, got {_said(value)}")
    if not isinstance(info, Mapping):
        faults.append(f"a dictionary as info, such as {{}}, got {_said(info)}")
    if faults:
        raise UserError(f"step must return {', and '.join(faults)}")
    assert paid is not None
    return paid, bool(ended), bool(cut), info


def plain_reset(result: Any) -> tuple[Any, Mapping[str, Any]]:
    """Return observation and info of a reset.

    Raises:
        UserError: the result is something else.
    """
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise UserError(
            f"reset must return (observation, info), info a dictionary, got {_said(result)}"
        )
    return result


def success(info: Mapping[str, Any]) -> float | None:
    """Return `info["success"]` as a float, or None if it is missing or not a number."""
    if "success" not in info:
        return None
    value = info["success"]
    return number(np.squeeze(value) if isinstance(value, np.ndarray) else value)


def _said(value: Any) -> str:
    """Describe a value briefly; for an array of one number, add the remedy."""
    shape = tuple(getattr(value, "shape", None) or ())
    if shape:
        return f"an array of shape {shape}{' (return its element [0])' if shape == (1,) else ''}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
