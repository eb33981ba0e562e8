"""Native backend: all simulations of all tasks in one `mujoco.batch.Batch`.

A `MujocoFamily` has a model, or the id of a stock Gymnasium body, and vectorised functions over all
simulations. `MujocoVectorEnv` steps them in one call. States, observations and terminations equal
the stock Gymnasium environment bit for bit, at any number of threads.

MuJoCo resets a diverging simulation in the middle of a step, and its state looks normal afterwards.
Only the warning counters show it. They are compared after every step; the episode is then truncated
and marked in `info["diverged"]`.
"""

# mujoco is compiled and brings no type stubs.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_whole, did_you_mean
from metarl.envs.family import TaskFamily
from metarl.envs.mujoco.bodies import find_body
from metarl.envs.mujoco.rewards import root_x
from metarl.envs.mujoco.serial_batch import DATA_FIELDS, SerialBatch
from metarl.envs.mujoco.simulation import Sim, Step, control_bounds, load_model, read_only
from metarl.envs.tasks import Tasks
from metarl.envs.vector import Bools, Floats, SingleTaskEnv, TaskVectorEnv, detached

try:
    from mujoco.batch import DATA_FIELDS, Batch
except ImportError:  # an older MuJoCo
    Batch = SerialBatch

_DIVERGED = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADCTRL + 1)
_COUNT = 1  # index in (last info, number of warnings)
_CONTACT_FORCES = "cfrc_ext"

STOCK: Any = None
"""Default: the value of the stock body."""


@dataclass(frozen=True, kw_only=True)
class MujocoFamily(TaskFamily):
    """Family over one MuJoCo model, stepped natively.

    For example, stock Gymnasium hoppers of different masses:

        def scale_masses(model, tasks):
            return {"body_mass": tasks[:, :1] * model.body_mass}

        MujocoFamily(
            name="heavy-hopper",
            env="Hopper-v5",
            tasks=Uniform({"mass": (0.5, 2.0)}),
            model_fields=scale_masses,
            horizon=200,
        )

    Missing values come from the stock body. With your own model file, set `xml`, `frame_skip`,
    `observe`, `reward` and `initial_state`. All functions except `initial_state` and `edit` are
    called for all simulations at once. Use functions of a module, because lambdas cannot be
    pickled.

    Raises:
        UserError: a body or field does not exist, a part is missing, or a number is below 1.
    """

    env: str | None = None
    """Gymnasium id of the stock body for missing values (one of `bodies.BODIES`)."""
    xml: str = STOCK
    """Model file: a path, or the name of one of Gymnasium's MuJoCo models."""
    frame_skip: int = STOCK
    """Physics steps per environment step."""
    observe: Callable[[Sim], Floats] = STOCK
    """Observations [simulations, observation_dim]."""
    reward: Callable[[Step], tuple[Floats, dict[str, Any]]] = STOCK
    """Rewards [simulations], and info arrays [simulations, ...] by name."""
    initial_state: Callable[[np.random.Generator, mujoco.MjModel], tuple[Floats, Floats]] = STOCK
    """Draws the initial qpos [nq] and qvel [nv] of one episode."""
    track: Callable[[Sim], Floats] = STOCK
    """Values of the state before the step that the reward needs, [simulations, ...]. With your own
    reward the default is the root's x [simulations]."""
    terminated: Callable[[Sim], Bools] | None = None
    """Whether the task has ended in the current state, [simulations]. Without env, None means
    never."""
    fields: tuple[str, ...] = ()
    """Derived fields of MjData that the functions above read, such as `sim["xpos"]`. As in
    Gymnasium they are one physics step old, unless a `stage` is given. Contact forces (`cfrc_ext`)
    take about 10 microseconds per environment step. As in Gymnasium they are zero at the start of
    an episode, unless a stage is given."""
    model_fields: Callable[[mujoco.MjModel, Tasks], Mapping[str, NDArray]] | None = None
    """Fields of MjModel, [n, ...] each, that tasks [n, task_dim] change. Constants that MuJoCo
    derives from them (mj_setConst) are recomputed."""
    edit: Callable[[mujoco.MjSpec], None] | None = None
    """Changes the model before it is compiled, for example to add sensors."""
    stage: int = int(mujoco.mjtStage.mjSTAGE_NONE)
    """Last stage to compute at the new state (mjtStage). With mjSTAGE_NONE derived fields are one
    physics step old."""
    action_scale: float = 1.0
    """Size s of a full-strength action: actions in [-s, s] map to the bounds of the controls. The
    control of an actuator without `ctrlrange` is the action divided by s, without bounds."""
    camera: str | None = "track"
    """Camera of the model for rendering; a free camera if the model does not have this one."""

    parallel: ClassVar[bool] = Batch is not SerialBatch

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = list(self.fields)
        if self.env is not None:
            body = find_body(self.env)
            if self.observe is None:
                fields += body.observe_fields
            if self.reward is None:
                fields += body.reward_fields
                self._fill("track", body.track)
            for part in ("xml", "frame_skip", "observe", "reward", "initial_state", "terminated"):
                self._fill(part, getattr(body, part))
        self._fill("track", root_x)
        parts = ("xml", "frame_skip", "observe", "reward", "initial_state")
        if missing := [part for part in parts if getattr(self, part) is None]:
            raise UserError(
                f"{self.name}: missing {', '.join(missing)}; give them, or env for a stock body"
            )
        check_whole(f"{self.name}: frame_skip", self.frame_skip, 1)
        if not 0.0 < self.action_scale < math.inf:
            raise UserError(f"{self.name}: action_scale must be positive, got {self.action_scale}")
        for field in fields:
            if field not in DATA_FIELDS:
                raise UserError(
                    f"{self.name}: no field {field!r}{did_you_mean(field, DATA_FIELDS)}"
                )
        object.__setattr__(self, "fields", tuple(dict.fromkeys(fields)))

    def _fill(self, part: str, value: Any) -> None:
        if getattr(self, part) is None:
            object.__setattr__(self, part, value)

    def make(self, task: ArrayLike | None = None, *, render_mode: str | None = None) -> gym.Env:
        return SingleTaskEnv(self, task, render_mode, threads=1)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> MujocoVectorEnv:
        return MujocoVectorEnv(self, num_tasks, episodes, **options)

    @functools.cached_property
    def model(self) -> mujoco.MjModel:
        """Compiled model."""
        return load_model(self.xml, self.edit)


class MujocoVectorEnv(TaskVectorEnv):
    """Vector environment of a `MujocoFamily`, with `threads` threads of one batch."""

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
        forces = _CONTACT_FORCES in family.fields
        # Contact forces need a simulation's complete data, so the batch must be persistent.
        self.batch = Batch(model, max(num_tasks * episodes, 1), threads, persistent=forces)
        self._forces = np.zeros((self.batch.nsim, model.nbody, 6)) if forces else None
        derived: dict[str, NDArray] = {
            name: self.batch.bind(name) for name in family.fields if name != _CONTACT_FORCES
        }
        if self._forces is not None:
            derived[_CONTACT_FORCES] = self._forces
        self.sim = Sim(self.batch.bind("qpos"), self.batch.bind("qvel"), derived)
        # Read-only for the family's functions, which must not change the simulations.
        self._shown_sim = Sim(
            read_only(self.sim.qpos),
            read_only(self.sim.qvel),
            {name: read_only(field) for name, field in derived.items()},
        )
        self._ctrl = self.batch.bind("ctrl")
        self._low, self._high = control_bounds(model)
        scale = np.float32(family.action_scale)
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=gym.spaces.Box(
                -np.inf, np.inf, (family.observe(self._shown_sim).shape[1],), np.float64
            ),
            action_space=gym.spaces.Box(scale * self._low, scale * self._high, dtype=np.float32),
            metadata={
                "render_modes": ["human", "rgb_array", "depth_array"],
                "render_fps": int(np.round(1.0 / self.dt)),
            },
            **options,
        )
        self.set_render_mode(render_mode)
        self._renderer: Any = None
        self._data = mujoco.MjData(model)
        self._scale = scale
        self._rngs: list[np.random.Generator | None] = [None] * self.num_envs
        self._warnings = self.batch.warning[:, _DIVERGED, _COUNT].copy()
        self._before = self._track()

    def _track(self) -> Floats:
        """Return a copy of the values of the current state that a reward needs."""
        return detached(self.family.track(self._shown_sim))

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        if self.family.model_fields is not None:
            self._put_model_fields(ids, self.family.model_fields(self.model, self._tasks[ids]))
        # Stage 0 clears the data of the last episode without computing anything. A warm start
        # would change the trajectory.
        self.batch.reset(ids, stage=0)
        for i, seed in zip(ids, seeds, strict=True):
            if seed is not None or self._rngs[i] is None:
                self._rngs[i], _ = seeding.np_random(seed)
            self.sim.qpos[i], self.sim.qvel[i] = self.family.initial_state(
                self._rngs[i], self.model
            )
        self.batch.forward(ids)
        if self._forces is not None:
            self._forces[ids] = 0.0
            if self.family.stage != mujoco.mjtStage.mjSTAGE_NONE:
                self._compute_forces(ids)
        self._warnings[ids] = self.batch.warning[ids, _DIVERGED, _COUNT]
        self._before = self._track()

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
        if self._forces is not None:
            self._compute_forces(range(self.num_envs) if ids is None else ids)
        step = Step(self._shown_sim, self._before, action, self.tasks, self.dt)
        reward, info = family.reward(step)
        self._before = self._track()
        diverged = None
        if not np.array_equal(counters := self.batch.warning[:, _DIVERGED, _COUNT], self._warnings):
            diverged = (counters != self._warnings).any(axis=1)
            self._warnings = counters.copy()
        terminated = family.terminated(self._shown_sim) if family.terminated is not None else None
        return reward, terminated, None, diverged, info

    def _put_model_fields(self, ids: NDArray[np.int64], fields: Mapping[str, NDArray]) -> None:
        for name, values in fields.items():
            try:
                self.batch.expand(name)[ids] = values
            except ValueError as error:
                raise UserError(
                    f"{self.family.name}: model_fields returned {name!r}: {error}"
                ) from error
        self.batch.set_const(ids)

    def _compute_forces(self, ids: Iterable[int]) -> None:
        assert self._forces is not None
        for i in ids:
            data = self.batch.get_data(i, self._data)
            mujoco.mj_rnePostConstraint(self.model, data)
            self._forces[i] = data.cfrc_ext

    def _observe(self) -> NDArray:
        return self.family.observe(self._shown_sim)

    def render(self) -> Any:
        """Return a frame of each sub-environment, or show the first one (render_mode 'human')."""
        if self.render_mode is None:
            raise UserError("give render_mode='rgb_array' when making the environment")
        if self._renderer is None:
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

            self._shown = copy.copy(self.model)
            named = mujoco.mj_name2id(
                self.model, mujoco.mjtObj.mjOBJ_CAMERA, self.family.camera or ""
            )
            self._renderer = MujocoRenderer(
                self._shown,
                self._data,
                width=480,
                height=480,
                camera_id=named if named >= 0 else None,
            )
        frames = []
        for i in range(1 if self.render_mode == "human" else self.num_envs):
            self.batch.get_data(i, self._data)
            self.batch.get_model(i, self._shown)
            mujoco.mj_forward(self._shown, self._data)
            frames.append(self._renderer.render(self.render_mode))
        return None if self.render_mode == "human" else tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
