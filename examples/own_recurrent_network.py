"""A recurrent policy network of your own: any torch module with `initial_state`.

Its state lasts for an episode. The networks gru and lstm are built in. From a shell:

    metarl train navigation-2d --policy.network examples.own_recurrent_network:Memory
"""

import gymnasium as gym
import torch
from torch import nn

import metarl


class Memory(nn.Module):
    def __init__(self, space, outputs, units=32):
        super().__init__()
        self.cell = nn.GRUCell(space.shape[0], units)
        self.head = nn.Linear(units, outputs)

    def initial_state(self, samples):  # a tensor [samples, ...], or a dict or tuple of them
        return torch.zeros(samples, self.cell.hidden_size)

    def forward(self, observation, state):
        state = self.cell(observation, state)
        return self.head(state), state


if __name__ == "__main__":
    options = {"policy.network": Memory, "iterations": 2, "tasks": 2, "episodes": 2}
    config = metarl.resolve(None, "navigation-2d", "promp", options)
    policy = metarl.train(config, "runs/example-memory", resume="auto").adapt([0.3, 0.2])
    env = gym.make("metarl/Navigation2D-v0", goal_x=0.3, goal_y=0.2)
    observation, _ = env.reset(seed=0)
    state = policy.initial_state()  # at the start of every episode
    for _ in range(3):
        action, state = policy.act(observation, state=state)
        observation, reward, *_ = env.step(action)
        print(f"action {action}, reward {reward:.2f}")
