"""A point that walks to a goal it does not see, as in Finn et al. 2017 (arXiv:1703.03400)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.errors import UserError
from envs.family import TaskFamily, Uniform, register
from envs.vector import Bools, Floats, SingleTaskEnv, TaskVectorEnv

STEP = 0.1  # the longest displacement along an axis
REACHED = 0.01  # along each axis


@dataclass(frozen=True, kw_only=True)
class NavigationFamily(TaskFamily):
    """Displacements are 0.1 clip(a, -1, 1) with `scaled` actions, clip(a, -0.1, 0.1) without."""

    scaled: bool = True

    parallel: ClassVar[bool] = True

    def make(self, task: Floats | None = None, *, render_mode: str | None = None) -> gym.Env:
        return SingleTaskEnv(self, task, render_mode)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> NavigationVectorEnv:
        options.pop("threads", None)
        return NavigationVectorEnv(self, num_tasks, episodes, **options)


class NavigationVectorEnv(TaskVectorEnv):
    """All points at once."""

    def __init__(
        self,
        family: NavigationFamily,
        num_tasks: int,
        episodes: int,
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        if render_mode is not None:
            raise UserError(f"navigation-2d has no render mode, got {render_mode!r}")
        bound = 1.0 if family.scaled else STEP
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
            action_space=gym.spaces.Box(-bound, bound, (2,), np.float32),
            metadata={"render_modes": []},
            **options,
        )
        self._bound = np.float32(bound)
        self._gain = STEP if family.scaled else 1.0
        self._position = np.zeros((self.num_envs, 2))

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        self._position[ids] = 0.0

    def _advance(
        self, ids: NDArray[np.int64] | None, actions: Any
    ) -> tuple[Floats, Bools | None, Bools | None, Bools | None, dict[str, Any]]:
        action = np.clip(np.asarray(actions, np.float32), -self._bound, self._bound)
        moves = slice(None) if ids is None else ids
        self._position[moves] += self._gain * action[moves].astype(np.float64)
        gap = self._position - self.tasks
        # The paper's text says the squared distance; its code, and its figures, the distance.
        reward = -np.sqrt(np.square(gap).sum(axis=1))
        reached: Bools = np.all(np.abs(gap) < REACHED, axis=1)
        return reward, reached, None, None, {}

    def _observe(self) -> NDArray:
        return self._position.copy()


@register
def navigation_2d(
    actions: Literal["scaled", "clipped"] = "scaled",
    horizon: int = 100,
) -> NavigationFamily:
    """Walk to a goal drawn from [-0.5, 0.5]^2 (Finn et al. 2017); `actions` as in their code."""
    if actions not in ("scaled", "clipped"):
        raise UserError(f"actions must be 'scaled' or 'clipped', got {actions!r}")
    return NavigationFamily(
        name="navigation-2d",
        description="a point walks to a hidden goal in the plane",
        tasks=Uniform({"goal_x": (-0.5, 0.5), "goal_y": (-0.5, 0.5)}),
        horizon=horizon,
        scaled=actions == "scaled",
    )
