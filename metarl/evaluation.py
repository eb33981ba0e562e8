"""How well a meta-policy adapts: returns after 0 ... K inner steps on held-out tasks.

Returns after k steps come from episodes of their own: K steps take K + 1 samples. The policy is
adapted afresh on each task, by the same inner loop as in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from envs.errors import UserError
from metarl.config import available_threads
from metarl.inner_loop import NonFiniteError
from metarl.meta_policy import MetaPolicy, load, random_meta_policy
from metarl.parallel import ChunkPool, one_intraop_thread
from metarl.policies import Params
from metarl.rollouts import Address
from metarl.trajectories import Rollout
from metarl.workers import make_collector

Floats = NDArray[np.float64]


def mean_interval(values: Floats, level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of [n] values and its confidence interval by Student's t.

    The bounds are NaN for fewer than two values.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(special.stdtrit(len(values) - 1, 0.5 + level / 2.0)) * error
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Curve:
    """Returns of one policy after 0 ... K inner steps."""

    step_sizes: list[float]
    """Of the K steps."""
    per_task: Floats
    """[tasks, K + 1]"""
    success: Floats | None = None
    """Part of the episodes in which the task is done, [tasks, K + 1], where the family tells."""

    @property
    def returns(self) -> list[float]:
        """Mean over tasks after each number of steps."""
        return self.per_task.mean(axis=0).tolist()

    @property
    def ci95(self) -> list[tuple[float, float]]:
        """95 % confidence interval over tasks of each mean."""
        return [mean_interval(column)[1:] for column in self.per_task.T]

    def gain(self, steps: int = 1) -> tuple[float, float, float]:
        """Return the mean gain of `steps` inner steps and its interval, paired by task."""
        return mean_interval(self.per_task[:, steps] - self.per_task[:, 0])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is not finite is null."""
        result = {
            "step_sizes": self.step_sizes,
            "returns": _finite(self.returns),
            "ci95": _finite([list(pair) for pair in self.ci95]),
            "per_task": _finite(self.per_task.tolist()),
        }
        if self.success is not None:
            result["success"] = _finite(self.success.mean(axis=0).tolist())
            result["success_per_task"] = _finite(self.success.tolist())
        return result


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluated policy, references on the same tasks, and what they were measured on."""

    curve: Curve
    references: Mapping[str, Curve]
    setting: Mapping[str, Any] = field(default_factory=dict)
    """Family, tasks and all else that gives the returns their meaning."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`."""
        curve = self.curve
        result = {**self.setting, **curve.to_json()}
        if len(curve.returns) > 1:
            mean, low, high = curve.gain()
            result["gain"] = _finite({"mean": mean, "ci95": [low, high]})
        result["references"] = {name: ref.to_json() for name, ref in self.references.items()}
        result["verdict"] = self.verdict()
        return result

    def verdict(self) -> str:
        """Say in one sentence whether adaptation gains anything."""
        if len(self.curve.returns) < 2:
            return "No inner step was taken."
        mean, low, high = self.curve.gain()
        if math.isnan(low):
            return f"One step gains {mean:+.1f} on a single task; several give an interval."
        if low <= 0.0 <= high:
            return (
                f"The gain of one adaptation step cannot be told from zero:"
                f" {mean:+.1f}, 95 % interval [{low:+.1f}, {high:+.1f}]."
            )
        improved = float((self.curve.per_task[:, 1] > self.curve.per_task[:, 0]).mean())
        word = "gains" if mean > 0.0 else "LOSES"
        return (
            f"Adaptation {word} {abs(mean):.1f} ± {(high - low) / 2.0:.1f} after one step"
            f" ({100.0 * improved:.0f} % of tasks improve)."
        )

    def table(self) -> str:
        """Return a plain-text table: a row a policy, a column a number of inner steps."""
        rows = {"this policy": self.curve, **self.references}
        steps = len(self.curve.returns)
        width = max(len(name) for name in rows)
        head = " " * width + "".join(f"{f'{k} steps':>18}" for k in range(steps))
        lines = [head.replace(" 1 steps", "  1 step")]
        for name, curve in rows.items():
            cells = ""
            for mean, (low, high) in zip(curve.returns, curve.ci95, strict=True):
                half = (high - low) / 2.0
                cells += f"{f'{mean:.1f} ± {half:.1f}':>18}" if half == half else f"{mean:>18.1f}"
            lines.append(f"{name:<{width}}{cells}")
        told = {name: curve.success for name, curve in rows.items() if curve.success is not None}
        if told:
            lines.append("success rate, %")
        for name, success in told.items():
            cells = "".join(f"{100.0 * rate:>18.1f}" for rate in success.mean(axis=0))
            lines.append(f"{name:<{width}}{cells}")
        return "\n".join(lines)


def evaluate(
    meta_policy: MetaPolicy | str | Path,
    *,
    tasks: int = 40,
    episodes: int = 20,
    steps: int = 3,
    seed: int = 0,
    step_sizes: Sequence[float] | None = None,
    references: Mapping[str, MetaPolicy] | None = None,
    random_step_sizes: Sequence[float] | None = None,
    deterministic: bool = False,
    drawn: bool = False,
    split: Literal["test", "validation"] = "test",
    threads: int | None = None,
    workers: int = 0,
) -> EvaluationResult:
    """Return a meta-policy's returns after 0 ... `steps` inner steps on held-out tasks.

    Args:
        meta_policy: a meta-policy, or what `load` takes.
        tasks: held-out tasks; few possible ones are drawn equally often.
        episodes: episodes a task, for each update and for each return.
        seed: of episodes, and of drawn tasks; the same ones for every policy.
        step_sizes: one a step, the last repeated; by default the policy's own for evaluation.
        references: other policies of the family, evaluated on the same tasks.
        random_step_sizes: those of the random initialization, which is always a reference; by
            default the policy's.
        deterministic: act by the mean instead of a sample, in the returns only.
        drawn: draw the tasks at random, as the papers do, instead of covering the test split
            evenly, which tells the mean over the split with less chance.
        split: "validation" draws other tasks and episodes, for choosing between policies.
        threads: for physics and updates; results do not depend on it.
        workers: processes for environments without a native backend; 0 steps them in this one.

    Raises:
        UserError: a number is out of range, the family cannot be made, or a reference is of
            another family.
    """
    if not isinstance(meta_policy, MetaPolicy):
        meta_policy = load(meta_policy)
    least_values = (("tasks", tasks, 1), ("episodes", episodes, 1), ("steps", steps, 0))
    for name, value, least in (*least_values, ("seed", seed, 0), ("workers", workers, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    for size in (*(step_sizes or ()), *(random_step_sizes or ())):
        if not (math.isfinite(size) and size > 0.0):
            raise UserError(f"step sizes must be positive, got {size}")
    family, config = meta_policy.family, meta_policy.config
    address = Address(seed, split=split)
    if split == "validation":
        goals = family.tasks.sample(address.tasks(), tasks)
    elif drawn:
        goals = family.tasks.sample(address.tasks(), tasks, "test")
    else:
        goals = family.tasks.grid(tasks)
    others = {"random": (random_meta_policy(meta_policy, seed), random_step_sizes)}
    for name, reference in (references or {}).items():
        same = (reference.config.family, dict(reference.config.family_options))
        if same != (config.family, dict(config.family_options)):
            raise UserError(
                f"{name} was trained on {same[0]} {same[1]}, not on"
                f" {config.family} {dict(config.family_options)}: their returns do not compare"
            )
        others[name] = (reference, None)

    with one_intraop_thread(), ChunkPool(threads or available_threads()) as pool:
        collector = make_collector(
            family, meta_policy.policy, tasks, episodes, pool, config.policy.action,
            workers=workers, timeout=config.worker_timeout,
        )  # fmt: skip

        def curve(policy: MetaPolicy, sizes: Sequence[float] | None) -> Curve:
            loop, meta = policy.inner_loop(pool, sizes)
            told = policy.context(goals)

            def sample(params: Params, k: int, *, deterministic: bool = False) -> Rollout:
                where = Address(seed, split=split, inner_step=k)
                params = {**params, **told}
                return collector.collect(params, goals, where, deterministic=deterministic)

            adapted = loop.run(sample, meta, tasks, steps=steps, query="rollout")
            rollouts = adapted.rollouts
            if deterministic:
                rollouts = [
                    sample(loop.adapter.params(fast, adapted.slow, tasks), k, deterministic=True)
                    for k, fast in enumerate(adapted.iterates)
                ]
            returns = [rollout.mean_returns().numpy() for rollout in rollouts]
            success = None
            if family.tells_success:
                rates = [rollout.success_rates().numpy() for rollout in rollouts]
                success = np.stack(rates, axis=1)
            used = loop.adapter.mean_step_sizes(meta, steps)
            return Curve(used, np.stack(returns, axis=1), success)

        try:
            own = curve(meta_policy, step_sizes)
            results = {}
            for name, (policy, sizes) in others.items():
                results[name] = curve(policy, sizes or (step_sizes if name == "random" else None))
        except NonFiniteError as error:
            raise UserError(f"{family.name}: {error}") from error
        finally:
            collector.close()

    setting = {
        "family": config.family,
        "family_options": dict(config.family_options),
        "preset": config.preset,
        "algorithm": config.algorithm,
        "horizon": family.horizon,
        "components": list(family.tasks.names),
        "tasks": goals.tolist(),
        "episodes": episodes,
        "seed": seed,
        "split": split,
        "drawn": drawn,
        "deterministic": deterministic,
        "trained": dict(meta_policy.record),
    }
    return EvaluationResult(own, results, setting)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if math.isfinite(value) else None
