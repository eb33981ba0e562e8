"""Adapt a policy on transitions that your own program makes, such as a robot's; takes seconds."""

import metarl
from metarl.envs import make_family

env = make_family("navigation-2d").make([0.3, -0.2])  # stands for the robot


def play(policy, learn=None, episodes=10):
    """Return the mean return of episodes; each transition is passed to `learn`."""
    total = 0.0
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        terminated = truncated = False
        while not (terminated or truncated):
            action = policy.act(observation)
            following, reward, terminated, truncated, _ = env.step(action)
            if learn:
                learn(observation, action, reward, terminated, truncated)
            observation = following
            total += float(reward)
    return total / episodes


adapter = metarl.load("navigation-2d-icml2017").adapter()
for step in range(3):
    returned = play(adapter, learn=adapter.add)
    print(f"return after {step} inner steps: {returned:.1f}")
    policy = adapter.adapted()  # one inner step on the transitions since the last

policy.save("adapted.safetensors")  # an ordinary policy
print(f"return of the result: {play(policy):.1f}")
