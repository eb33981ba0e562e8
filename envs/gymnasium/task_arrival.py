"""Setting a task through the environment's own interface, and verification of its arrival.

The interface is a method `set_task(task)` or an attribute `task` of the environment or a wrapper:

- The outermost method is called. It must pass the task on to the interfaces of all inner layers.
- The attribute of every layer outside this method is set. Without a method, every layer's is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import UserError
from metarl.envs.gymnasium.wrappers import kind, layers

Floats = NDArray[np.float64]


def own_method(env: gym.Env[Any, Any]) -> gym.Env[Any, Any] | None:
    """Return the outermost layer with a method `set_task`, or None."""
    return next((layer for layer in layers(env) if _has_method(layer)), None)


def has_own_way(env: gym.Env[Any, Any]) -> bool:
    """Return whether an environment or a wrapper has a method `set_task` or an attribute `task`."""
    return own_method(env) is not None or any(hasattr(layer, "task") for layer in layers(env))


def takes_tasks(env: gym.Env[Any, Any]) -> bool:
    """Return whether an environment takes tasks itself, also in a family with a reward."""
    return own_method(env) is not None or any(_holds_a_task(x, only_way=False) for x in layers(env))


def give(env: gym.Env[Any, Any], task: Floats, name: str, *, only_way: bool) -> None:
    """Set a task in an environment through the environment's own interface.

    Args:
        env: environment with its wrappers.
        task: task vector, [task_dim].
        name: name of the family, for errors.
        only_way: the family has no other way to set a task. Otherwise an attribute `task` that does
            not hold numbers has another purpose and is not changed.

    Raises:
        UserError: the attribute cannot hold a task, or does not keep it.
    """
    method = own_method(env)
    above = _above(env, method)
    if method is not None:
        method.set_task(task)  # type: ignore[attr-defined]
    holders = [layer for layer in above if _holds_a_task(layer, only_way)]
    if only_way and method is None and not holders:
        layer = next(layer for layer in above if hasattr(layer, "task"))
        raise UserError(
            f"{name}: the attribute task of {kind(layer)} is {_short(layer.task)},"  # type: ignore[attr-defined]
            " not a task vector; give the family set_task"
        )
    for layer in reversed(holders):
        with suppress(AttributeError):  # a wrapper's property that returns an inner attribute
            layer.task = task  # type: ignore[attr-defined]
        if not _reads(layer, task):
            raise UserError(
                f"{name}: the attribute task of {kind(layer)} does not keep the task"
                f" {task.tolist()}; it is {_short(layer.task)}"  # type: ignore[attr-defined]
            )


def give_and_verify(
    env: gym.Env[Any, Any], task: Floats, other: Floats, name: str, **options: Any
) -> None:
    """Call `give`, and verify that the method passes the task on to the inner layers.

    Args:
        env: environment with its wrappers.
        task: task vector, [task_dim].
        other: another task, which is also tried if the first one has no visible effect.
        name: name of the family, for errors.
        options: options of `give`.

    Raises:
        UserError: the task does not reach a layer with its own interface; or as in `give`.
    """
    method = own_method(env)
    below = [] if method is None else _below(env, method)
    missed = _missed(below, lambda: give(env, task, name, **options), task)
    if missed:  # the task may already have been set
        missed = _missed(missed, lambda: give(env, other, name, **options), other)
        give(env, task, name, **options)
    for layer in missed:
        own = "set_task(task)" if _has_method(layer) else "task = task"
        keeper = [outer for outer in _above(env, layer) if _has_method(outer)][-1]
        raise UserError(
            f"{name}: set_task of {kind(keeper)} does not pass the task on, so it never reaches"
            f" {kind(layer)}, which is inside; pass the task on in set_task"
            f" (self.unwrapped.{own})"
        )


def verify_given(env: gym.Env[Any, Any], task: Floats, name: str, way: str) -> None:
    """Raise UserError if the family's way to set a task misses a layer with its own interface.

    Args:
        env: environment with its wrappers, after the task was set.
        task: task vector, [task_dim].
        name: name of the family.
        way: "set_task", which gets the unwrapped environment, or "keywords".
    """
    found = list(layers(env))
    for layer in found if way == "keywords" else found[:-1]:
        if _has_method(layer):
            raise UserError(
                f"{name}: {kind(layer)} has a method set_task, which is not called if the family"
                f" has {way}; remove {way}, so that the method gets the task"
            )
        held = getattr(layer, "task", None)
        if isinstance(held, np.ndarray) and held.shape == task.shape and not _reads(layer, task):
            raise UserError(
                f"{name}: {kind(layer)} has an attribute task, which stays {held.tolist()} with the"
                f" family's {way}; remove {way}, so that the attribute is set"
            )


def _above(env: gym.Env[Any, Any], method: gym.Env[Any, Any] | None) -> list[gym.Env[Any, Any]]:
    """Return the layers outside of the layer `method`, or all layers without one."""
    found = list(layers(env))
    return found if method is None else found[: found.index(method)]


def _below(env: gym.Env[Any, Any], method: gym.Env[Any, Any]) -> list[gym.Env[Any, Any]]:
    """Return the layers inside of the layer `method` that have their own interface."""
    found = list(layers(env))
    inside = found[found.index(method) + 1 :]
    return [x for x in inside if _has_method(x) or _holds_a_task(x, only_way=False)]


def _has_method(layer: gym.Env[Any, Any]) -> bool:
    return callable(getattr(layer, "set_task", None))


def _holds_a_task(layer: gym.Env[Any, Any], only_way: bool) -> bool:
    """Return whether a layer has an attribute `task` that may hold a task vector."""
    if not hasattr(layer, "task"):
        return False
    held = layer.task  # type: ignore[attr-defined]
    if held is None:
        return True
    if isinstance(held, bool | int | np.integer):
        return only_way  # otherwise it is probably an index of the environment's own tasks
    try:
        return np.asarray(held).dtype.kind in "fiu"
    except (TypeError, ValueError):
        return False


def _reads(layer: gym.Env[Any, Any], task: Floats) -> bool:
    """Return whether the attribute `task` of a layer equals this task."""
    try:
        return np.array_equal(np.asarray(layer.task, np.float64), task)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False


def _missed(
    candidates: list[gym.Env[Any, Any]], apply: Callable[[], None], task: Floats
) -> list[gym.Env[Any, Any]]:
    """Return the layers without a visible effect of `apply`.

    An effect is a call of the method, an attribute `task` that equals the task, or any attribute
    with a new value.
    """
    before = [_held(layer) for layer in candidates]
    with _listening(candidates) as called:
        apply()
    return [
        layer
        for layer, held in zip(candidates, before, strict=True)
        if not (id(layer) in called or _reads(layer, task) or _differs(held, _held(layer)))
    ]


@contextmanager
def _listening(candidates: list[gym.Env[Any, Any]]) -> Iterator[set[int]]:
    """Record the layers whose method is called."""
    called: set[int] = set()
    heard = []
    for layer in candidates:
        if _has_method(layer) and "set_task" not in getattr(layer, "__dict__", {"set_task": None}):
            layer.set_task = _noted(layer, called)  # type: ignore[attr-defined]
            heard.append(layer)
    try:
        yield called
    finally:
        for layer in heard:
            vars(layer).pop("set_task", None)


def _noted(layer: gym.Env[Any, Any], called: set[int]) -> Callable[..., Any]:
    method = layer.set_task  # type: ignore[attr-defined]

    def set_task(*arguments: Any, **keywords: Any) -> Any:
        called.add(id(layer))
        return method(*arguments, **keywords)

    return set_task


def _held(layer: gym.Env[Any, Any]) -> dict[str, Any]:
    """Return a layer's attributes, with copies of arrays, which may be changed in place."""
    found = {k: v for k, v in getattr(layer, "__dict__", {}).items() if k != "set_task"}
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in found.items()}


def _differs(before: dict[str, Any], after: dict[str, Any]) -> bool:
    def same(one: Any, two: Any) -> bool:
        if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
            return one.shape == two.shape and one.tobytes() == two.tobytes()
        return one is two

    return before.keys() != after.keys() or not all(same(before[k], after[k]) for k in before)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
