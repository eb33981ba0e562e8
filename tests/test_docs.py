"""What stands in the README and the other documents runs, and so do the examples."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro
from expecting import mentions, refused, run

import metarl
from metarl.algorithms import algorithms
from metarl.cli import main as cli
from metarl.envs import family_names, registry
from metarl.envs.registry import data_names, option_defaults
from metarl.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PAGES = {str(p.relative_to(ROOT)): p for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))}
TEXTS = {name: path.read_text() for name, path in sorted(PAGES.items())}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(kind: str) -> list[tuple[str, str]]:
    """Return the (page, content) of all blocks of a language."""
    return [
        (page, code)
        for page, text in TEXTS.items()
        for language, code in re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.M | re.S)
        if language == kind
    ]


PYTHON = [(page, code) for page, code in blocks("python") if not code.startswith("# examples/")]
EXCERPTS = [(page, code) for page, code in blocks("python") if code.startswith("# examples/")]
LINES = [line for _, code in blocks("bash") for line in code.splitlines()]
LAUNCHERS = [ROOT / "examples" / name for name in ("slurm.sh", "kubernetes.yaml")]
LINES += [line for path in LAUNCHERS for line in re.findall(r"-m (metarl .*)", path.read_text())]
CELLS = re.findall(r"^\|.*?`(metarl [^`]+)`", "\n".join(TEXTS.values()), re.M)  # of a table
COMMANDS = sorted({line.partition("  #")[0].strip() for line in [*LINES, *CELLS]} - {""})
CHECKED = [command.split()[2] for command in COMMANDS if command.startswith("metarl check ")]


@pytest.fixture(autouse=True)
def _folder_of_a_user(tmp_path, monkeypatch):
    """A folder with the examples, and a table of families that may be added to."""
    shutil.copytree(
        ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page for page, _ in PYTHON])
def test_python_blocks_run(page, code, monkeypatch):
    module = types.ModuleType("documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    before = len(names)
    exec(compile(code, page, "exec"), names)
    assert len(names) > before + 1  # it ran to its end and left what it made


HOPPER_VEL = '''
from functools import partial

from metarl.envs.mujoco.family import MujocoFamily
from metarl.envs.mujoco.rewards import UNITS, velocity_reward
from metarl.envs.registry import register
from metarl.envs.tasks import Uniform


@register(gymnasium_id="metarl/HopperVel-v0")
def hopper_vel(low: float = 0.0, high: float = 2.0, horizon: int = 200) -> MujocoFamily:
    """Hop at a goal velocity from [low, high] m/s."""
    return MujocoFamily(
        name="hopper-vel",
        description="hopper hops at a goal velocity (m/s)",
        tasks=Uniform({"velocity": (low, high)}),
        achieved={"velocity": "x_velocity"},
        units=UNITS,
        horizon=horizon,
        env="Hopper-v5",
        reward=partial(velocity_reward, control=1e-3, bonus=1.0),
    )
'''


def test_a_file_in_the_folder_of_families_adds_a_family(tmp_path):
    shutil.copytree(ROOT / "metarl", tmp_path / "metarl")
    envs = tmp_path / "metarl" / "envs"
    shutil.copytree(ROOT / "envs", envs)
    (envs / "families" / "hopper_vel.py").write_text(HOPPER_VEL)
    use = (
        "import gymnasium, metarl.envs as envs; gymnasium.make('metarl/HopperVel-v0');"
        " print(envs.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", use], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(envs / "__init__.py"), done.stderr


@pytest.mark.parametrize(("page", "code"), EXCERPTS, ids=[code.split()[1] for _, code in EXCERPTS])
def test_excerpts_equal_lines_of_the_example(page, code):
    first, _, rest = code.partition("\n")
    assert rest in (ROOT / first.removeprefix("# ")).read_text()


EXTRAS = {
    "from_stable_baselines3": "stable_baselines3",
    "log_to_wandb": "wandb",
    "my_rooms": "minigrid",
    "out_of_distribution": "pandas",
    "tune_with_optuna": "optuna",
}
"""Packages that examples need, and the tests do not."""


LONG = {
    "compare_runs", "curriculum", "from_stable_baselines3", "log_to_wandb", "my_algorithm",
    "neural_critic", "own_attention", "own_distribution", "own_loop", "own_network",
    "own_outer_loss", "own_recurrent_network", "train_my_family", "tune_with_optuna",
}  # fmt: skip
"""Examples that take more than five seconds; `make examples` runs all of them."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else [])
        for path in EXAMPLES
    ],
)
def test_examples_run(path):
    where = dict(os.environ)
    if (package := EXTRAS.get(path.stem)) and importlib.util.find_spec(package) is None:
        stand_ins = ROOT / "tests" / "stand_ins"
        if not (stand_ins / f"{package}.py").exists():
            pytest.skip(f"{package} is not installed")
        where["PYTHONPATH"] = os.pathsep.join([str(stand_ins), where.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", f"examples/{path.name}"]
    result = subprocess.run(command, capture_output=True, text=True, env=where)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    if path.stem.startswith("my_") and path.stem != "my_algorithm":
        assert not result.stdout.startswith("[")  # no list of faults


def test_the_loop_of_the_example_is_that_of_training(capsys):
    shown = importlib.import_module("examples.own_loop")
    lines = capsys.readouterr().out.splitlines()[:3]
    own = {"tasks": shown.TASKS, "episodes": 10, "stratified": True, "iterations": 3, "threads": 1}
    metarl.train(shown.config.with_options(own), "run")
    for line, row in zip(lines, read_metrics(Path("run")), strict=True):
        iteration, *found = map(float, re.findall(r"-?[0-9.]+[0-9]|[0-9]", line))
        assert iteration == row["iteration"] - 1
        # The order of the Fisher products' samples is another one, which rounding shows later.
        expected = [row[key] for key in ("return_pre", "return_post", "kl")]
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_accepted(command, tmp_path, monkeypatch):
    # Parsed whole and handed to the function behind them, which is run where it is quick.
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] in ("python", "bash"):
        assert (ROOT / words[1]).exists()
        return
    if words[0] == "torchrun":
        if "-m" not in words:
            assert (ROOT / words[-1]).exists()
            return
        words = words[words.index("-m") + 1 :]
    if words[0] == "source":
        assert words[1].endswith("/bin/activate")
        return
    if words[0] == "tensorboard":
        pytest.importorskip("tensorboard")
        return
    assert words[0] == "metarl"
    if words[1] not in ("families", "algorithms"):
        kind, _ = cli.command_of(words[1])
        monkeypatch.setattr(cli, "command_of", lambda name: (kind, lambda command: 0))
    if "--resume" in words:
        from conftest import small

        from metarl.runs.folder import create_run

        create_run(tmp_path / words[words.index("--resume") + 1], {"config": small().to_json()})
    assert run(*words[1:]) == 0


def test_every_option_that_the_text_names_exists(capsys):
    for name in cli.commands():
        assert run(name, "--help") == 0
    for name, algorithm in algorithms().items():
        family = "navigation-2d" if algorithm.head == "meta" else "characters"
        assert run("train", family, "--algorithm", name, "--help") == 0
    for words in (["--outer", "adamw"], ["--baseline", "critic"]):
        assert run("train", "navigation-2d", *words, "--help") == 0
    assert run("train", "characters", "--help") == 0
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    of_families = {option for name in data_names() for option in option_defaults(name)}
    known |= {f"--{option.replace('_', '-')}" for option in of_families}
    known |= {option.partition(".")[0] for option in known}  # a whole section
    known |= {"--version", "--max-restarts", "--nnodes"}  # the last two are torchrun's
    for page, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for span in re.findall(r"`([^`\n]+)`", prose):
            if not span.startswith(("python ", "torchrun ", "pip ", "twine ")):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", span)) - known
                assert not unknown, f"{page}: {span}"


def test_the_documentation_checks_every_example_family():
    files = {name.partition(":")[0].removeprefix("examples.") for name in CHECKED}
    shown = {path.stem for path in EXAMPLES if "check_task_family" in path.read_text()}
    assert shown - set(EXTRAS) <= files
    assert len(shown) > 5


@pytest.mark.parametrize("name", [name for name in CHECKED if name.startswith("examples.")])
def test_each_example_family_trains_and_evaluates(name, capsys):
    small = ["--tasks", "2", "--episodes", "2", "--workers", "0", "--out", "run"]
    assert run("train", name, "--iterations", "2", *small) == 0
    assert run("evaluate", "run", "--steps", "1", *small) == 0
    assert mentions(capsys.readouterr().out, "random")
    made = importlib.import_module(name.partition(":")[0])  # from Python, the same
    own = getattr(made, name.partition(":")[2])
    task = own.tasks.grid(1)[0]
    policy = metarl.load("run").adapt(own.make(task), steps=1, episodes=2)
    env = own.make(task)
    assert env.action_space.contains(policy.act(env.reset(seed=0)[0]))


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_has_a_target(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        path = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link
    for name in re.findall(r"(?:scripts|tests|examples)/[a-z_]+\.\w+", TEXTS[page]):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page, text in TEXTS.items():
        for tree in re.findall(r"^```{toctree}\n(.*?)^```", text, re.M | re.S):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {path for e in entries for path in PAGES[page].parent.glob(f"{e}.md")}
    pages = set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "index.md"}
    assert pages == listed


def test_every_family_is_described():
    for name in set(family_names()):
        assert f"`{name}`" in TEXTS["docs/families.md"], name


def test_the_cited_version_is_the_newest():
    (newest, *_) = re.findall(r"^## (\d+\.\d+\.\d+)", TEXTS["CHANGELOG.md"], re.M)
    assert f"\nversion: {newest}\n" in (ROOT / "CITATION.cff").read_text()


def test_records_match_their_rows_and_produce_the_tables_of_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reproduce = importlib.import_module("reproduce")
    for name, row in reproduce.ROWS.items():
        record = json.loads((ROOT / "docs" / "records" / f"{name}.json").read_text())
        flags = reproduce.flags_of(row, reproduce.Arguments())
        assert record["command"] == " ".join(["metarl train", *flags, "--seed SEED"])
    for folder in ("records", "results", "experiments"):
        shutil.copytree(ROOT / "docs" / folder, tmp_path / folder)
    written = reproduce.write_docs(tmp_path)
    assert written == {name: TEXTS[f"docs/{name}"] for name in written}
    assert {Path(name).parent.name for name in written} == {"results", "experiments"}


def test_a_script_continues_a_run_only_with_the_same_options(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    trainings = importlib.import_module("trainings")
    train = trainings.train
    flags = ["navigation-2d", "--tasks", "2", "--episodes", "2", "--family-options", "horizon=5"]
    assert run("train", *flags, "--iterations", "2", "--out", str(tmp_path / "run")) == 0
    train(tmp_path / "run", [*flags, "--iterations", "3"], 1)
    with refused(tmp_path / "run.log"):
        train(tmp_path / "run", [*flags, "--iterations", "3", "--seed", "1"], 1)
    assert mentions((tmp_path / "run.log").read_text(), "seed", 0, 1)
    # Nothing is begun after a failure.
    wanted = {tmp_path / name: [*flags, "--iterations", "2"] for name in ("run", "next")}
    with refused(tmp_path / "run", 3, 2, "--out"):
        trainings.train_all(wanted, 1)
    assert not (tmp_path / "next").exists()


def test_algorithms_are_compared_with_the_options_of_the_preset(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    compare = importlib.import_module("compare_algorithms")
    arguments = compare.Arguments("half-cheetah-dir", Path("unused"))
    for name in compare.OF_POLICIES:
        expected = metarl.resolve(arguments.preset, arguments.family, name, {"threads": 1})
        options = compare.run_config(arguments, name, 0).options()
        for key in ("iterations", "checkpoint_every"):
            options[key] = getattr(expected.run, key)
        assert options == expected.options()


def test_a_record_keeps_its_seeds_and_references(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reproduce = importlib.import_module("reproduce")
    path = ROOT / "docs" / "records" / "navigation-2d-icml2017.json"
    with refused("--seeds", [1, 2, 3, 4]):
        reproduce.check_kept(path, reproduce.Arguments(seeds=(0,), references=True))
    with refused("--references"):
        reproduce.check_kept(path, reproduce.Arguments(seeds=tuple(range(5))))
    reproduce.check_kept(path, reproduce.Arguments(seeds=tuple(range(6)), references=True))


def test_the_best_of_the_newest_checkpoints_is_chosen_by_the_rows_measure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reproduce = importlib.import_module("reproduce")
    (tmp_path / "checkpoints").mkdir()
    for i in range(6):
        (tmp_path / "checkpoints" / f"{i:06d}.safetensors").touch()
    asked = []

    def measured(path, **how):
        asked.append(how)
        return {1: 9.0, 3: 5.0}.get(int(path.stem), float(path.stem) / 10)

    monkeypatch.setattr(reproduce, "validation_return", measured)
    row = reproduce.Row("navigation-2d", "icml2017", 1e6, last=4, judged_after=2, judged_on=80)
    found = reproduce.choose(tmp_path, row)
    assert found["checkpoint"] == str(tmp_path / "checkpoints" / "000003.safetensors")
    assert asked == [{"steps": 2, "tasks": 80}] * 4
    reproduce.choose(tmp_path, row)  # known by now
    reproduce.choose(tmp_path, dataclasses.replace(row, judged_on=20))
    assert asked[4:] == [{"steps": 2, "tasks": 20}] * 4


def test_the_documented_commands_reproduce_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reproduce = importlib.import_module("reproduce")
    pages = [TEXTS[name] for name in TEXTS if name.startswith(("docs/results", "docs/experiments"))]
    commands = re.findall(r"python scripts/reproduce\.py ([^`\n]+)", "\n".join(pages))
    assert {command.split()[0] for command in commands} == set(reproduce.ROWS)
    for words in commands:
        given = tyro.cli(reproduce.Arguments, args=words.split())
        for name in given.rows:
            stem = f"{name}.{given.repeat}" if given.repeat else name
            path = ROOT / "docs" / "records" / f"{stem}.json"
            reproduce.check_kept(path, given)
            record = json.loads(path.read_text())
            assert list(given.seeds) == record["seeds"]
            if given.references:
                pretrained = record["references"]["pretrained"]["seeds"]
                assert len(given.reference_seeds) == pretrained


def test_the_gap_closed_is_the_share_of_the_distance_to_the_oracle(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    records = importlib.import_module("records")
    returns = {"MAML": (7.0, 70.0, 90.0), "random": (-50.0, 0.0), "oracle": (140.0, 160.0)}
    assert records.gap_closed(returns) == "0.60"  # of the way from -50 to 150
