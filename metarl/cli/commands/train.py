"""Meta-train a policy on a task family."""

from metarl.cli.training import Train, train

__all__ = ["IMPORTS", "Train", "train"]

IMPORTS = ("metarl.training.run",)
