"""metarl: gradient-based meta-reinforcement learning.

meta_policy = metarl.load("half-cheetah-dir-icml2017")
policy = meta_policy.adapt(env)
action = policy.act(observation)
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from metarl.commands.interrupts import end_at_once, ignore_at_the_end, is_the_program

if is_the_program():
    end_at_once()  # on Ctrl-C; imports take a second or two
    ignore_at_the_end()

# Without it MKL's results depend on where in memory an array lies, and so on the number of
# threads. It is read at the process's first matrix product; an existing value is left alone.
os.environ.setdefault("MKL_CBWR", "AUTO")

from metarl.envs import UserError, check_task_family  # also registers the families with Gymnasium

if TYPE_CHECKING:
    from metarl.running.checkpoints import CheckpointError
    from metarl.running.config import Config
    from metarl.running.evaluation import evaluate
    from metarl.running.loading import load, load_policy
    from metarl.running.meta_policy import MetaPolicy
    from metarl.running.policy import Policy
    from metarl.running.presets import resolve
    from metarl.running.runs import RunError
    from metarl.running.trainer import train

# What needs torch is imported when it is first asked for (PEP 562).
_LAZY = {
    "CheckpointError": "checkpoints",
    "Config": "config",
    "MetaPolicy": "meta_policy",
    "Policy": "policy",
    "RunError": "runs",
    "evaluate": "evaluation",
    "load": "loading",
    "load_policy": "loading",
    "resolve": "presets",
    "train": "trainer",
}

__all__ = [
    "CheckpointError",
    "Config",
    "MetaPolicy",
    "Policy",
    "RunError",
    "UserError",
    "check_task_family",
    "evaluate",
    "load",
    "load_policy",
    "resolve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("metarl-gradient")
    if name not in _LAZY:
        raise AttributeError(f"module 'metarl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"metarl.running.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
