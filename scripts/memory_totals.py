"""Compare total returns of RL^2 on bandits and random MDPs with Duan et al. 2016.

    python scripts/memory_totals.py bandit runs/which/bandit/rl2-0 runs/which/bandit/rl2-1

It prints a Markdown table. A total is the sum of the returns of all episodes of a trial. It also
simulates other methods on the same distribution of tasks, so that published totals can be checked:
random actions, posterior sampling (Thompson sampling on bandits) and greedy actions by the
posterior mean. On bandits it computes the Bayes optimum of one episode by dynamic programming.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

import metarl
from metarl.cli.errors import exit_code
from metarl.envs import make_family
from metarl.envs.errors import UserError
from metarl.envs.families.tabular import TabularFamily

Floats = NDArray[np.float64]
Method = Literal["random", "posterior sampling", "greedy"]
METHODS: tuple[Method, ...] = ("random", "posterior sampling", "greedy")
PUBLISHED = {
    ("bandit", 1): {"random": 5.0, "posterior sampling": 5.7, "greedy": 6.6, "rl2": 6.7},
    ("bandit", 10): {"random": 49.9, "posterior sampling": 74.7, "greedy": 74.8, "rl2": 78.7},
    ("tabular-mdp", 10): {
        "random": 100.1, "posterior sampling": 138.1, "greedy": 134.8, "rl2": 156.2,
    },
    ("tabular-mdp", 25): {
        "random": 250.2, "posterior sampling": 408.8, "greedy": 368.8, "rl2": 445.7,
    },
}  # fmt: skip
"""Totals of Duan et al. 2016 (arXiv:1611.02779), by family and number of episodes."""


@dataclass
class Arguments:
    """Compare the total returns of RL^2 with Duan et al. 2016."""

    family: Annotated[Literal["bandit", "tabular-mdp"], tyro.conf.Positional]
    """Task family."""
    policies: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of rl2, one for each seed."""
    episodes: int = 10
    """Episodes of a trial."""
    tasks: int = 1000
    """Number of held-out tasks."""
    trials: int = 5
    """Trials of each task for each policy."""
    threads: int | None = None
    """Threads; by default one per available processor."""


def simulate(
    family: TabularFamily, tasks: Floats, episodes: int, method: Method, rng: np.random.Generator
) -> Floats:
    """Return the total of one trial on each task, [tasks].

    The prior is the distribution of tasks. Rewards are Bernoulli with a uniform prior, or N(m, 1)
    with m ~ N(1, 1); transitions have a flat Dirichlet prior. Before each episode, the method plans
    over the horizon with a sample from the posterior, or with its mean; on bandits, before each
    pull.
    """
    rewards, transitions = family.tables(tasks)
    count, states, actions = rewards.shape
    bernoulli, each = family.payoff == "bernoulli", np.arange(count)
    seen, paid = np.zeros((*rewards.shape, states)), np.zeros_like(rewards)
    total = np.zeros(count)

    def plan(steps: int) -> list[NDArray[np.int64]]:
        number = seen.sum(axis=3)
        if bernoulli:
            mean = (paid + 1.0) / (number + 2.0)
            drawn = rng.beta(paid + 1.0, number - paid + 1.0)
        else:
            mean = (paid + 1.0) / (number + 1.0)
            drawn = mean + rng.standard_normal(mean.shape) / np.sqrt(number + 1.0)
        reward, weight = mean, seen + 1.0
        if method == "posterior sampling":
            reward, weight = drawn, rng.gamma(weight)
        following = weight / weight.sum(axis=3, keepdims=True)
        value, chosen = np.zeros((count, states)), []
        for _ in range(steps):
            worth = reward + np.einsum("nsat,nt->nsa", following, value)
            worth += 1e-9 * rng.random(worth.shape)  # ties
            chosen.insert(0, worth.argmax(axis=2))
            value = worth.max(axis=2)
        return chosen

    for _ in range(episodes):
        state = np.zeros(count, np.int64)
        policy = [] if method == "random" or states == 1 else plan(family.horizon)
        for t in range(family.horizon):
            if method == "random":
                action = rng.integers(0, actions, count)
            else:
                action = (plan(1)[0] if states == 1 else policy[t])[each, state]
            mean = rewards[each, state, action]
            noise = rng.random(count) if bernoulli else rng.standard_normal(count)
            reward = (noise < mean).astype(np.float64) if bernoulli else mean + noise
            ahead = transitions[each, state, action].cumsum(axis=1)
            after = (ahead > rng.random((count, 1))).argmax(axis=1)
            seen[each, state, action, after] += 1.0
            paid[each, state, action] += reward
            total += reward
            state = after
    return total


Arms = tuple[tuple[int, int], ...]


@cache
def bayes_optimum(arms: Arms, pulls: int) -> float:
    """Return the largest expected total of Bernoulli arms with uniform priors.

    Args:
        arms: numbers of successes and failures of each arm, sorted.
        pulls: remaining pulls.
    """
    if pulls == 0:
        return 0.0
    best = 0.0
    for i, (won, lost) in enumerate(arms):
        rest = arms[:i] + arms[i + 1 :]
        mean = (won + 1) / (won + lost + 2)
        after = [tuple(sorted((*rest, arm))) for arm in ((won + 1, lost), (won, lost + 1))]
        values = [bayes_optimum(arm, pulls - 1) for arm in after]
        best = max(best, mean * (1.0 + values[0]) + (1.0 - mean) * values[1])
    return best


def table(arguments: Arguments) -> str:
    family = make_family(arguments.family)
    assert isinstance(family, TabularFamily)
    count, rng = arguments.episodes, np.random.default_rng(0)
    published = PUBLISHED.get((arguments.family, count), {})
    lines = [("method", f"total of {count} episode{'s' * (count > 1)}", "Duan et al. 2016")]
    tasks = family.tasks.sample(rng, 5000)

    def add(name: str, value: float, error: float = 0.0) -> None:
        said = f"{value:.1f}" + (f" ± {1.96 * error:.1f}" if error else "")
        lines.append((name, said, str(published.get(name, ""))))

    for method in METHODS:
        totals = simulate(family, tasks, count, method, rng)
        add(method, totals.mean(), totals.std() / np.sqrt(len(totals)))
    found = metarl.evaluate(
        arguments.policies, tasks=family.tasks.sample(rng, arguments.tasks), steps=count - 1,
        episodes=arguments.trials, threads=arguments.threads,
    )  # fmt: skip
    seeds = found.curve.per_seed.sum(axis=2)  # [seeds, tasks]
    add("rl2", seeds.mean(), seeds.mean(axis=0).std() / np.sqrt(arguments.tasks))
    for seed, one in zip(found.curve.seeds, seeds, strict=True):
        add(f"rl2, seed {seed}", one.mean())
    if family.states == 1 and count == 1:
        add("Bayes optimum", bayes_optimum(((0, 0),) * family.actions, family.horizon))
    add("optimum, task known", count * family.optimal_return(tasks).mean())
    lines.insert(1, ("---",) * 3)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Arguments) -> int:
    families = {metarl.load(policy).setup.family for policy in arguments.policies}
    if families != {arguments.family}:
        raise UserError(f"name run folders of rl2 on {arguments.family}, got {sorted(families)}")
    print(table(arguments))
    return 0


if __name__ == "__main__":
    given = tyro.cli(Arguments, description=Arguments.__doc__)
    raise SystemExit(exit_code(lambda: main(given)))
