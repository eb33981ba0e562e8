"""metarl: gradient-based meta-reinforcement learning.

meta_policy = metarl.load("half-cheetah-dir-icml2017")
policy = meta_policy.adapt(env)
action = policy.act(observation)
"""

import envs  # registers the families with Gymnasium  # noqa: F401
from metarl.config import Config
from metarl.evaluation import evaluate
from metarl.meta_policy import MetaPolicy, Policy, load
from metarl.presets import preset_config
from metarl.trainer import train

__all__ = ["Config", "MetaPolicy", "Policy", "evaluate", "load", "preset_config", "train"]
