"""Two small examples over stock Gymnasium environments, stepped in Python."""

from __future__ import annotations

from typing import Any

from metarl.envs.errors import UserError
from metarl.envs.gymnasium.family import GymnasiumFamily
from metarl.envs.registry import register
from metarl.envs.tasks import Uniform
from metarl.envs.vector import Floats


def put_length(env: Any, task: Floats) -> None:
    """Set the half length of a cart's pole, and the product that depends on it."""
    env.length = float(task[0])
    env.polemass_length = env.masspole * env.length


@register(gymnasium_id="metarl/PendulumGravity-v0", max_episode_steps=200)
def pendulum_gravity(low: float = 5.0, high: float = 15.0, horizon: int = 200) -> GymnasiumFamily:
    """Swing a pendulum up under a gravity (m/s^2) drawn from [low, high]; stock is 10."""
    return GymnasiumFamily(
        name="pendulum-gravity",
        description="stock Pendulum-v1 under another gravity (m/s^2)",
        env="Pendulum-v1",
        keywords=True,
        tasks=Uniform({"g": (low, high)}),
        horizon=horizon,
    )


@register(gymnasium_id="metarl/CartPoleLength-v0", max_episode_steps=200)
def cartpole_length(low: float = 0.25, high: float = 2.0, horizon: int = 200) -> GymnasiumFamily:
    """Balance a pole whose half length (m) is drawn from [low, high]; stock is 0.5."""
    if not low > 0.0:
        raise UserError(f"cartpole-length: low must be positive, got {low}")
    return GymnasiumFamily(
        name="cartpole-length",
        description="stock CartPole-v1 with a pole of another half length (m)",
        env="CartPole-v1",
        set_task=put_length,
        tasks=Uniform({"length": (low, high)}),
        horizon=horizon,
    )
