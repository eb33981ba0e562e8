"""Train with the processes that torchrun started; alone, it is one process. Takes seconds.

torchrun --standalone --nproc-per-node 2 examples/scale_out.py
"""

import metarl
from metarl.distributed.process_group import joined

if __name__ == "__main__":
    options = {"iterations": 3, "tasks": 8, "episodes": 5}
    config = metarl.resolve("icml2017", "navigation-2d", overrides=options)
    with joined() as group:  # each process has its share of the tasks
        folder = "runs/example-shared"
        meta_policy = metarl.train(config, folder, resume="auto", process_group=group)
        if group.is_main:  # all have the same result
            print(metarl.evaluate(meta_policy, tasks=4, episodes=5, steps=1).table())
