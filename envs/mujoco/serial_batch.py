"""Serial version of `mujoco.batch.Batch`, restricted to the methods that native families use.

It is for MuJoCo versions without `mujoco.batch` (Meta-World pins 3.3.0). Its results equal the
results of `Batch` bit for bit; it only has no threads.
"""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from metarl.envs.errors import did_you_mean

Ids = Sequence[int] | NDArray[Any] | None

SPEC = int(mujoco.mjtState.mjSTATE_INTEGRATION)
# Fields of MjData that belong to the integration state, and their bits.
_STATE = {
    name: int(getattr(mujoco.mjtState, f"mjSTATE_{bit}"))
    for name, bit in {
        "time": "TIME", "qpos": "QPOS", "qvel": "QVEL", "act": "ACT",
        "qacc_warmstart": "WARMSTART", "ctrl": "CTRL", "qfrc_applied": "QFRC_APPLIED",
        "xfrc_applied": "XFRC_APPLIED", "eq_active": "EQ_ACTIVE", "mocap_pos": "MOCAP_POS",
        "mocap_quat": "MOCAP_QUAT", "userdata": "USERDATA",
    }.items()
}  # fmt: skip
NONE, _POS, _VEL, _ACC = (
    int(getattr(mujoco.mjtStage, f"mjSTAGE_{stage}")) for stage in ("NONE", "POS", "VEL", "ACC")
)


class SerialBatch:
    """Batch of `nsim` simulations of a model, each an MjData; `nthread` has no effect.

    `bind` returns live arrays [nsim, ...]. Values written to the state (qpos, ctrl, …) take effect
    at the next call. Every call refreshes the other fields. `warning` is [nsim, kinds of
    mjtWarning, (last info, number)].
    """

    def __init__(
        self, model: mujoco.MjModel, nsim: int, nthread: int = 1, persistent: bool = False
    ) -> None:
        self.model, self.nsim, self.nthread, self.persistent = model, nsim, nthread, persistent
        self._models = [model] * nsim
        self._data = [mujoco.MjData(model) for _ in range(nsim)]
        self._expanded: dict[str, NDArray[Any]] = {}
        self._bound: dict[str, NDArray[Any]] = {}
        self.state = np.zeros((nsim, mujoco.mj_stateSize(model, SPEC)))
        self.warning = np.zeros((nsim, len(self._data[0].warning.number), 2), np.int32)
        for i in range(nsim):
            self._save(i)

    def bind(self, name: str) -> NDArray[Any]:
        """Return a field of MjData for all simulations, [nsim, ...]."""
        if name in _STATE:
            bit = _STATE[name]
            start = mujoco.mj_stateSize(self.model, SPEC & (bit - 1))
            view = self.state[:, start : start + mujoco.mj_stateSize(self.model, bit)]
            return view.reshape(self.nsim, *np.shape(getattr(self._data[0], name)))
        if name not in DATA_FIELDS:
            hint = did_you_mean(name, DATA_FIELDS)
            raise ValueError(f"{name} is not an array field of MjData with a fixed size{hint}")
        if name not in self._bound:
            field = getattr(self._data[0], name)
            self._bound[name] = np.zeros((self.nsim, *field.shape), field.dtype)
        return self._bound[name]

    def expand(self, name: str) -> NDArray[Any]:
        """Copy a field of MjModel, or of its options (`opt.NAME`), for each simulation."""
        if name not in self._expanded:
            holder, field = model_field(self.model, name)
            if not isinstance(getattr(holder, field, None), (np.ndarray, float, int)):
                hint = did_you_mean(name, dir(self.model))
                raise ValueError(f"{name} is not a field of MjModel{hint}")
            if not self._expanded:
                self._models = [copy.copy(self.model) for _ in range(self.nsim)]
            value = np.asarray(getattr(holder, field))
            self._expanded[name] = np.repeat(value[None], self.nsim, axis=0)
        return self._expanded[name]

    def expanded(self, name: str) -> NDArray[Any] | None:
        """Return the values of a field that `expand` copied, or None."""
        return self._expanded.get(name)

    def set_const(self, ids: Ids = None) -> None:
        """Recompute constants that depend on expanded fields, as `mj_setConst` does."""
        scratch = mujoco.MjData(self.model)
        for i in self._each(ids):
            model = self._load(i)
            mujoco.mj_setConst(model, scratch)
            for name, values in self._expanded.items():
                holder, field = model_field(model, name)
                values[i] = getattr(holder, field)

    def step(self, ids: Ids = None, nstep: int = 1, stage: int = NONE) -> None:
        """Advance by nstep physics steps, then compute the stages up to `stage`."""
        for i in self._each(ids):
            model, data = self._load(i), self._data[i]
            mujoco.mj_step(model, data, nstep)
            _compute(model, data, stage)
            self._save(i)

    def forward(self, ids: Ids = None, stage: int = _ACC) -> None:
        """Compute the stages up to `stage` at the current state."""
        for i in self._each(ids):
            _compute(self._load(i), self._data[i], stage)
            self._save(i)

    def reset(self, ids: Ids = None, stage: int = _ACC) -> None:
        """Set the model's default state, then compute the stages up to `stage`."""
        for i in self._each(ids):
            model = self._load(i)
            mujoco.mj_resetData(model, self._data[i])
            _compute(model, self._data[i], stage)
            self._save(i)

    def get_model(self, sim: int, model: mujoco.MjModel | None = None) -> mujoco.MjModel:
        """Write a simulation's model into `model`, or into a copy by default, and return it."""
        own = self._load(sim)
        if model is None:
            return copy.copy(own)
        for name, field in _arrays(own):
            getattr(model, name)[...] = field
        for name in self._expanded:
            holder, field = model_field(model, name)
            setattr(holder, field, getattr(model_field(own, name)[0], field))
        return model

    def get_data(self, sim: int, data: mujoco.MjData | None = None) -> mujoco.MjData:
        """Write a simulation's state into `data`, or copy all data by default, and return it.

        A persistent batch returns the complete data of the simulation; do not write into it.
        """
        if data is None:
            self._load(sim)
            return copy.copy(self._data[sim])
        mujoco.mj_setState(self.model, data, self.state[sim], SPEC)
        return self._data[sim] if self.persistent else data

    def _each(self, ids: Ids) -> Iterable[int]:
        return range(self.nsim) if ids is None else map(int, ids)

    def _load(self, i: int) -> mujoco.MjModel:
        """Apply values written since the last call, and return the simulation's model."""
        model = self._models[i]
        for name, values in self._expanded.items():
            holder, field = model_field(model, name)
            setattr(holder, field, values[i])
        mujoco.mj_setState(model, self._data[i], self.state[i], SPEC)
        return model

    def _save(self, i: int) -> None:
        data = self._data[i]
        mujoco.mj_getState(self._models[i], data, self.state[i], SPEC)
        for name, values in self._bound.items():
            values[i] = getattr(data, name)
        self.warning[i, :, 0] = data.warning.lastinfo
        self.warning[i, :, 1] = data.warning.number


def _arrays(held: mujoco.MjModel | mujoco.MjData) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the array fields of a model or data with their names."""
    for name in dir(held):
        if name[0] != "_" and isinstance(field := getattr(held, name), np.ndarray):
            yield name, field


def model_field(model: mujoco.MjModel, name: str) -> tuple[Any, str]:
    """Return the object that has a model field, and the field's name in it."""
    return (model.opt, name[4:]) if name.startswith("opt.") else (model, name)


def _compute(model: mujoco.MjModel, data: mujoco.MjData, stage: int) -> None:
    if stage == _ACC:
        mujoco.mj_forward(model, data)
        return
    if stage >= _POS:
        mujoco.mj_fwdPosition(model, data)
        mujoco.mj_sensorPos(model, data)
    if stage >= _VEL:
        mujoco.mj_fwdVelocity(model, data)
        mujoco.mj_sensorVel(model, data)


# Fields of MjData that `bind` accepts; fields of constraints change their size at every step.
DATA_FIELDS = frozenset(_STATE) | {
    name
    for name, _ in _arrays(mujoco.MjData(mujoco.MjModel.from_xml_string("<mujoco/>")))
    if "efc" not in name and "island" not in name
}
