"""Families over packages of other people, where they are installed (the extra `third-party`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from expecting import run

FLAPPY = """
import flappy_bird_gymnasium
from metarl.envs import Finite, GymnasiumFamily

family = GymnasiumFamily(name="flappy", env="FlappyBird-v0", keywords=True, horizon=30,
    env_options={"use_lidar": False}, tasks=Finite(("pipe_gap",), [[100.0], [140.0], [200.0]]))
"""
MAZE = """
import gymnasium as gym
import gymnasium_robotics
import numpy as np
from metarl.envs import GymnasiumFamily, Uniform

gym.register_envs(gymnasium_robotics)

def reward(observation, action, next_observation, info, task):
    return -np.abs(next_observation[:, 0] - task[:, 0])

family = GymnasiumFamily(name="maze", env="PointMaze_UMaze-v3", reward=reward, horizon=15,
    tasks=Uniform({"x": (-1.0, 1.0)}))
"""
ROOMS = """
import gymnasium as gym
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper
from metarl.envs import Finite, GymnasiumFamily

class PaysTheWay(gym.Wrapper):
    def set_task(self, task):
        self.axis = int(task[0])

    def step(self, action):
        before = self.unwrapped.agent_pos[self.axis]
        observation, _, *rest = self.env.step(action)
        return observation, float(self.unwrapped.agent_pos[self.axis] - before), *rest

def make(render_mode=None):
    env = gym.make("MiniGrid-Empty-5x5-v0", render_mode=render_mode)
    return PaysTheWay(ImgObsWrapper(RGBImgObsWrapper(env, tile_size=4)))

family = GymnasiumFamily(name="rooms", env=make, tasks=Finite(("axis",), [[0.0], [1.0]]),
    horizon=8)
"""
ASTERIX = """
import gymnasium as gym
import minatar.gym
import numpy as np
from metarl.envs import Finite, GymnasiumFamily

minatar.gym.register_envs()

class PaysTheWay(gym.Wrapper):
    observation_space = gym.spaces.Box(0, 255, (10, 10, 4), np.uint8)

    def set_task(self, task):
        self.direction = task

    def reset(self, *, seed=None, options=None):
        self.unwrapped.game.last_action = 0  # else it outlives the episode
        observation, info = self.env.reset(seed=seed, options=options)
        return 255 * observation.astype(np.uint8), info

    def step(self, action):
        before = self.place()
        observation, _, *rest = self.env.step(action)
        reward = float(self.direction @ (self.place() - before))
        return 255 * observation.astype(np.uint8), reward, *rest

    def place(self):
        game = self.unwrapped.game.env
        return np.array([game.player_x, game.player_y])

def make(render_mode=None):
    return PaysTheWay(gym.make("MinAtar/Asterix-v1", render_mode=render_mode))

family = GymnasiumFamily(name="asterix", env=make, horizon=8,
    tasks=Finite(("right", "down"), [[1, 0], [-1, 0], [0, 1], [0, -1]]))
"""
PACKAGES = {
    "flappy_bird_gymnasium": FLAPPY,
    "gymnasium_robotics": MAZE,
    "minatar": ASTERIX,
    "minigrid": ROOMS,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_plugs_in(package, tmp_path, monkeypatch, capsys):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "plugged.py").write_text(PACKAGES[package])
    monkeypatch.delitem(sys.modules, "plugged", raising=False)
    assert run("check", "plugged:family") == 0, capsys.readouterr().out
    small = ["--tasks", "2", "--episodes", "2", "--policy.hidden", "8"]
    rows = []
    for workers in ("0", "2"):
        out = f"run-{workers}"
        command = ["train", "plugged:family", *small, "--iterations", "2", "--workers", workers]
        assert run(*command, "--out", out) == 0
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        times = ("seconds", "env_steps_per_second")
        rows.append([{k: v for k, v in row.items() if not k.startswith(times)} for row in kept])
    assert rows[0] == rows[1]
    few = ["--tasks", "2", "--episodes", "1", "--steps", "1", "--workers", "0"]
    assert run("evaluate", "run-0", *few) == 0
    assert run("record", "run-0", "--episodes", "1") == 0
    assert run("export", "run-0", "--out", "policy.pt") == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("id", ["HalfCheetahVel", "AntDir", "Navigation2D", "Bandit"])
def test_torchrl_makes_and_checks_an_environment(id):
    envs = pytest.importorskip("torchrl.envs")
    env = envs.GymEnv(f"metarl/{id}-v0")  # with a keyword that only some environments have
    envs.check_env_specs(env)
    assert env.rollout(5)["next", "reward"].shape == (5, 1)
    assert envs.GymEnv(f"metarl/{id}-v0", frame_skip=2).rollout(3).shape == (3,)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
def test_weights_and_biases_records_the_events_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    program = f"""
import pathlib, wandb
from metarl import resolve, train
wandb.init(mode="offline", dir={str(tmp_path)!r}, sync_tensorboard=True)
values = {{"family_options": {{"horizon": 8}}, "tasks": 3, "episodes": 3, "iterations": 3}}
train(resolve(None, "navigation-2d", overrides=values), pathlib.Path({str(tmp_path / "run")!r}))
wandb.finish()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"rollout/ep_rew_mean_post" in file.read_bytes()
