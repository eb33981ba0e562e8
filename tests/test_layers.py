"""A module imports only modules above it in `import_order.txt`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (ROOT / "tests" / "import_order.txt").read_text()
TOP = "metarl"
"""Package of the modules that are in no folder."""
ROOMS = {
    room: rows.split() for room, rows in re.findall(r"^(\w+)\n((?:    [\w.*]+\n)+)", ORDER, re.M)
}
"""Packages in their order, and the modules of each in theirs."""

ENTRY = {"metarl.__init__", "metarl.__main__", "envs.__init__"}
"""Files that only name what others have."""


def name_of(path: Path) -> str:
    """Return ROOM.MODULE or ROOM.FOLDER.MODULE of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "metarl" and len(parts) > 2 else parts)


FILES = {name_of(p): p for top in ("envs", "metarl") for p in (ROOT / top).rglob("*.py")}
PACKAGES = {name.removesuffix(".__init__") for name in FILES if name.endswith(".__init__")}
MODULES = {name for name in FILES if not name.endswith("__init__")} - ENTRY


def places() -> dict[str, int]:
    """Return each module's place in the order; the modules of a star share a place."""
    rows = [f"{room}.{row}" for room, names in ROOMS.items() for row in names]
    found = {row: place for place, row in enumerate(rows) if not row.endswith("*")}
    for place, row in enumerate(rows):
        if row.endswith("*"):
            folder = row.removesuffix("*")
            inside = [name for name in MODULES if name.rpartition(".")[0] + "." == folder]
            assert set(inside) - set(found), row
            found |= {name: place for name in inside if name not in found}
    return found


PLACES = places()


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, those for type checking alone left out.

    An import from a package itself counts as one of its `__init__`.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return {module_of(name) for name in found if name.partition(".")[0] == "metarl"}


def module_of(name: str) -> str:
    """Return the module, as in MODULES, or the `__init__` that has an imported name."""
    name = name.removeprefix("metarl").removeprefix(".")
    while name and name not in PACKAGES:
        for module in (name, f"{TOP}.{name}"):
            if module in MODULES:
                return module
        name = name.rpartition(".")[0]
    return f"{name or TOP}.__init__"


def last_of(package: str) -> int:
    """Return the place of the last module of a package's room, which imports all before it."""
    room = package.partition(".")[0]
    return max(place for name, place in PLACES.items() if name.partition(".")[0] == room)


def test_every_module_has_its_place():
    folders = {path.name for path in (ROOT / "metarl").iterdir() if list(path.glob("*.py"))}
    assert set(ROOMS) == {"envs", TOP, *folders}
    assert set(PLACES) == MODULES
    lines = [line for line in ORDER.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) == sum(map(len, ROOMS.values())) + len(ROOMS)  # no line is left unread


def test_the_documentation_lists_the_packages_in_their_order():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition("| package |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([\w]+)` \|", table, re.M) == [r for r in ROOMS if r != TOP]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module):
    own = PLACES[module]
    for name in imports(FILES[module]):
        package = name.removesuffix(".__init__")
        if package == TOP:  # for the version
            assert module.startswith("cli."), f"{module} imports the package as a whole"
            continue
        place = PLACES[name] if name in PLACES else last_of(package)
        assert place < own, f"{module} imports {name}, which stands below it"


@pytest.mark.parametrize("package", sorted(PACKAGES - {TOP, "envs"}))
def test_a_package_imports_only_its_own_room_and_those_above(package):
    for name in imports(FILES[f"{package}.__init__"]):
        place = PLACES.get(name, last_of(name))
        assert place <= last_of(package), f"{package} imports {name}, which stands below it"


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "envs").rglob("*.py")),
    ids=lambda path: f"{path.parent.name}.{path.stem}",
)
def test_envs_import_neither_torch_nor_the_rest(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {a.name.partition(".")[0] for a in node.names} & {"torch"}
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).partition(".")[0] != "torch"
    assert {name.partition(".")[0] for name in imports(path)} <= {"envs"}
