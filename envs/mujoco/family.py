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
from metarl.envs.mujoco.one_simulation import OneSimulation, has_views
from metarl.envs.mujoco.pictures import Pictures
from metarl.envs.mujoco.rewards import root_x
from metarl.envs.mujoco.serial_batch import DATA_FIELDS, SerialBatch
from metarl.envs.mujoco.simulation import (
    Sim,
    Step,
    control_bounds,
    load_model,
    read_only,
)
from metarl.envs.single import SingleTaskEnv
from metarl.envs.tasks import Tasks
from metarl.envs.vector import Advanced, Bools, Floats, TaskVectorEnv, detached

try:
    from mujoco.batch import DATA_FIELDS, Batch
except ImportError:  # an older MuJoCo
    Batch = SerialBatch

_DIVERGED = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADCTRL + 1)
_COUNT = 1  # index in (last info, number of warnings)
_CONTACT_FORCES = "cfrc_ext"
# Attributes that show a batch's memory, and the renderer. A copy makes its own.
_MEMORY = frozenset({
    "batch", "sim", "_data", "_forces", "_shown_sim", "_ctrl", "_expanded", "_counters",
    "_warnings", "_warned", "_pictures",
})  # fmt: skip

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
    model_fields: Callable[[mujoco.MjModel, Tasks], Mapping[str, NDArray[Any]]] | None = None
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
    width: int = 480
    """Width of rendered images in pixels."""
    height: int = 480
    """Height of rendered images in pixels."""

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
        for number in ("frame_skip", "width", "height"):
            check_whole(f"{self.name}: {number}", getattr(self, number), 1)
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

    def make(
        self, task: ArrayLike | None = None, *, render_mode: str | None = None
    ) -> gym.Env[Any, Any]:
        return SingleTaskEnv(self, task, render_mode, threads=1)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> MujocoVectorEnv:
        return MujocoVectorEnv(self, num_tasks, episodes, **options)

    @functools.cached_property
    def model(self) -> mujoco.MjModel:
        """Compiled model."""
        return load_model(self.xml, self.edit)


def _is_built_in(function: Callable[..., Any]) -> bool:
    """Return whether a function, and those that it is given, belong to this package."""
    if isinstance(function, functools.partial):
        given = [*function.args, *function.keywords.values()]
        return all(_is_built_in(x) for x in (function.func, *filter(callable, given)))
    return getattr(function, "__module__", "").startswith("metarl.envs.")


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
        self._threads = threads
        self.model = family.model
        self.dt = self.model.opt.timestep * family.frame_skip
        self._bind(family, max(num_tasks * episodes, 1))
        low, high = control_bounds(self.model)
        self._low, self._high = low[None], high[None]
        scale = np.float32(family.action_scale)
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=gym.spaces.Box(
                -np.inf, np.inf, (family.observe(self._shown_sim).shape[1],), np.float64
            ),
            action_space=gym.spaces.Box(scale * low, scale * high, dtype=np.float32),
            metadata={
                "render_modes": ["human", "rgb_array", "depth_array"],
                "render_fps": int(np.round(1.0 / self.dt)),
            },
            **options,
        )
        self.set_render_mode(render_mode)
        self._scale, self._scaled = scale, scale != 1.0
        self._built_in = all(map(_is_built_in, (family.reward, family.track, family.observe)))
        """Functions of this package return new arrays, and for one simulation also numbers."""
        self._rngs: list[np.random.Generator | None] = [None] * self.num_envs
        self._before = self._track()
        self._shown_tasks = read_only(self.tasks)

    def _bind(self, family: MujocoFamily, count: int) -> None:
        """Make the simulations, and the arrays that show their memory."""
        model, forces = self.model, _CONTACT_FORCES in family.fields
        bound = [name for name in family.fields if name != _CONTACT_FORCES]
        if count == 1 and has_views(model, bound):
            self.batch = OneSimulation(model)
            self._data = self.batch.data
        else:
            # Contact forces need a simulation's complete data, so the batch must be persistent.
            self.batch = Batch(model, count, self._threads, persistent=forces)
            self._data = mujoco.MjData(model)
        self._forces = np.zeros((count, model.nbody, 6)) if forces else None
        derived: dict[str, NDArray[Any]] = {name: self.batch.bind(name) for name in bound}
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
        self._expanded: tuple[str, ...] = ()
        """Fields of the model that tasks changed."""
        if isinstance(self.batch, OneSimulation):
            self._counters = self.batch.warning_numbers[:, _DIVERGED]
        else:
            self._counters = self.batch.warning[:, _DIVERGED, _COUNT]
        self._keep_warnings()
        self._pictures: Pictures | None = None

    def _keep_warnings(self) -> None:
        self._warnings = self._counters.copy()
        self._warned = self._warnings.tobytes()

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key not in _MEMORY}
        if isinstance(self.batch, OneSimulation):
            simulated = self.batch.get_state()
        else:
            simulated = self.batch.state.copy()
        return {
            **state,
            "_saved": (
                simulated,
                detached(dict(self.sim.derived)),
                {name: self.batch.expand(name).copy() for name in self._expanded},
            ),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved, derived, expanded = state["_saved"]
        vars(self).update({key: value for key, value in state.items() if key != "_saved"})
        self._bind(self.family, self.num_envs)
        for name, values in expanded.items():
            self.batch.expand(name)[...] = values
        if expanded:
            self._expanded = tuple(expanded)
            self.batch.set_const()
        if isinstance(self.batch, OneSimulation):
            self.batch.set_state(saved)
        else:
            self.batch.state[...] = saved
        for name, values in derived.items():  # one physics step old, so they cannot be recomputed
            field = self.sim.derived[name]
            before, field.flags.writeable = field.flags.writeable, True
            field[...] = values
            field.flags.writeable = before

    def _track(self) -> Floats:
        """Return a copy of the values of the current state that a reward needs."""
        return detached(self.family.track(self._shown_sim))

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        if self.family.model_fields is not None:
            self._put_model_fields(ids, self.family.model_fields(self.model, self._tasks[ids]))
        self._shown_tasks = read_only(self.tasks)
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
        self._keep_warnings()
        self._before = self._track()

    def advance(self, ids: NDArray[np.int64] | None, actions: Any) -> Advanced:
        family = self.family
        action = np.asarray(actions, np.float32)
        if action.shape != self._ctrl.shape:
            raise UserError(f"actions must be {self._ctrl.shape}, got {action.shape}")
        if self._scaled:
            action = action / self._scale
        # np.clip takes twice as long.
        action = np.minimum(np.maximum(action, self._low), self._high)
        self._ctrl[...] = action
        self.batch.step(ids, family.frame_skip, family.stage)
        if self._forces is not None:
            self._compute_forces(range(self.num_envs) if ids is None else ids)
        numbers = self.numbers and self._built_in
        shown = self._shown_sim
        # A copy, because a user's function may write to it.
        task = self._shown_tasks if self._built_in else self.tasks
        reward, info = family.reward(Step(shown, self._before, action, task, self.dt, numbers))
        self._before = family.track(shown) if self._built_in else self._track()
        diverged = None
        if self._counters.tobytes() != self._warned:
            diverged = (self._counters != self._warnings).any(axis=1)
            self._keep_warnings()
        terminated = family.terminated(self._shown_sim) if family.terminated is not None else None
        return reward, terminated, None, diverged, info

    def _put_model_fields(self, ids: NDArray[np.int64], fields: Mapping[str, NDArray[Any]]) -> None:
        for name, values in fields.items():
            try:
                self.batch.expand(name)[ids] = values
            except ValueError as error:
                raise UserError(
                    f"{self.family.name}: model_fields returned {name!r}: {error}"
                ) from error
        self._expanded = tuple(fields)
        self.batch.set_const(ids)

    def _compute_forces(self, ids: Iterable[int]) -> None:
        assert self._forces is not None
        for i in ids:
            data = self.batch.get_data(i, self._data)
            mujoco.mj_rnePostConstraint(self.model, data)
            self._forces[i] = data.cfrc_ext

    def _observe(self) -> NDArray[Any]:
        return self.family.observe(self._shown_sim)

    def observations(self) -> NDArray[Any]:
        return self._observe() if self._built_in else super().observations()

    def render(self) -> Any:
        """Return a frame of each sub-environment, or show the first one (render_mode 'human')."""
        if self.render_mode is None:
            raise UserError("give render_mode='rgb_array' when making the environment")
        if self._pictures is None:
            family = self.family
            self._pictures = Pictures(self.model, family.camera, family.width, family.height)
        shown = range(1 if self.render_mode == "human" else self.num_envs)
        frames = [self._pictures.draw(self.batch, i, self.render_mode) for i in shown]
        return None if self.render_mode == "human" else tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        if self._pictures is not None:
            self._pictures.close()
            self._pictures = None
