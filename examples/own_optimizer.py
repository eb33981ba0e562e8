"""An outer optimizer of your own: any class in the style of torch.optim, with its arguments.

From a shell:

    metarl train navigation-2d --outer examples.own_optimizer:SignDescent --outer.decay 0.01
"""

import torch

import metarl


class SignDescent(torch.optim.Optimizer):
    """Steps of one size along the gradient's sign, and weight decay."""

    def __init__(self, params, lr=1e-3, decay=0.0):
        super().__init__(params, {"lr": lr, "decay": decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.0 - group["lr"] * group["decay"])
                p.data.add_(p.grad.sign(), alpha=-group["lr"])


if __name__ == "__main__":
    options = {"outer": SignDescent, "outer.decay": 0.01, "iterations": 3, "tasks": 10}
    config = metarl.resolve(None, "navigation-2d", "maml-trpo", options)
    meta_policy = metarl.train(config, "runs/example-own-optimizer", resume="auto")
    print(metarl.evaluate(meta_policy, tasks=4, episodes=2, steps=1).table())
