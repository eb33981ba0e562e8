"""What ranks do together and how they fail, asserted on each; see test_ranks, which starts it."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from expecting import mentions, refused

from metarl.config.resolve import resolve
from metarl.distributed.process_group import ALONE, CHUNK, ProcessGroup, joined
from metarl.envs.errors import UserError
from metarl.runs import recorder as recording
from metarl.training.run import new_trainer, train


def sums_and_gathers(process_group: ProcessGroup) -> None:
    vectors = list(torch.randn(9, 101, generator=torch.Generator().manual_seed(0)))
    own = process_group.block(34)
    mine = vectors[own.start // CHUNK : -(-own.stop // CHUNK)]
    assert torch.equal(process_group.sum_in_order(mine), ALONE.sum_in_order(vectors))
    # One number a part: fewer coordinates than ranks.
    one, few = ([v[:1] for v in some] for some in (vectors, mine))
    assert torch.equal(process_group.sum_in_order(few), ALONE.sum_in_order(one))
    values = torch.arange(68.0, dtype=torch.float64).view(34, 2)
    assert torch.equal(process_group.gather(values[own]), values)
    assert (
        process_group.total(process_group.rank + 1)
        == process_group.size * (process_group.size + 1) // 2
    )
    assert process_group.largest(process_group.rank) == process_group.size - 1
    assert process_group.any(process_group.rank == 1)
    assert not process_group.any(False)
    assert process_group.from_main(f"rank {process_group.rank}") == "rank 0"


def an_error_is_everyones(process_group: ProcessGroup) -> None:
    for failing in range(process_group.size):
        with (
            refused(f"mine-{failing}") as caught,
            process_group.errors_shared(),
            process_group.errors_shared(),
        ):
            if process_group.rank >= failing:
                raise UserError(f"mine-{process_group.rank}")
            process_group.total(1)
        assert getattr(caught.value, "elsewhere", False) == (process_group.rank != failing)
    assert process_group.total(1) == process_group.size  # they go on together


def an_error_that_cannot_be_sent(process_group: ProcessGroup) -> None:
    class Local(Exception):
        pass

    kind = Local if process_group.rank == 1 else RuntimeError
    with refused("mine", error=kind), process_group.errors_shared():
        if process_group.rank == 1:
            raise Local("mine")


def drift_is_seen(process_group: ProcessGroup) -> None:
    same = torch.tensor([0.5, math.nan])
    process_group.check_same(same)
    drifted = same + 1e-7 if process_group.rank == 1 else same
    with refused("rank 1", "parameters"):
        process_group.check_same(drifted)


def what_is_not_finite_is_skipped(process_group: ProcessGroup) -> None:
    """A reward of rank 1 is NaN: no rank takes the step, and the next iteration is as ever."""
    config = resolve(None, "navigation-2d", "maml-trpo", {"tasks": 8, "episodes": 2, "threads": 1})
    with new_trainer(config, process_group) as trainer:
        collect = trainer.source.collector.collect

        def broken(*args, **options):
            rollout = collect(*args, **options)
            if process_group.rank == 1:
                rollout.reward[0, 0, 0] = math.nan
            return rollout

        with mock.patch.object(trainer.source.collector, "collect", broken):
            row = trainer.iterate()
        assert mentions(row["skipped"], "reward")
        assert trainer.state.skipped_updates == 1
        assert "skipped" not in trainer.iterate()


def a_full_disk(process_group: ProcessGroup, out: Path) -> None:
    """Rank 0 cannot write: all end with its error."""
    config = resolve(None, "navigation-2d", "random", {"tasks": 8, "episodes": 1, "threads": 1})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    patched = mock.patch.object(recording.MetricsLog, "write", side_effect=full)
    with patched, pytest.raises(OSError) as caught:  # noqa: PT011
        train(config, out / "full", process_group=process_group)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "metrics.jsonl")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    with joined(60.0) as process_group:
        sums_and_gathers(process_group)
        an_error_is_everyones(process_group)
        an_error_that_cannot_be_sent(process_group)
        drift_is_seen(process_group)
        what_is_not_finite_is_skipped(process_group)
        a_full_disk(process_group, out)
        (out / f"fine-{process_group.rank}").write_text(json.dumps(vars(process_group.traffic)))
