"""Callbacks of a run: user extensions of training.

    for each iteration:
        tasks = callback.tasks(rng, count, family)   # or the family's own
        train on them
        callback.update(iteration)                   # may change the callback's state
        save metrics and checkpoint, with callback.state()
        callback.saved(iteration)

A checkpoint contains the state after `update`, so a resumed run continues exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarl.envs import guard
from metarl.envs.errors import UserError, kind_of
from metarl.envs.family import Family
from metarl.envs.registry import import_attribute
from metarl.envs.tasks import Tasks
from metarl.plain_json import json_text
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.folder import CallbackState, RunError
from metarl.sampling.seeding import stream
from metarl.sampling.trajectories import Rollout


@dataclass
class Run:
    """Run, as callbacks see it."""

    folder: Path
    """Run folder."""
    options: Mapping[str, Any]
    """Values of the config by key, such as `family`, `seed` or `inner.steps`, as JSON values."""
    family: Family
    """Task family of the run."""
    measure: str
    """Measure of adaptation in the metrics: return, or loss for supervised tasks."""
    meta_policy: Callable[[], MetaPolicy]
    """Returns the current meta-parameters as a policy."""
    stopped: str = ""
    """Reason for an early end; empty without one."""

    def stop(self, reason: str) -> None:
        """End the run after the iteration is saved. The reason is shown."""
        self.stopped = self.stopped or str(reason) or "stopped by a callback"


@dataclass(frozen=True)
class Iteration:
    """Iteration, as callbacks see it."""

    run: Run
    """The run that the iteration belongs to."""
    number: int
    """Index of the iteration, from 1."""
    metrics: dict[str, Any]
    """Metrics as in `metrics.jsonl`; a copy."""
    tasks: Tasks
    """Task vectors, [T, task_dim]."""
    returns_pre: NDArray[np.float64] | None
    """Mean return of each task before adaptation, [T]; None for supervised tasks."""
    returns_post: NDArray[np.float64] | None
    """Mean return of each task after adaptation, [T]; NaN without episodes after it."""
    rollouts: list[Rollout]
    """Rollouts of this process's tasks, support first; empty for supervised tasks."""

    def meta_policy(self) -> MetaPolicy:
        """Return the meta-parameters after the iteration as a policy."""
        return self.run.meta_policy()

    def stop(self, reason: str) -> None:
        """End the run after the iteration is saved. The reason is shown."""
        self.run.stop(reason)


class Callback:
    """Base class of callbacks. A function of an `Iteration` is also one, called like `saved`.

    With several processes, callbacks run on rank 0.
    """

    name: str = ""
    """Name of its state in checkpoints; by default the name of its class."""

    def start(self, run: Run) -> None:
        """Prepare for a run, after `load_state` if it is resumed."""

    def tasks(self, rng: np.random.Generator, count: int, family: Family) -> Any:
        """Return the tasks of the next iteration, [count, task_dim]; None: sample from the family.

        Args:
            rng: random stream, a function of the run's seed and the iteration.
            count: number of tasks.
            family: task family of the run.
        """
        return None

    def update(self, iteration: Iteration) -> None:
        """Update the state after an iteration. The iteration's checkpoint contains it."""

    def saved(self, iteration: Iteration) -> None:
        """Process an iteration with metrics and checkpoint on the disk. The run waits for it."""

    def close(self, error: BaseException | None) -> None:
        """Release resources at the end of a run; `error` is the error that ended it, if any."""

    def state(self) -> Mapping[str, Any]:
        """Return the state by name: JSON values, arrays, tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`; arrays and tensors are NumPy arrays."""
        raise UserError(f"the callback {self.name} has a state, but no load_state")


_METHODS = [name for name, method in vars(Callback).items() if callable(method)]


class _Function(Callback):
    """Callback that calls a function."""

    def __init__(self, function: Callable[[Iteration], object]) -> None:
        self.function = function

    def saved(self, iteration: Iteration) -> None:
        self.function(iteration)


def find_callback(what: str) -> Any:
    """Return the callback named by `module:attribute`; a class is called without arguments.

    Raises:
        UserError: it does not exist, the module cannot be imported, or the class needs arguments.
    """
    found = import_attribute(what, "a callback")
    if not isinstance(found, type):
        return found
    try:
        with guard.user_code():
            return found()
    except TypeError as error:
        raise UserError(
            f"the callback {what} cannot be created: {error}; name an object"
        ) from error


class CallbackList:
    """Callbacks of a run.

    Args:
        callbacks: `Callback` objects, or functions of an iteration.

    Raises:
        UserError: an entry is something else, two have the same name, or several propose tasks.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        if callable(callbacks) or isinstance(callbacks, (str, Callback)):
            raise UserError(f"callbacks must be a list, got {kind_of(callbacks)}")
        self._all = [_as_callback(c) for c in callbacks]
        names = [c.name for c in self._all if not isinstance(c, _Function)]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two callbacks have the name {name!r}: set the name of one")
        proposing = [c for c in self._all if type(c).tasks is not Callback.tasks]
        if len(proposing) > 1:
            raise UserError(
                f"callbacks {' and '.join(c.name for c in proposing)} both propose tasks; one may"
            )
        self.proposes = bool(proposing)
        """Whether one of them proposes tasks."""
        self._proposer = proposing[0] if proposing else None
        self.wait = any(type(c).saved is not Callback.saved for c in self._all)
        """Whether one of them needs saved iterations."""

    def __bool__(self) -> bool:
        return bool(self._all)

    def load(self, folder: Path, states: CallbackState) -> None:
        """Load the states of callbacks from a checkpoint of the run folder.

        Raises:
            RunError: the callback of a state is missing.
        """
        known = {callback.name: callback for callback in self._all}
        for name, (values, arrays) in states.items():
            if name not in known:
                missing = f"{folder} was trained with the callback {name}; pass it again"
                raise RunError(
                    f"{missing} in callbacks", f"{missing} with --callback module:attribute"
                )
            numbers = {key: value.numpy().copy() for key, value in arrays.items()}
            with guard.user_code():
                known[name].load_state({**copy.deepcopy(values), **numbers})

    def states(self) -> CallbackState:
        """Return the states, as JSON values and copied tensors."""
        found: CallbackState = {}
        for callback in self._all:
            with guard.user_code():
                state = _checked_state(callback.name, callback.state())
            arrays = {k: v for k, v in state.items() if isinstance(v, (np.ndarray, torch.Tensor))}
            values = json.loads(json_text({k: v for k, v in state.items() if k not in arrays}))
            if state:
                tensors = {k: _tensor(callback.name, k, v) for k, v in arrays.items()}
                found[callback.name] = (values, tensors)
        return found

    def start(self, run: Run) -> None:
        """Call `start` of all callbacks."""
        for callback in self._all:
            with guard.user_code():
                callback.start(run)

    def tasks(self, seed: int, iteration: int, count: int, family: Family) -> Tasks | None:
        """Return the proposed tasks of an iteration; None: sample from the family.

        Raises:
            UserError: the tasks are not finite numbers [count, task_dim].
        """
        if self._proposer is None:
            return None
        with guard.user_code():
            found = self._proposer.tasks(stream(seed, iteration, "tasks"), count, family)
        if found is None:
            return None
        shape = (count, family.tasks.dim)
        try:
            tasks = np.array(found, np.float64)
        except (TypeError, ValueError):
            tasks = np.array(math.nan)
        if tasks.shape != shape or not np.isfinite(tasks).all():
            got = f"{list(tasks.shape)}" if tasks.shape != shape else "numbers that are not finite"
            raise UserError(
                f"tasks of the callback {self._proposer.name} must be finite numbers {list(shape)},"
                f" [tasks, {', '.join(family.tasks.names[:4])}], got {got}"
            )
        return tasks

    def update(self, iteration: Iteration) -> None:
        """Call `update` of all callbacks."""
        for callback in self._all:
            with guard.user_code():
                callback.update(_copied(iteration))

    def saved(self, iteration: Iteration) -> None:
        """Call `saved` of all callbacks."""
        for callback in self._all:
            with guard.user_code():
                callback.saved(_copied(iteration))

    def close(self, error: BaseException | None) -> None:
        """Call `close` of all callbacks."""
        for callback in self._all:
            with guard.user_code():
                callback.close(error)


def _as_callback(what: Any) -> Callback:
    if isinstance(what, type) or not (isinstance(what, Callback) or callable(what)):
        raise UserError(
            f"a callback is a metarl.Callback or a function of an iteration, got {kind_of(what)}"
        )
    callback = what if isinstance(what, Callback) else _Function(what)
    callback.name = callback.name or type(callback).__name__
    for name in dir(callback):
        if name.startswith("on_") and callable(getattr(type(callback), name, None)):
            raise UserError(
                f"the callback {callback.name} has the method {name}, which no run calls; the"
                f" methods of callbacks are {', '.join(_METHODS)}"
            )
    own = (getattr(getattr(callback, name), "__func__", None) for name in _METHODS)
    if all(method is vars(Callback)[name] for method, name in zip(own, _METHODS, strict=True)):
        raise UserError(
            f"the callback {callback.name} does nothing: define one of {', '.join(_METHODS)}"
        )
    if "/" in callback.name:
        raise UserError(f"the name of a callback must not have '/', got {callback.name!r}")
    return callback


def _copied(iteration: Iteration) -> Iteration:
    """Return a copy of an iteration that a callback may change; its rollouts are shared."""
    fresh = {
        name: copy.deepcopy(getattr(iteration, name))
        for name in ("metrics", "tasks", "returns_pre", "returns_post")
    }
    return dataclasses.replace(iteration, rollouts=list(iteration.rollouts), **fresh)


def _checked_state(name: str, state: Any) -> dict[str, Any]:
    """Return the state of a callback; raise UserError unless all its keys are texts."""
    if not isinstance(state, Mapping) or not _text_keys(state):
        raise UserError(
            f"state of the callback {name} must be a dict with texts as keys, and so must dicts"
            f" inside, got {state!r}"
        )
    return dict(state)


def _text_keys(value: Any) -> bool:
    """Whether all keys of nested dicts are texts; JSON would make them texts."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _text_keys(v) for key, v in value.items())
    return not isinstance(value, list | tuple) or all(map(_text_keys, value))


def _tensor(callback: str, key: str, value: NDArray | torch.Tensor) -> torch.Tensor:
    try:
        return torch.as_tensor(value).detach().cpu().clone()
    except TypeError as error:
        raise UserError(f"the callback {callback} cannot save {key}: {error}") from error
