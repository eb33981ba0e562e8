"""Tune the options of an algorithm on a task family, by the same procedure for all algorithms.

    python scripts/tune.py promp half-cheetah-dir --out runs/tune/promp --trials 24

The search covers the options to which parts declare a range (`metarl.parts.tunable`), near their
defaults. The first trial uses the defaults. All trials have the same number of env steps. A trial
is evaluated on validation tasks after a quarter, after half and at the end of its iterations. It
ends early if it is worse than the median of the trials before it. The defaults and the best trials
are trained again with further seeds, and the best mean over the seeds wins. It is written to
best.toml, and printed as a command.

The same command continues an interrupted search; more trials extend it. It needs the extra `tune`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
import statistics
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import optuna
import tomllib
import tyro
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

import metarl
from metarl.cli.errors import exit_code
from metarl.config.options import Config
from metarl.config.resolve import usual_preset
from metarl.envs import TaskFamily
from metarl.envs.errors import NonFiniteError, UserError
from metarl.envs.registry import parse_options
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.metrics import read_metrics
from metarl.training.callbacks import Iteration

RUNGS = (0.25, 0.5)
"""Progress at which unfinished trials are compared."""
UNPRUNED = 4
"""Number of trials that are never ended early."""


@dataclass(frozen=True)
class Arguments:
    """Tune the options of an algorithm on a task family."""

    algorithm: Annotated[str, tyro.conf.Positional]
    """Algorithm: a name or module:attribute."""
    family: Annotated[str, tyro.conf.Positional]
    """Task family: a name or module:attribute."""
    out: Path
    """Folder for the study, table.md and best.toml."""
    trials: int = 24
    """Number of trials."""
    env_steps: int = 1_600_000
    """Env steps of each trial."""
    validation_tasks: int = 20
    """Number of validation tasks."""
    validation_episodes: int = 20
    """Episodes per validation task, for each inner step."""
    steps: int = 1
    """Number of inner steps before the return that is compared."""
    finalists: int = 3
    """Number of best trials that are trained with further seeds, in addition to the defaults."""
    fixed: tuple[str, ...] = ()
    """Options that keep their defaults, such as policy.initial_std."""
    spread: float = 10.0
    """Largest factor between a default and a value of the search, for logarithmic ranges."""
    seeds: tuple[int, ...] = (1001, 1002, 1003)
    """Seeds: the first for trials, the others for finalists. Compare algorithms with others."""
    preset: str | None = None
    """Preset of the defaults; by default the usual one of the family."""
    family_options: tuple[str, ...] = ()
    """Options of the family, as name=value."""
    options: tuple[str, ...] = ()
    """Options of all trials, as name=value in TOML, such as tasks=40 or inner.step_sizes=[0.1]."""
    jobs: int = 1
    """Number of trainings at the same time, with one thread each."""

    def check(self) -> None:
        """Raise UserError if a number is out of range."""
        for name in ("trials", "env_steps", "finalists", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.spread < 1.0:
            raise UserError(f"spread must be at least 1, got {self.spread}")
        if not self.seeds:
            raise UserError("seeds must not be empty")


@dataclass(frozen=True)
class Result:
    """Result of a training."""

    score: float | None
    """Mean return on validation tasks; None if the training ended early or failed."""
    reason: str
    """Reason for an early end; empty without one."""
    core_seconds: float


def given_options(arguments: Arguments) -> dict[str, Any]:
    """Return the options of all trials, by key."""
    try:
        return flat(tomllib.loads("\n".join(arguments.options)))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"options must be name=value in TOML: {error}") from error


def starting_point(arguments: Arguments) -> Config:
    """Return the config of the first trial."""
    preset = arguments.preset or usual_preset(arguments.family)
    said = {**given_options(arguments), "threads": 1}
    said["family_options"] = parse_options(arguments.family_options)
    base = metarl.resolve(preset, arguments.family, arguments.algorithm, said)
    if not base.setup.algorithm.outer.learns:
        raise UserError(f"{base.setup.algorithm.name} does not learn, so it has no options to tune")
    family = MetaPolicy({}, base.setup).family
    if not isinstance(family, TaskFamily):
        raise UserError(f"{arguments.family} has no env steps: tune on a family of environments")
    rollouts = base.setup.algorithm.inner.steps + base.setup.algorithm.meta.needs_query
    each = rollouts * base.run.tasks * base.run.episodes * family.horizon
    iterations = max(1, round(arguments.env_steps / each))
    return base.with_options({"iterations": iterations, "checkpoint_every": iterations})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one table with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def search_space(arguments: Arguments, config: Config) -> dict[str, BaseDistribution]:
    """Return the distribution of each option that is searched, by key."""
    space: dict[str, BaseDistribution] = {}
    for section, part in config.sections().items():
        if section == "inner" and config.setup.algorithm.task_conditioned:
            continue  # it takes no inner step
        for name, found in part.ranges().items():
            default = getattr(part, name)
            if isinstance(default, int):
                space[part.key(name)] = IntDistribution(int(found.low), int(found.high))
            elif default != ():
                first, low, high = first_of(default), found.low, found.high
                if found.log and low <= first <= high:
                    low, high = (
                        max(low, first / arguments.spread),
                        min(high, first * arguments.spread),
                    )
                space[part.key(name)] = FloatDistribution(low, high, log=found.log)
    for key in arguments.fixed:
        if space.pop(key, None) is None and key not in config.options():
            raise UserError(f"fixed has the unknown option {key!r}")
    return space


def first_of(value: Any) -> Any:
    """Return the first entry of a tuple, or the value."""
    return value[0] if isinstance(value, tuple) else value


def first_values(arguments: Arguments, config: Config) -> dict[str, float]:
    """Return the defaults within the search space; of a tuple, its first entry."""
    options, found = config.options(), {}
    for key, space in search_space(arguments, config).items():
        found[key] = min(max(first_of(options[key]), space.low), space.high)  # type: ignore[attr-defined]
    return found


def options_of(config: Config, values: Mapping[str, float]) -> dict[str, Any]:
    """Return the options for values of the search. Later entries of a tuple keep their ratio."""
    options, found = config.options(), {}
    for key, value in values.items():
        default, value = options[key], float(f"{value:.3g}")
        if isinstance(default, tuple):
            found[key] = tuple(float(f"{value * x / default[0]:.3g}") for x in default)
        else:
            found[key] = type(default)(value)
    return found


def score(policy: MetaPolicy, arguments: Arguments) -> float:
    """Return the mean return after the inner steps on validation tasks."""
    found = metarl.evaluate(
        policy,
        tasks=arguments.validation_tasks,
        episodes=arguments.validation_episodes,
        steps=0 if policy.setup.algorithm.task_conditioned else arguments.steps,
        split="validation",
        threads=1,
    )
    return found.curve.returns[-1]


def trained(
    arguments: Arguments,
    values: Mapping[str, float],
    seed: int,
    name: str,
    trial_id: int | None = None,
) -> Result:
    """Train and evaluate once. A known result is read from its file.

    Args:
        values: values of the search.
        name: name of the run folder and the file.
        trial_id: trial of the study that may end early; None: it never ends early.
    """
    store = arguments.out / "results" / f"{name}.json"
    if store.exists():
        return Result(**json.loads(store.read_text("utf-8")))
    base = starting_point(arguments)
    config = base.with_options({**options_of(base, values), "seed": seed})
    trial = None if trial_id is None else Trial(load_study(arguments), trial_id)
    rungs = {max(1, round(share * config.run.iterations)): i for i, share in enumerate(RUNGS)}
    folder, reason = arguments.out / "runs" / name, ""

    def compare(iteration: Iteration) -> None:
        nonlocal reason
        if trial is None or iteration.number not in rungs:
            return
        trial.report(score(iteration.meta_policy(), arguments), rungs[iteration.number])
        if trial.should_prune():
            reason = f"worse than the median at iteration {iteration.number}"
            iteration.stop(reason)

    found = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resumed run repeats its warnings
        try:
            policy = metarl.train(config, folder, resume="auto", callbacks=[compare])
            found = None if reason else score(policy, arguments)
        except (NonFiniteError, metarl.RunError) as error:  # options that do not learn
            rows, reason = read_metrics(folder), str(error)
            if isinstance(error, metarl.RunError) and not (rows and "skipped" in rows[-1]):
                raise
    rows = read_metrics(folder)
    result = Result(found, reason, sum(row["seconds_processor"] for row in rows))
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(dataclasses.asdict(result)), "utf-8")
    shutil.rmtree(folder)
    return result


def load_study(arguments: Arguments, started: int = 0) -> optuna.Study:
    """Return the study in the output folder, a new one if it does not exist.

    Args:
        started: number of trials before the next one, which it seeds.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=f"{arguments.algorithm} on {arguments.family}",
        storage=JournalStorage(JournalFileBackend(str(arguments.out / "study.log"))),
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=arguments.seeds[0] + started, n_startup_trials=5),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED),
    )


def check_study(arguments: Arguments, study: optuna.Study, config: Config) -> None:
    """Raise UserError if the study has other settings. A new study stores its settings."""
    same = ("env_steps", "validation_tasks", "validation_episodes", "steps", "fixed", "spread")
    settings = {name: getattr(arguments, name) for name in same}
    settings |= {"seed": arguments.seeds[0], "config": config.to_json()}
    settings = json.loads(json.dumps(settings))
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", settings)
    elif changed := [name for name in settings if settings[name] != known.get(name)]:
        raise UserError(
            f"the search in {arguments.out} was started with another {changed[0]}; choose another"
            " --out"
        )


def search(arguments: Arguments, pool: Executor) -> list[FrozenTrial]:
    """Run the trials; return the complete ones, best first."""
    study, config = load_study(arguments), starting_point(arguments)
    check_study(arguments, study, config)
    space = search_space(arguments, config)
    if not study.trials:
        study.enqueue_trial(first_values(arguments, config))
    running: dict[Future[Result], int] = {}

    def started() -> int:
        return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))

    def submit(number: int, trial_id: int, values: Mapping[str, float]) -> None:
        name = f"trial-{number:03d}"
        job = pool.submit(trained, arguments, values, arguments.seeds[0], name, trial_id)
        running[job] = number

    for left in study.get_trials(states=(TrialState.RUNNING,)):  # of an interrupted search
        submit(left.number, left._trial_id, left.params)
    while running or started() < arguments.trials:
        while len(running) < arguments.jobs and started() < arguments.trials:
            trial = load_study(arguments, started()).ask(space)
            submit(trial.number, trial._trial_id, trial.params)
        for job in wait(running, return_when=FIRST_COMPLETED).done:
            number, result = running.pop(job), job.result()
            state = TrialState.PRUNED if result.score is None else TrialState.COMPLETE
            study.tell(number, result.score, state=state)
            print(f"trial {number}: {result.reason or round(result.score or 0.0, 1)}", flush=True)
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: trial.value or 0.0, reverse=True)


def finals(
    arguments: Arguments, best: list[FrozenTrial], pool: Executor
) -> list[tuple[FrozenTrial, list[float]]]:
    """Train the finalists with all seeds; return them with their scores, best mean first."""
    chosen = best[: arguments.finalists]
    chosen += [trial for trial in best[arguments.finalists :] if trial.number == 0]  # the defaults
    jobs = {
        (trial.number, seed): pool.submit(
            trained, arguments, trial.params, seed, f"trial-{trial.number:03d}-seed-{seed}"
        )
        for trial in chosen
        for seed in arguments.seeds[1:]
    }
    found = []
    for trial in chosen:
        scores = [trial.value]
        scores += [jobs[trial.number, seed].result().score for seed in arguments.seeds[1:]]
        found.append((trial, [float("-inf") if x is None else x for x in scores]))
    return sorted(found, key=lambda entry: statistics.mean(entry[1]), reverse=True)


def write_results(arguments: Arguments, finalists: list[tuple[FrozenTrial, list[float]]]) -> None:
    """Write table.md and best.toml."""
    config, trials = starting_point(arguments), load_study(arguments).trials
    files = (arguments.out / "results").glob("*.json")
    seconds = [json.loads(file.read_text("utf-8"))["core_seconds"] for file in files]
    keys = list(search_space(arguments, config))
    lines = [
        f"{arguments.algorithm} on {arguments.family}: {len(trials)} trials of"
        f" {arguments.env_steps / 1e6:g}M env steps, {len(seconds)} trainings,"
        f" {sum(seconds) / 3600:.3g} core-hours.",
        "",
        f"| trial | {' | '.join(keys)} | return, by seed |",
        "| --- |" + " --- |" * (len(keys) + 1),
    ]
    scores = {trial.number: found for trial, found in finalists}
    for trial in sorted(trials, key=lambda t: (t.value is None, -(t.value or 0.0))):
        values = options_of(config, trial.params)
        known = scores.get(trial.number, [] if trial.value is None else [trial.value])
        cells = [str(values[key]) for key in keys]
        cells.append(", ".join(f"{x:.1f}" for x in known) or "ended early")
        lines.append(f"| {trial.number} | {' | '.join(cells)} |")
    values = options_of(config, finalists[0][0].params)
    lines += ["", command(arguments, values)]
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    best = [f'[families."{arguments.family}".algorithms."{arguments.algorithm}"]']
    best += [f"{k} = {list(v) if isinstance(v, tuple) else v}" for k, v in values.items()]
    (arguments.out / "best.toml").write_text("\n".join(best) + "\n", "utf-8")
    print(command(arguments, values))


def command(arguments: Arguments, values: Mapping[str, Any]) -> str:
    """Return the command that trains with the values of a search."""
    words = ["metarl", "train", arguments.family, "--algorithm", arguments.algorithm]
    words += ["--preset", arguments.preset] if arguments.preset else []
    words += ["--family-options", *arguments.family_options] if arguments.family_options else []
    for key, value in {**given_options(arguments), **values}.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(words)


@contextlib.contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """Provide processes for trainings. After an error, no further training starts."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(arguments: Arguments) -> int:
    arguments.check()
    search_space(arguments, starting_point(arguments))  # errors before anything is written
    arguments.out.mkdir(parents=True, exist_ok=True)
    with processes(arguments.jobs) as pool:
        best = search(arguments, pool)
        if not best:
            raise UserError(f"no trial of {arguments.algorithm} ended with a score")
        write_results(arguments, finals(arguments, best, pool))
    return 0


if __name__ == "__main__":
    given = tyro.cli(Arguments, description=Arguments.__doc__)
    raise SystemExit(exit_code(lambda: main(given)))
