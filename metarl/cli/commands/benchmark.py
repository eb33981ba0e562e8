"""Measure sampling and training speed against the physics ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metarl.cli.options import family_named, resolved_config, starting_config
from metarl.cli.streams import say
from metarl.config.options import Config
from metarl.distributed.process_group import LIMIT_SECONDS, joined
from metarl.envs.errors import UserError
from metarl.envs.registry import data_names, is_built_in, make_family
from metarl.plain_json import json_text

IMPORTS = ("metarl.evaluation.benchmark",)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Options of `metarl benchmark`; `with_options` adds the options of the config."""

    repeats: int = 3
    """Measured iterations, after one warm-up iteration."""
    json: bool = False
    """Print one JSON object."""
    rank_timeout: float = LIMIT_SECONDS
    """Under torchrun: seconds of waiting for a rank after which it is considered dead."""

    @staticmethod
    def starting(arguments: Sequence[str]) -> Config:
        """Return the config that the flags modify: a preset's."""
        family = family_named(Benchmark, arguments)
        if family in data_names():
            make_family(family)  # raises: no simulation to measure
        preset = "pearl2019" if not family or is_built_in(family) else ""
        return starting_config(Benchmark, arguments, family="half-cheetah-dir", preset=preset)

    @staticmethod
    def resolved(config: Config, arguments: Sequence[str], said: Mapping[str, Any]) -> Config:
        """Return the config that results from the given options."""
        for key in ("iterations", "checkpoint_every"):
            if key in said:
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"{flag} has no effect: --repeats sets the number of iterations")
        return resolved_config(config, said)


def benchmark(command: Any) -> int:
    """Run `metarl benchmark`."""
    from metarl.evaluation import benchmark as measuring

    with joined(command.rank_timeout) as process_group:
        result = measuring.benchmark(command.config, command.repeats, process_group)
        if process_group.is_main:
            say(json_text(result, indent=2) if command.json else measuring.table(result))
    return 0
