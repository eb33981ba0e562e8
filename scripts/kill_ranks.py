"""Kill random ranks of runs under torchrun --max-restarts; compare results, time the restarts.

python scripts/kill_ranks.py OUT [--kills 20] [--ranks 2]

Each kill uses a separate run, a random moment and SIGKILL. A run must end like an undisturbed run,
and leave no process.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from os import kill as send
from pathlib import Path

from metarl.runs.checkpoints import load
from metarl.runs.metrics import measured_time, read_metrics

TRAIN = (
    "-m", "metarl", "train", "navigation-2d", "--tasks", "12", "--episodes", "5", "--threads", "1",
    "--resume", "auto", "--iterations",
)  # fmt: skip


def ended(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def children(process: subprocess.Popen) -> list[int]:
    paths = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(pid) for path in paths for pid in path.read_text("utf-8").split())


def wait(condition, process: subprocess.Popen) -> float:
    start = time.perf_counter()
    while process.poll() is None and not condition():
        time.sleep(0.005)
    return time.perf_counter() - start


def end_of(folder: Path) -> str:
    """Return everything that a run learned and recorded, as text."""
    newest = sorted((folder / "checkpoints").glob("*.safetensors"))[-1]
    tensors, _ = load(newest)
    rows = [{k: v for k, v in row.items() if not measured_time(k)} for row in read_metrics(folder)]
    held = {name: tensors[name].numpy().tobytes().hex() for name in sorted(tensors)}
    return newest.name + json.dumps([held, rows])


def one_kill(folder: Path, ranks: int, iterations: int, rng: random.Random) -> tuple[float, float]:
    """Return the seconds until the other ranks have ended, and until the next metrics."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), "--max-restarts", "3", *TRAIN, str(iterations), "--out", str(folder),
    ]  # fmt: skip
    metrics = folder / "metrics.jsonl"
    at = rng.randrange(1, iterations - 5)

    def rows() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        wait(lambda: rows() >= at, process)
        time.sleep(rng.uniform(0.0, 0.2))  # anywhere within an iteration
        group = children(process)
        victim = rng.choice(group)
        send(victim, signal.SIGKILL)
        noticed = wait(lambda: all(map(ended, group)), process)
        before = rows()
        back = noticed + wait(lambda: rows() > before, process)
        code = process.wait()
    assert code == 0, f"{folder}: exit code {code}"
    assert all(map(ended, group)), f"{folder}: a process is left"
    return noticed, back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=30)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    rng = random.Random(0)
    alone = options.out / "alone"
    command = [sys.executable, *TRAIN, str(options.iterations), "--out", str(alone)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected, times = end_of(alone), []
    for i in range(options.kills):
        folder = options.out / f"kill-{i}"
        times.append(one_kill(folder, options.ranks, options.iterations, rng))
        same = end_of(folder) == expected
        print(
            f"kill {i + 1}: the others ended after {times[-1][0]:.2f} s, the next iteration was"
            f" saved after {times[-1][1]:.1f} s; {'the same end' if same else 'ANOTHER END'}",
            flush=True,
        )
        assert same
    noticed, back = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"median: {noticed:.2f} s until the others ended, {back:.1f} s until back at work")


if __name__ == "__main__":
    main()
