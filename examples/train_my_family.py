"""Train on a family of your own from Python, with worker processes; takes half a minute.

The family is named `file:attribute`. The file stands beside this one, in a folder that Python
searches, so that worker processes find it too.
"""

from pathlib import Path

import metarl


def main():
    config = metarl.resolve(
        None,
        "my_pendulum:pendulum",
        overrides={
            "policy.action": "scale",  # [-1, 1] mapped onto the torques [-2, 2]
            "iterations": 3,
            "tasks": 4,
            "episodes": 5,
            "workers": 2,
        },
    )
    folder = Path("runs/example-pendulum")
    meta_policy = metarl.train(config, folder, resume=folder.exists())
    print(metarl.evaluate(meta_policy, tasks=4, episodes=5, steps=1, workers=2).table())


if __name__ == "__main__":  # worker processes import this file
    main()
