"""Log a run to Weights & Biases, offline; needs wandb, `pip install 'metarl-gradient[wandb]'`.

`wandb sync` uploads the record later. With an account, leave `mode` out. From a shell:

    metarl train navigation-2d --log wandb
"""

import json

import metarl
from metarl.training.loggers import WeightsAndBiases

config = metarl.resolve("icml2017", "navigation-2d", overrides={"iterations": 3, "tasks": 10})
logger = WeightsAndBiases(project="metarl-examples", mode="offline")
metarl.train(config, "runs/example-wandb", resume="auto", callbacks=[logger])
with open("runs/example-wandb/wandb.json") as file:
    print(f"recorded as run {json.load(file)['id']}")
