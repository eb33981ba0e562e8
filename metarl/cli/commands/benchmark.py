"""Measure sampling and training speed against the physics ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from metarl.cli.streams import say
from metarl.distributed.process_group import LIMIT_SECONDS, joined
from metarl.envs.registry import data_names, is_built_in, make_family
from metarl.plain_json import json_text

IMPORTS = ("metarl.evaluation.benchmark",)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Options of `metarl benchmark`; `command_type` adds the options of the config."""

    repeats: int = 3
    """Measured iterations, after one warm-up iteration."""
    json: bool = False
    """Print one JSON object."""
    rank_timeout: float = LIMIT_SECONDS
    """Under torchrun: seconds of waiting for a rank after which it is considered dead."""

    without: ClassVar = ("iterations", "checkpoint_every")
    """Options of the config that this command does not have: `repeats` sets the length."""

    @staticmethod
    def usual(family: str) -> tuple[str, str]:
        """Return the family and the preset if none are given."""
        if family in data_names():
            make_family(family)  # raises: no simulation to measure
        preset = "pearl2019" if not family or is_built_in(family) else ""
        return family or "half-cheetah-dir", preset


def benchmark(command: Any) -> int:
    """Run `metarl benchmark`."""
    from metarl.evaluation import benchmark as measuring
    from metarl.training.run import new_trainer

    with joined(command.rank_timeout) as process_group:
        with process_group.errors_shared(), new_trainer(command.config, process_group) as trainer:
            result = measuring.benchmark(trainer, command.repeats)
        if process_group.is_main:
            say(json_text(result, indent=2) if command.json else measuring.table(result))
    return 0
