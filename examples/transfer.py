"""Start from a shipped policy on another distribution of tasks; takes a few seconds.

The policy learned goals on a plane in 100 steps. Here episodes have 50 steps. From a shell:

    metarl train navigation-2d --family-options horizon=50 --init navigation-2d-icml2017
"""

import metarl

config = metarl.resolve(
    "metarl2026",
    "navigation-2d",
    overrides={"iterations": 3, "tasks": 10, "family_options": {"horizon": 50}},
)
meta_policy = metarl.train(
    config, "runs/example-transfer", init="navigation-2d-icml2017", resume="auto"
)
print(f"started from {meta_policy.origin['policy']}")
print(metarl.evaluate(meta_policy, tasks=10, episodes=5, steps=1).table())
