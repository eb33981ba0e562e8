"""Files of tensors: written whole or not at all; hashed, and read without running code.

The format is safetensors. Its header carries a JSON text and the SHA-256 of that text and of every
tensor's name, type, shape and bytes: a file cut short or altered anywhere is refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from metarl.config.options import Config
from metarl.envs.errors import UserError
from metarl.plain_json import json_text
from metarl.runs.files import write_atomically

FORMAT = 1
DISTRIBUTION = "metarl-gradient"


class CheckpointError(UserError):
    """A file of parameters cannot be used; the message says why."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to a file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json_text({**metadata, "format": FORMAT}, sort_keys=True)
    header = {"metarl": text, "sha256": _digest(tensors, text)}
    write_atomically(path, safetensors.torch.save(tensors, header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and metadata of a file.

    Raises:
        CheckpointError: it is missing, damaged, of another kind or of a later format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["__metadata__"]
        text, digest = header["metarl"], header["sha256"]
    except Exception as error:  # whatever a damaged file makes the parsers raise
        raise CheckpointError(
            f"{path} is damaged or no metarl file ({type(error).__name__})"
        ) from error
    if _digest(tensors, text) != digest:
        raise CheckpointError(f"{path} is damaged: its content does not have its checksum")
    metadata = json.loads(text)
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{path} has format {found!r}, which no version of metarl writes")
    if found > FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, this version reads up to {FORMAT}; update metarl"
        )
    return tensors, metadata


def checkpoint_path(run: Path, iteration: int) -> Path:
    """Return where a run keeps the checkpoint of an iteration."""
    return run / "checkpoints" / f"{iteration:06d}.safetensors"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Return a run folder's checkpoints by their iterations, in order."""
    found = (run / "checkpoints").glob("*.safetensors")
    return dict(sorted((int(path.stem), path) for path in found if path.stem.isdecimal()))


def newest_checkpoint(run: Path) -> Path:
    """Return a run folder's newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    found = checkpoints_of(run)
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint yet")
    return found[max(found)]


def newest_good(run: Path, before: int, use: Callable[[Path], Any]) -> int | None:
    """Return the newest iteration before another whose checkpoint is used without complaint."""
    for iteration, path in sorted(checkpoints_of(run).items(), reverse=True):
        if iteration < before:
            with contextlib.suppress(CheckpointError):
                use(path)
                return iteration
    return None


def config_of(path: Path, metadata: Mapping[str, Any], given: Config | None = None) -> Config:
    """Return the config in a file's metadata.

    Args:
        given: see `Config.from_json`.

    Raises:
        CheckpointError: it is missing, or none that this version takes.
    """
    try:
        return Config.from_json(metadata["config"], given)
    except KeyError as error:
        raise CheckpointError(f"{path} holds no config") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds a config that cannot be used: {error}") from error


def count_of(path: Path, metadata: Mapping[str, Any], name: str) -> int:
    """Return a whole number, 0 or more, in a file's metadata.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = metadata.get(name, "missing")
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{path}: {name} must be a whole number, 0 or more, is {value!r}")
    return value


def in_shapes(
    path: Path | str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return the tensors in the order of these names; files keep no order, and sums depend on it.

    Raises:
        CheckpointError: their names, shapes or types are others, or a number is not finite.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        odd = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
        raise CheckpointError(
            f"{path} is of another network: {odd} is {found.get(odd, 'missing')},"
            f" expected {shapes.get(odd, 'none')}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected torch.float32")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds a number that is not finite")
    return {name: tensors[name] for name in shapes}


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    names = (DISTRIBUTION, "torch", "numpy", "gymnasium", "mujoco")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


@functools.cache  # it takes a millisecond, and each checkpoint has them
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def machine() -> dict[str, Any]:
    """Return what timings depend on; all but the number of cores changes results' last bits too."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "thread_library": _thread_library(),
        "blas_settings": " ".join(f"{k}={os.environ[k]}" for k in _BLAS if k in os.environ),
    }


_BLAS = (
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES",
)  # fmt: skip


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return where what results depend on differs: "torch 2.12.0 (now 2.13.0)".

    Args:
        before: `versions` and `machine` as a file of a run keeps them.
        now: the same of here.
    """
    return [
        f"{name} {part[name]} (now {now[kind].get(name, 'unknown')})"
        for kind in ("versions", "machine")
        if isinstance(part := before.get(kind), Mapping)
        for name in part
        if name != "cores" and part[name] != now[kind].get(name, "unknown")
    ]


def _thread_library() -> str:
    info = torch.__config__.parallel_info()
    backend = re.search(r"ATen parallel backend: (.+)", info)
    parts = re.findall(r"^(OpenMP \d+|Intel.* Math Kernel Library Version [\w.]+)", info, re.M)
    return ", ".join([*(backend.groups() if backend else []), *parts])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
