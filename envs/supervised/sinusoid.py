"""Regression on sinusoids, as in Finn et al. 2017 (arXiv:1703.03400)."""

from __future__ import annotations

import math

import numpy as np

from metarl.envs.registry import register_data
from metarl.envs.supervised.family import Floats, FunctionFamily
from metarl.envs.tasks import Tasks, Uniform


def _sine(x: Floats, tasks: Tasks) -> Floats:
    amplitude, phase = tasks[:, :1], tasks[:, 1:]
    return amplitude * np.sin(x - phase)


@register_data(FunctionFamily.training)
def sinusoid(
    shots: int = 10, queries: int = 10, phases: float = math.pi, test_queries: int = 100
) -> FunctionFamily:
    """y = A sin(x - p), A from [0.1, 5], p from [0, phases], x from [-5, 5] (Finn et al. 2017).

    Nichol et al. 2018 use phases up to 2 pi.
    """
    return FunctionFamily(
        name="sinusoid",
        description="regression on a sinusoid of unknown amplitude and phase",
        tasks=Uniform({"amplitude": (0.1, 5.0), "phase": (0.0, phases)}),
        units={"phase": "rad"},
        function=_sine,
        interval=(-5.0, 5.0),
        shots=shots,
        queries=queries,
        test_queries=test_queries,
    )
