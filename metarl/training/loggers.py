"""Callbacks that record metrics with other programs: Weights & Biases, MLflow.

Each run folder keeps the program's id of the run, so a resumed run continues the same record.
Experiment name, server and offline mode are set by the programs' environment variables, such as
WANDB_PROJECT, WANDB_MODE and MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metarl.envs.errors import UserError
from metarl.plain_json import json_text
from metarl.runs.files import write_atomically
from metarl.training.callbacks import Callback, Iteration, Run


class _Logger(Callback):
    """Base class of callbacks that record metrics with another program.

    Args:
        options: arguments of the program's function that starts a run.
    """

    package = ""

    def __init__(self, **options: Any) -> None:
        try:
            self._module: Any = importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.package} is not installed: pip install 'metarl-gradient[{self.package}]'"
            ) from error
        self._options = options

    def _path(self, run: Run) -> Path:
        return run.folder / f"{self.package}.json"

    def _known_id(self, run: Run) -> str | None:
        """Return the id of the run's record, or None."""
        path = self._path(run)
        return json.loads(path.read_text("utf-8"))["id"] if path.exists() else None

    def _keep_id(self, run: Run, name: str) -> None:
        write_atomically(self._path(run), json_text({"id": name}).encode())


class WeightsAndBiases(_Logger):
    """Record metrics with Weights & Biases. An active `wandb` run is used and stays open.

    Args:
        options: arguments of `wandb.init`, such as `project` or `mode="offline"`.
    """

    package = "wandb"
    _run: Any = None

    def start(self, run: Run) -> None:
        self._own = self._module.run is None
        if self._own:
            common = {"name": run.folder.name, "dir": str(run.folder), "config": dict(run.options)}
            name = self._known_id(run)
            again = {} if name is None else {"id": name, "resume": "allow"}
            self._run = self._module.init(**{**common, **again, **self._options})
            self._keep_id(run, self._run.id)
        else:
            self._run = self._module.run

    def update(self, iteration: Iteration) -> None:
        self._run.log(_numbers(iteration.metrics), step=iteration.number)

    def close(self, error: BaseException | None) -> None:
        if self._run is not None and self._own:
            self._run.finish(exit_code=0 if error is None else 1)
        self._run = None


class MLflow(_Logger):
    """Record metrics with MLflow. An active `mlflow` run is used and stays open.

    Args:
        options: arguments of `mlflow.start_run`, such as `experiment_id`.
    """

    package = "mlflow"
    _run: Any = None

    def start(self, run: Run) -> None:
        self._run = self._module.active_run()
        self._own = self._run is None
        if self._own:
            name = self._known_id(run)
            again = {"run_name": run.folder.name} if name is None else {"run_id": name}
            self._run = self._module.start_run(**{**again, **self._options})
            self._keep_id(run, self._run.info.run_id)
            if name is None:
                self._module.log_params(dict(run.options))

    def update(self, iteration: Iteration) -> None:
        numbers = _numbers(iteration.metrics)
        self._module.log_metrics(numbers, step=iteration.number, run_id=self._run.info.run_id)

    def close(self, error: BaseException | None) -> None:
        if self._run is not None and self._own:
            self._module.end_run("FINISHED" if error is None else "FAILED")
        self._run = None


LOGGERS: dict[str, type[_Logger]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}
"""Callbacks by their `--log` names."""


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
