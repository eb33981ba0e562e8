"""Actuators without `ctrlrange`: no bounds natively, an error where Gymnasium makes them zeros."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from expecting import mentions, refused, run
from gymnasium.envs.mujoco import MujocoEnv

from metarl import check_task_family, load, load_policy, resolve, train
from metarl.envs import GymnasiumFamily, MujocoFamily, Uniform
from metarl.envs.mujoco.simulation import Sim, Step
from metarl.policies.export import export

LIMITED = 'ctrlrange="-1 1"'


def model_file(folder: Path, *ranges: str) -> str:
    """Write a model of an arm with a hinge and a motor for each range, and return its path."""
    links, motors, ends = "", "", ""
    for i, text in enumerate(ranges):
        links += (
            f'<body pos="0 0 {-0.2 * bool(i)}"><joint name="j{i}" type="hinge" axis="0 1 0"'
            ' damping="0.1"/><geom type="capsule" size="0.03" fromto="0 0 0 0 0 -0.2" mass="1"'
            ' contype="0" conaffinity="0"/>'
        )
        motors += f'<motor name="m{i}" joint="j{i}" gear="3" {text}/>'
        ends += "</body>"
    path = folder / f"arm-{len(ranges)}{'-'.join(map(str, map(len, ranges)))}.xml"
    path.write_text(
        '<mujoco><option timestep="0.01"/><worldbody><body pos="0 0 1">'
        f"{links}{ends}</body></worldbody><actuator>{motors}</actuator></mujoco>"
    )
    return str(path)


def observe(sim: Sim) -> np.ndarray:
    return np.concatenate([sim.qpos, sim.qvel], axis=1)


def reward(step: Step):
    return -np.abs(step.sim.qpos[:, 0] - step.task[:, 0]), {}


def initial_state(rng: np.random.Generator, model: mujoco.MjModel):
    return rng.uniform(-0.1, 0.1, model.nq), np.zeros(model.nv)


def arm(folder: str, ranges: tuple[str, ...] = (LIMITED, "")) -> MujocoFamily:
    return MujocoFamily(
        name="arm", xml=model_file(Path(folder), *ranges), frame_skip=5, horizon=10,
        tasks=Uniform({"angle": (-1.0, 1.0)}), observe=observe, reward=reward,
        initial_state=initial_state,
    )  # fmt: skip


def settings(tmp_path: Path, *, action: str, ranges: tuple[str, ...] = (LIMITED, "")):
    overrides = {
        "family_options": {"folder": str(tmp_path), "ranges": ranges},
        "tasks": 2, "episodes": 3, "iterations": 2, "policy.hidden": (4,), "threads": 1,
        "policy.action": action, "policy.initial_std": 3.0,
    }  # fmt: skip
    return resolve(None, "test_unlimited_actuators:arm", overrides=overrides)


# The native backend -------------------------------------------------------------------------------


def test_an_actuator_without_ctrlrange_has_no_bounds(tmp_path):
    space = arm(str(tmp_path), (LIMITED, "", 'ctrlrange="-2 5"')).make().action_space
    assert isinstance(space, gym.spaces.Box)
    np.testing.assert_array_equal(space.low, np.float32([-1, -np.inf, -2]))
    np.testing.assert_array_equal(space.high, np.float32([1, np.inf, 5]))


def test_a_range_that_is_declared_not_to_limit_does_not(tmp_path):
    space = arm(str(tmp_path), (f'{LIMITED} ctrllimited="false"',)).make().action_space
    assert isinstance(space, gym.spaces.Box)
    assert not np.isfinite([space.low, space.high]).any()


def test_an_unlimited_actuator_moves_as_in_mujoco_alone(tmp_path):
    env = arm(str(tmp_path)).make(np.zeros(1))
    observation, _ = env.reset(seed=3)
    model = mujoco.MjModel.from_xml_path(model_file(tmp_path, LIMITED, ""))
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = np.split(observation, 2)
    mujoco.mj_forward(model, data)
    for t in range(10):
        action = np.float32([0.5, 4.0 * (-1) ** t])
        observation = env.step(action)[0]
        data.ctrl[:] = action
        mujoco.mj_step(model, data, 5)
    np.testing.assert_allclose(observation, [*data.qpos, *data.qvel], rtol=1e-9)


def test_a_scale_divides_an_unlimited_action_too(tmp_path):
    plain = arm(str(tmp_path))
    scaled = dataclasses.replace(plain, action_scale=10.0)
    seen = []
    for family, action in ((plain, [0.1, 3.0]), (scaled, [1.0, 30.0])):
        env = family.make(np.zeros(1))
        env.reset(seed=0)
        seen.append(env.step(np.float32(action))[0])
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-5)
    with refused("action_scale", 0.0):
        dataclasses.replace(plain, action_scale=0.0)


@pytest.mark.parametrize("action", ["clip", "scale"])
def test_a_run_acts_beyond_one_where_there_are_no_bounds(tmp_path, action):
    train(settings(tmp_path, action=action), tmp_path / "run")
    policy = load(tmp_path / "run").adapt(np.zeros(1), episodes=2)
    with contextlib.closing(arm(str(tmp_path)).make()) as env:
        observations = np.random.default_rng(0).normal(size=(200, 4))
        actions = policy.act(observations)
        assert all(env.action_space.contains(a) for a in actions)
    limited, free = np.abs(actions).max(axis=0)
    assert limited == 1.0  # the deviation is 3: some are cut
    assert free > 4.0
    assert (np.abs(actions[:, 1]) != 1.0).all()


def test_scaling_without_any_bounds_is_refused(tmp_path):
    with refused("policy.action", "scale"):
        train(settings(tmp_path, action="scale", ranges=("", "")), tmp_path / "run")


@pytest.mark.parametrize("action", ["clip", "scale"])
def test_modules_files_and_exports_keep_unbounded_components(tmp_path, action):
    train(settings(tmp_path, action=action), tmp_path / "run")
    policy = load(tmp_path / "run").adapt(np.zeros(1), episodes=2)
    policy.save(tmp_path / "adapted")
    again = load_policy(tmp_path / "adapted")
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 100
    wanted = policy.act(observations, deterministic=True)
    np.testing.assert_array_equal(again.act(observations, deterministic=True), wanted)
    with torch.no_grad():
        module = policy.module()(torch.from_numpy(observations)).numpy()
    np.testing.assert_allclose(module, wanted, rtol=1e-4, atol=1e-5)
    with contextlib.closing(arm(str(tmp_path)).make()) as env:
        export(policy, tmp_path / "policy.pt", "torchscript", env.observation_space)


@pytest.mark.parametrize("action", ["clip", "scale"])
def test_an_online_adapter_takes_actions_beyond_one(tmp_path, action):
    train(settings(tmp_path, action=action), tmp_path / "run")
    adapter = load(tmp_path / "run").adapter()
    with contextlib.closing(arm(str(tmp_path)).make(np.zeros(1))) as env:
        observation, _ = env.reset(seed=0)
        for t in range(10):
            act = adapter.act(observation) if t % 2 else np.float32([0.5, 7.0])
            following, paid, terminated, truncated, _ = env.step(act)
            adapter.add(observation, act, float(paid), terminated, truncated)
            observation = following
    assert all(torch.isfinite(p).all() for p in adapter.adapted().params.values())


def test_check_has_no_complaint_of_an_unlimited_actuator(tmp_path):
    assert not [f for f in check_task_family(arm(str(tmp_path))) if f.severity == "fault"]


# Gymnasium's own environment of a model -----------------------------------------------------------


class Arm(MujocoEnv):
    """Takes its action space of the model's ranges, as every MujocoEnv does."""

    metadata = {  # noqa: RUF012
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"], "render_fps": 20,
    }  # fmt: skip
    task = np.zeros(1)

    def __init__(self, file: str, bounds: float | None = None, **options) -> None:
        size = mujoco.MjModel.from_xml_path(file).nu
        space = gym.spaces.Box(-np.inf, np.inf, (2 * size,), np.float64)
        super().__init__(file, 5, space, **options)
        if bounds is not None:
            self.action_space = gym.spaces.Box(-bounds, bounds, (size,), np.float32)

    def _get_obs(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reset_model(self):
        start = self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.set_state(start, np.zeros(self.model.nv))
        return self._get_obs()

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        return self._get_obs(), -abs(float(self.data.qpos[0] - self.task[0])), False, False, {}


def gymnasium_arm(folder: str, ranges: tuple[str, ...], **options) -> GymnasiumFamily:
    file = model_file(Path(folder), *ranges)
    return GymnasiumFamily(
        name="arm", env=Arm, env_options={"file": file, **options}, horizon=10,
        tasks=Uniform({"angle": (-1.0, 1.0)}),
    )  # fmt: skip


@pytest.mark.parametrize("ranges", [("",), ("", ""), (LIMITED, "")])
def test_gymnasium_bounds_of_zeros_are_refused_everywhere(tmp_path, ranges):
    missing = str(ranges.index(""))
    family = gymnasium_arm(str(tmp_path), ranges)
    for use in (family.make, lambda: family.make_vec(2, 1)):
        with refused(missing, f"m{missing}", "ctrlrange", "action_space"):
            use()
    faults = [f for f in check_task_family(family) if f.severity == "fault"]
    assert faults
    assert mentions(faults[0].message, missing, "ctrlrange", "action_space")
    config = resolve(
        None, "test_unlimited_actuators:gymnasium_arm",
        overrides={"family_options": {"folder": str(tmp_path), "ranges": ranges}, "tasks": 2},
    )  # fmt: skip
    with refused("ctrlrange"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_commands_refuse_bounds_of_zeros(tmp_path, capsys):
    options = ("--family-options", f"folder={tmp_path}", "ranges=('',)")
    name = "test_unlimited_actuators:gymnasium_arm"
    assert run("train", name, *options, "--out", str(tmp_path / "run")) == 2
    assert mentions(capsys.readouterr().err, "ctrlrange", "m0")


def test_an_environment_that_says_its_bounds_itself_is_taken(tmp_path):
    with contextlib.closing(gymnasium_arm(str(tmp_path), ("", ""), bounds=2.0).make()) as env:
        assert env.action_space == gym.spaces.Box(-2.0, 2.0, (2,), np.float32)


class Levers(gym.Env):
    """Actions between two arrays of bounds."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    task = np.zeros(1)

    def __init__(self, low, high) -> None:
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action[0] * self.task[0]), False, False, {}


def levers(low: list[float], high: list[float]) -> GymnasiumFamily:
    return GymnasiumFamily(
        name="levers", env=Levers, env_options={"low": low, "high": high}, horizon=5,
        tasks=Uniform({"sign": (-1.0, 1.0)}),
    )  # fmt: skip


@pytest.mark.parametrize("bounds", [[0.0], [0.3], [0.0, 0.3]])
def test_bounds_that_are_all_equal_are_refused_whatever_the_environment(bounds):
    with refused("action_space", "ctrlrange", 0):
        levers(bounds, bounds).make()


@pytest.mark.parametrize("locked", [0.0, 0.3])
def test_one_locked_component_beside_others_is_allowed(locked):
    with contextlib.closing(levers([-1.0, locked], [1.0, locked]).make()) as env:
        env.reset(seed=0)
        env.step(np.float32([0.5, locked]))
