"""Files of tensors, written atomically and checked by a hash.

The format is safetensors, so reading a file runs no code. The header contains a JSON text. It also
contains the SHA-256 of that text and of every tensor's name, type, shape and bytes. A truncated or
altered file is refused.

    checkpoint    meta.NAME, outer.NAME, baseline.NAME, callback.NAME/KEY
    meta-policy   the meta-parameters by name, baseline.NAME
    adapted       the adapted parameters by name

The JSON text has `format`, `kind` ("checkpoint", "policy", "adapted"), `config`, `family` and
`versions`. A checkpoint adds `machine`, `iteration`, `env_steps`, other counters, and `callbacks`
with their remaining values; a meta-policy adds `iteration` and `env_steps`; an adapted policy adds
`adapted`: task, steps, episodes and seed. `family` is the fingerprint of the family: horizon, task
components and ranges, spaces. Files without one are not compared.

`config`, as in `config.json`, has `family`, `family_options`, `preset`, `algorithm` and the value
of every option by key in `options`. `named` is false if the algorithm was given as an object, which
cannot be found again. `origin` is the policy that the run started from, with its checksum.
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
    """A file of parameters cannot be used. The message gives the reason."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to a file atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json_text({**metadata, "format": FORMAT}, sort_keys=True)
    header = {"metarl": text, "sha256": _digest(tensors, text)}
    write_atomically(path, safetensors.torch.save(tensors, header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and metadata of a file.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or of a later format.
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
    except Exception as error:  # the parsers may raise anything for a damaged file
        raise CheckpointError(
            f"{path} is damaged or not a metarl file ({type(error).__name__})"
        ) from error
    if _digest(tensors, text) != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
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
    """Return the path of a run's checkpoint of an iteration."""
    return run / "checkpoints" / f"{iteration:06d}.safetensors"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Return the checkpoints of a run folder by iteration, in order."""
    found = (run / "checkpoints").glob("*.safetensors")
    return dict(sorted((int(path.stem), path) for path in found if path.stem.isdecimal()))


def newest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run folder.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    found = checkpoints_of(run)
    if not found:
        raise CheckpointError(f"{run} has no checkpoint yet")
    return found[max(found)]


def newest_good(run: Path, before: int, use: Callable[[Path], Any]) -> int | None:
    """Return the newest iteration before `before` whose checkpoint `use` accepts, or None."""
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
        CheckpointError: the config is missing, or this version does not accept it.
    """
    try:
        return Config.from_json(metadata["config"], given)
    except KeyError as error:
        raise CheckpointError(f"{path} contains no config") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} contains a config that cannot be used: {error}") from error


def count_of(path: Path, metadata: Mapping[str, Any], name: str) -> int:
    """Return a non-negative integer from a file's metadata.

    Raises:
        CheckpointError: it is missing or not such a number.
    """
    value = metadata.get(name, "missing")
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{path}: {name} must be a whole number, 0 or more, got {value!r}")
    return value


def in_shapes(
    path: Path | str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return the tensors in the order of `shapes`. Files do not keep the order; sums depend on it.

    Raises:
        CheckpointError: names, shapes or types differ, or a number is not finite.
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
            raise CheckpointError(f"{path}: {name} contains a number that is not finite")
    return {name: tensors[name] for name in shapes}


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    names = (DISTRIBUTION, "torch", "numpy", "gymnasium", "mujoco")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


@functools.cache  # a lookup takes a millisecond, and each checkpoint needs it
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def machine() -> dict[str, Any]:
    """Return what timings depend on. All but `cores` also change the last bits of results."""
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
    """Return the differences in what results depend on: "torch 2.12.0 (now 2.13.0)".

    Args:
        before: `versions` and `machine` from a file of a run.
        now: the current `versions` and `machine`.
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
