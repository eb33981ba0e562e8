"""Compare gradient adaptation, memory and training from scratch by experience on new tasks.

    python scripts/which_method.py navigation-2d --policies navigation-2d-icml2017 --out runs/which
    python scripts/which_method.py tabular-mdp --algorithms maml-trpo rl2 --seeds 0 1 2 \
        --env-steps 2000000 --out runs/which

It trains each algorithm and seed with an equal budget of env steps, then evaluates all runs and
policies on the same held-out tasks. Training from scratch has ten times the experience. The results
are in OUT/FAMILY: experience.png, experience.csv, evaluation.json and table.md. After an
interruption, the same command continues; existing runs and results are reused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import metarl
from metarl.cli.errors import exit_code
from metarl.cli.results import evaluate_into
from metarl.config.options import available_threads, default_workers
from metarl.envs.errors import UserError
from metarl.envs.registry import parse_options
from metarl.evaluation.tables import experience_table, method_name
from metarl.runs.metrics import read_metrics
from metarl.training.callbacks import Iteration, Run


@dataclass
class Arguments:
    """Compare methods by experience on new tasks."""

    family: Annotated[str, tyro.conf.Positional]
    """Task family."""
    out: Path
    """Folder for the runs and the results, each in a folder named like the family."""
    algorithms: tuple[str, ...] = ()
    """Algorithms to train, such as `maml-trpo rl2`."""
    policies: tuple[str, ...] = ()
    """Shipped policies, policy files or run folders to compare, too."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each training."""
    env_steps: int = 2_000_000
    """Budget of each training; it ends with the iteration that reaches it."""
    preset: str | None = None
    """Preset of all trainings."""
    options: tuple[str, ...] = ()
    """Options of all trainings, as key=value; an algorithm without an option ignores it."""
    family_options: tuple[str, ...] = ()
    """Options of the family in all trainings, as name=value."""
    tasks: int = 10
    """Number of held-out tasks."""
    episodes: int = 20
    """Returns of each task for each measured policy, and episodes of an update from scratch."""
    experience: int = 20
    """Episodes of experience on each task; ten times as many from scratch."""
    episodes_per_step: tuple[int, ...] = ()
    """Numbers of episodes per inner step; by default 1, 5, 10 and 20, up to the experience."""
    threads: int | None = None
    """Threads; by default one per available processor. Results do not depend on their number."""

    @property
    def folder(self) -> Path:
        return self.out / self.family.replace(":", "-")


class Budget(metarl.Callback):
    """End of a run after a number of env steps."""

    def __init__(self, env_steps: int) -> None:
        self.env_steps = env_steps

    def start(self, run: Run) -> None:
        for row in read_metrics(run.folder)[-1:]:
            self._check(run, row)

    def saved(self, iteration: Iteration) -> None:
        self._check(iteration.run, iteration.metrics)

    def _check(self, run: Run, row: Mapping[str, Any]) -> None:
        if row["env_steps"] >= self.env_steps:
            run.stop(f"{row['env_steps']} env steps")


def trained(arguments: Arguments, algorithm: str, seed: int) -> str:
    """Train with an algorithm and a seed, or continue; return the run folder."""
    folder = arguments.folder / f"{algorithm.replace(':', '-')}-{seed}"
    base = metarl.resolve(
        arguments.preset,
        arguments.family,
        algorithm,
        {
            "seed": seed,
            "threads": arguments.threads or available_threads(),
            "workers": default_workers(),
            "family_options": parse_options(arguments.family_options),
        },
    )
    options = parse_options(arguments.options)
    base = base.with_options(options, known_only=True)
    # The budget is reached first.
    config = base.with_options({"iterations": arguments.env_steps})
    metarl.train(config, folder, resume="auto", callbacks=[Budget(arguments.env_steps)])
    return str(folder)


def evaluated(arguments: Arguments) -> dict[str, Any]:
    """Return the content of evaluation.json, of an earlier call with equal arguments if any."""
    asked = {k: v for k, v in vars(arguments).items() if k not in ("out", "threads")}
    asked = json.loads(json.dumps(asked))
    folder, store = arguments.folder, arguments.folder / "arguments.json"
    if store.exists() and json.loads(store.read_text("utf-8")) == asked:
        return json.loads((folder / "evaluation.json").read_text("utf-8"))
    # Seeds in the outer loop: an interrupted comparison lacks seeds, not algorithms.
    runs = [trained(arguments, name, s) for s in arguments.seeds for name in arguments.algorithms]
    found = evaluate_into(
        [*runs, *arguments.policies], folder,
        steps=1, tasks=arguments.tasks, episodes=arguments.episodes,
        experience=arguments.experience, episodes_per_step=arguments.episodes_per_step or None,
        from_scratch=True, threads=arguments.threads, workers=default_workers(),
    )  # fmt: skip
    assert found is not None
    store.write_text(json.dumps(asked), "utf-8")
    return json.loads((folder / "evaluation.json").read_text("utf-8"))


def table(evaluation: Mapping[str, Any]) -> str:
    """Return a Markdown table of returns against experience.

    The last column is the number of episodes before the mean return first reaches the best return
    of a meta-learner.
    """
    curves = evaluation["experience_curves"]
    own = [c for c in curves if c["role"] == "meta-learner"]
    reached = [r for c in own for n, r in zip(c["episodes"], c["returns"], strict=True) if n]
    target = max((r for r in reached if r is not None), default=None)
    found = experience_table(evaluation)
    heads = [*found.heads, "" if target is None else f"episodes to {target:.1f}"]
    needed = {method_name(curve): _needed(curve, target) for curve in curves}
    lines = [heads, ["---"] * len(heads)]
    for name, *cells in found.rows:
        blank = [""] * (len(heads) - 2 - len(cells))
        lines.append([name, *cells, *blank, needed.get(name, "")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _needed(curve: Mapping[str, Any], target: float | None) -> str:
    pairs = zip(curve["episodes"], curve["returns"], strict=True)
    if target is None:
        return ""
    enough = (n for n, mean in pairs if mean is not None and mean >= target)
    return next((f"{n:.0f}" for n in enough), f"more than {curve['episodes'][-1]:.0f}")


def main(arguments: Arguments) -> int:
    if not (arguments.algorithms or arguments.policies):
        raise UserError("name --algorithms to train, or --policies")
    text = table(evaluated(arguments))
    (arguments.folder / "table.md").write_text(f"{text}\n", "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    given = tyro.cli(Arguments, description=Arguments.__doc__)
    raise SystemExit(exit_code(lambda: main(given)))
