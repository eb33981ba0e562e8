"""Runs on several ranks: the same bits as on one, and what happens when one of them fails."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import expecting
import pytest
import torch
from expecting import mentions, refused

from metarl.cli.main import main
from metarl.config.options import available_threads
from metarl.config.resolve import resolve
from metarl.distributed.process_group import ALONE, CHUNK, ProcessGroup, device_of
from metarl.envs.errors import UserError
from metarl.runs.checkpoints import load
from metarl.runs.metrics import measured_time, read_metrics
from metarl.training.run import new_trainer, train

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")

ALGORITHMS = ("maml-trpo", "promp", "reptile", "e-maml", "imaml")


def case(family, options, algorithm, iterations, tasks, episodes, **values):
    values = {"tasks": tasks, "episodes": episodes, **values}
    return family, options, algorithm, values, iterations


def cases(tasks: int, iterations: int) -> dict[str, tuple]:
    """Every kind of outer step on a native family and on one in Python."""
    return {
        f"{family}-{algorithm}": case(family, {"horizon": 8}, algorithm, iterations, tasks, 2)
        for family in ("half-cheetah-vel", "cartpole-length")
        for algorithm in ALGORITHMS
    }


def started(ranks: int, *command: str, **options) -> subprocess.Popen:
    """Return torchrun at work on a module or a script."""
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", str(ranks), *command],
        env={**os.environ, **threads, **options.pop("env", {})},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def run(ranks: int, *command: str, **options) -> str:
    process = started(ranks, *command, **options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def run_cases(ranks: int, todo: dict[str, tuple], out: Path) -> None:
    path = out.with_suffix(".json")
    path.write_text(json.dumps(todo))
    run(ranks, str(HERE / "rank_runs.py"), str(path), str(out))


def run_alone(todo: dict[str, tuple], out: Path) -> None:
    for name, (family, options, algorithm, values, iterations) in todo.items():
        length = {"family_options": options, "iterations": iterations}
        config = resolve(None, family, algorithm, {"threads": 2, **values, **length})
        train(config, out / name, resume="auto")


def until(todo: dict[str, tuple], iterations: int) -> dict[str, tuple]:
    return {name: (*parts[:-1], iterations) for name, parts in todo.items()}


def assert_same(one: Path, other: Path) -> None:
    """Assert that two runs learned the same bits and recorded the same numbers."""
    newest = sorted((one / "checkpoints").glob("*.safetensors"))[-1].name
    (a, _), (b, _) = (load(run / "checkpoints" / newest) for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), one.name
    rows = [
        [{k: v for k, v in row.items() if not measured_time(k)} for row in read_metrics(run)]
        for run in (one, other)
    ]
    assert rows[0] == rows[1], one.name


@pytest.mark.parametrize("tasks", [1, 4, 5, 40, 41])
def test_blocks_are_whole_chunks_of_all_tasks(tasks):
    for size in range(1, -(-tasks // CHUNK) + 1):
        blocks = []
        for rank in range(size):
            process_group = ProcessGroup()
            process_group.rank, process_group.size = rank, size
            blocks.append(process_group.block(tasks))
        assert (blocks[0].start, blocks[-1].stop) == (0, tasks)
        assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
        assert all(b.start % CHUNK == 0 and b.stop > b.start for b in blocks)


def test_more_ranks_than_chunks_are_refused():
    process_group = ProcessGroup()
    process_group.size = 11
    with refused("tasks", 40, "ranks", 11):
        process_group.block(40)


def test_supervised_tasks_train_on_one_rank():
    process_group = ProcessGroup()
    process_group.size = 2
    with refused("sinusoid", "rank", 2):
        new_trainer(resolve(None, "sinusoid"), process_group)


def test_one_process_is_the_identity():
    values = torch.randn(3, 2)
    assert torch.equal(ALONE.gather(values), values)
    assert (ALONE.total(3), ALONE.largest(4), ALONE.any(False)) == (3, 4, False)
    with refused("mine"), ALONE.errors_shared():
        raise UserError("mine")


def test_ranks_on_a_machine_share_its_processors_and_gpus(monkeypatch):
    alone = available_threads()
    assert device_of("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert available_threads() == max(alone // 2, 1)
    assert (device_of("cuda"), device_of("cpu"), device_of("cuda:0")) == ("cuda:1", "cpu", "cuda:0")


def test_two_ranks_and_a_resume_on_one_agree_bit_for_bit(tmp_path):
    todo = cases(9, 2)
    run_alone(todo, tmp_path / "one")
    run_cases(2, until(todo, 1), tmp_path / "two")
    # Half of them go on on one rank; each of the others had two iterations on both.
    run_alone(todo, tmp_path / "two")
    for name in todo:
        assert_same(tmp_path / "one" / name, tmp_path / "two" / name)


def test_callbacks_do_the_same_on_two_ranks(tmp_path):
    command = [
        "train", "navigation-2d", "--family-options", "horizon=8", "--tasks", "5", "--episodes",
        "2", "--threads", "1", "--iterations", "3", "--callback", "test_callbacks:Curriculum",
        "--callback", "test_callbacks:Impatient", "--out",
    ]  # fmt: skip
    assert expecting.run(*command, str(tmp_path / "one")) == 0
    run(2, "-m", "metarl", *command, str(tmp_path / "two"))
    assert rows_of(tmp_path / "two") == 2  # the second ended both
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_any_number_of_ranks_agrees_bit_for_bit(ranks, tmp_path):
    few = (33, 2)
    norm = {"policy.normalize": True}
    steps = {"inner.steps": 2, "inner.min_kl": 0.05}
    clipped = {"outer.steps": 4}
    recurrent = {"policy.network": "gru", "policy.units": 7}
    flat = {"outer.schedule": "constant", "meta.anneal_fraction": 0.0}
    todo = cases(33, 5) | {
        "normalize": case("half-cheetah-vel", {}, "maml-trpo", 5, *few, **norm),
        "fitted": case("navigation-2d", {}, "maml-trpo", 5, *few, **steps),
        "clipped": case("navigation-2d", {}, "promp", 5, *few, **clipped),
        "episodes": case("cartpole-length", {}, "dice-maml", 5, 33, 8),
        "samples": case("cartpole-length", {}, "maml-trpo", 5, 33, 8),
        "recurrent": case("navigation-2d", {"horizon": 6}, "maml-trpo", 5, *few, **recurrent),
        "trials": case("bandit", {}, "rl2", 5, *few),
        **{
            algorithm: case("navigation-2d", {}, algorithm, 5, *few)
            for algorithm in ("meta-sgd", "anil", "cavia", "maml-ppo", "oracle")
        },
        # Its schedules follow the length of the run, which is another one here until it goes on.
        "maml++": case("navigation-2d", {}, "maml++", 5, *few, **flat),
    }
    run_alone(todo, tmp_path / "one")
    run_cases(ranks, until(todo, 3), tmp_path / "some")
    run_cases(5 - min(ranks, 3), todo, tmp_path / "some")
    for name in todo:
        assert_same(tmp_path / "one" / name, tmp_path / "some" / name)


def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    run(2, str(HERE / "rank_faults.py"), str(tmp_path))
    assert {path.name for path in tmp_path.glob("fine-*")} == {"fine-0", "fine-1"}


def train_command(out: Path, iterations: int) -> list[str]:
    return [
        "-m", "metarl", "train", "navigation-2d", "--tasks", "12", "--episodes", "2", "--threads",
        "1", "--iterations", str(iterations), "--out", str(out), "--resume", "auto",
    ]  # fmt: skip


def children(process: subprocess.Popen) -> list[int]:
    """Return torchrun's ranks, in their order."""
    found = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        found += [int(pid) for pid in path.read_text().split()]
    return sorted(found)


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def rows_of(out: Path) -> int:
    return len(read_metrics(out)) if (out / "metrics.jsonl").exists() else 0


def ended(pids: list[int]) -> bool:
    stats = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not s.exists() or s.read_text().rpartition(")")[2].split()[0] == "Z" for s in stats)


def test_a_signal_to_one_rank_stops_all_with_the_iteration_saved(tmp_path):
    out = tmp_path / "run"
    process = started(2, *train_command(out, 10_000))
    try:
        wait_for(lambda: rows_of(out) >= 1)
        ranks = children(process)
        os.kill(ranks[1], signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert ended(ranks)
    assert "Traceback" not in err.partition("torch/distributed/elastic")[0]
    newest = sorted((out / "checkpoints").glob("*.safetensors"))[-1]
    assert int(newest.stem) == rows_of(out) < 10_000


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path):
    out = tmp_path / "run"
    process = started(2, *train_command(out, 10_000), "--rank-timeout", "5")
    try:
        wait_for(lambda: rows_of(out) >= 1)
        ranks = children(process)
        os.kill(ranks[1], signal.SIGSTOP)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert ended(ranks)
    assert mentions(err, "rank 0", "--rank-timeout", 5)


@pytest.mark.slow
def test_killed_ranks_restart_and_reach_the_same_end(tmp_path):
    rng = random.Random(0)
    alone, out = tmp_path / "one", tmp_path / "some"
    subprocess.run([sys.executable, *train_command(alone, 60)], check=True)
    process = started(3, "--max-restarts", "10", *train_command(out, 60))
    seen: list[int] = []
    try:
        for kill in range(3):
            rows = 15 * (kill + 1)
            wait_for(lambda: rows_of(out) >= rows or process.poll() is not None)  # noqa: B023
            ranks = children(process)
            seen += ranks
            if ranks:
                os.kill(rng.choice(ranks), signal.SIGKILL)
                wait_for(lambda: ended(ranks))  # noqa: B023
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert ended(seen)
    assert_same(alone, out)


def test_ranks_share_an_evaluation_and_one_of_them_writes_it(tmp_path, monkeypatch, capsys):
    # Tuning meets steps that are not finite, and the paths of the first tasks are of both ranks.
    command = [
        "evaluate", "navigation-2d-icml2017", "--family-options", "horizon=20", "--tasks", "6",
        "--episodes", "2", "--steps", "1",
        "--tune-step-sizes", "--from-scratch", "--experience", "2", "--episodes-per-step", "1",
        "--threads", "1", "--out",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*command, "alone"]) == 0
    out = run(2, "-m", "metarl", *command, "shared")
    assert out.replace("shared", "alone") == capsys.readouterr().out
    one, other = (
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("alone", "shared")
    )
    assert one == other
