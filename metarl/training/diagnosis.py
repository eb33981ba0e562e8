"""Diagnosis of a run: sentences about the adaptation in its last iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LAST = 10  # number of examined iterations

# Limits beyond which runs did not improve (docs/experiments/seeds.md).
_LITTLE_KL, _LARGE_KL = 0.01, 3.0
_LITTLE_AGREEMENT = 0.1
_SATURATED = 0.36  # a standard normal action is beyond -1 and 1 in 0.32 of all cases


def findings(rows: Sequence[Mapping[str, Any]], *, stratified: bool = False) -> list[str]:
    """Return findings from the last rows of a run's metrics: the gain, and obstacles to it.

    Args:
        rows: rows of `metrics.jsonl`; older runs lack some of the metrics.
        stratified: tasks were spread evenly. Their spread then says little about the noise of the
            meta-gradient, so no sentence covers it.

    Returns:
        The first sentence is about the gain. Empty without rows, or if nothing adapts.
    """
    rows = rows[-LAST:]
    gains = _known(rows, "gain")
    if not len(gains):
        return []
    mean = gains.mean()
    noise = 2.0 * gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.inf
    said = [f"Adaptation gains {mean:+.1f} on training tasks (last {len(gains)} iterations)."]
    if abs(mean) <= noise:
        said[0] += " This is not significantly different from zero."
    checks = (
        ("inner_kl", lambda x: x < _LITTLE_KL,
         "An inner step moves policies by a mean KL of only {:.2g}: adaptation has almost no"
         " effect, because steps are small or rewards hardly differ. Larger inner.step_sizes, or"
         " inner.min_kl 0.5, which scales the step, increase it."),
        ("inner_kl", lambda x: x > _LARGE_KL,
         "An inner step moves policies by a mean KL of {:.2g}, more than its samples support."
         " Use smaller inner.step_sizes; inner.min_kl only increases a step."),
        ("clip_fraction", lambda x: x > _SATURATED,
         "{:.0%} of the actions are beyond the bounds, where they have no effect and the"
         " gradient is noise. policy.output_scale 0.1, policy.normalize or a smaller"
         " policy.initial_std start within the bounds."),
        ("inner_gradient_cosine", lambda x: x < _LITTLE_AGREEMENT,
         "The inner gradients of two halves of a task's episodes have a cosine of {:.2g}: the"
         " step is mostly noise, or rewards hardly differ. More episodes reduce the noise; so does"
         " an advantage.gae_lambda of 0.95, and with few episodes advantage.targets"
         " lambda-returns."),
        ("gradient_agreement", lambda x: x < _LITTLE_AGREEMENT,
         "Meta-gradients of two such batches of tasks would have a cosine of {:.2g}: the outer"
         " step is mostly noise. More tasks, or stratified ones, reduce it."),
    )  # fmt: skip
    for name, fails, text in checks:
        values = _known(rows, name)
        if stratified and name == "gradient_agreement":
            continue
        if len(values) and fails(values.mean()):
            said.append(text.format(float(values.mean())))
    return said


def _known(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    values = np.array([row.get(name) for row in rows], np.float64)  # None becomes NaN
    return values[np.isfinite(values)]
