"""Few-shot classification on arrays of one's own: handwritten digits, two classes a task.

Needs scikit-learn. Six digits are for training, two for validation, two for test tasks.

    metarl train examples.few_shot_digits:digits --algorithm protomaml --iterations 200
"""

from sklearn.datasets import load_digits

import metarl
from metarl.envs import FewShotFamily

data = load_digits()
digits = FewShotFamily(data.images / 16.0, data.target, ways=2, shots=1, name="digits")

if __name__ == "__main__":
    said = {"iterations": 300, "policy.network": "mlp", "policy.hidden": (64,)}
    config = metarl.resolve(None, "few_shot_digits:digits", "maml-trpo", said)
    metarl.train(config, "runs/digits", resume="auto")
    print(metarl.evaluate("runs/digits", tasks=100, steps=1).table())
