"""The wheel, installed beside a user's own folder `envs/`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """\
import envs
import gymnasium
import metarl

assert envs.MINE
assert metarl.__file__.startswith(FOLDER) and metarl.envs.__file__.startswith(FOLDER)
config = metarl.resolve(
    None, "navigation-2d", overrides={"iterations": 2, "tasks": 2, "episodes": 2}
)
metarl.train(config, "run")
assert metarl.load("run").provenance["iteration"] == 2
assert metarl.load("half-cheetah-dir-icml2017").setup.family == "half-cheetah-dir"
assert gymnasium.make("metarl/HalfCheetahVel-v0", velocity=1.5).spec.id
print("trained")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing but the wheel's content; what it depends on is the test's own."""
    made = tmp_path_factory.mktemp("wheel")
    source = made / "source"  # a copy: building leaves files behind
    for name in ("metarl", "envs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(made), str(source)]
    subprocess.run([*pip, *build], check=True, cwd=made)
    (wheel,) = made.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(made / "site")
    return made / "site"


def test_the_wheel_holds_one_package(site):
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert names == {"metarl"}
    packaged = {str(path.relative_to(site / "metarl")) for path in site.glob("metarl/**/*.py")}
    here = {str(path.relative_to(ROOT / "metarl")) for path in ROOT.glob("metarl/**/*.py")}
    here |= {str(path.relative_to(ROOT)) for path in ROOT.glob("envs/**/*.py")}
    assert packaged == here
    recipes = "config/recipes/*.toml"
    assert {p.name for p in (site / "metarl").glob(recipes)} == {
        p.name for p in (ROOT / "metarl").glob(recipes)
    }
    assert (site / "metarl" / "py.typed").exists()


def test_the_wheel_trains_next_to_a_users_folder_envs(site, tmp_path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "__init__.py").write_text("MINE = True\n")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("FOLDER", repr(str(site))))
    surroundings = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip().endswith("trained"), done.stderr
