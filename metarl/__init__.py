"""metarl: gradient-based meta-reinforcement learning.

meta_policy = metarl.load("half-cheetah-dir-icml2017")
policy = meta_policy.adapt(env)
action = policy.act(observation)
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from metarl.cli.interrupts import end_at_once, ignore_at_the_end, is_the_program

if is_the_program():
    end_at_once()  # on Ctrl-C; imports take a second or two
    ignore_at_the_end()

# Without it, MKL's results depend on the memory address of an array, and therefore on the number of
# threads. MKL reads it at the first matrix product; an existing value is kept.
os.environ.setdefault("MKL_CBWR", "AUTO")

from metarl.envs import UserError, check_task_family  # also registers the families with Gymnasium

if TYPE_CHECKING:
    from metarl.algorithms import Algorithm
    from metarl.config.options import Config
    from metarl.config.resolve import resolve
    from metarl.config.setup import Setup
    from metarl.evaluation.curves import Curve
    from metarl.evaluation.evaluate import evaluate
    from metarl.evaluation.results import EvaluationResult
    from metarl.models.distribution import Distribution
    from metarl.policies.loading import load, load_policy
    from metarl.policies.meta_policy import MetaPolicy
    from metarl.policies.online import OnlineAdapter
    from metarl.policies.policy import Policy
    from metarl.runs.checkpoints import CheckpointError
    from metarl.runs.folder import RunError
    from metarl.training.best import EarlyStopping, KeepBest
    from metarl.training.callbacks import Callback
    from metarl.training.run import train

    __version__: str

# Modules that need torch are imported on first access (PEP 562).
_LAZY = {
    "Algorithm": "algorithms",
    "Callback": "training.callbacks",
    "CheckpointError": "runs.checkpoints",
    "Config": "config.options",
    "Curve": "evaluation.curves",
    "Distribution": "models.distribution",
    "EarlyStopping": "training.best",
    "EvaluationResult": "evaluation.results",
    "KeepBest": "training.best",
    "MetaPolicy": "policies.meta_policy",
    "OnlineAdapter": "policies.online",
    "Policy": "policies.policy",
    "RunError": "runs.folder",
    "Setup": "config.setup",
    "evaluate": "evaluation.evaluate",
    "load": "policies.loading",
    "load_policy": "policies.loading",
    "resolve": "config.resolve",
    "train": "training.run",
}

__all__ = [
    "Algorithm",
    "Callback",
    "CheckpointError",
    "Config",
    "Curve",
    "Distribution",
    "EarlyStopping",
    "EvaluationResult",
    "KeepBest",
    "MetaPolicy",
    "OnlineAdapter",
    "Policy",
    "RunError",
    "Setup",
    "UserError",
    "check_task_family",
    "evaluate",
    "load",
    "load_policy",
    "resolve",
    "train",
]

if not TYPE_CHECKING:  # type checkers would accept every name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("metarl-gradient")
        if name not in _LAZY:
            raise AttributeError(f"module 'metarl' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"metarl.{_LAZY[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
