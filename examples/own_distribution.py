"""A distribution of your own: Laplace noise around the network's output."""

from dataclasses import dataclass
from math import log

import torch

import metarl


@dataclass(frozen=True, kw_only=True)
class Laplace(metarl.Distribution):
    width: float = 0.5  # the option policy.width

    def size(self, space):  # of the network's output
        return space.shape[0]

    def sample(self, dist, noise):  # noise is uniform in (0, 1)
        return dist["output"] - self.width * (u := 2 * noise - 1).sign() * torch.log1p(-u.abs())

    def mode(self, dist):
        return dist["output"]

    def log_prob(self, dist, action):
        return -((action - dist["output"]).abs() / self.width + log(2 * self.width)).sum(-1)

    def entropy(self, dist):
        return torch.full_like(dist["output"], 1 + log(2 * self.width)).sum(-1)

    def kl(self, old, new):
        return ((x := (old["output"] - new["output"]).abs() / self.width) + (-x).exp() - 1).sum(-1)

    def fisher(self, dist, tangent):  # optional; torch finds no second derivative of |x|
        return {"output": tangent["output"] / self.width**2}


if __name__ == "__main__":
    options = {"policy.distribution": Laplace, "policy.width": 0.3, "iterations": 3}
    config = metarl.resolve(None, "navigation-2d", "promp", options)
    print(metarl.train(config, "runs/example-laplace", resume="auto").provenance)
