"""Evaluate a shipped policy inside and outside the range of its training, as a data frame.

It was trained on velocities from 0 to 2 m/s. Needs pandas: pip install 'metarl-gradient[pandas]'.
"""

import numpy as np

import metarl

velocities = np.array([[0.5], [1.0], [1.5], [2.5], [3.0]])
result = metarl.evaluate("half-cheetah-vel-icml2017", tasks=velocities, episodes=10, steps=1)
print(result.table(), "\n")

# A row is one episode.
frame = result.to_frame()
columns = ["policy", "outside_training", "task_velocity", "step"]
returns = frame.groupby(columns)["return"].agg(["mean", "std", "min"]).round(1)
print(returns.loc["this policy"], "\n")

# What one inner step gains, inside and outside.
steps = frame.pivot_table("return", ["policy", "outside_training"], "step")
print((steps[1] - steps[0]).round(1).rename("gain"))

# The same tasks in another environment: episodes of half the length.
short = metarl.evaluate(
    "half-cheetah-vel-icml2017", tasks=velocities, episodes=10, steps=1,
    family_options={"horizon": 100},
)  # fmt: skip
print(short.setting["family_changes"], short.curve.returns)
