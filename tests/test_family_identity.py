"""A family that changed between training and use is noticed, and what changed is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from expecting import mentions, refused, run

from metarl import CheckpointError, RunError, UserError, evaluate, load, load_policy, resolve, train
from metarl.envs import Finite, GymnasiumFamily, Uniform, make_family, registry
from metarl.envs.few_shot import FewShotFamily
from metarl.running import checkpoints
from metarl.running.config import Config
from metarl.running.fingerprint import changes, fingerprint
from metarl.running.loading import newest_checkpoint, shipped

edit: dict[str, Any] = {}
"""What was changed in the file of the family below."""


class Hall(gym.Env):
    """A walk along a line."""

    task = np.zeros(1)

    def __init__(self, observed: float, seen: int, acted: float, kind: str) -> None:
        self.observation_space = gym.spaces.Box(-observed, observed, (seen,), np.float32)
        self.action_space = gym.spaces.Box(-acted, acted, (1,), np.float32)
        if kind == "Discrete":
            self.action_space = gym.spaces.Discrete(3)

    def _seen(self) -> np.ndarray:
        return np.full(self.observation_space.shape, self.x, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-0.1, 0.1))
        return self._seen(), {}

    def step(self, action):
        self.x = float(np.clip(self.x + 0.2 * float(np.ravel(action)[0]), -5.0, 5.0))
        return self._seen(), -abs(self.x - float(self.task[0])), False, False, {}


def hall() -> GymnasiumFamily:
    """Return the family as its file says now."""
    now = {
        "names": ("goal",), "range": (-1.0, 1.0), "test": None, "values": None, "horizon": 10,
        "observed": 10.0, "seen": 1, "acted": 1.0, "kind": "Box", **edit,
    }  # fmt: skip
    test = now["test"] and dict.fromkeys(now["names"], now["test"])
    tasks: Any = Uniform(dict.fromkeys(now["names"], now["range"]), test=test)
    if now["values"] is not None:
        tasks = Finite(now["names"], now["values"])
    options = {key: now[key] for key in ("observed", "seen", "acted", "kind")}
    return GymnasiumFamily(
        name="hall", env=Hall, env_options=options, tasks=tasks, horizon=now["horizon"]
    )


def config(**overrides: Any) -> Config:
    values = {
        "tasks": 2, "episodes": 2, "iterations": 2, "policy.hidden": (4,), "threads": 1,
        "checkpoint_every": 1,
    }  # fmt: skip
    return resolve(None, "test_family_identity:hall", overrides={**values, **overrides})


@pytest.fixture
def changed():
    yield edit.update
    edit.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    assert not edit
    folder = tmp_path_factory.mktemp("identity") / "run"
    meta = train(config(), folder)
    meta.save(folder.parent / "policy.safetensors")
    meta.adapt(np.zeros(1), episodes=2).save(folder.parent / "adapted.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path, whole) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


CHANGES = [
    ({"horizon": 25}, ["horizon", 10, 25]),
    ({"range": (3.0, 9.0)}, ["train", "test", "goal", "[-1, 1]", "[3, 9]"]),
    ({"test": (1.0, 2.0)}, ["test", "goal", "[1, 2]"]),
    ({"values": [[-1.0], [1.0]]}, ["goal", "values"]),
    ({"names": ("target",)}, ["components", "goal", "target"]),
    ({"names": ("goal", "wind")}, ["components", "wind"]),
    ({"observed": 20.0}, ["observation", 10, 20]),
    ({"seen": 2}, ["observations", "shape", "[1]", "[2]"]),
    ({"acted": 5.0}, ["actions", -1, -5]),
    ({"kind": "Discrete"}, ["actions", "Box", "Discrete"]),
]


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "names"), CHANGES)
def test_a_run_does_not_go_on_with_a_changed_family(folder, changed, change, names):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed(change)
    with refused(folder, *names, error=RunError):
        train(config(iterations=3), folder, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    edit.clear()
    assert train(config(iterations=3), folder, resume=True).provenance["iteration"] == 3


def test_every_difference_is_named(folder, changed):
    changed({"horizon": 25, "names": ("target",), "range": (3.0, 9.0), "acted": 5.0})
    with refused("horizon", "components", "train tasks", "test tasks", "actions", error=RunError):
        train(config(iterations=3), folder, resume=True)


def test_the_command_refuses_a_changed_family_in_one_line(folder, changed, capsys):
    changed({"horizon": 25})
    assert run("train", "--resume", str(folder), "--iterations", "3") == 2
    assert mentions(capsys.readouterr().err, "horizon", 10, 25)


def test_a_checkpoint_of_a_run_on_the_changed_family_is_refused(tmp_path, folder, changed):
    changed({"horizon": 25})
    train(config(), tmp_path / "other")
    edit.clear()
    shutil.copy(newest_checkpoint(tmp_path / "other"), newest_checkpoint(folder))
    with refused("horizon", 25, 10, error=CheckpointError):
        train(config(iterations=3), folder, resume=True)


def test_another_family_file_of_the_same_name_is_noticed(tmp_path, monkeypatch, folder):
    """The folder that comes first on Python's path decides which file a name means."""
    text = (
        "from metarl.envs import make_family\nimport dataclasses\n"
        "mine = dataclasses.replace(make_family('navigation-2d'), horizon={})\n"
    )
    for name, horizon in (("here", 5), ("there", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a_family_of_mine.py").write_text(text.format(horizon))
    values = {"tasks": 2, "episodes": 2, "iterations": 1, "policy.hidden": (4,), "threads": 1}
    monkeypatch.syspath_prepend(tmp_path / "here")
    train(resolve(None, "a_family_of_mine:mine", overrides=values), tmp_path / "mine")
    monkeypatch.syspath_prepend(tmp_path / "there")
    monkeypatch.delitem(__import__("sys").modules, "a_family_of_mine")
    longer = resolve(None, "a_family_of_mine:mine", overrides={**values, "iterations": 2})
    with refused("horizon", 5, 6, error=RunError):
        train(longer, tmp_path / "mine", resume=True)


# Evaluating and adapting --------------------------------------------------------------------------

UNUSABLE = [CHANGES[i] for i in (4, 5, 7, 8, 9)]
TOLD = [CHANGES[i] for i in range(4)]


def uses(whole: Path) -> dict[str, Any]:
    """Return what needs the family, of a run and of a policy file."""
    return {
        "run": lambda: evaluate(whole, tasks=2, episodes=2, steps=1, threads=1),
        "file": lambda: evaluate(
            whole.parent / "policy.safetensors", tasks=2, episodes=2, steps=1, threads=1
        ),
        "adapt": lambda: load(whole).adapt(np.zeros(1), episodes=2),
        "adapter": lambda: load(whole).adapter(),
    }


@pytest.mark.parametrize("use", ["run", "file", "adapt", "adapter"])
@pytest.mark.parametrize(("change", "names"), UNUSABLE)
def test_a_policy_is_not_used_on_a_family_that_it_does_not_fit(whole, changed, use, change, names):
    changed(change)
    with refused(*names):
        uses(whole)[use]()


@pytest.mark.parametrize("use", ["run", "file", "adapt"])
@pytest.mark.parametrize(("change", "names"), TOLD)
def test_a_policy_is_used_on_other_tasks_and_horizons_with_a_notice(
    whole, changed, caplog, use, change, names
):
    changed(change)
    uses(whole)[use]()
    (message,) = caplog.messages
    assert mentions(message, "test_family_identity:hall", *names)
    assert "\n" not in message


def test_an_unchanged_family_is_not_mentioned(whole, caplog):
    for use in uses(whole).values():
        use()
    load_policy(whole.parent / "adapted.safetensors")
    assert not caplog.messages


def test_bounds_of_observations_change_no_result(whole, changed, caplog):
    changed({"observed": 20.0})
    uses(whole)["run"]()
    assert not caplog.messages


def test_an_adapted_policy_knows_its_family_too(tmp_path, whole, changed, caplog):
    path = whole.parent / "adapted.safetensors"
    changed({"horizon": 25})
    policy = load_policy(path)
    assert mentions(caplog.messages[0], "horizon", 10, 25)
    policy.save(tmp_path / "again")
    assert checkpoints.load(tmp_path / "again")[1]["family"]["horizon"] == 10
    changed({"names": ("target",)})
    with refused("components", "goal", "target"):
        load_policy(path)


def test_seeds_and_references_of_a_changed_family_are_told(tmp_path, whole, changed, caplog):
    changed({"horizon": 25})
    train(config(seed=1), tmp_path / "changed")
    with refused("horizon", 10, 25):
        evaluate([whole, tmp_path / "changed"], tasks=2, episodes=2, steps=1)
    caplog.clear()
    other = {"other": whole}
    evaluate(tmp_path / "changed", tasks=2, episodes=2, steps=1, threads=1, references=other)
    assert mentions(caplog.messages[0], "horizon", 10, 25)


def test_commands_refuse_a_changed_family_in_one_line(whole, changed, capsys):
    changed({"names": ("target",)})
    assert run("evaluate", str(whole), "--tasks", "2", "--out", str(whole.parent / "results")) == 2
    assert run("adapt", str(whole), "--task", "target=0") == 2
    assert mentions(capsys.readouterr().err, "goal", "target")


# Files from before, and what is stored ------------------------------------------------------------


def test_files_without_a_fingerprint_are_used_as_before(folder, changed, caplog):
    kept = json.loads((folder / "config.json").read_text())
    del kept["family"]
    (folder / "config.json").write_text(json.dumps(kept))
    for path in (folder / "checkpoints").iterdir():
        tensors, metadata = checkpoints.load(path)
        del metadata["family"]
        checkpoints.save(path, tensors, metadata)
    changed({"horizon": 25})
    evaluate(folder, tasks=2, episodes=2, steps=1, threads=1)
    assert train(config(iterations=3), folder, resume=True).provenance["iteration"] == 3
    assert not caplog.messages


@pytest.mark.parametrize("name", ["navigation-2d-icml2017", "half-cheetah-dir-icml2017"])
def test_shipped_policies_load_as_before(name, caplog):
    assert name in shipped()
    meta = load(name)
    assert meta.family.horizon
    assert not caplog.messages


@pytest.mark.parametrize(
    "name", ["navigation-2d", "half-cheetah-dir", "tabular-mdp", "sinusoid", "walker2d-params"]
)
def test_a_fingerprint_is_short_standard_json_and_always_the_same(name):
    one, other = (fingerprint(registry.find_family(name)) for _ in range(2))
    text = json.dumps(one, allow_nan=False)
    assert len(text) < 10_000
    assert not changes(json.loads(text), other)


def test_an_infinite_bound_is_standard_json():
    family = make_family("half-cheetah-dir")
    env = family.make()
    found = fingerprint(family, (env.observation_space, env.action_space))
    env.close()
    json.dumps(found, allow_nan=False)
    assert not changes(found, json.loads(json.dumps(found)))


def test_many_values_and_classes_differ_where_one_does():
    values = np.arange(200.0)[:, None]
    others = values.copy()
    others[77] += 0.5

    def listed(values: np.ndarray) -> dict[str, Any]:
        edit["values"] = values
        try:
            return fingerprint(hall())
        finally:
            edit.clear()

    assert not changes(listed(values), listed(values.copy()))
    assert changes(listed(values), listed(others))
    labels = np.repeat(np.arange(20), 6)
    images = np.zeros((120, 4, 4))
    parts = [{"train": [*range(8), last], "test": [18, 19]} for last in (8, 9)]
    one, other = (
        fingerprint(FewShotFamily(images, labels, 2, 1, queries=2, test_queries=2, **part))
        for part in parts
    )
    assert changes(one, other)


# Names --------------------------------------------------------------------------------------------


def test_two_families_of_one_name_are_refused():
    def sinusoid() -> None:
        """Another family of supervised tasks has this name."""

    def navigation_2d() -> None:
        """Another family of environments has this name."""

    for function in (sinusoid, navigation_2d):
        for register in (registry.register, registry.register_data({})):
            with refused(function.__name__, error=UserError):
                register(function)  # type: ignore[arg-type]


def test_a_name_that_two_packages_offer_is_refused(tmp_path, monkeypatch):
    for package in ("one", "two"):
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[{registry.ENTRY_POINTS}]\nshared-name = {package}_module:family\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    with refused("one_module:family", "two_module:family", "shared-name"):
        make_family("shared-name")
