"""Train on navigation-2d for a few iterations and evaluate the result; takes seconds.

If you run it again, nothing is trained: the run in `runs/` is complete. Give more iterations to
continue.
"""

import metarl

config = metarl.resolve(
    "icml2017",
    "navigation-2d",
    overrides={"iterations": 5, "tasks": 5, "inner.step_sizes": (0.4,), "seed": 1},
)
# The preset halves the second step in evaluation.
inner = config.setup.algorithm.inner
print(f"step sizes: {inner.step_sizes}; evaluated with {inner.sizes_in_evaluation}")


def show(iteration):
    before, after = iteration.metrics["return_pre"], iteration.metrics["return_post"]
    print(f"iteration {iteration.number}: return {before:.1f} before, {after:.1f} after one step")


folder = "runs/example-navigation"
meta_policy = metarl.train(config, folder, resume="auto", callbacks=[show])

result = metarl.evaluate(meta_policy, tasks=6, episodes=5, steps=2)
print(result.table())
print(result.verdict())
