"""The native backend: every simulation of every task in one `mujoco.batch.Batch`.

A `MujocoFamily` gives a model and vectorised functions over all simulations; `MujocoVectorEnv`
steps them in one call. States, observations and terminations equal those of the stock Gymnasium
environment stepped alone, bit for bit, at any number of threads.

A simulation that diverges is reset by MuJoCo in the middle of a step and looks healthy afterwards;
only its warning counters tell. They are compared after every step, and the episode is truncated
and marked in `info["diverged"]`.
"""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from envs.errors import UserError
from envs.family import TaskFamily
from envs.serial_batch import SerialBatch
from envs.vector import Bools, Floats, SingleTaskEnv, TaskVectorEnv

try:
    from mujoco.batch import Batch
except ImportError:  # an older MuJoCo
    Batch = SerialBatch

_DIVERGED = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADCTRL + 1)
_COUNT = 1  # of (last info, number of warnings)


def _ignore(message: str) -> None:
    """Take a warning and do nothing."""


@dataclass(frozen=True)
class Sim:
    """The state of all simulations, live arrays [simulations, ...]."""

    qpos: Floats
    qvel: Floats
    sensordata: Floats | None
    """Sensors at the present state, where the family asks for a stage; else None."""


@dataclass(frozen=True)
class Step:
    """One step of all simulations, as a reward sees it; arrays are [simulations, ...]."""

    sim: Sim
    before: Floats
    """What the family's `track` gave before the step."""
    action: NDArray[np.float32]
    """The action applied: scaled and clipped to the actuators' bounds."""
    task: Floats
    dt: float
    """Seconds of simulated time that a step takes."""


@dataclass(frozen=True, kw_only=True)
class MujocoFamily(TaskFamily):
    """A family over one MuJoCo model, stepped natively."""

    xml: str
    """Model file: a path, or a name among Gymnasium's own MuJoCo models."""
    frame_skip: int
    """Physics steps an environment step."""
    observe: Callable[[Sim], Floats]
    """Observations [simulations, observation_dim], a new array."""
    reward: Callable[[Step], tuple[Floats, dict[str, Any]]]
    """Rewards [simulations], and info arrays."""
    initial_state: Callable[[np.random.Generator, mujoco.MjModel], tuple[Floats, Floats]]
    """Draws the qpos and qvel that one episode starts from."""
    track: Callable[[Sim], Floats] = field(default=lambda sim: sim.qpos[:, 0].copy())
    """What a reward needs to know of the state before the step."""
    terminated: Callable[[Sim], Bools] | None = None
    edit: Callable[[mujoco.MjSpec], None] | None = None
    """Changes the model before it is compiled, to add sensors for instance."""
    stage: int = int(mujoco.mjtStage.mjSTAGE_NONE)
    """Stages to compute at the new state (mjtStage); none leaves derived fields one step behind."""
    action_scale: float = 1.0
    """The policy's action for a full-strength control: actions in [-s, s] map to the bounds."""
    camera: str | None = "track"

    parallel: ClassVar[bool] = Batch is not SerialBatch

    def make(self, task: Floats | None = None, *, render_mode: str | None = None) -> gym.Env:
        return SingleTaskEnv(self, task, render_mode, threads=1)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> MujocoVectorEnv:
        return MujocoVectorEnv(self, num_tasks, episodes, **options)

    @functools.cached_property
    def model(self) -> mujoco.MjModel:
        """The compiled model."""
        path = self.xml
        if not os.path.exists(path):
            assets = os.path.join(os.path.dirname(gym.__file__), "envs", "mujoco", "assets")
            path = os.path.join(assets, self.xml)
        if not os.path.exists(path):
            raise UserError(f"{self.name}: no model file {self.xml!r}")
        # MuJoCo prints its warnings and appends them to a log file in the current folder. Those
        # of a divergence reach the caller in `info`; those of the stock models' deprecated
        # elements are nobody's concern here.
        mujoco.set_mju_user_warning(_ignore)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = mujoco.MjSpec.from_file(path)
            if self.edit is not None:
                self.edit(spec)
            return spec.compile()


class MujocoVectorEnv(TaskVectorEnv):
    """All simulations of a `MujocoFamily`, on `threads` threads of one batch."""

    family: MujocoFamily

    def __init__(
        self,
        family: MujocoFamily,
        num_tasks: int,
        episodes: int,
        *,
        threads: int = 1,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        if threads < 1:
            raise UserError(f"threads must be at least 1, got {threads}")
        model = family.model
        self.model = model
        self.dt = model.opt.timestep * family.frame_skip
        self.batch = Batch(model, max(num_tasks * episodes, 1), threads)
        needs_sensors = family.stage != mujoco.mjtStage.mjSTAGE_NONE
        self.sim = Sim(
            self.batch.bind("qpos"),
            self.batch.bind("qvel"),
            self.batch.bind("sensordata") if needs_sensors else None,
        )
        self._ctrl = self.batch.bind("ctrl")
        bounds = model.actuator_ctrlrange.astype(np.float32)
        self._low, self._high = bounds[:, 0], bounds[:, 1]
        scale = np.float32(family.action_scale)
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=gym.spaces.Box(
                -np.inf, np.inf, (family.observe(self.sim).shape[1],), np.float64
            ),
            action_space=gym.spaces.Box(scale * self._low, scale * self._high, dtype=np.float32),
            metadata={
                "render_modes": ["human", "rgb_array", "depth_array"],
                "render_fps": int(np.round(1.0 / self.dt)),
            },
            **options,
        )
        self.render_mode = render_mode
        self._renderer: Any = None
        self._scale = scale
        self._rngs: list[np.random.Generator | None] = [None] * self.num_envs
        self._warnings = self.batch.warning[:, _DIVERGED, _COUNT].copy()
        self._before = family.track(self.sim)

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        # Stage 0 clears what a finished episode left behind (a warm start would change the
        # trajectory) without computing anything yet.
        self.batch.reset(ids, stage=0)
        for i, seed in zip(ids, seeds, strict=True):
            if seed is not None or self._rngs[i] is None:
                self._rngs[i], _ = seeding.np_random(seed)
            self.sim.qpos[i], self.sim.qvel[i] = self.family.initial_state(
                self._rngs[i], self.model
            )
        self.batch.forward(ids)
        self._warnings[ids] = self.batch.warning[ids, _DIVERGED, _COUNT]
        self._before = self.family.track(self.sim)

    def _advance(
        self, ids: NDArray[np.int64] | None, actions: Any
    ) -> tuple[Floats, Bools | None, Bools | None, Bools | None, dict[str, Any]]:
        family = self.family
        action = np.asarray(actions, np.float32)
        if action.shape != self.action_space.shape:
            raise UserError(f"actions must be {self.action_space.shape}, got {action.shape}")
        if self._scale != 1.0:
            action = action / self._scale
        action = np.clip(action, self._low, self._high)
        self._ctrl[...] = action
        self.batch.step(ids, nstep=family.frame_skip, stage=family.stage)
        reward, info = family.reward(Step(self.sim, self._before, action, self.tasks, self.dt))
        self._before = family.track(self.sim)
        diverged = None
        if not np.array_equal(counters := self.batch.warning[:, _DIVERGED, _COUNT], self._warnings):
            diverged = (counters != self._warnings).any(axis=1)
            self._warnings = counters.copy()
        terminated = family.terminated(self.sim) if family.terminated is not None else None
        return reward, terminated, None, diverged, info

    def _observe(self) -> NDArray:
        return self.family.observe(self.sim)

    def render(self) -> Any:
        """Return one frame of each sub-environment, or show the first (render_mode 'human')."""
        if self.render_mode is None:
            raise UserError("give render_mode='rgb_array' when making the environment")
        if self._renderer is None:
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

            self._data = mujoco.MjData(self.model)
            named = mujoco.mj_name2id(
                self.model, mujoco.mjtObj.mjOBJ_CAMERA, self.family.camera or ""
            )
            self._renderer = MujocoRenderer(
                self.model,
                self._data,
                width=480,
                height=480,
                camera_id=named if named >= 0 else None,
            )
        frames = []
        for i in range(1 if self.render_mode == "human" else self.num_envs):
            self.batch.get_data(i, self._data)
            mujoco.mj_forward(self.model, self._data)
            frames.append(self._renderer.render(self.render_mode))
        return None if self.render_mode == "human" else tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
