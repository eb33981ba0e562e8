"""Callbacks that track the best value of a metric: early stopping, and keeping the best policy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from metarl.envs.errors import UserError, check_one_of, check_whole, did_you_mean
from metarl.policies.meta_policy import MetaPolicy
from metarl.training.callbacks import Callback, Iteration, Run


class _Best(Callback):
    """Track the best value of a metric.

    Args:
        metric: key of `metrics.jsonl`; by default `return_post`, or `loss_post` for data sets.
        mode: "max" or "min"; by default "min" for losses.
    """

    def __init__(self, metric: str | None = None, mode: str | None = None) -> None:
        if mode is not None:
            check_one_of("mode", mode, ("max", "min"))
        self.metric, self.mode = metric, mode
        self.best: float | None = None
        self.loaded: Mapping[str, Any] = {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.loaded = state

    def start(self, run: Run) -> None:
        self.best = self.loaded.get("best")
        self.metric = self.metric or f"{run.measure}_post"
        self.mode = self.mode or ("min" if self.metric.startswith("loss") else "max")

    def better(self, metrics: Mapping[str, Any], by: float = 0.0) -> bool:
        """Store the metric and return True if it is better than the best by more than `by`."""
        assert self.metric is not None
        if self.metric not in metrics:
            hint = did_you_mean(self.metric, metrics)
            raise UserError(f"{type(self).__name__}: no metric {self.metric!r}{hint}")
        value = metrics[self.metric]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{type(self).__name__}: {self.metric} is not a number, but {value!r}")
        sign = -1.0 if self.mode == "min" else 1.0
        if not math.isfinite(value):
            return False
        if self.best is not None and not sign * (value - self.best) > by:
            return False
        self.best = float(value)
        return True


class EarlyStopping(_Best):
    """Stop a run whose metric has not improved for a number of iterations.

    Args:
        metric: key of `metrics.jsonl`; by default `return_post`, or `loss_post` for data sets.
        patience: number of iterations without improvement before the run stops.
        min_delta: smallest change that counts as an improvement.
        mode: "max" or "min"; by default "min" for losses.
    """

    def __init__(
        self,
        metric: str | None = None,
        patience: int = 20,
        min_delta: float = 0.0,
        mode: str | None = None,
    ) -> None:
        super().__init__(metric, mode)
        check_whole("patience", patience, 1)
        if not 0.0 <= min_delta < math.inf:
            raise UserError(f"min_delta must be finite and not negative, got {min_delta}")
        self.patience, self.min_delta, self.waited = patience, min_delta, 0

    def start(self, run: Run) -> None:
        super().start(run)
        self.waited = self.loaded.get("waited", 0)
        self.loaded = {}
        self._stop(run)  # a resumed run may already have stopped

    def update(self, iteration: Iteration) -> None:
        self.waited = 0 if self.better(iteration.metrics, self.min_delta) else self.waited + 1
        self._stop(iteration.run)

    def _stop(self, run: Run) -> None:
        if self.waited >= self.patience:
            run.stop(f"{self.metric} has not improved for {self.waited} iterations")

    def state(self) -> Mapping[str, Any]:
        return {"best": self.best, "waited": self.waited}


class KeepBest(_Best):
    """Keep the policy with the best metric as the policy file best.safetensors in the run folder.

    The metric of an iteration measures the meta-parameters at its start. These are saved.

    Args:
        metric: key of `metrics.jsonl`; by default `return_post`, or `loss_post` for data sets.
        mode: "max" or "min"; by default "min" for losses.
    """

    def __init__(self, metric: str | None = None, mode: str | None = None) -> None:
        super().__init__(metric, mode)
        self.kept: MetaPolicy | None = None

    def start(self, run: Run) -> None:
        super().start(run)
        self.kept, self.measured = None, run.meta_policy()
        path = run.folder / "best.safetensors"
        if not self.loaded:
            path.unlink(missing_ok=True)  # it may be from discarded iterations
            return
        parts: dict[str, Any] = {"params": {}, "baseline": {}}
        for key, value in self.loaded.items():
            part, _, name = key.partition("/")
            if name:
                parts[part][name] = torch.from_numpy(value)
        provenance = self.loaded["provenance"]
        self.kept = dataclasses.replace(self.measured, provenance=provenance, **parts)
        self.kept.save(path)
        self.loaded = {}

    def update(self, iteration: Iteration) -> None:
        if self.better(iteration.metrics):
            self.kept = self.measured
            self.kept.save(iteration.run.folder / "best.safetensors")
        self.measured = iteration.meta_policy()

    def state(self) -> Mapping[str, Any]:
        if self.kept is None:
            return {}
        return {
            "best": self.best,
            "provenance": self.kept.provenance,
            **{f"params/{name}": p for name, p in self.kept.params.items()},
            **{f"baseline/{name}": p for name, p in self.kept.baseline.items()},
        }
