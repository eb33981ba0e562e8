"""Write a policy as a TorchScript or ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from metarl.cli.adaptation import Adaptation, families_of, one_of, parse_task
from metarl.cli.arguments import check_file
from metarl.cli.streams import say
from metarl.envs import guard
from metarl.envs.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Export(Adaptation):
    """Write a policy to a file for other programs (TorchScript or ONNX)."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    """A policy file of `metarl adapt`; or a run folder, a policy file or the name of a shipped
    policy. These are adapted first if --task is given."""
    format: Literal["torchscript", "onnx"] | None = None
    """File format; by default from the suffix of --out, else torchscript. onnx needs the package
    onnx (the extra `onnx`)."""
    task: tuple[str, ...] = ()
    """Task to adapt an initialization to, as component=value for each component."""
    out: Path | None = None
    """File to write; by default NAME.pt or NAME.onnx in the policy's folder."""


def export(command: Export) -> int:
    """Run `metarl export`."""
    from metarl.policies.export import CHECKED, SUFFIXES, Format
    from metarl.policies.export import export as write
    from metarl.policies.loading import is_adapted, load, load_policy

    what = one_of(command.what)
    check_file("--out", command.out, tuple(SUFFIXES.values()))
    formats: dict[str, Format] = {suffix: name for name, suffix in SUFFIXES.items()}
    said = formats.get(command.out.suffix) if command.out is not None else None
    if command.format and said and command.format != said:
        raise UserError(
            f"--out {command.out} has the suffix of {said}, but --format is {command.format}"
        )
    kind = command.format or said or "torchscript"
    if is_adapted(what):
        if command.task:
            raise UserError(f"{what} is already adapted: remove --task")
        policy = load_policy(what)
        family, played = families_of(policy)
    else:
        meta = load(what)
        family, played = meta.family, meta.played
        usual = Export(what=command.what)
        adapts = (command.steps, command.options()) != (usual.steps, usual.options())
        told = meta.algorithm.task_conditioned
        if (adapts or told) and not command.task:
            names = " ".join(f"{name}=..." for name in family.tasks.names)
            why = "an oracle observes its task;" if told else "to adapt before it is exported,"
            raise UserError(f"{why} name the task: --task {names}")
        task = parse_task(family, command.task) if command.task else family.tasks.grid(1)[0]
        steps = command.steps if command.task else 0
        policy = meta.adapt(task, steps=steps, **command.options())
    with guard.opened(played.make) as env:
        space = env.observation_space
    source = Path(what)
    folder = source if source.is_dir() else source.parent
    stem = source.resolve().name.removesuffix(".safetensors")
    out = command.out or folder / f"{stem}{SUFFIXES[kind]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    gap = write(policy, out, kind, space)
    seen = " x ".join(map(str, policy.policy.observation_shape))
    state = policy.initial_state()
    kept = f" and the state ({', '.join(state)})" if state else ""
    say(
        f"{out}: observations [n, {seen}]{kept} to the most likely actions"
        f"{' and the next state' if state else ''};"
        f" equal to the policy's on {CHECKED} observations, to {gap:.1g}"
    )
    return 0
