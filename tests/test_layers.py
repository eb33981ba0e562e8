"""A module imports only what stands above it in the house."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVS = [
    "errors", "family", "vector", "gymnasium_family", "serial_batch", "mujoco_bodies",
    "mujoco_vector", "traces", "checker", "ant", "classic_control", "half_cheetah", "hopper",
    "humanoid", "meta_world", "navigation", "swimmer", "tabular", "walker2d", "__init__",
]  # fmt: skip
METARL = [
    "seeding", "parallel", "trajectories", "policies", "rollouts", "workers", "advantages",
    "objectives",
    "adaptation", "inner_loop", "meta_gradients", "metrics", "trust_region", "first_order",
    "statistics", "results", "algorithms", "config", "presets", "checkpoints", "meta_policy",
    "runs", "trainer", "evaluation", "plots", "videos", "report", "benchmark", "__init__",
    "policy_commands", "cli", "__main__",
]  # fmt: skip


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


@pytest.mark.parametrize(("package", "order"), [("envs", ENVS), ("metarl", METARL)])
def test_imports_point_up(package, order):
    files = {path.stem: path for path in (ROOT / package).glob("*.py")}
    assert set(files) == set(order), "name each module in the order above"
    for i, module in enumerate(order):
        names = [name.split(".") for name in imports(files[module])]
        found = {name[1] for name in names if name[0] == package and len(name) > 1}
        below = found & set(order[i:])
        assert not below, f"{package}.{module} imports {below}, which stand below it"


def test_envs_know_nothing_of_learning():
    for path in (ROOT / "envs").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "metarl"}, path
