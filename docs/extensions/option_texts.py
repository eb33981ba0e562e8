"""Options of commands, parts and algorithms as Markdown, from the objects that parse them."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tyro

from metarl.algorithms import Algorithm, algorithms, find_algorithm
from metarl.algorithms.algorithm import SECTIONS
from metarl.algorithms.named_parts import BASELINES, OUTER, find_outer
from metarl.cli import main
from metarl.cli.options import command_type
from metarl.cli.parsing import Flag, flags_by_field, help_texts
from metarl.config.options import Config, RunOptions
from metarl.config.setup import CHOICES
from metarl.models.distributions import DISTRIBUTIONS
from metarl.models.network_parts import POLICY_NETWORKS, PREDICTOR_NETWORKS
from metarl.parts import Part

MACHINE = "depends on the machine"


@dataclass(frozen=True)
class Entry:
    """One option."""

    flag: Flag
    default: str
    text: str

    @property
    def key(self) -> str:
        """Key in Python: inner.step_sizes."""
        return self.flag.name.removeprefix("--").replace("-", "_")

    def markdown(self) -> str:
        """Return the option as a directive."""
        default = f"*Default: {self.default}.*" if self.default else ""
        signature = self.flag.name
        if self.flag.kind is bool and not self.flag.choices:
            signature += f", {self.flag.switch_off}"
        else:
            signature += f" {self._value()}"
        text = f"{_escaped(self.text)} {default}".strip()
        return f"```{{option}} {signature}\n{text}\n```\n"

    def _value(self) -> str:
        name = "|".join(self.flag.choices)
        if not name:
            name = {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(self.flag.kind, "PATH")
            name = "NAME=VALUE" if self.flag.several and self.flag.kind is str else name
        return f"{name} ..." if self.flag.several else name


def entries(kind: type) -> list[Entry]:
    """Return the options of a command's dataclass."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    documented = help_texts(kind)
    found = []
    for name, flag in flags_by_field(kind).items():
        text = _marked(hints[name], "help") or documented.get(name, "")
        found.append(Entry(flag, _shown(fields[name]), text))
    return found


def config_entries(config: Config, kind: type) -> list[Entry]:
    """Return the options of a command that changes a config."""
    found = entries(command_type(kind, config))
    fields = {field.name: field for field in dataclasses.fields(RunOptions)}
    return [
        dataclasses.replace(entry, default=MACHINE)
        if entry.key in fields and fields[entry.key].default_factory is not dataclasses.MISSING
        else entry
        for entry in found
    ]


def part_entries(part: Part) -> list[Entry]:
    """Return the options of a part."""
    texts = help_texts(type(part))
    hints = typing.get_type_hints(type(part))
    made = dataclasses.make_dataclass(
        "Options", [(name, hints[name]) for name in part.option_fields()]
    )
    flags = flags_by_field(made)
    return [
        Entry(
            dataclasses.replace(flag, name=f"--{part.key(name)}".replace("_", "-")),
            shown(getattr(part, name)),
            texts.get(name, ""),
        )
        for name, flag in flags.items()
    ]


def _escaped(text: str) -> str:
    """Return a help text as Markdown; torch's own texts have RST links and no full stop."""
    text = re.sub(r"`([^`]*)`_", r"\1", text).strip()
    text = re.sub(r"(`[^`]*`)|(--[\w.-]*\w)|([*|])", _code, text)
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith(".") else f"{text}."


def _code(match: re.Match[str]) -> str:
    flag, sign = match[2], match[3]
    return match[1] or (f"`{flag}`" if flag else f"\\{sign}")


def shown(value: Any) -> str:
    """Return a default value as words of a command line; "" for no value."""
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if _plain(value) else str(value)


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and float(f"{value:g}") == value


def _shown(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return MACHINE
    return shown(field.default)


def _marked(hint: Any, name: str) -> str:
    """Return an attribute of the first `tyro.conf.arg` in an annotation."""
    markers = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    return next((text for marker in markers if (text := getattr(marker, name, None))), "")


def _names(kind: type) -> list[tuple[str, str]]:
    """Return metavar and help of the names that a command takes before its flags."""
    hints = typing.get_type_hints(kind, include_extras=True)
    texts = help_texts(kind)
    return [
        (_marked(hints[f.name], "metavar"), _marked(hints[f.name], "help") or texts[f.name])
        for f in dataclasses.fields(kind)
        if tyro.conf.Positional in typing.get_args(hints[f.name])
    ]


def _listed(found: Iterable[Entry], program: str) -> str:
    return "\n".join([f"```{{program}} {program}\n```\n", *(e.markdown() for e in found)])


def command_page() -> str:
    """Return the sections of all commands, then of the parts that options choose."""
    lines = []
    for name, text in main.commands().items():
        kind, _ = main.command_of(name)
        config = Config.of("", "maml-trpo") if hasattr(kind, "usual") else None
        made = command_type(kind, config) if config else kind
        words = [f"metarl {name}", *(metavar for metavar, _ in _names(made))]
        words += ["[OPTIONS]"] * bool(dataclasses.fields(made))
        lines += [f"## metarl {name}\n", f"{text}\n", f"```text\n{' '.join(words)}\n```\n"]
        lines += [f"`{metavar}`: {_escaped(said)}\n" for metavar, said in _names(made)]
        if config is None:
            lines.append(_listed(entries(kind), f"metarl {name}"))
            continue
        found = config_entries(config, kind)
        own = [e for e in found if e.key.partition(".")[0] not in SECTIONS or e.key in CHOICES]
        own = [e for e in own if e.key in CHOICES or not e.key.startswith("policy.")]
        lines.append(_listed(own, f"metarl {name}"))
        lines.append(
            "The other options belong to the parts of the run: see"
            " [options of parts](#options-of-parts) and the page of the"
            " [algorithm](algorithms/index.md).\n"
        )
    return "\n".join(lines + _parts())


def _parts() -> list[str]:
    """Return the sections of parts that `--outer`, `--baseline` and `--policy` choose."""
    config = Config.of("", "maml-trpo")
    lines = [
        "## Options of parts\n",
        "An option exists only if its part is chosen. Options of an algorithm's inner update and"
        " meta-gradient are on the page of the [algorithm](algorithms/index.md).\n",
    ]
    policy = {k: part for k, part in config.sections().items() if k == "policy"}
    lines += ["### Policy\n", _listed(part_entries(policy["policy"]), "metarl policy")]
    kinds: Mapping[str, Mapping[str, Any]] = {
        "policy.network": {**POLICY_NETWORKS, **PREDICTOR_NETWORKS},
        "policy.distribution": DISTRIBUTIONS,
        "outer": {**OUTER, "adam": find_outer("adam"), "sgd": find_outer("sgd")},
        "baseline": BASELINES,
    }
    for choice, known in kinds.items():
        title = choice.partition(".")[2] or choice
        lines.append(f"### --{choice}\n")
        if choice == "outer":
            lines.append(
                "All classes of `torch.optim` are accepted, with their own options. `adam` and"
                " `sgd` are examples.\n"
            )
        for name, kind in known.items():
            part = kind if isinstance(kind, Part) else kind()
            found = part_entries(part)
            lines.append(f"#### --{choice} {name}\n")
            lines.append(_listed(found, f"metarl {title} {name}") if found else "No options.\n")
    return lines


def usual_family(algorithm: Algorithm) -> str:
    """Return a family that an algorithm supports: navigation-2d, or characters for classifiers."""
    return "navigation-2d" if algorithm.head == "meta" else "characters"


def algorithm_entries(name: str) -> list[Entry]:
    """Return the options of an algorithm's parts."""
    algorithm = find_algorithm(name)
    config = Config.of(usual_family(algorithm), name)
    return [
        entry
        for section, part in config.setup.algorithm.sections().items()
        if section in SECTIONS
        for entry in part_entries(part)
    ]


def algorithm_options(name: str) -> str:
    """Return the options of an algorithm, first the ones that differ from maml-trpo's."""
    usual = {(e.key, e.default, e.text) for e in algorithm_entries("maml-trpo")}
    found = algorithm_entries(name)
    own = [e for e in found if (e.key, e.default, e.text) not in usual]
    rest = [e for e in found if e not in own]
    program = f"metarl train --algorithm {name}"
    if name == "maml-trpo" or not rest or not own:
        return _listed(found, program)
    link = "[maml-trpo](maml-trpo.md#options)"
    return (
        f"{_listed(own, program)}\nThese options are the same as those of {link}: "
        + ", ".join(f"`{e.flag.name}`" for e in rest)
        + "."
    )


def names() -> list[str]:
    """Return the names of the built-in algorithms."""
    return list(algorithms())
