"""Videos of policies on one task, side by side, with goal, step and return in the frame.

No display is needed: MuJoCo renders through EGL or OSMesa. Another process tests which of them
works, because a process that failed with one cannot try the other. `prepare` chooses before an
environment's module is imported, because some read the choice at import.
"""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from metarl.envs import MujocoFamily, TaskFamily, guard
from metarl.envs.errors import UserError, check_one_of
from metarl.policies.policy import Policy
from metarl.runs.files import write_atomically

FPS = 25  # maximum; slower families keep their own rate
_LINE, _GAP = 30, 8  # pixels: height of a line of text above a panel, space between panels
_NARROWEST = 160  # minimum width of a panel with text, in pixels

_TRY = """
import mujoco
from mujoco.{backend} import GLContext
context = GLContext(16, 16)
context.make_current()
model = mujoco.MjModel.from_xml_string("<mujoco/>")
mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
"""


@dataclass(frozen=True)
class Video:
    """Frames [time, height, width, 3] uint8, and frames per second."""

    frames: NDArray[np.uint8]
    fps: float

    def save(self, path: Path) -> None:
        """Write the video in the format of the suffix: .mp4, .webm or .gif."""
        check_one_of("suffix", path.suffix, (".gif", *_CODECS))
        if path.suffix == ".gif":
            images = [
                Image.fromarray(f).quantize(64, dither=Image.Dither.NONE) for f in self.frames
            ]
            data = io.BytesIO()
            images[0].save(
                data, "gif", save_all=True, append_images=images[1:], loop=0,
                duration=round(1000.0 / self.fps),
            )  # fmt: skip
            write_atomically(path, data.getvalue())
            return
        height, width = self.frames.shape[1:3]
        raw = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {self.fps} -i -"
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / path.name
            _ffmpeg([*raw.split(), *_CODECS[path.suffix], str(made)], self.frames.tobytes())
            write_atomically(path, made.read_bytes())


_H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
_VP9 = ["-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p", "-crf", "33", "-b:v", "0", "-cpu-used", "5"]
_CODECS = {".mp4": _H264, ".webm": _VP9}


def to_webm(path: Path) -> bytes:
    """Return a video file's content as .webm."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "video.webm"
        _ffmpeg(["-i", str(path), *_VP9, str(out)])
        return out.read_bytes()


def _ffmpeg(arguments: list[str], data: bytes = b"") -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *arguments]
    done = subprocess.run(command, input=data, capture_output=True)
    if done.returncode:
        raise UserError(f"{arguments[-1]} cannot be written: {done.stderr.decode().strip()}")


def choose_gl() -> None:
    """Set MUJOCO_GL to a backend that works here: the current one, EGL, OSMesa or a display.

    Raises:
        UserError: no backend works; the message lists what to install.
    """
    if not sys.platform.startswith("linux"):
        return  # the system default needs no choice
    asked = os.environ.get("MUJOCO_GL")
    for backend in [asked] if asked else ["egl", "osmesa", *(["glfw"] if _display() else [])]:
        if draws(backend):
            os.environ["MUJOCO_GL"] = backend
            return
    tried = f"MUJOCO_GL={asked} does not work" if asked else "neither EGL nor OSMesa works"
    raise UserError(f"no video: {tried} here; on Debian or Ubuntu: apt-get install libegl1 libgl1")


def prepare() -> str | None:
    """Choose a backend that renders without a display, for all environments imported later.

    Returns:
        description of the problem if MuJoCo cannot render; other environments may still render.
    """
    if sys.platform.startswith("linux") and not _display():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame's
    try:
        choose_gl()
    except UserError as error:
        return str(error)
    return None


def _display() -> bool:
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@functools.cache
def draws(backend: str) -> bool:
    """Return whether MuJoCo renders with a backend here, such as "egl". Starts a process."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY.format(backend=backend)],
            env=environment,
            capture_output=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def record(
    policies: Mapping[str, Policy],
    family: TaskFamily,
    task: NDArray[np.float64],
    *,
    seed: int = 0,
    deterministic: bool = False,
    speed: float = 1.0,
) -> Video:
    """Return a video of one episode of each policy on a task, side by side, from the same start.

    Args:
        policies: policies by their panel title.
        seed: seed of the reset.
        deterministic: act with the mean instead of a sample.
        speed: speed of playback, 1 for real time.

    Raises:
        UserError: no backend renders here, or the family renders no images.
    """
    if not speed > 0.0:
        raise UserError(f"speed must be positive, got {speed}")
    amiss = prepare()
    with guard.opened(lambda: family.make(task)) as probe:
        modes = probe.metadata.get("render_modes") or []
        drawn_at = float(probe.metadata.get("render_fps") or FPS)
    if "rgb_array" not in modes:
        raise UserError(
            f"no video: {family.name} has no render mode rgb_array; list it in the"
            ' metadata of the environment ("render_modes") and return frames from render'
        )
    if amiss is not None and isinstance(family, MujocoFamily):
        raise UserError(amiss)
    rate = speed * drawn_at
    every = max(1, round(rate / FPS))
    fps = rate / every
    goal = _goal(family, task)
    panels = []
    for title, policy in policies.items():
        with guard.opened(lambda: family.make(task, render_mode="rgb_array")) as env:
            shown = _episode(policy, env, every, seed, deterministic, amiss)
        panels.append(
            [
                _panel(image, title, goal, f"step {step}   return {total:.1f}")
                for step, total, image in shown
            ]
        )
    panels = _of_one_size(panels)
    longest = max(map(len, panels)) + round(fps / 2)  # the last frame stays for half a second
    joined = []
    for i in range(longest):
        row = [panel[min(i, len(panel) - 1)] for panel in panels]
        space = np.full((row[0].shape[0], _GAP, 3), 255, np.uint8)
        joined.append(np.concatenate([x for p in row for x in (p, space)][:-1], axis=1))
    frames = np.stack(joined)
    return Video(frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2], fps)


def _of_one_size(panels: list[list[NDArray[np.uint8]]]) -> list[list[NDArray[np.uint8]]]:
    """Scale frames to the size of the first; some environments change the size between states."""
    height, width = panels[0][0].shape[:2]
    return [
        [
            frame if frame.shape[:2] == (height, width)
            else np.asarray(Image.fromarray(frame).resize((width, height)))
            for frame in panel
        ]
        for panel in panels
    ]  # fmt: skip


def _episode(
    policy: Policy,
    env: gym.Env,
    every: int,
    seed: int,
    deterministic: bool,
    amiss: str | None,
) -> list[tuple[int, float, NDArray[np.uint8]]]:
    """Return step, return so far and image, for every few steps and for the last one.

    Raises:
        UserError: the environment cannot render; `amiss` describes a problem of MuJoCo.
    """

    def image() -> NDArray[np.uint8]:
        try:
            with guard.user_code():
                drawn = env.render()
        except Exception as error:  # a graphics library may raise anything
            why = f"{amiss}; {type(error).__name__}: {error}" if amiss else f"no video: {error}"
            raise UserError(why) from error
        if drawn is None:
            raise UserError(
                "no video: the environment renders nothing; if a function creates it, the function"
                " must take render_mode=None and pass it on"
            )
        return _frame(drawn)

    shown: list[tuple[int, float, NDArray[np.uint8]]] = []
    last = (0, 0.0)

    def on_step(step: int, total: float) -> None:
        nonlocal last
        last = (step, total)
        if step % every == 0:
            shown.append((step, total, image()))

    policy.play(env, seed=seed, deterministic=deterministic, on_step=on_step)
    if shown[-1][0] != last[0]:
        shown.append((*last, image()))
    return shown


def _frame(drawn: Any) -> NDArray[np.uint8]:
    """Return a rendered image as bytes [height, width, 3], large enough for text.

    Some environments render grey images, an alpha channel or floats in [0, 1].
    """
    image = np.asarray(drawn)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise UserError(
            f"no video: render gives an array of shape {np.shape(drawn)}, not [height, width, 3]"
        )
    if np.issubdtype(image.dtype, np.floating) and image.max() <= 1.0:
        image = 255.0 * image
    image = np.broadcast_to(image[..., :3], (*image.shape[:2], 3)).astype(np.uint8)
    times = max(1, -(-_NARROWEST // image.shape[1]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _goal(family: TaskFamily, task: NDArray[np.float64]) -> str:
    parts = []
    for name, value in zip(family.tasks.names, task, strict=True):
        unit = family.units.get(name)
        parts.append(f"{name.replace('_', ' ')} {value:.3g}{f' {unit}' if unit else ''}")
    return "goal: " + ", ".join(parts)


def _panel(image: NDArray[np.uint8], *lines: str) -> NDArray[np.uint8]:
    """Write lines of text above an image."""
    strip = Image.new("RGB", (image.shape[1], _LINE * len(lines) + 6), "black")
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        size = 22.0
        while draw.textlength(line, font := ImageFont.load_default(size)) > image.shape[1] - 20:
            size *= 0.95
        draw.text((10, 4 + _LINE * i), line, font=font, fill="white")
    return np.concatenate([np.asarray(strip), image])
