"""A module imports only what stands above it in the house."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = {
    room: re.findall(r"^\| `(\w+)` \|", text, re.M)
    for room, text in re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE, re.M | re.S)
}
"""Rooms in their order, and the modules of each in theirs, as the documentation lists them."""

ORDER = [f"{room}.{module}" for room, modules in ROOMS.items() for module in modules]


def file_of(name: str) -> Path:
    room, module = name.split(".")
    return (ROOT / "envs" if room == "envs" else ROOT / "metarl" / room) / f"{module}.py"


def imports(path: Path) -> set[str]:
    """Modules a file imports, those for type checking alone left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return found


def test_every_module_has_its_place():
    assert list(ROOMS) == ["envs", "learning", "sampling", "running", "showing", "commands"]
    folders = [ROOT / "envs", *(path for path in (ROOT / "metarl").iterdir() if path.is_dir())]
    files = {
        f"{path.parent.name}.{path.stem}" for folder in folders for path in folder.glob("*.py")
    }
    assert {name for name in files if not name.endswith("__init__")} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module):
    names = [name.split(".") for name in imports(file_of(module))]
    found = {".".join(name[1:3]) for name in names if name[0] == "metarl"}
    below = found & set(ORDER[ORDER.index(module) :])
    assert not below, f"{module} imports {below}, which stand below it"


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.py")), ids=lambda path: path.stem)
def test_envs_import_neither_torch_nor_the_rest(path):
    for name in imports(path):
        assert name.split(".")[0] != "torch", name
        assert name.split(".")[0] != "metarl" or name.startswith("metarl.envs"), name
