"""Trains what a file of JSON says, one run after the other; torchrun starts it: see test_ranks.

python -m torch.distributed.run --standalone --nproc-per-node N tests/rank_runs.py CASES OUT

CASES is by the run's name [family, family's options, algorithm, values of the config, iterations].
A run that is there already goes on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from metarl.config.resolve import resolve
from metarl.distributed.process_group import joined
from metarl.training.run import train

if __name__ == "__main__":
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    with joined(float(os.environ.get("RANK_TIMEOUT", "400"))) as process_group:
        for name, (family, options, algorithm, values, iterations) in cases.items():
            length = {"family_options": options, "iterations": iterations}
            config = resolve(None, family, algorithm, {"threads": 1, **values, **length})
            train(config, out / name, resume="auto", process_group=process_group)
    # A thread of the group that is left may meet the end of Python, and abort.
    left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in left), left
