"""Measure how well meta-policies adapt to held-out tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from metarl.cli.arguments import check_file
from metarl.cli.results import evaluate_into
from metarl.cli.streams import say
from metarl.config.options import default_workers
from metarl.envs.errors import UserError
from metarl.envs.registry import parse_options
from metarl.evaluation.tables import described, sampled
from metarl.plain_json import json_text

IMPORTS = ("metarl.evaluation.evaluate", "metarl.plots.figures")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how well meta-policies adapt to held-out tasks."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY ...")]
    """Run folders, policy files or names of shipped policies. Runs that differ only in their seed
    share a row; runs of the algorithms pretrained, random and oracle are references."""
    tasks: int = 40
    """Number of held-out tasks."""
    task: tuple[str, ...] = ()
    """Chosen tasks instead, each as component=value for all components, one after the other. They
    may lie outside the training range."""
    family_options: tuple[str, ...] = ()
    """Options of the family that differ from training, as name=value."""
    episodes: int = 20
    """Episodes per task, for each inner step and for each measured return."""
    steps: int | None = None
    """Number of inner steps; by default 3. For rl2, number of episodes before the last one; by
    default as in training."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step of the first policy, the last repeated; by default its step sizes."""
    random_step_sizes: tuple[float, ...] = ()
    """The same for the random initialization; by default its preset's, or the policy's."""
    pretrained_step_sizes: tuple[float, ...] = ()
    """The same for a pretrained policy; by default its preset's, or its own."""
    tune_step_sizes: bool = False
    """Choose the size of the first step for each policy, including references, on validation tasks;
    later steps use half of it."""
    seed: int = 0
    """Seed of episodes, and of drawn tasks."""
    deterministic: bool = False
    """Measure returns with the mean action instead of a sample."""
    experience: int = 0
    """Also measure returns against experience, up to this number of episodes on each task, and ten
    times as many for --from-scratch; 0 does not. Writes experience.png and experience.csv."""
    episodes_per_step: tuple[int, ...] = ()
    """Numbers of episodes per inner step, each with its own curve against experience; by default 1,
    5, 10 and 20, up to the experience."""
    from_scratch: bool = False
    """Compare with training from scratch on each task with clipped policy gradients, with the env
    steps of adaptation and with ten times as many. Also with PPO of stable-baselines3 if it is
    installed.
    """
    scratch_learning_rate: float = 3e-3
    """Learning rate of the built-in training from scratch."""
    drawn: bool = False
    """Sample the held-out tasks at random, as in the papers, instead of covering the test split
    evenly."""
    threads: int | None = None
    """Threads; by default one per available processor. Results do not depend on their number."""
    workers: int = field(default_factory=default_workers)
    """Worker processes for environments without a native backend; 0 steps them in this process."""
    out: Path | None = None
    """Folder for evaluation.json and the figures; by default the run folder, or
    runs/NAME-evaluation for a policy file or a shipped policy."""
    csv: Path | None = None
    """File for the return of every episode, one row each."""
    per_task: bool = False
    """Print the returns of each task, and the achieved value of its goal."""
    json: bool = False
    """Print the content of evaluation.json instead of tables."""
    rank_timeout: float | None = None
    """Under torchrun: seconds of waiting for a rank after which it is considered dead; by default
    as in training."""


_OF_THE_COMMAND = ("what", "out", "csv", "per_task", "json", "rank_timeout")
"""Options that are not arguments of `evaluate_into` by the same name."""


def evaluate(command: Evaluate) -> int:
    """Run `metarl evaluate`."""
    from metarl.distributed.process_group import LIMIT_SECONDS, joined

    if command.task and command.tasks != Evaluate.tasks:
        raise UserError("--tasks is a number of held-out tasks: it has no effect with --task")
    check_file("--csv", command.csv, (".csv",))
    options = {name: value for name, value in vars(command).items() if name not in _OF_THE_COMMAND}
    options["family_options"] = parse_options(command.family_options)
    options["episodes_per_step"] = command.episodes_per_step or None
    limit = LIMIT_SECONDS if command.rank_timeout is None else command.rank_timeout
    with joined(limit) as process_group, process_group.errors_shared():
        found = evaluate_into(command.what, command.out, process_group=process_group, **options)
    if found is None:
        return 0
    result, files = found
    if command.csv is not None:
        result.to_csv(command.csv)
        files.append(command.csv)
    if command.json:
        say(json_text(result.to_json(), indent=2))
        return 0
    setting = result.setting
    options = "".join(f" {k}={v}" for k, v in setting["family_options"].items())
    said = f"{described(setting)}; {sampled(result.to_json())}"
    say(f"{setting['family']}{options}: {said}\n")
    if command.per_task:
        say(f"{result.task_table()}\n")
    say(f"{result.table()}\n")
    if result.experience:
        say(f"{result.experience_table()}\n")
    say(result.verdicts())
    say(", ".join(map(str, files)))
    return 0
