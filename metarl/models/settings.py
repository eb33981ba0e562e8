"""Settings of torch that results depend on: set while metarl computes, restored after user code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from metarl.envs import guard
from metarl.envs.guard import Setting


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention with plain matrix products: the fused kernels have no second derivative."""
    fused = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.enable_flash_sdp(False)  # also for the CPU
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(fused[0])
        torch.backends.mha.set_fastpath_enabled(fused[1])


def _device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.6 after set_default_device(None)
        return torch.device("cpu")


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Use metarl's settings inside this context, and restore the caller's settings afterwards.

    One intra-op thread, gradients enabled, float32, the CPU.
    """
    threads, dtype, device = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        _device(),
    )
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    _set_device(torch.device("cpu"))
    try:
        with torch.inference_mode(False), torch.enable_grad(), plain_attention():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        _set_device(device)


guard.register("torch gradients", Setting(torch.is_grad_enabled, torch.set_grad_enabled, True))
guard.register("torch dtype", Setting(torch.get_default_dtype, torch.set_default_dtype, True))
guard.register("torch threads", Setting(torch.get_num_threads, torch.set_num_threads, True))
guard.register("torch device", Setting(_device, _set_device))
guard.register(
    "torch determinism",
    Setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
)
guard.register(
    "torch anomalies",
    Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
)
guard.register(
    "torch matrix products",
    Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
)
