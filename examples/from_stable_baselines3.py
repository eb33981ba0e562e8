"""A policy of stable-baselines3 as an initialization that adapts, and back again.

Needs stable-baselines3: pip install 'metarl-gradient[sb3]'.
"""

import numpy as np
import torch
from stable_baselines3 import PPO

import metarl
from metarl.envs import make_family

family = make_family("navigation-2d")
settings = {"n_steps": 1000, "batch_size": 100, "policy_kwargs": {"net_arch": [32, 32]}}
ppo = PPO("MlpPolicy", family.make(), seed=0, device="cpu", **settings)  # a task an episode
ppo.learn(2000)

network = [m for m in ppo.policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
layers = dict(enumerate([*network, ppo.policy.action_net]))

# In metarl the weights of a layer are [inputs, outputs].
params = {"log_std": ppo.policy.log_std.detach()}
for i, layer in layers.items():
    params |= {f"layer{i}.weight": layer.weight.detach().T, f"layer{i}.bias": layer.bias.detach()}
options = {"policy.hidden": (32, 32), "inner.test_step_sizes": (0.1, 0.05)}
config = metarl.resolve(None, "navigation-2d", "pretrained", options)
meta_policy = metarl.MetaPolicy.of(params, config.setup)
print(metarl.evaluate(meta_policy, tasks=4, episodes=10, steps=2).table())

policy = meta_policy.adapt([0.4, -0.2], steps=2)
with torch.no_grad():
    ppo.policy.log_std.copy_(policy.params["log_std"])
    for i, layer in layers.items():
        layer.weight.copy_(policy.params[f"layer{i}.weight"].T)
        layer.bias.copy_(policy.params[f"layer{i}.bias"])
position = np.array([0.1, 0.1], np.float32)
print("PPO's policy:", ppo.predict(position, deterministic=True)[0])
print("the same in metarl:", policy.act(position, deterministic=True))
