"""Evaluation of policies into a folder: evaluation.json and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarl.cli.adaptation import parse_tasks
from metarl.cli.arguments import check_place
from metarl.envs.errors import UserError
from metarl.plain_json import json_text

if TYPE_CHECKING:
    from metarl.distributed.process_group import ProcessGroup
    from metarl.evaluation.results import EvaluationResult


def results_folder(what: str, out: Path | None = None) -> Path:
    """Create and return the folder for results of a policy: its run folder, if it has one."""
    from metarl.runs.folder import short_name

    source = Path(what)
    named = Path("runs") / f"{short_name(what)}-evaluation"
    folder = out or (source if source.is_dir() else named)
    check_place("--out", folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def evaluate_into(
    what: Sequence[str],
    out: Path | None,
    *,
    task: Sequence[str] = (),
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> tuple[EvaluationResult, list[Path]] | None:
    """Evaluate policies; write the result and its figures to the first one's folder, or to `out`.

    Args:
        task: chosen tasks, as component=value.
        options: arguments of `evaluate`.

    Returns:
        the result and its files; None on all ranks except rank 0.
    """
    from metarl.distributed.process_group import ALONE
    from metarl.evaluation.evaluate import evaluate
    from metarl.evaluation.groups import grouped
    from metarl.plots import figures as plots
    from metarl.runs.files import write_atomically
    from metarl.runs.metrics import show_adaptation

    if not what:
        raise UserError("name a run folder, a policy file or a shipped policy to evaluate")
    groups = grouped(what)
    (name, members), *others = groups.items()
    references = {key: list(other.values()) for key, other in others}
    seeds = list(members.values())
    process_group = process_group or ALONE
    if out is not None:
        check_place("--out", out)  # before the evaluation
    if task:
        options["tasks"] = parse_tasks(seeds[0].source, task)
    result = evaluate(
        seeds, references=references, name=name, process_group=process_group, **options
    )
    if not process_group.is_main:
        return None
    folder = results_folder(next(iter(members)), out)
    files = [folder / "evaluation.json"]
    write_atomically(files[0], json_text(result.to_json(), indent=2).encode())
    files += plots.plot_evaluation(result, folder / "evaluation.png")
    files += plots.plot_tasks(result, folder / "evaluation-tasks.png")
    files += plots.plot_paths(result, folder / "evaluation-paths.png")
    files += plots.plot_functions(result, folder / "evaluation-functions.png")
    files += _experience_files(result, folder)
    if (folder / "config.json").exists():  # a run, which TensorBoard shows
        pictures = {path.stem: path for path in files if path.suffix == ".png"}
        shown = {"curve": "evaluation", "tasks": "evaluation-tasks"}
        images = {k: pictures[v].read_bytes() for k, v in shown.items() if v in pictures}
        show_adaptation(folder / "evaluation", result.curve.returns, images)
    return result, [path for path in files if path.suffix != ".svg"]


def _experience_files(result: EvaluationResult, folder: Path) -> list[Path]:
    """Write returns against experience as figure and CSV; replace files of earlier evaluations."""
    from metarl.plots.figures import plot_experience

    for suffix in (".png", ".svg", ".csv"):
        (folder / f"experience{suffix}").unlink(missing_ok=True)
    files = plot_experience(result, folder / "experience.png")
    if files:
        files.append(folder / "experience.csv")
        result.experience_to_csv(files[-1])
    return files
