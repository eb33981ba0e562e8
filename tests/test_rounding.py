"""The noise itself: where it is, how large it is, and that equal calls stay equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch

# What a process prints of itself; with noise every entry differs from the true results.
PROBE = """
import json, multiprocessing
from concurrent.futures import ThreadPoolExecutor
import numpy as np, torch
from metarl.learning.networks import tanh
from metarl.learning.parallel import ChunkPool

x = torch.linspace(-3.0, 3.0, 101, dtype=torch.float64)
matrix = torch.outer(x, x.flip(0).cos())

def forward(_=0):
    return [*matrix.mm(matrix).flatten().tolist(), *x.exp().tolist(), *x.softmax(0).tolist()]

def backward(_=0):
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(tanh(leaf).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(slope.sum(), leaf)[0].tolist()

def numpy(_=0):
    y = x.numpy()
    rows = matrix.numpy()
    return [*np.tanh(y).tolist(), *rows.mean(1).tolist(), *rows.std(1).tolist(), np.sum(y * y)]

def everywhere():
    found = {}
    for work in (forward, backward, numpy):
        with ChunkPool(2) as pool, ThreadPoolExecutor(1) as executor:
            found[work.__name__] = work()
            found[f"{work.__name__} in a pool"] = pool.map(work, [0, 1])[1]
            found[f"{work.__name__} in a thread"] = executor.submit(work).result()
    return found

if __name__ == "__main__":
    found = {"here": everywhere()}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found["worker"] = pool.apply(everywhere)
    print(json.dumps(found))
"""


def printed(folder: Path, seed: int | None) -> dict[str, dict[str, list[float]]]:
    """Return what the probe finds in a process and its worker, with noise of a seed or none."""
    script = folder / "probe.py"
    script.write_text(PROBE)
    environment = {k: v for k, v in os.environ.items() if k != rounding.VARIABLE}
    environment["PYTHONPATH"] = str(Path(rounding.__file__).parent)
    environment["OMP_NUM_THREADS"] = "1"
    if seed is not None:
        environment[rounding.VARIABLE] = str(seed)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("probe")
    plain, noise = (printed(folder, seed) for seed in (None, 1))
    return {"plain": plain["here"], **noise}


@pytest.mark.parametrize("where", ["", " in a pool", " in a thread"])
@pytest.mark.parametrize("work", ["forward", "backward", "numpy"])
def test_noise_reaches_every_thread_forward_backward_and_numpy(found, work, where):
    plain, noise = (np.array(found[run][work + where]) for run in ("plain", "here"))
    assert (plain != noise).mean() > 0.5
    np.testing.assert_allclose(noise, plain, rtol=1e-12, atol=1e-12)


def test_equal_calls_are_equal_in_every_thread_and_process(found):
    assert found["here"] == found["worker"]
    for work in ("forward", "backward", "numpy"):
        for where in (" in a pool", " in a thread"):
            assert found["here"][work] == found["here"][work + where]


def test_another_seed_is_other_noise():
    one, other = (np.linspace(0.1, 0.9, 101) for _ in range(2))
    rounding.mover(1)(one)
    rounding.mover(2)(other)
    assert 0.2 < (one != other).mean() < 0.8


@pytest.mark.parametrize(("floats", "integers"), [("float32", "int32"), ("float64", "int64")])
def test_a_value_moves_by_one_unit_in_the_last_place(floats, integers):
    draw = np.random.default_rng(0).standard_normal(10_000)
    values = (draw * 10.0 ** np.linspace(-30, 30, 10_000)).astype(floats)
    moved = values.copy()
    rounding.mover(1)(moved)
    steps = moved.view(integers) - values.view(integers)
    assert set(steps) == {-1, 1}
    assert abs(steps.mean()) < 0.1


@pytest.mark.parametrize("floats", ["float32", "float64"])
def test_values_that_no_processor_rounds_do_not_move(floats):
    limits = np.finfo(floats)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, limits.max, limits.smallest_subnormal]
    for values in (np.array(special, floats), np.arange(9), np.array([True, False])):
        moved = values.copy()
        rounding.mover(1)(moved)
        assert moved.tobytes() == values.tobytes()


def test_the_move_depends_on_the_value_alone():
    values = np.random.default_rng(0).standard_normal((6, 50))
    whole = values.copy()
    rounding.mover(1)(whole)
    for index in np.ndindex(values.shape):
        one = np.array(values[index])
        rounding.mover(1)(one)
        assert one == whole[index]
    columns = values.copy()
    for part in (columns[:, ::2], columns[:, 1::2].T):
        rounding.mover(1)(part)
    np.testing.assert_array_equal(columns, whole)
    negative = -values
    rounding.mover(1)(negative)
    np.testing.assert_array_equal(negative, -whole)


def test_this_run_has_the_noise_that_it_was_asked_for(request):
    seed = request.config.getoption("--rounding-noise")
    assert os.environ.get(rounding.VARIABLE) == (None if seed is None else str(seed))
    sums = [float(torch.ones(count).sum()) for count in range(1, 9)]
    assert (sums == list(range(1, 9))) == (seed is None)
