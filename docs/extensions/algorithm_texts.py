"""Parts of an algorithm's page as Markdown, from the algorithm itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import metarl.algorithms
from metarl.algorithms import Algorithm, find_algorithm
from metarl.algorithms.algorithm import SECTIONS
from metarl.config.options import Config
from metarl.envs import GymnasiumFamily, Uniform
from metarl.envs.errors import UserError
from metarl.envs.registry import find_family

DOCS = Path(__file__).parents[1]
YES, NO = "✓", "–"  # noqa: RUF001

SPACES: dict[str, gym.Space] = {
    "`Box`, a vector": gym.spaces.Box(-1.0, 1.0, (3,)),
    "`Box`, a `uint8` image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8),
    "`Discrete`": gym.spaces.Discrete(3),
    "`MultiDiscrete`": gym.spaces.MultiDiscrete([2, 3]),
    "`MultiBinary`": gym.spaces.MultiBinary(2),
    "`Dict`": gym.spaces.Dict({"a": gym.spaces.Discrete(2)}),
    "`Tuple`": gym.spaces.Tuple([gym.spaces.Discrete(2)]),
}
OPTION = re.compile(rf"\b(?:{'|'.join((*SECTIONS, 'policy'))})\.\w+")
RESULTS = {"algorithms.md": "Algorithms compared", "supervised.md": "Supervised tasks"}
"""Pages of docs/results with tables of algorithms, and their titles."""
SUPERVISED = {"regression": "sinusoid", "classification": "characters"}


def module_of(name: str) -> str:
    """Return the module of a built-in algorithm."""
    for module in pkgutil.iter_modules(metarl.algorithms.__path__):
        full = f"metarl.algorithms.{module.name}"
        for value in vars(importlib.import_module(full)).values():
            if isinstance(value, Algorithm) and value.name == name:
                return full
    raise KeyError(name)


def pseudocode(name: str) -> tuple[str, str]:
    """Return an algorithm's pseudocode and the options of its symbols, with flags as code.

    Both are the docstring of its module, without the title; the options are its last paragraph.
    """
    text = inspect.getdoc(importlib.import_module(module_of(name))) or ""
    code, _, options = text.partition("\n")[2].strip("\n").rpartition("\n\n")
    return code, OPTION.sub(lambda key: f"`--{key[0].replace('_', '-')}`", options)


def symbols(name: str) -> list[str]:
    """Return the flags of the options that an algorithm's pseudocode names."""
    return re.findall(r"`(--[\w.-]+)`", pseudocode(name)[1])


def paper(name: str) -> str:
    """Return an algorithm's citation with links to arXiv, and a link to its file."""
    link = r"[arXiv:\1](https://arxiv.org/abs/\1)"
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", link, find_algorithm(name).citation)
    path = module_of(name).replace(".", "/") + ".py"
    return f"Paper: {text}. Code: [{path}](../../{path})."


def spaces(name: str) -> str:
    """Return the table of spaces and data sets that an algorithm supports."""
    rows = [
        f"| {label} | {_mark(_plays(name, space, VECTOR))} | {_mark(_plays(name, VECTOR, space))} |"
        for label, space in SPACES.items()
    ]
    table = "\n".join(["| space | observations | actions |", "| --- | --- | --- |", *rows])
    if YES not in table:
        table = "Policies are not supported."
    kinds = [kind for kind, family in SUPERVISED.items() if _learns(name, family)]
    return f"{table}\n\nSupervised tasks: {' and '.join(kinds) or 'none'}.\n"


def results(name: str) -> str:
    """Return the rows of an algorithm and of maml-trpo in the tables of docs/results."""
    found = []
    for file, title in RESULTS.items():
        for table, command in _tables((DOCS / "results" / file).read_text("utf-8")):
            head, line, *rows = table.splitlines()
            labels = {row: row.split("|")[1].strip(" `") for row in rows}
            if name in labels.values() and " step" in head:
                shown = [row for row in rows if labels[row] in (name, "maml-trpo")]
                lines = "\n".join([head, line, *shown])
                found.append(f"From [{title}](../results/{file}):\n\n{command}\n\n{lines}\n")
    if not found:
        raise ValueError(f"no table of docs/results has a row for {name}")
    return "\n".join(found)


def _tables(text: str) -> list[tuple[str, str]]:
    """Return the tables of a page, each with the next block of commands."""
    found = []
    for match in re.finditer(r"(?:^\|.*\n)+", text, re.M):
        command = re.search(r"^```bash\n.*?^```", text[match.end() :], re.M | re.S)
        if command:
            found.append((match[0].rstrip(), command[0]))
    return found


def _mark(supported: bool) -> str:
    return YES if supported else NO


def _allowed(function: Callable[[], object]) -> bool:
    try:
        function()
    except UserError:
        return False
    return True


class _Env(gym.Env):
    """Environment with given spaces."""

    task = np.zeros(1)

    def __init__(self, observation: gym.Space, action: gym.Space) -> None:
        self.observation_space, self.action_space = observation, action

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**options)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


VECTOR = SPACES["`Box`, a vector"]


def _plays(name: str, observation: gym.Space, action: gym.Space) -> bool:
    def make() -> None:
        config = Config.of("navigation-2d", name)
        env, tasks = partial(_Env, observation, action), Uniform({"x": (0.0, 1.0)})
        family = GymnasiumFamily(name="spaces", env=env, tasks=tasks, horizon=2)
        config.setup.domain.model(config.setup.algorithm, config.setup.policy, family)

    return _allowed(make)


def _learns(name: str, family: str) -> bool:
    def make() -> None:
        config = Config.of(family, name)
        config.setup.domain.model(config.setup.algorithm, config.setup.policy, find_family(family))

    return _allowed(make)
