"""Adapt a policy that comes with the package to one task, use it, save it; takes seconds."""

import gymnasium as gym

import metarl

meta_policy = metarl.load("half-cheetah-dir-icml2017")
env = gym.make("metarl/HalfCheetahDir-v0", direction=-1.0, variant="icml2017")

before = meta_policy.adapt(env, steps=0)  # the initialization itself
after = meta_policy.adapt(env, steps=1, episodes=20, seed=0)
print(
    f"return before: {before.play(env, seed=1):.1f}, after one step: {after.play(env, seed=1):.1f}"
)

# An adapted policy is an ordinary one: observation in, action out.
after.save("backwards.safetensors")
policy = metarl.load_policy("backwards.safetensors")
observation, info = env.reset(seed=1)
for _ in range(100):
    action = policy.act(observation, deterministic=True)
    observation, reward, terminated, truncated, info = env.step(action)
print(f"forward velocity after 100 steps: {info['x_velocity']:.2f} m/s")
