"""Networks and environments of users, for test_own_networks.py; importable in worker processes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from metarl.envs import GymnasiumFamily, Uniform


class Residual(nn.Module):
    """Layer normalization with a residual connection."""

    def __init__(self, space, outputs, width=16):
        super().__init__()
        self.first = nn.Linear(space.shape[0], width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(x + torch.tanh(self.second(self.norm(x))))


class Attention(nn.Module):
    """Attention over the components of a vector."""

    def __init__(self, space, outputs):
        super().__init__()
        self.token = nn.Linear(1, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        x = self.token(x.unsqueeze(-1))
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """A GRU over the components of a vector; torch has no rule for batches of its weights."""

    def __init__(self, space, outputs):
        super().__init__()
        self.gru = nn.GRU(1, 8, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.gru(x.unsqueeze(-1))[1][0])


class Plain(nn.Module):
    """The built-in MLP of 8 units as a module."""

    def __init__(self, space, outputs):
        super().__init__()
        self.body = nn.Linear(int(np.prod(space.shape)), 8)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))


class Bare(nn.Module):
    """One parameter that no layer holds."""

    def __init__(self, space, outputs):
        super().__init__()
        self.head = nn.Parameter(0.1 * torch.randn(space.shape[0], outputs))

    def forward(self, x):
        return x @ self.head


class CameraAndJoints(nn.Module):
    """An image and a vector of a Dict."""

    def __init__(self, space, outputs):
        super().__init__()
        assert space["camera"].dtype == np.uint8
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        joints = space["joints"].shape[0] + space["mode"].n
        joints += space["context"].shape[0] if "context" in space.spaces else 0
        self.head = nn.Linear(4 * 3 * 3 + joints, outputs)

    def forward(self, x):
        assert x["camera"].dtype == torch.uint8
        assert x["camera"].shape[1:] == (8, 8, 3)
        assert x["mode"].dtype == torch.int64
        pixels = torch.relu(self.conv(x["camera"].movedim(-1, 1) / 255.0)).flatten(1)
        mode = nn.functional.one_hot(x["mode"], 3)
        parts = [pixels, x["joints"], mode, *([x["context"]] if "context" in x else [])]
        return self.head(torch.cat(parts, 1))


class Seeing(gym.Env):
    """Pays for the action that equals the first joint plus the task."""

    observation_space = gym.spaces.Dict(
        {
            "camera": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "joints": gym.spaces.Box(-1.0, 1.0, (2,), np.float32),
            "mode": gym.spaces.Discrete(3),
        }
    )
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    shift = 0.0

    def _observe(self):
        self.joints = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        camera = np.full((8, 8, 3), 100 + 50 * self.joints[0], np.uint8)
        return {"camera": camera, "joints": self.joints, "mode": int(self.np_random.integers(3))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        reward = -abs(float(action[0]) - float(self.joints[0]) - self.shift)
        return self._observe(), reward, False, False, {}


def set_shift(env, task):
    env.shift = float(task[0])


def seeing():
    return GymnasiumFamily(
        name="seeing", env=Seeing, tasks=Uniform({"shift": (-0.5, 0.5)}), set_task=set_shift,
        horizon=6,
    )  # fmt: skip
