"""An outer loss of your own on the worst quarter of the tasks (CVaR)."""

import dataclasses

import metarl
from metarl.algorithms import find_algorithm


def softly_bounded(policy, dist, batch):
    """Likelihood ratio of the query samples, with a soft bound instead of a clip; [tasks]."""
    ratio = (policy.log_prob(dist, batch.action) - batch.old_log_prob).exp()
    return (batch.weight * ((ratio - 1).square() - ratio * batch.advantage)).sum(1)


def cvar(returns):
    """Weigh the worst quarter of the tasks alone; returns [tasks] -> weights [tasks]."""
    return (returns <= returns.quantile(0.25)).double()


careful = dataclasses.replace(
    find_algorithm("maml-trpo"), name="careful", outer="adam", outer_loss=softly_bounded,
    task_weights=cvar,
)  # fmt: skip

if __name__ == "__main__":
    options = {"iterations": 3, "tasks": 12}
    config = metarl.resolve(None, "navigation-2d", "own_outer_loss:careful", options)
    meta_policy = metarl.train(config, "runs/example-careful", resume="auto")
    print(metarl.evaluate(meta_policy, tasks=4, episodes=2, steps=1).table())
