"""The memory that a run needs, told in advance."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import gaussian_policy
from expecting import mentions, refused, run

from metarl.domains import memory
from metarl.domains.memory import Need, check_memory, need
from metarl.envs.memory import available
from metarl.learning.advantages import discounted_sum
from metarl.models.encoders import NatureCNN
from metarl.sampling.rollouts import RolloutBuffer

POLICY = gaussian_policy(observation_dim=3, action_dim=2, hidden=(5,))


def test_rollouts_are_counted_as_they_are_held():
    shape = {"tasks": 2, "episodes": 3, "horizon": 7}
    held = sum(
        array.nbytes for array in RolloutBuffer(POLICY, 2, 3, 7, ("speed",)).arrays().values()
    )
    one, two, shared = (
        need(POLICY, rollouts=rollouts, workers=workers, info_keys=1, **shape).rollouts
        for rollouts, workers in ((1, 0), (2, 0), (1, 4))
    )
    batch = 3 * 4 * 2 * 3 * 7
    assert two - one == held + batch
    assert shared - one == held
    images = gaussian_policy(observation_dim=64, action_dim=2, encoder=NatureCNN((36, 36, 3)))
    more = [need(images, rollouts=k, **shape).rollouts for k in (1, 2)]
    assert 36 * 36 * 3 * 42 < more[1] - more[0] < 1.3 * 36 * 36 * 3 * 42  # a byte each


def test_activations_of_a_forward_pass_are_counted():
    encoder = NatureCNN((36, 40, 3))
    sizes = []
    policy = gaussian_policy(observation_dim=encoder.features, action_dim=2, encoder=encoder)
    params = {n: torch.zeros(shape) for n, shape in policy.shapes().items()}
    image = torch.zeros(1, 36, 40, 3, dtype=torch.uint8)

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.conv2d or getattr(function, "__name__", "") in ("conv2d", "relu"):
                sizes.append(result.numel())
            return result

    with Count():
        encoder.encode(params, image)
    assert encoder.activations == 36 * 40 * 3 + sum(sizes)


def test_a_run_that_does_not_fit_in_memory_is_refused_or_warned_about(
    monkeypatch, caplog, tmp_path, capsys
):
    monkeypatch.setattr(memory, "available", lambda: 8 * 10**9)
    check_memory(Need(4 * 10**9, 3 * 10**9), "far")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_memory(Need(4 * 10**9, 5 * 10**9), "far")
    (message,) = caplog.messages
    assert mentions(message, "9.0 GB", "8.0 GB")
    with refused("12.0 GB", "8.0 GB", "--episodes"):
        check_memory(Need(9 * 10**9, 3 * 10**9), "far")
    monkeypatch.chdir(tmp_path)
    far = ["--family-options", "horizon=100000000", "--out", "run"]
    assert run("train", "navigation-2d", *far) == 2
    assert mentions(capsys.readouterr().err, "navigation-2d", "horizon", "--episodes")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "available", lambda: None)  # a system that does not tell
    check_memory(Need(10**15, 0), "far")


def test_free_memory_is_plausible_on_this_machine():
    free = available()
    assert free is None or 10**6 < free < 10**14


def test_file_cache_in_a_container_counts_as_free(monkeypatch):
    files = {
        "/proc/meminfo": "MemAvailable: 9000000 kB\n",
        "/sys/fs/cgroup/memory.max": "4000000000\n",
        "/sys/fs/cgroup/memory.current": "3500000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 400000000\ninactive_file 3000000000\nactive_file 5\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path, encoding=None: files[str(path)])
    assert available() == 3_500_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available() == 9_216_000_000


@pytest.mark.parametrize("steps", [1024, 1025, 2500])
def test_long_rows_are_summed_as_a_loop_sums_them(steps):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, steps)))
    expected, rest = torch.zeros_like(x), torch.zeros(3, dtype=x.dtype)
    for t in reversed(range(steps)):
        rest = x[:, t] + 0.997 * rest
        expected[:, t] = rest
    assert torch.allclose(discounted_sum(x, 0.997), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(discounted_sum(x, 0.0), x, rtol=1e-12, atol=0.0)
