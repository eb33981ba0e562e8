"""Files of tensors: written aside, fsynced and renamed; hashed, and read without running code.

The format is safetensors. Its header carries a JSON text and the SHA-256 of that text and of every
tensor's name, type, shape and bytes: a file cut short or altered anywhere is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from metarl.envs.errors import UserError

FORMAT = 1
DISTRIBUTION = "metarl-gradient"


class CheckpointError(UserError):
    """A file of parameters cannot be used; the message says why."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to a file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**metadata, "format": FORMAT}, sort_keys=True)
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
    if metadata["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata['format']}, this version reads up to {FORMAT};"
            " update metarl"
        )
    return tensors, metadata


def in_shapes(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return the tensors in the order of these names; files keep no order, and sums depend on it.

    Raises:
        CheckpointError: their names or shapes are others.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        odd = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
        raise CheckpointError(
            f"{path} is of another network: {odd} is {found.get(odd, 'missing')},"
            f" expected {shapes.get(odd, 'none')}"
        )
    return {name: tensors[name] for name in shapes}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file aside, fsync and rename it: a crash leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    found = {"python": platform.python_version()}
    for name in (DISTRIBUTION, "torch", "numpy", "gymnasium", "mujoco"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return what timings depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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
