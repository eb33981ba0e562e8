"""A baseline of your own: the mean over a task's episodes at each time step.

From a shell:

    metarl train navigation-2d --baseline examples.own_baseline:MeanOfEpisodes
"""

from dataclasses import dataclass
from typing import ClassVar

import metarl
from metarl.learning.baselines import Baseline


@dataclass(frozen=True, kw_only=True)
class MeanOfEpisodes(Baseline):
    name: ClassVar[str] = "mean"

    def fit(self, state, observation, valid):  # valid [tasks, episodes, time]
        def values(target):  # [tasks, episodes, time] -> the same shape
            mean = (valid * target).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
            return mean.expand_as(target)

        return values


if __name__ == "__main__":
    options = {"baseline": MeanOfEpisodes, "iterations": 3, "tasks": 10}
    config = metarl.resolve("metarl2026", "navigation-2d", "maml-trpo", options)
    meta_policy = metarl.train(config, "runs/example-own-baseline", resume="auto")
    print(metarl.evaluate(meta_policy, tasks=4, episodes=2, steps=1).table())
