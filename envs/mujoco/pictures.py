"""Pictures of simulations."""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import copy
from typing import Any

import mujoco
import numpy as np


class Pictures:
    """Renderer of the simulations of a batch.

    Args:
        model: model of the batch.
        camera: name of a camera of the model; a free camera if the model does not have it.
        width: width of a picture in pixels.
        height: height of a picture in pixels.
    """

    def __init__(self, model: mujoco.MjModel, camera: str | None, width: int, height: int) -> None:
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        # Copies, because drawing computes fields that the next step would start from.
        self._model, self._data = copy.copy(model), mujoco.MjData(model)
        named = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera or "")
        self._renderer = MujocoRenderer(
            self._model,
            self._data,
            width=width,
            height=height,
            camera_id=named if named >= 0 else None,
        )

    def draw(self, batch: Any, i: int, mode: str) -> Any:
        """Return a frame of simulation i, or show it (render mode 'human')."""
        batch.get_data(i, self._data)
        batch.get_model(i, self._model)
        mujoco.mj_forward(self._model, self._data)
        move_floor(self._model, self._data)
        return self._renderer.render(mode)

    def close(self) -> None:
        """Free the resources."""
        self._renderer.close()


def move_floor(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Move the drawn floor below the first body, by whole periods of its texture.

    A simulated plane is infinite, but MuJoCo draws it in its finite size.
    """
    if model.nbody < 2:
        return
    for i in np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE):
        size, material = model.geom_size[i, :2], model.geom_matid[i]
        if model.geom_bodyid[i] or not size.all():  # it moves itself, or is drawn infinite
            continue
        period = size
        if material >= 0:
            repeat = np.maximum(model.mat_texrepeat[material], 1e-3)
            period = 1.0 / repeat if model.mat_texuniform[material] else 2.0 * size / repeat
        axes = data.geom_xmat[i].reshape(3, 3)[:, :2]
        away = (data.xpos[1] - data.geom_xpos[i]) @ axes
        data.geom_xpos[i] += axes @ (np.round(away / period) * period)
