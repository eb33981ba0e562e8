"""Policies as files for other programs: TorchScript and ONNX, checked against the policy."""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path
from typing import Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metarl.envs.errors import UserError, check_one_of
from metarl.policies.policy import Policy
from metarl.runs.checkpoints import write_atomically

Format = Literal["torchscript", "onnx"]
SUFFIXES: dict[Format, str] = {"torchscript": ".pt", "onnx": ".onnx"}

CHECKED = 1000
"""Number of observations on which an exported policy is compared."""


def export(policy: Policy, path: Path, kind: Format, observations: gym.Space) -> float:
    """Write a policy to a file and return the largest difference between both policies' actions.

    The file maps observations [n, ...] (float32, images uint8) to the most likely actions.

    Args:
        observations: observation space; the observations for the comparison are sampled from it.

    Raises:
        UserError: a package that the format needs is not installed, or the exported policy acts
            differently.
    """
    check_one_of("format", kind, get_args(Format))
    observations.seed(0)
    kept = policy.policy.observation_dtype
    seen = np.stack([observations.sample() for _ in range(CHECKED)]).astype(kept)
    module = policy.module().requires_grad_(False)
    data = _torchscript(module, seen[:2]) if kind == "torchscript" else _onnx(module, seen[:2])
    expected = policy.act(seen, deterministic=True)
    found = _run_torchscript(data, seen) if kind == "torchscript" else _run_onnx(data, seen)
    gap = np.abs(found.astype(np.float64) - expected)
    if np.issubdtype(expected.dtype, np.floating):
        wrong = gap > 1e-4 * (1.0 + np.abs(expected))
    else:  # categories that are equally likely up to rounding may swap
        wrong = np.broadcast_to((gap > 0).mean() > 0.005, gap.shape)
    if found.shape != expected.shape or wrong.any():
        raise UserError(f"{path}: the exported policy acts differently, by up to {gap.max():g}")
    write_atomically(path, data)
    return float(gap.max())


def _torchscript(module: nn.Module, example: NDArray) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the format is old
        traced = torch.jit.trace(module, torch.from_numpy(example), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
    return buffer.getvalue()


def _run_torchscript(data: bytes, seen: NDArray) -> NDArray:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        return torch.jit.load(io.BytesIO(data))(torch.from_numpy(seen)).numpy()


def _onnx(module: nn.Module, example: NDArray) -> bytes:
    if importlib.util.find_spec("onnx") is None:
        raise UserError(
            "the format onnx needs the package onnx, which is not installed:"
            " pip install 'metarl-gradient[onnx]', or use --format torchscript"
        )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.from_numpy(example),),
            buffer,  # pyright: ignore[reportArgumentType]  (a file object is accepted)
            input_names=["observation"],
            output_names=["action"],
            dynamic_axes={"observation": {0: "n"}, "action": {0: "n"}},
            dynamo=False,  # the other exporter needs one more package
        )
    return buffer.getvalue()


def _run_onnx(data: bytes, seen: NDArray) -> NDArray:
    import onnx  # pyright: ignore[reportMissingImports]  (an extra)
    from onnx.reference import ReferenceEvaluator  # pyright: ignore[reportMissingImports]

    return np.asarray(
        ReferenceEvaluator(onnx.load_from_string(data)).run(None, {"observation": seen})[0]
    )
