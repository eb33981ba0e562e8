"""What type checkers see of the package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import numpy as np
from typing_extensions import assert_type
import metarl
from metarl.envs import MujocoFamily, make_family, register

policy = metarl.load("half-cheetah-dir-icml2017").adapt(make_family("half-cheetah-dir").make())
action = policy.act(np.zeros(17))
environment = make_family("half-cheetah-dir").make()
vector = make_family("half-cheetah-dir").make_vec(1, 1)
stepped = vector.step(np.zeros((1, 6)))
named: type[metarl.EvaluationResult] | type[metarl.Curve] | type[metarl.OnlineAdapter]
assert_type(metarl.__version__, str)

@register
def one(low: float = 1.0) -> MujocoFamily:
    raise NotImplementedError

@register(gymnasium_id="own/Two-v0", max_episode_steps=5)
def two(low: float = 1.0) -> MujocoFamily:
    raise NotImplementedError

assert_type(one(2.0), MujocoFamily)
assert_type(two(low=2.0), MujocoFamily)
"""
WRONG = ["metarl.lod('x')", "one(lw=2.0)", "two('far')"]


@pytest.mark.slow
def test_a_strict_checker_knows_every_type_and_finds_every_mistake(tmp_path):
    pytest.importorskip("pyright")
    shutil.copytree(ROOT / "metarl", tmp_path / "metarl")
    shutil.copytree(ROOT / "envs", tmp_path / "metarl" / "envs", dirs_exist_ok=True)
    (tmp_path / "use.py").write_text("\n".join([PROGRAM, *WRONG]))
    settings = {"include": ["use.py"], "extraPaths": ["."], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    lines = {entry["range"]["start"]["line"] for entry in found}
    first = PROGRAM.count("\n") + 1
    assert lines == {first + i for i in range(len(WRONG))}, found
