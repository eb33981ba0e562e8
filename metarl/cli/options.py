"""Options of a config as fields of a command."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from metarl.algorithms import Algorithm, find_algorithm
from metarl.algorithms.named_parts import BASELINES, OUTER
from metarl.cli.arguments import peek, said
from metarl.cli.parsing import first_name, flags_of, help_texts, parse
from metarl.config.options import Config, default_workers
from metarl.config.resolve import resolve, usual_preset
from metarl.config.setup import CHOICES, Setup, owners
from metarl.envs.errors import UserError
from metarl.envs.registry import parse_options
from metarl.models.distributions import DISTRIBUTIONS

AUTO = "auto"
"""Value of --resume that also starts a run."""

_CHOICE_TEXTS = {
    "outer": f"Outer optimizer: {', '.join(OUTER)}, a class of torch.optim such as adamw, or"
    " module:attribute.",
    "baseline": f"Baseline: {', '.join(BASELINES)}, or module:attribute.",
    "policy.distribution": "Distribution over actions: "
    f"{', '.join(DISTRIBUTIONS)}, or module:attribute.",
}


def _choice_text(section: str, setup: Setup) -> str:
    if section == "policy.network":
        names = ", ".join(setup.domain.networks)
        return f"Network: {names}, or module:attribute of a torch.nn.Module."
    return _CHOICE_TEXTS[section]


def command_type(kind: type, config: Config) -> type:
    """Return a command's dataclass with a field for every option of a config.

    An option that the command sets in another way is in its `without`.
    """
    setup, without = config.setup, getattr(kind, "without", ())
    fields: list[tuple[str, Any, Any]] = [
        _field("family", Annotated[str, tyro.conf.Positional, tyro.conf.arg(
            metavar="[FAMILY]", help=help_texts(Setup)["family"])], setup.family),
        _field("preset", Annotated[str | None, _arg("preset", Setup)], setup.preset),
        _field("algorithm", Annotated[str, _arg("algorithm", Setup)], setup.algorithm.source),
        _field("family_options", Annotated[tuple[str, ...], _arg("family_options", Setup)], ()),
    ]  # fmt: skip
    for section, part in config.sections().items():
        if section in CHOICES:
            text = _choice_text(section, setup)
            annotation = Annotated[str, tyro.conf.arg(name=section, help=text)]
            name = section.replace(".", "__")
            fields.append(_field(name, annotation, part.source or part.name))  # type: ignore[attr-defined]
        hints = typing.get_type_hints(type(part))
        for name in part.option_fields():
            key = part.key(name)
            if key in without:
                continue
            annotation = Annotated[hints[name], _arg(name, type(part), key)]
            fields.append(_field(key.replace(".", "__"), annotation, getattr(part, name)))
    own = [
        (f.name, typing.get_type_hints(kind, include_extras=True)[f.name],
         dataclasses.field(default=f.default))
        for f in dataclasses.fields(kind)
    ]  # fmt: skip
    helps = help_texts(kind)
    own = [(n, Annotated[t, tyro.conf.arg(help=helps.get(n, ""))], d) for n, t, d in own]
    return dataclasses.make_dataclass(kind.__name__, fields + own, kw_only=True)


def family_named(kind: type, arguments: Sequence[str]) -> str:
    """Return the family that a command line names, at any position; "" for none."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    config = Config(setup=Setup(algorithm=_algorithm_named(arguments)))
    for name, word in _chosen(arguments).items():
        with contextlib.suppress(UserError):  # a network of data sets; parsing reports errors
            config = config.with_options({name: word})
    flags = flags_of(command_type(kind, config))
    return first_name(arguments, [name for name, flag in flags.items() if flag.kind is bool])


def _algorithm_named(arguments: Sequence[str]) -> Algorithm:
    return find_algorithm(peek(arguments, "--algorithm") or "maml-trpo")


def _chosen(arguments: Sequence[str]) -> dict[str, str]:
    """Return the parts that a command line chooses, by option."""
    words = {name: peek(arguments, f"--{name}") for name in CHOICES}
    return {name: word for name, word in words.items() if word is not None}


def _family_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the family options of a command line. Parsing refuses invalid ones."""
    words = list(arguments)
    if "--family-options" not in words:
        return {}
    rest = words[words.index("--family-options") + 1 :]
    given = itertools.takewhile(lambda word: "=" in word and not word.startswith("--"), rest)
    return parse_options(given)


def configured(kind: type, arguments: Sequence[str], **common: str) -> Any:
    """Parse a command line into a command that has the config of its options as `config`.

    Args:
        kind: dataclass of the command. `usual` returns the family and the preset for the family
            that is named; "" for the usual preset of that family.
        common: other arguments of `parse`.
    """
    folder = peek(arguments, "--resume") if hasattr(kind, "resume") else None
    resumed = None
    if folder not in (None, AUTO):
        from metarl.policies.loading import run_config

        resumed = run_config(Path(folder))
    start = resumed or _start(kind, arguments)
    kind = command_type(kind, start)
    command = parse(kind, arguments, hint=lambda flag: owners(flag[2:].replace("-", "_")), **common)
    setup, keys = start.setup, start.options()
    values = {k: getattr(command, k.replace(".", "__")) for k in said(arguments, list(keys))}
    options = parse_options(command.family_options)
    if resumed is not None:
        _check_same(command, setup)
        options = {**setup.family_options, **options}
        start = dataclasses.replace(start, setup=dataclasses.replace(setup, family_options=options))
        command.config = start.with_options(values)
        return command
    if "workers" in keys:
        values.setdefault("workers", default_workers())
    values["family_options"] = options
    command.config = resolve(setup.preset, setup.family, setup.algorithm.source, values)
    return command


def _start(kind: Any, arguments: Sequence[str]) -> Config:
    """Return the config that the flags of a command line modify: a preset's."""
    family, usual = kind.usual(family_named(kind, arguments))
    algorithm = _algorithm_named(arguments)
    named = peek(arguments, "--preset") or usual or usual_preset(family)
    values: dict[str, Any] = {**_chosen(arguments), "family_options": _family_options(arguments)}
    config = resolve(None if named == "None" else named, family, algorithm, values)
    return config.with_options({"workers": default_workers()}, known_only=True)


def _check_same(command: Any, setup: Setup) -> None:
    """Raise UserError if the words name another family, preset or algorithm than the run's."""
    own = {
        "family": setup.family, "preset": setup.preset, "algorithm": setup.algorithm.source,
    }  # fmt: skip
    for key, value in own.items():
        if (named := getattr(command, key)) != value:
            raise UserError(
                f"the run to resume has the {key} {value}, not {named}: remove that, or start a new"
                " run"
            )


def _field(name: str, annotation: Any, default: Any) -> tuple[str, Any, Any]:
    return name, annotation, dataclasses.field(default=default)


def _arg(name: str, kind: type, key: str | None = None) -> Any:
    flag = (key or name).replace("_", "-")
    return tyro.conf.arg(name=flag, help=help_texts(kind).get(name, ""))
