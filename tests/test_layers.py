"""A module imports only what stands above it in the house."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "envs": """errors family vector gymnasium_family processes serial_batch mujoco_bodies
        mujoco_vector traces environment_checks task_checks checker ant classic_control half_cheetah
        hopper humanoid meta_world navigation swimmer tabular walker2d""",
    "learning": """stopwatch parallel trajectories encoders policies modules advantages objectives
        linear_solves adaptation inner_loop credit meta_gradients trust_region first_order
        algorithms""",
    "sampling": "seeding rollouts worker_process workers",
    "running": """config presets checks files checkpoints metrics statistics results memory policy
        online meta_policy runs iterations trainer scratch evaluation export benchmark""",
    "showing": "plots videos report",
    "commands": "interrupts errors arguments listing training policy_commands cli",
}
"""Rooms in their order, and the modules of each in theirs."""

ORDER = [f"{room}.{module}" for room, modules in ROOMS.items() for module in modules.split()]


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
    folders = [ROOT / "envs", *(path for path in (ROOT / "metarl").iterdir() if path.is_dir())]
    files = {
        f"{path.parent.name}.{path.stem}" for folder in folders for path in folder.glob("*.py")
    }
    assert {name for name in files if not name.endswith("__init__")} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_up(module):
    names = [name.split(".") for name in imports(file_of(module))]
    found = {".".join(name[1:3]) for name in names if name[0] == "metarl"}
    below = found & set(ORDER[ORDER.index(module) :])
    assert not below, f"{module} imports {below}, which stand below it"


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.py")), ids=lambda path: path.stem)
def test_envs_know_nothing_of_learning(path):
    for name in imports(path):
        assert name.split(".")[0] != "torch", name
        assert name.split(".")[0] != "metarl" or name.startswith("metarl.envs"), name
