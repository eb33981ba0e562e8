"""Options of a config as fields of a command."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import tyro

from metarl.algorithms import Algorithm, find_algorithm
from metarl.algorithms.named_parts import BASELINES, OUTER
from metarl.cli.arguments import peek, said
from metarl.cli.parsing import first_name, flags_of
from metarl.config.options import CHOICES, Config, default_workers
from metarl.config.resolve import resolve, usual_preset
from metarl.envs.errors import UserError
from metarl.envs.registry import parse_options
from metarl.models.distributions import DISTRIBUTIONS

_CHOICE_TEXTS = {
    "outer": f"Outer optimizer: {', '.join(OUTER)}, a class of torch.optim such as adamw, or"
    " module:attribute.",
    "baseline": f"Baseline: {', '.join(BASELINES)}, or module:attribute.",
    "policy.distribution": "Distribution over actions: "
    f"{', '.join(DISTRIBUTIONS)}, or module:attribute.",
}


def _choice_text(section: str, config: Config) -> str:
    if section == "policy.network":
        names = ", ".join(config.domain.networks)
        return f"Network: {names}, or module:attribute of a torch.nn.Module."
    return _CHOICE_TEXTS[section]


def with_options(kind: type, config: Config) -> type:
    """Return a command's dataclass with a field for every option of a config."""
    fields: list[tuple[str, Any, Any]] = [
        _field("family", Annotated[str, tyro.conf.Positional, tyro.conf.arg(
            metavar="[FAMILY]", help=help_texts(Config)["family"])], config.family),
        _field("preset", Annotated[str | None, _arg("preset", Config)], config.preset),
        _field("algorithm", Annotated[str, _arg("algorithm", Config)], config.algorithm.source),
        _field("family_options", Annotated[tuple[str, ...], _arg("family_options", Config)], ()),
    ]  # fmt: skip
    kinds = typing.get_type_hints(Config)
    for name in config.own:
        if name not in config.hidden_options:
            annotation = Annotated[kinds[name], _arg(name, Config)]
            fields.append(_field(name, annotation, getattr(config, name)))
    for section, part in config.sections().items():
        if section in CHOICES:
            text = _choice_text(section, config)
            annotation = Annotated[str, tyro.conf.arg(name=section, help=text)]
            name = section.replace(".", "__")
            fields.append(_field(name, annotation, part.source or part.name))  # type: ignore[attr-defined]
        hints = typing.get_type_hints(type(part))
        for name in part.option_fields():
            key = part.key(name)
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


def given(command: Any, config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values of config options that a command line gives, by key."""
    keys = ["preset", "algorithm", "family_options", *config.options()]
    values = {key: getattr(command, key.replace(".", "__")) for key in said(arguments, keys)}
    values["family"] = command.family
    values["family_options"] = parse_options(values.get("family_options", ()))
    return values


def family_named(kind: type, arguments: Sequence[str]) -> str:
    """Return the family that a command line names, at any position; "" for none."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    config = Config(algorithm=_algorithm_named(arguments))
    for name, word in _chosen(arguments).items():
        with contextlib.suppress(UserError):  # a network of data sets; parsing reports errors
            config = config.with_options({name: word})
    flags = flags_of(with_options(kind, config))
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


def starting_config(
    kind: type, arguments: Sequence[str], *, family: str, preset: str = ""
) -> Config:
    """Return the config that the flags of a command line modify.

    Args:
        kind: dataclass of the command.
        family: default family.
        preset: default preset; by default the usual one of the family.
    """
    family = family_named(kind, arguments) or family
    algorithm = _algorithm_named(arguments)
    named = peek(arguments, "--preset") or preset or usual_preset(family)
    values: dict[str, Any] = {**_chosen(arguments), "family_options": _family_options(arguments)}
    config = resolve(None if named == "None" else named, family, algorithm, values)
    return dataclasses.replace(config, workers=default_workers())


def resolved_config(start: Config, said: Mapping[str, Any]) -> Config:
    """Return the config with the given values and the values that follow from them."""
    apart = ("family", "preset", "algorithm")
    values = {key: value for key, value in said.items() if key not in apart}
    if "workers" in start.options():
        values.setdefault("workers", start.workers)
    return resolve(start.preset, start.family, start.algorithm.source, values)


def _field(name: str, annotation: Any, default: Any) -> tuple[str, Any, Any]:
    return name, annotation, dataclasses.field(default=default)


def _arg(name: str, kind: type, key: str | None = None) -> Any:
    flag = (key or name).replace("_", "-")
    return tyro.conf.arg(name=flag, help=help_texts(kind).get(name, ""))


@cache
def help_texts(kind: type) -> Mapping[str, str]:
    """Return the documentation of a dataclass's fields by name, each as one paragraph."""
    from docstring_parser import parse, parse_from_object

    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        found = []
        if optimizer := parent.__dict__.get("optimizer"):
            found += parse(optimizer.__doc__ or "").params
        if dataclasses.is_dataclass(parent):
            found += parse_from_object(parent).params
        for entry in found:
            # torch also writes the default, and tyro adds it again.
            text = re.sub(r"\(default: .*\)$", "", " ".join((entry.description or "").split()))
            texts[entry.arg_name] = text.strip()
    return texts
