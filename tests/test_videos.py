"""Videos: what they show, their files, and machines that cannot draw."""

from __future__ import annotations

import dataclasses
import os
import subprocess

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import counting_family
from expecting import mentions, refused
from PIL import Image, ImageDraw
from test_evaluation import navigator

import metarl
from metarl.config.options import Config
from metarl.envs import GymnasiumFamily, Uniform, make_family
from metarl.envs.errors import UserError
from metarl.models.policies import PolicyModel
from metarl.plots import video as videos
from metarl.policies.meta_policy import MetaPolicy
from metarl.policies.policy import Policy
from metarl.runs.checkpoints import CheckpointError

GOAL = np.array([0.3, -0.2])


def film(**options) -> videos.Video:
    meta = navigator()
    policies = {"before adaptation": meta.adapt(GOAL, steps=0), "after": meta.adapt(GOAL, steps=1)}
    return videos.record(policies, meta.family, GOAL, **options)


def test_episodes_before_and_after_adaptation_are_side_by_side():
    video = film(seed=3)
    time, height, width, colours = video.frames.shape
    # 15 steps and the start, then half a second of the end, at the family's 20 frames a second.
    assert (time, colours, video.fps) == (16 + 10, 3, 20.0)
    assert width == 480 + 8 + 480
    assert height == 480 + 96
    assert np.array_equal(video.frames[0][96:, :480], video.frames[0][96:, 488:])  # the same start
    assert not np.array_equal(video.frames[15][96:, :480], video.frames[15][96:, 488:])
    assert np.array_equal(video.frames[15], video.frames[-1])
    text = video.frames[:, 66:96, :480]  # the line with step and return
    assert not np.array_equal(text[0], text[7])
    assert np.array_equal(video.frames[0, :66], video.frames[7, :66])  # title and goal stay
    fast = film(speed=2.5)
    assert fast.fps == 25.0  # every second step is shown, at twice and a half the pace
    assert len(fast.frames) == 9 + 12  # 0, 2 ... 14 and the last


def test_text_and_goal_are_drawn_where_they_belong(monkeypatch):
    frames: list[list[str]] = []  # the lines written in each, by the first of them
    write = ImageDraw.ImageDraw.text

    def watch(self, position, text, *arguments, **options):
        if text == "as it is":
            frames.append([])
        frames[-1].append(text)
        return write(self, position, text, *arguments, **options)

    meta = navigator()
    policy = meta.adapt(GOAL, steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", watch)
        videos.record({"as it is": policy}, meta.family, GOAL, seed=5, deterministic=True)
    env = meta.family.make(GOAL)
    observation, _ = env.reset(seed=5)
    total = 0.0
    for step in range(16):
        title, goal, progress = frames[step]
        assert title == "as it is"
        assert mentions(goal, 0.3, -0.2)
        assert mentions(progress, step, f"{total:.1f}")
        observation, reward, *_ = env.step(policy.act(observation, deterministic=True))
        total += float(reward)
    long = videos.record({30 * "many words ": policy}, meta.family, GOAL).frames[0]
    assert long.shape == (480 + 96, 480, 3)
    assert long[:36].any()
    assert not long[:36, -3:].any()  # made smaller, not cut


def test_the_point_and_its_goal_are_where_they_should_be():
    env = make_family("navigation-2d").make(np.array([0.5, 0.25]), render_mode="rgb_array")
    env.reset(seed=0)
    env.step(np.array([-1.0, 1.0], np.float32))
    frame = env.render()
    assert frame.shape == (480, 480, 3)

    def centre(colour):
        rows, columns = np.nonzero((frame == colour).all(axis=2))
        return columns.mean() / 240 - 1.0, 1.0 - rows.mean() / 240

    assert centre((213, 94, 0)) == pytest.approx((0.5, 0.25), abs=0.01)
    assert centre((0, 114, 178)) == pytest.approx((-0.1, 0.1), abs=0.01)
    env.close()
    blind = make_family("navigation-2d").make()
    with refused("render_mode", "rgb_array"):
        blind.vector.render()
    with refused("render_mode", "human", "rgb_array"):
        make_family("navigation-2d").make(render_mode="human")


def test_video_files_contain_the_frames(tmp_path):
    video = film()
    video = videos.Video(video.frames[:, ::4, ::4], video.fps)
    video.save(tmp_path / "video.mp4")
    told = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "video.mp4"))
    assert told == (len(video.frames), pytest.approx(len(video.frames) / video.fps, abs=0.01))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "video.mp4")]
    raw = ["-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run([*command, *raw], capture_output=True, check=True)
    again = np.frombuffer(done.stdout, np.uint8).reshape(video.frames.shape)
    assert np.abs(again.astype(int) - video.frames).mean() < 4.0  # compressed
    video.save(tmp_path / "video.gif")
    with Image.open(tmp_path / "video.gif") as gif:
        assert gif.n_frames > 10
        assert gif.size == (video.frames.shape[2], video.frames.shape[1])
        assert gif.info["duration"] == 50
    assert videos.to_webm(tmp_path / "video.mp4")[:4] == b"\x1a\x45\xdf\xa3"
    with refused(tmp_path / "nowhere" / "video.mp4", error=FileNotFoundError):
        video.save(tmp_path / "nowhere" / "video.mp4")


def test_a_half_cheetah_is_filmed_without_a_display(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    try:
        videos.choose_gl()
    except UserError as error:
        pytest.skip(str(error))
    assert os.environ["MUJOCO_GL"] in ("egl", "osmesa")
    meta = metarl.load("half-cheetah-dir-icml2017")
    short = {**meta.setup.family_options, "horizon": 8}
    meta = MetaPolicy(meta.params, dataclasses.replace(meta.setup, family_options=short))
    video = videos.record({"forwards": meta.adapt([1.0], steps=0)}, meta.family, np.array([1.0]))
    assert video.fps == 25.0  # 100 steps a second, each fourth shown
    assert len(video.frames) == 3 + 12
    assert video.frames[:, 96:].std() > 20.0
    assert not np.array_equal(video.frames[0, 96:], video.frames[2, 96:])


def test_the_first_backend_that_draws_is_taken_and_none_is_an_error(monkeypatch):
    tried: list[str] = []
    works = {"osmesa"}
    monkeypatch.setattr(videos, "draws", lambda name: tried.append(name) or name in works)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "")
    videos.choose_gl()
    assert tried == ["egl", "osmesa"]
    assert os.environ["MUJOCO_GL"] == "osmesa"
    works.clear()
    with refused("MUJOCO_GL", "osmesa", "libegl1"):
        videos.choose_gl()
    monkeypatch.delenv("MUJOCO_GL")
    with refused("EGL", "OSMesa", "libegl1"):
        videos.choose_gl()
    # Points in the plane need none of it.
    assert len(film().frames)
    meta = metarl.load("half-cheetah-dir-icml2017")
    with refused("EGL", "OSMesa", "libegl1"):
        videos.record({"x": meta.adapt([1.0], steps=0)}, meta.family, np.array([1.0]))


def test_a_backend_that_is_not_there_does_not_draw(monkeypatch):
    assert not videos.draws("nothing_of_this_name")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "nothing_of_this_name")
    with refused("MUJOCO_GL", "nothing_of_this_name"):
        videos.choose_gl()


def test_a_speed_of_zero_and_a_family_without_images_are_refused():
    with refused("speed", 0.0):
        film(speed=0.0)
    policy = navigator().adapt(GOAL, steps=0)
    with refused("counting", "rgb_array"):
        videos.record({"x": policy}, counting_family(), np.array([3.0]))


def test_an_adapted_policy_is_saved_and_loaded(tmp_path):
    meta = navigator()
    policy = meta.adapt(GOAL, steps=2, episodes=3, seed=4)
    policy.save(tmp_path / "adapted")
    again = metarl.load_policy(tmp_path / "adapted")
    assert again.provenance == {"task": GOAL.tolist(), "steps": 2, "episodes": 3, "seed": 4}
    # A new policy of the same adaptation draws the same noise from the start.
    env = meta.family.make(GOAL)
    assert again.play(env, seed=1) == policy.play(env, seed=1)
    with refused(tmp_path / "adapted", "metarl.load_policy", error=CheckpointError):
        metarl.load(tmp_path / "adapted")
    meta.save(tmp_path / "meta")
    with refused(tmp_path / "meta", "metarl adapt", error=CheckpointError):
        metarl.load_policy(tmp_path / "meta")


@pytest.mark.parametrize("algorithm", ["cavia", "oracle"])
def test_adapted_policies_that_see_a_context_keep_it(algorithm, tmp_path):
    steps = {"oracle": 0, "cavia": 1}[algorithm]
    meta = navigator(algorithm)
    policy = meta.adapt(GOAL, steps=steps, episodes=3)
    policy.save(tmp_path / "adapted")
    again = metarl.load_policy(tmp_path / "adapted")
    assert np.abs(again.params["context"].numpy()).max() > 0.0
    seen = np.array([0.1, 0.2])
    assert np.array_equal(again.act(seen, deterministic=True), policy.act(seen, deterministic=True))


class Draws(gym.Env):
    """As gymnasium-robotics': MuJoCo draws, and nothing about the environment tells so."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    task = np.zeros(1)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self):
        if "MUJOCO_GL" not in os.environ:
            raise RuntimeError("no OpenGL context")
        return np.zeros((64, 64, 3), np.uint8)


def family_and_policy(env: type[Draws]) -> tuple[GymnasiumFamily, Policy]:
    tasks = Uniform({"x": (0.0, 1.0)})
    family = GymnasiumFamily(name="draws", env=env, tasks=tasks, horizon=3)
    config = Config().with_options({"policy.hidden": (4,)})
    network = config.setup.domain.model(config.setup.algorithm, config.setup.policy, family)
    assert isinstance(network, PolicyModel)
    params = network.init(np.random.default_rng(0))
    record = {"task": None, "steps": 0, "episodes": 0, "seed": 0}
    return family, Policy(network, params, Draws.action_space, 3, "clip", record, {})


def test_images_of_every_kind_become_frames():
    class Shows(Draws):
        image: np.ndarray

        def render(self):
            return self.image

    family, policy = family_and_policy(Shows)

    def shown(image):
        Shows.image = image
        return videos.record({"x": policy}, family, np.zeros(1)).frames[0, 96:]  # below the text

    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (30, 300, 3), dtype=np.uint8)
    alpha = np.concatenate([colour, np.full((30, 300, 1), 7, np.uint8)], axis=2)
    for drawn in (colour, alpha, colour.astype(np.float64)):
        assert np.array_equal(shown(drawn), colour)
    assert np.array_equal(shown(colour[..., 0]), colour[..., :1].repeat(3, axis=2))
    assert abs(shown(colour / 255.0).astype(int) - colour).max() <= 1
    small = shown(np.array([[0, 9], [4, 2]], np.uint8))  # text has no room on two pixels
    assert small.shape == (160, 160, 3)
    assert small[[0, 0, -1, -1], [0, -1, 0, -1], 0].tolist() == [0, 9, 4, 2]
    with refused("render", "(3,)"):
        shown(np.zeros(3))


def test_a_backend_is_chosen_whatever_the_environment_draws_with(monkeypatch):
    family, policy = family_and_policy(Draws)
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(videos, "draws", lambda name: name == "osmesa")
    assert len(videos.record({"it": policy}, family, np.zeros(1)).frames) == 9
    assert os.environ.pop("MUJOCO_GL") == "osmesa"
    assert os.environ.pop("SDL_VIDEODRIVER") == "dummy"
    monkeypatch.setattr(videos, "draws", lambda name: False)
    with refused("EGL", "OSMesa", "libegl1", "OpenGL"):  # the last by the environment
        videos.record({"it": policy}, family, np.zeros(1))
    os.environ.pop("SDL_VIDEODRIVER")
