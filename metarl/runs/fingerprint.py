"""Fingerprint of the task family that a run or policy was trained on.

A family's code may change between training and resume or evaluation. The horizon, tasks and spaces
are therefore stored with the trained parameters and compared when they are used again. Older files
without a fingerprint are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.plain_json import json_text

Fingerprint = Mapping[str, Any]
"""JSON values by name."""

Spaces = tuple[gym.Space, gym.Space]
"""Observation space and action space."""

LONGEST = 64
"""Maximum size of an array that is stored number by number; longer ones become checksums."""

_NEEDED = ("kind", "components", "inputs", "outputs", "observations", "actions")
"""Entries that a policy depends on. Other differences change results, or nothing."""

_SHOWN_NOWHERE = ("observation bounds",)
"""Entries that results do not depend on."""


def fingerprint(family: Family, spaces: Spaces | None = None) -> dict[str, Any]:
    """Return what identifies a family, besides its name and options.

    Args:
        family: family of environments or of supervised tasks.
        spaces: spaces of its environments; None if unknown.
    """
    tasks = family.tasks
    found: dict[str, Any] = {"components": _short(list(tasks.names))}
    for split in ("train", "test"):
        extent = tasks.extent(split)
        if len(extent) > LONGEST:
            extent = {"all": np.array(list(extent.values()))}
        found[f"{split} tasks"] = {name: _short(values) for name, values in extent.items()}
    found |= {name: _short(value) for name, value in family.identity().items()}
    if spaces is not None:
        observation, action = spaces
        found["observations"] = _kind(observation)
        found["observation bounds"] = _bounds(observation)
        found["actions"] = {**_kind(action), **_bounds(action)}
    return json.loads(json_text(found))  # a tuple is a list, as in a file


def changes(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return the differences between two fingerprints: "horizon 10 -> 25"."""
    return _differences(old, new, tuple(old))


def notices(family: str, old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return the differences that leave a policy usable but change its results.

    Args:
        family: name of the family that the policy was trained on.

    Raises:
        UserError: there are differences that make the policy unusable.
    """
    if found := _differences(old, new, _NEEDED):
        raise UserError(
            f"this policy was trained on a different {family} (then -> now):"
            f" {'; '.join(found)}; restore the family, or train on it again"
        )
    return _differences(old, new, [key for key in old if key not in (*_NEEDED, *_SHOWN_NOWHERE)])


def sizes_changed(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return the differences that require a network of another size."""
    return _differences(old, new, [key for key in _NEEDED if key != "components"])


def _differences(old: Fingerprint, new: Fingerprint, keys: Iterable[str]) -> list[str]:
    found = []
    for key in keys:
        if key not in old or key not in new or old[key] == new[key]:
            continue
        before, now = old[key], new[key]
        if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
            found += [
                f"{key}: {part} {_words(before[part])} -> {_words(now[part])}"
                for part in before
                if before[part] != now[part]
            ]
        else:
            found.append(f"{key} {_words(before)} -> {_words(now)}")
    return found


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_words, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(values: Any) -> Any:
    """Return an array as lists of numbers or strings, or as its shape and checksum."""
    array = np.asarray(values)
    # Nine digits: another machine may compute different last digits.
    plain = [f"{x:.9g}" if array.dtype.kind == "f" else x for x in array.ravel().tolist()]
    if array.size > LONGEST:
        digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
        return {"shape": list(array.shape), "sha256": digest[:16]}
    numbers = [_number(x) if array.dtype.kind == "f" else x for x in plain]
    return _nested(numbers, array.shape)


def _number(text: str) -> float | str:
    """Return a number, or a string if it is not finite. JSON has no such numbers."""
    number = float(text)
    return number if np.isfinite(number) else text


def _nested(values: list[Any], shape: tuple[int, ...]) -> Any:
    if not shape:
        return values[0]
    each = len(values) // shape[0] if shape[0] else 0
    return [_nested(values[i * each : (i + 1) * each], shape[1:]) for i in range(shape[0])]


def _kind(space: gym.Space) -> dict[str, Any]:
    counts = {
        name: _short(getattr(space, name))
        for name in ("n", "nvec", "start")
        if hasattr(space, name)
    }
    shape = list(space.shape) if space.shape is not None else []
    return {"kind": type(space).__name__, "shape": shape, "dtype": str(space.dtype), **counts}


def _bounds(space: gym.Space) -> dict[str, Any]:
    if not isinstance(space, gym.spaces.Box):
        return {}
    return {name: _bound(getattr(space, name)) for name in ("low", "high")}


def _bound(values: np.ndarray) -> Any:
    same = values.size > 0 and (values == values.flat[0]).all()
    return _short(np.asarray(values.flat[0] if same else values, np.float64))
