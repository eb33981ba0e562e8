"""Attention over the components of an observation, adapted by MAML and by ANIL."""

from torch import nn

import metarl


class Attention(nn.Module):
    """Each component of the observation is a token."""

    def __init__(self, space, outputs, size=16):
        super().__init__()
        self.token = nn.Linear(1, size)
        self.place = nn.Embedding(space.shape[0], size)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.head = nn.Linear(size, outputs)

    def forward(self, observation):
        x = self.token(observation.unsqueeze(-1)) + self.place.weight
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


if __name__ == "__main__":
    for algorithm in ("maml-trpo", "anil"):
        options = {"policy.network": Attention, "iterations": 2, "tasks": 5}
        config = metarl.resolve("metarl2026", "navigation-2d", algorithm, options)
        meta_policy = metarl.train(config, f"runs/example-attention-{algorithm}", resume="auto")
        print(metarl.evaluate(meta_policy, tasks=4, episodes=2, steps=1).table())
