"""Choose a run's best checkpoint on validation tasks and save it as a policy file.

    python scripts/choose_policy.py runs/dir --out half-cheetah-dir.safetensors

Validation tasks and episodes have random streams of their own: the test tasks that
`metarl evaluate` draws are not looked at.
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
    """Inner steps after which returns are compared."""
    last: int = 5
    """Checkpoints to compare, from the newest back."""
    tasks: int = 20
    """Validation tasks."""
    episodes: int = 20
    """Episodes a task."""


def main(arguments: Arguments) -> None:
    best = None
    found = sorted((arguments.run / "checkpoints").glob("*.safetensors"))[-arguments.last :]
    for path in found:
        meta_policy = metarl.load(path)
        result = metarl.evaluate(
            meta_policy,
            tasks=arguments.tasks,
            episodes=arguments.episodes,
            steps=arguments.steps,
            split="validation",
        )
        score = result.curve.returns[-1]
        print(f"{path.stem}: {score:.1f} after {arguments.steps} steps, validation tasks")
        if best is None or score > best[0]:
            best = score, path, meta_policy
    if best is None:
        raise SystemExit(f"{arguments.run} holds no checkpoints")
    best[2].save(arguments.out)
    print(f"saved {best[1].stem} as {arguments.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=Arguments.__doc__))
