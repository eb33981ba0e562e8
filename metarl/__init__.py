"""metarl: gradient-based meta-reinforcement learning.

meta_policy = metarl.load("half-cheetah-dir-icml2017")
policy = meta_policy.adapt(env)
action = policy.act(observation)
"""

import os

# Without it MKL's results depend on where in memory an array lies, and so on the number of
# threads. It is read at the process's first matrix product; an existing value is left alone.
os.environ.setdefault("MKL_CBWR", "AUTO")

from envs import check_task_family  # envs also registers the families with Gymnasium
from metarl.config import Config
from metarl.evaluation import evaluate
from metarl.meta_policy import MetaPolicy, Policy, load, load_policy
from metarl.presets import preset_config
from metarl.trainer import train

__all__ = [
    "Config",
    "MetaPolicy",
    "Policy",
    "check_task_family",
    "evaluate",
    "load",
    "load_policy",
    "preset_config",
    "train",
]
