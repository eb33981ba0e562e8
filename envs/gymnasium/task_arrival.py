"""How a task gets into an environment by the environment's own way, and whether it arrived.

A way is a method `set_task(task)` or an attribute `task`, of the environment or of a wrapper:

- the outermost method is called, and must hand the task on to the ways of all layers below it;
- above it, or where there is none, the attribute of every layer is set.
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


def own_method(env: gym.Env) -> gym.Env | None:
    """Return the outermost layer with a method `set_task`, None if there is none."""
    return next((layer for layer in layers(env) if _has_method(layer)), None)


def has_own_way(env: gym.Env) -> bool:
    """Whether an environment or a wrapper has a method `set_task` or an attribute `task`."""
    return own_method(env) is not None or any(hasattr(layer, "task") for layer in layers(env))


def takes_tasks(env: gym.Env) -> bool:
    """Whether an environment uses tasks by a way of its own, in a family with a reward too."""
    return own_method(env) is not None or any(_holds_a_task(x, only_way=False) for x in layers(env))


def give(env: gym.Env, task: Floats, name: str, *, only_way: bool) -> None:
    """Give a task to an environment by its own ways.

    Args:
        env: the environment, with its wrappers.
        task: [task_dim]
        name: of the family, for errors.
        only_way: the family has no other. Otherwise an attribute `task` that holds something else
            than numbers is somebody else's, and stays as it is.

    Raises:
        UserError: the attribute is no place for a task, or does not keep it.
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
            " no task vector: give the family set_task"
        )
    for layer in reversed(holders):
        with suppress(AttributeError):  # a wrapper's property that shows the one inside
            layer.task = task  # type: ignore[attr-defined]
        if not _reads(layer, task):
            raise UserError(
                f"{name}: the attribute task of {kind(layer)} does not keep the task that it is"
                f" given, {task.tolist()}; it is {_short(layer.task)}"  # type: ignore[attr-defined]
            )


def give_and_verify(env: gym.Env, task: Floats, other: Floats, name: str, **options: Any) -> None:
    """Do as `give`, and make sure that the method hands the task on to what lies below it.

    Args:
        env: the environment, with its wrappers.
        task: [task_dim]
        other: another task, which is given as well where the first one shows no effect.
        name: of the family, for errors.
        options: of `give`.

    Raises:
        UserError: a layer with a way of its own is not reached; or as `give` does.
    """
    method = own_method(env)
    below = [] if method is None else _below(env, method)
    missed = _missed(below, lambda: give(env, task, name, **options), task)
    if missed:  # the task may have been in force already
        missed = _missed(missed, lambda: give(env, other, name, **options), other)
        give(env, task, name, **options)
    for layer in missed:
        own = "set_task(task)" if _has_method(layer) else "task = task"
        keeper = [outer for outer in _above(env, layer) if _has_method(outer)][-1]
        raise UserError(
            f"{name}: set_task of {kind(keeper)} keeps the task for itself, and {kind(layer)},"
            f" inside it, has a way of its own that is never used: hand the task on in set_task"
            f" (self.unwrapped.{own})"
        )


def verify_given(env: gym.Env, task: Floats, name: str, way: str) -> None:
    """Raise UserError if the family's own way left out a layer that waits for a task of its own.

    Args:
        env: the environment, with its wrappers, after the task was given.
        task: [task_dim]
        name: of the family.
        way: "set_task", which gets the unwrapped environment, or "keywords".
    """
    found = list(layers(env))
    for layer in found if way == "keywords" else found[:-1]:
        if _has_method(layer):
            raise UserError(
                f"{name}: {kind(layer)} has a method set_task, which the family's {way} would leave"
                f" uncalled: leave {way} out, so that the method gets the task"
            )
        held = getattr(layer, "task", None)
        if isinstance(held, np.ndarray) and held.shape == task.shape and not _reads(layer, task):
            raise UserError(
                f"{name}: {kind(layer)} has an attribute task, which stays {held.tolist()} with the"
                f" family's {way}: leave {way} out, so that the attribute is set"
            )


def _above(env: gym.Env, method: gym.Env | None) -> list[gym.Env]:
    """Return the layers outside of one, or all."""
    found = list(layers(env))
    return found if method is None else found[: found.index(method)]


def _below(env: gym.Env, method: gym.Env) -> list[gym.Env]:
    """Return the layers inside of one that have a way of their own."""
    found = list(layers(env))
    inside = found[found.index(method) + 1 :]
    return [x for x in inside if _has_method(x) or _holds_a_task(x, only_way=False)]


def _has_method(layer: gym.Env) -> bool:
    return callable(getattr(layer, "set_task", None))


def _holds_a_task(layer: gym.Env, only_way: bool) -> bool:
    """Whether a layer has an attribute `task` that may be a task vector, or becomes one."""
    if not hasattr(layer, "task"):
        return False
    held = layer.task  # type: ignore[attr-defined]
    if held is None:
        return True
    if isinstance(held, bool | int | np.integer):
        return only_way  # else most likely a number among the environment's own tasks
    try:
        return np.asarray(held).dtype.kind in "fiu"
    except (TypeError, ValueError):
        return False


def _reads(layer: gym.Env, task: Floats) -> bool:
    """Whether the attribute `task` of a layer is this task."""
    try:
        return np.array_equal(np.asarray(layer.task, np.float64), task)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False


def _missed(candidates: list[gym.Env], apply: Callable[[], None], task: Floats) -> list[gym.Env]:
    """Return the layers that show no trace of what was applied.

    A trace is a call of the method, an attribute `task` that reads back, or any attribute that
    holds something else than before.
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
def _listening(candidates: list[gym.Env]) -> Iterator[set[int]]:
    """Note the layers whose method is called."""
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


def _noted(layer: gym.Env, called: set[int]) -> Callable[..., Any]:
    method = layer.set_task  # type: ignore[attr-defined]

    def set_task(*arguments: Any, **keywords: Any) -> Any:
        called.add(id(layer))
        return method(*arguments, **keywords)

    return set_task


def _held(layer: gym.Env) -> dict[str, Any]:
    """Return a layer's attributes; arrays as copies, for they may be written into."""
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
