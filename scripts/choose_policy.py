"""Choose a run's best checkpoint on validation tasks and save it as a policy file.

    python scripts/choose_policy.py runs/dir --out half-cheetah-dir.safetensors

Validation tasks and episodes have separate random streams. The test tasks of `metarl evaluate` are
not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import metarl


@dataclass
class Arguments:
    """Choose a run's best checkpoint on validation tasks and save it as a policy file."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    out: Path
    """Policy file to write."""
    steps: int = 1
    """Number of inner steps before the compared returns."""
    last: int = 5
    """Number of newest checkpoints to compare."""
    tasks: int = 20
    """Number of validation tasks."""
    episodes: int = 20
    """Episodes per task."""


def validation_return(path: Path, *, steps: int = 1, tasks: int = 20, episodes: int = 20) -> float:
    """Return a checkpoint's mean return after `steps` inner steps on validation tasks."""
    result = metarl.evaluate(path, tasks=tasks, episodes=episodes, steps=steps, split="validation")
    return result.curve.returns[-1]


def main(arguments: Arguments) -> None:
    options = {key: getattr(arguments, key) for key in ("steps", "tasks", "episodes")}
    scores: dict[Path, float] = {}
    for path in sorted((arguments.run / "checkpoints").glob("*.safetensors"))[-arguments.last :]:
        scores[path] = validation_return(path, **options)
        print(f"{path.stem}: {scores[path]:.1f} after {arguments.steps} steps, validation tasks")
    if not scores:
        raise SystemExit(f"{arguments.run} contains no checkpoints")
    best = max(scores, key=scores.__getitem__)
    metarl.load(best).save(arguments.out)
    print(f"saved {best.stem} as {arguments.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=Arguments.__doc__))
