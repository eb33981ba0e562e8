"""One simulation with the methods of a batch, for single environments.

Its arrays are views of one MjData, so a step copies nothing. `Batch` has the same results bit for
bit.
"""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.mujoco.serial_batch import NONE, SPEC, Ids, SerialBatch, model_field


def has_views(model: mujoco.MjModel, fields: Iterable[str]) -> bool:
    """Return whether all of these fields of MjData are arrays that `OneSimulation` can show."""
    data = mujoco.MjData(model)
    return all(isinstance(getattr(data, name), np.ndarray) for name in fields)


class OneSimulation(SerialBatch):
    """Batch of one simulation, with its MjData as `data`."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model, self.nsim, self.nthread, self.persistent = model, 1, 1, True
        self.data = mujoco.MjData(model)
        self._models, self._data = [model], [self.data]
        self._expanded = {}
        self._numbers: list[str] = []
        """Expanded fields that are not arrays, which therefore have no view."""
        self.warning_numbers = self.data.warning.number[None]
        """Live numbers of warnings, [1, kinds of mjtWarning]."""

    def get_state(self) -> NDArray[np.float64]:
        """Return the integration state, [1, size]."""
        state = np.zeros((1, mujoco.mj_stateSize(self.model, SPEC)))
        mujoco.mj_getState(self.model, self.data, state[0], SPEC)
        return state

    def set_state(self, state: NDArray[np.float64]) -> None:
        """Set the integration state, [1, size]."""
        mujoco.mj_setState(self.model, self.data, state[0], SPEC)

    def bind(self, name: str) -> NDArray[Any]:
        """Return a live field of MjData, [1, ...]."""
        return getattr(self.data, name)[None]

    def expand(self, name: str) -> NDArray[Any]:
        """Return a field of the simulation's own model, or of its options (`opt.NAME`), [1, ...].

        A number takes effect at the next call.
        """
        if name not in self._expanded:
            copied = super().expand(name)
            value = getattr(*model_field(self._models[0], name))
            if isinstance(value, np.ndarray):
                self._expanded[name] = value[None]
            else:
                self._expanded[name] = copied
                self._numbers.append(name)
        return self._expanded[name]

    def step(self, ids: Ids = None, nstep: int = 1, stage: int = NONE) -> None:
        """Advance by nstep physics steps, then compute the stages up to `stage`."""
        if stage or self._numbers:
            super().step(ids, nstep, stage)
        else:
            mujoco.mj_step(self._models[0], self.data, nstep)

    def get_data(self, sim: int, data: mujoco.MjData | None = None) -> mujoco.MjData:
        """Write the state into `data`, and return the complete data of the simulation.

        Do not write into the returned data. By default return a copy.
        """
        if data is None:
            return copy.copy(self.data)
        if data is not self.data:
            mujoco.mj_setState(self.model, data, self.get_state()[0], SPEC)
        return self.data

    def _load(self, i: int) -> mujoco.MjModel:
        model = self._models[0]
        for name in self._numbers:
            owner, field = model_field(model, name)
            setattr(owner, field, self._expanded[name][0])
        return model

    def _save(self, i: int) -> None:
        """Do nothing; the arrays are views."""
