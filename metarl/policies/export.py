"""Policies as files for other programs: TorchScript and ONNX, checked against the policy."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metarl.envs.errors import UserError, check_one_of
from metarl.models.networks import State
from metarl.policies.policy import Policy
from metarl.runs.checkpoints import write_atomically

Format = Literal["torchscript", "onnx"]
SUFFIXES: dict[Format, str] = {"torchscript": ".pt", "onnx": ".onnx"}

CHECKED = 1000
"""Number of observations on which an exported policy is compared."""
_ROWS = 50  # observations of a call; those of later calls continue a recurrent policy's episodes


def export(policy: Policy, path: Path, kind: Format, observations: gym.Space) -> float:
    """Write a policy to a file and return the largest difference between both policies' actions.

    The file maps observations [n, ...] (float32, images uint8) to the most likely actions. The file
    of a recurrent policy also has the tensors of `Policy.initial_state(n)` as inputs, and the
    tensors of the next state as outputs.

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
    state = policy.initial_state(_ROWS)
    if kind == "torchscript":
        data = _torchscript(module, seen[:2], policy.initial_state(2))
        run = _torchscript_runner(data)
    else:
        data = _onnx(module, seen[:2], policy.initial_state(2))
        run = _onnx_runner(data, list(state))
    actions: list[NDArray] = []
    others: list[NDArray] = []
    same = True
    for one in seen.reshape(-1, _ROWS, *seen.shape[1:]):
        other, *after = run(one, *(x.numpy() for x in state.values()))
        action, state = policy.act(one, state=state, deterministic=True)
        actions.append(action)
        others.append(other)
        pairs = zip(after, state.values(), strict=True)
        same = same and all(np.allclose(a, b.numpy(), atol=1e-4) for a, b in pairs)
    expected, found = np.concatenate(actions), np.concatenate(others)
    gap = np.abs(found.astype(np.float64) - expected)
    if np.issubdtype(expected.dtype, np.floating):
        wrong = gap > 1e-4 * (1.0 + np.abs(expected))
    else:  # categories that are equally likely up to rounding may swap
        wrong = np.broadcast_to((gap > 0).mean() > 0.005, gap.shape)
    if found.shape != expected.shape or wrong.any() or not same:
        raise UserError(f"{path}: the exported policy acts differently, by up to {gap.max():g}")
    write_atomically(path, data)
    return float(gap.max())


def _torchscript(module: nn.Module, example: NDArray, state: State) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the format is old
        inputs = (torch.from_numpy(example), *state.values())
        traced = torch.jit.trace(module, inputs, check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
    return buffer.getvalue()


Runner = Callable[..., Sequence[NDArray]]
"""(observations, tensors of the state) -> actions, tensors of the next state."""


def _torchscript_runner(data: bytes) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(io.BytesIO(data))

    def run(*inputs: NDArray) -> list[NDArray]:
        with torch.inference_mode():
            found = loaded(*map(torch.from_numpy, inputs))
        return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]

    return run


def _onnx(module: nn.Module, example: NDArray, state: State) -> bytes:
    if importlib.util.find_spec("onnx") is None:
        raise UserError(
            "the format onnx needs the package onnx, which is not installed:"
            " pip install 'metarl-gradient[onnx]', or use --format torchscript"
        )
    buffer = io.BytesIO()
    inputs, outputs = ["observation", *state], ["action", *(f"next.{name}" for name in state)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.from_numpy(example), *state.values()),
            buffer,  # pyright: ignore[reportArgumentType]  (a file object is accepted)
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: {0: "n"} for name in (*inputs, *outputs)},
            dynamo=False,  # the other exporter needs one more package
        )
    return buffer.getvalue()


def _onnx_runner(data: bytes, names: list[str]) -> Runner:
    import onnx  # pyright: ignore[reportMissingImports]  (an extra)
    from onnx.reference import ReferenceEvaluator  # pyright: ignore[reportMissingImports]

    loaded = ReferenceEvaluator(onnx.load_from_string(data))

    def run(*inputs: NDArray) -> list[NDArray]:
        found = loaded.run(None, dict(zip(("observation", *names), inputs, strict=True)))
        return [np.asarray(x) for x in found]

    return run
