"""Navigation of a point to a hidden goal, as in Finn et al. 2017 (arXiv:1703.03400)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_one_of
from metarl.envs.family import TaskFamily
from metarl.envs.registry import register
from metarl.envs.single import SingleTaskEnv
from metarl.envs.tasks import Uniform
from metarl.envs.vector import Advanced, Bools, Floats, TaskVectorEnv

STEP = 0.1  # the longest displacement along an axis
REACHED = 0.01  # along each axis


@dataclass(frozen=True, kw_only=True)
class NavigationFamily(TaskFamily):
    """Family of points that move by 0.1 clip(a, -1, 1) if `scaled`, else by clip(a, -0.1, 0.1)."""

    scaled: bool = True

    parallel: ClassVar[bool] = True

    def make(
        self, task: ArrayLike | None = None, *, render_mode: str | None = None
    ) -> gym.Env[Any, Any]:
        return SingleTaskEnv(self, task, render_mode)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> NavigationVectorEnv:
        options.pop("threads", None)
        return NavigationVectorEnv(self, num_tasks, episodes, **options)


class NavigationVectorEnv(TaskVectorEnv):
    """Vector environment of all points."""

    def __init__(
        self,
        family: NavigationFamily,
        num_tasks: int,
        episodes: int,
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        bound = 1.0 if family.scaled else STEP
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            action_space=gym.spaces.Box(-bound, bound, (2,), np.float32),
            metadata={"render_modes": ["rgb_array"], "render_fps": 20},
            **options,
        )
        self.set_render_mode(render_mode)
        self._bound = np.float32(bound)
        self._gain = STEP if family.scaled else 1.0
        self._position = np.zeros((self.num_envs, 2))
        self._trails: list[list[Floats]] = [[] for _ in range(self.num_envs)]

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        self._position[ids] = 0.0
        for i in ids if self.render_mode else ():
            self._trails[i] = [self._position[i].copy()]

    def advance(self, ids: NDArray[np.int64] | None, actions: Any) -> Advanced:
        action = np.clip(np.asarray(actions, np.float32), -self._bound, self._bound)
        moves = slice(None) if ids is None else ids
        self._position[moves] += self._gain * action[moves].astype(np.float64)
        gap = self._position - self._tasks
        # The paper's text has the squared distance; its code and figures have the distance.
        reward = -np.sqrt(np.square(gap).sum(axis=1))
        reached: Bools = np.all(np.abs(gap) < REACHED, axis=1)
        if self.render_mode:
            for i in range(self.num_envs) if ids is None else ids:
                self._trails[i].append(self._position[i].copy())
        x, y = self._position.T.copy()
        return reward, reached, None, None, {"x_position": x, "y_position": y}

    def _observe(self) -> NDArray[Any]:
        return self._position

    def render(self) -> Any:
        """Return a frame [480, 480, 3] of each point; the goal is a ring, the path are dots."""
        if self.render_mode is None:
            raise UserError("give render_mode='rgb_array' when making the environment")
        return tuple(_draw(self._tasks[i], self._trails[i]) for i in range(self.num_envs))


_SIDE, _REACH = 480, 1.0  # pixels; the frame shows [-1, 1]^2


def _draw(goal: Floats, trail: Sequence[Floats]) -> NDArray[np.uint8]:
    frame = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    for tick in np.linspace(0, _SIDE - 1, 5).astype(int):  # every 0.5
        frame[tick, :] = frame[:, tick] = 225

    def disc(at: Floats, radius: int, colour: tuple[int, int, int]) -> None:
        unit = np.clip(at / _REACH, -1.0, 1.0) * (0.5, -0.5) + 0.5
        column, row = np.clip((unit * _SIDE).astype(int), radius, _SIDE - 1 - radius)
        span = np.arange(-radius, radius + 1)
        inside = np.square(span)[:, None] + np.square(span) <= radius**2
        frame[row - radius : row + radius + 1, column - radius : column + radius + 1][inside] = (
            colour
        )

    disc(goal, 16, (213, 94, 0))
    disc(goal, 11, (255, 255, 255))
    for step, at in enumerate(trail):
        disc(at, 3, (150, 190, 220) if step < len(trail) - 1 else (0, 0, 0))
    if trail:
        disc(trail[-1], 8, (0, 114, 178))
    return frame


@register(gymnasium_id="metarl/Navigation2D-v0", max_episode_steps=100)
def navigation_2d(
    actions: Literal["scaled", "clipped"] = "scaled",
    horizon: int = 100,
) -> NavigationFamily:
    """Walk to a goal drawn from [-0.5, 0.5]^2 (Finn et al. 2017); `actions` as in their code."""
    check_one_of("actions", actions, ("scaled", "clipped"))
    return NavigationFamily(
        name="navigation-2d",
        description="a point walks to a hidden goal in the plane",
        tasks=Uniform({"goal_x": (-0.5, 0.5), "goal_y": (-0.5, 0.5)}),
        horizon=horizon,
        achieved={"goal_x": "x_position", "goal_y": "y_position"},
        scaled=actions == "scaled",
    )
