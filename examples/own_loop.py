"""MAML with TRPO (Finn et al. 2017, algorithm 3) as a loop of your own, from metarl's parts.

`metarl.train` runs the same loop, and also saves, resumes and measures it.
"""

import metarl
from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs import make_family
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.meta_gradients.problem import Objective, Sampled
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.seeding import stream

TASKS = 10
family = make_family("navigation-2d")
options = {"inner.step_sizes": (0.1,), "outer.max_kl": 0.05, "outer.fisher_fraction": 1.0}
config = metarl.resolve(None, "navigation-2d", "maml-trpo", options)
algorithm, domain, network = config.setup.algorithm, config.setup.domain, config.setup.policy

policy = domain.model(algorithm, network, family)
adapter = domain.adapter(algorithm, policy)  # theta' = theta - alpha grad L(theta)
theta = adapter.init(policy.init(stream(0, 0, "init")))
state = algorithm.outer.init(theta)  # TRPO has none, Adam its moments
objective = Objective(domain.outer_loss(policy))
with ChunkPool(2) as pool:
    how = {"tasks": TASKS, "stratified": True, "episodes": 10, "options": network}
    source = domain.source(family, algorithm, adapter, pool, **how)
    inner_loop = InnerLoop(adapter, pool)
    for iteration in range(4):
        # Sample tasks; for each, episodes with theta, an inner step, episodes with theta'.
        samples = source.open(RandomKey(0, iteration), {})
        adapted = inner_loop.run(samples.sample, theta, TASKS, steps=1, query=True)
        # The gradient of the query loss at theta, through the inner step, is MAML's.
        problem = algorithm.meta.problem(Sampled(adapter, adapted, pool, objective))
        theta, state, stats = algorithm.outer.step(problem, theta, state, 1.0)
        before, after = (float(rollout.mean_returns().mean()) for rollout in samples.rollouts)
        print(f"{iteration}: return {before:.1f} -> {after:.1f}, KL {stats['kl']:.3f}")
    source.close()

print(metarl.evaluate(metarl.MetaPolicy.of(theta, config.setup), tasks=10, steps=1).table())
