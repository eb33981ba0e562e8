"""A policy network of your own: layer normalization with a residual connection.

Any torch module works. Its constructor takes the observation space and the size of the output.
From a shell:

    metarl train navigation-2d --policy.network examples.own_network:Residual --iterations 3
"""

from pathlib import Path

import torch
from torch import nn

import metarl


class Residual(nn.Module):
    def __init__(self, space, outputs, width=64):
        super().__init__()
        self.first = nn.Linear(space.shape[0], width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)  # the layer that ANIL adapts

    def forward(self, observation):  # [samples, observation size] -> [samples, outputs]
        x = torch.tanh(self.first(observation))
        return self.head(x + torch.tanh(self.second(self.norm(x))))


if __name__ == "__main__":
    options = {"policy.network": "own_network:Residual", "iterations": 3, "tasks": 10}
    config = metarl.resolve("metarl2026", "navigation-2d", "maml-trpo", options)
    meta_policy = metarl.train(config, Path("runs/example-own-network"), resume="auto")
    print(metarl.evaluate(meta_policy, tasks=10, episodes=5, steps=1).table())
