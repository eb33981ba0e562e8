"""A camera and joints in one Dict: the network gets both, as the environment gives them."""

import gymnasium as gym
import numpy as np
import torch

from metarl import envs, resolve, train


def see(joints):
    near = np.abs(np.linspace(-1.0, 1.0, 8) - joints[:2, None]) < 0.2  # of the tip
    return {"joints": joints, "camera": 255 * np.outer(*near)[..., None].astype(np.uint8)}


def pendulum(g):
    env, camera = gym.make("Pendulum-v1", g=g), gym.spaces.Box(0, 255, (8, 8, 1), np.uint8)
    both = gym.spaces.Dict(joints=env.observation_space, camera=camera)
    return gym.wrappers.TransformObservation(env, see, both)


def family():
    tasks = envs.Uniform({"g": (5.0, 15.0)})  # gravity
    return envs.GymnasiumFamily(name="seen", env=pendulum, tasks=tasks, keywords=True, horizon=50)


class CameraAndJoints(torch.nn.Module):
    def __init__(self, space, outputs):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 4, stride=2)
        self.head = torch.nn.Linear(72 + space["joints"].shape[0], outputs)

    def forward(self, seen):
        image = self.conv(seen["camera"].movedim(-1, 1) / 255.0).relu().flatten(1)
        return self.head(torch.cat([image, seen["joints"]], dim=1))


if __name__ == "__main__":
    options = {"policy.network": CameraAndJoints, "iterations": 3, "tasks": 4, "episodes": 4}
    config = resolve(None, "image_and_joints:family", overrides=options)
    print(train(config, "runs/example-camera", resume="auto").provenance)
