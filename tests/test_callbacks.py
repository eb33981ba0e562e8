"""Callbacks of `metarl.train`: what they see, what they change, and what a resumed run keeps."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same_params, timeless
from expecting import mentions, refused, run

from metarl import Callback, EarlyStopping, KeepBest, evaluate, load, resolve, train
from metarl.config.options import Config
from metarl.runs import checkpoints
from metarl.runs import recorder as recording
from metarl.runs.folder import RunError, flat
from metarl.runs.metrics import read_metrics
from metarl.training.callbacks import CallbackList, Iteration, Run


def small(family: str = "navigation-2d", **overrides: Any) -> Config:
    values = {"tasks": 3, "iterations": 3, "policy.hidden": (4,), "threads": 1}
    if family == "navigation-2d":
        values |= {"family_options": {"horizon": 8}, "episodes": 3}
    return resolve(None, family, overrides={**values, **overrides})


class Curriculum(Callback):
    """Goals nearer than a radius that grows with the best return; keeps what it saw."""

    def __init__(self) -> None:
        self.radius, self.seen = 0.1, np.zeros((0, 2))
        self.calls: list[tuple[str, int]] = []

    def tasks(self, rng, count, family):
        assert family.name == "navigation-2d"
        return rng.uniform(-self.radius, self.radius, (count, 2))

    def update(self, iteration: Iteration) -> None:
        assert iteration.returns_post is not None
        self.radius *= 1.0 + 0.01 * abs(float(iteration.returns_post.mean()))
        self.seen = np.concatenate([self.seen, iteration.tasks])
        self.calls.append(("update", iteration.number))

    def state(self) -> Mapping[str, Any]:
        return {"radius": self.radius, "seen": self.seen, "tensor": torch.tensor([self.radius])}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.radius, self.seen = state["radius"], state["seen"]
        assert state["tensor"].dtype == np.float32


@pytest.mark.parametrize("family", ["navigation-2d", "sinusoid"])
def test_a_callback_finds_its_iteration_on_the_disk(tmp_path, family):
    folder, seen = tmp_path / "run", []

    def look(iteration: Iteration) -> None:
        row, provenance = iteration.metrics, load(folder).provenance
        seen.append((iteration.number, provenance["iteration"], read_metrics(folder)[-1]))
        assert seen[-1][2]["env_steps"] == row["env_steps"] == provenance["env_steps"]
        assert same_params(load(folder), iteration.meta_policy())

    train(small(family), folder, callbacks=[look])
    assert [i for i, _, _ in seen] == [1, 2, 3]
    assert all(i == saved == row["iteration"] for i, saved, row in seen)


def test_a_callback_sees_the_tasks_returns_and_rollouts(tmp_path):
    seen: list[Iteration] = []
    train(small(), tmp_path / "run", callbacks=[seen.append])
    for iteration in seen:
        assert iteration.tasks.shape == (3, 2)
        support, query = iteration.rollouts
        assert np.array_equal(support.tasks.numpy(), iteration.tasks)
        for returns, rollout, key in (
            (iteration.returns_pre, support, "return_pre"),
            (iteration.returns_post, query, "return_post"),
        ):
            assert np.array_equal(returns, rollout.mean_returns().numpy())
            assert returns.mean() == pytest.approx(iteration.metrics[key])
    assert seen[0].run.folder == tmp_path / "run"
    train(small("sinusoid"), tmp_path / "sines", callbacks=[seen.append])
    assert seen[-1].returns_post is None
    assert not seen[-1].rollouts
    assert seen[-1].tasks.shape == (3, 2)


def test_without_a_query_no_return_is_one_after_adaptation(tmp_path):
    seen: list[Iteration] = []
    config = resolve(
        None, "navigation-2d", "reptile", {"tasks": 3, "episodes": 2, "iterations": 1, "threads": 1}
    )
    train(config, tmp_path / "run", callbacks=[seen.append])
    finite = np.isfinite(seen[0].metrics["return_post"])
    assert np.isfinite(seen[0].returns_post).all() == finite


def test_the_hooks_are_called_in_order(tmp_path):
    calls: list[Any] = []

    class Ordered(Callback):
        def start(self, run: Run) -> None:
            calls.append(("start", run.meta_policy().provenance["iteration"]))

        def tasks(self, rng, count, family):
            calls.append("tasks")

        def update(self, iteration: Iteration) -> None:
            saved = load(iteration.run.folder).provenance["iteration"]
            calls.append(("update", iteration.number, saved))

        def saved(self, iteration: Iteration) -> None:
            saved = load(iteration.run.folder).provenance["iteration"]
            calls.append(("saved", iteration.number, saved))

        def close(self, error: BaseException | None) -> None:
            calls.append(("close", error))

    train(small(iterations=2), tmp_path / "run", callbacks=[Ordered()])
    one, two = (["tasks", ("update", i, i - 1), ("saved", i, i)] for i in (1, 2))
    assert calls == [("start", 0), *one, *two, ("close", None)]


def test_a_callback_ends_the_run_with_that_iteration_and_no_other(tmp_path, capsys):
    folder = tmp_path / "run"

    def end(iteration: Iteration) -> None:
        if iteration.number == 2:
            iteration.stop("enough")

    meta = train(small(), folder, callbacks=[end])
    assert meta.provenance["iteration"] == len(read_metrics(folder)) == 2
    assert meta.provenance["stopped"] == "enough"
    assert "stopped" not in train(small(), folder, resume=True).provenance


def test_a_callback_that_raises_leaves_its_iteration_saved(tmp_path):
    class MineError(Exception):
        pass

    errors = []

    class Failing(Callback):
        def saved(self, iteration: Iteration) -> None:
            raise MineError

        def close(self, error: BaseException | None) -> None:
            errors.append(type(error))

    with pytest.raises(MineError):
        train(small(), tmp_path / "run", callbacks=[Failing()])
    assert load(tmp_path / "run").provenance["iteration"] == 1
    assert errors == [MineError]


def test_a_callback_does_not_change_a_run(tmp_path):
    def spoil(iteration: Iteration) -> None:
        iteration.metrics.clear()
        iteration.tasks[:] = 0.0
        for value in iteration.meta_policy().params.values():
            value.zero_()

    def measure(iteration: Iteration) -> None:
        evaluate(iteration.meta_policy(), tasks=2, episodes=2, steps=1)
        iteration.meta_policy().adapt([0.1, 0.2], episodes=2)
        torch.manual_seed(0)
        torch.set_num_threads(2)

    class Same(Callback):
        def tasks(self, rng, count, family):
            return family.tasks.sample(rng, count)

    train(small(), tmp_path / "without")
    for name, callback in (("spoiled", spoil), ("same", Same()), ("measured", measure)):
        train(small(), tmp_path / name, callbacks=[callback])
        assert timeless(tmp_path / name) == timeless(tmp_path / "without")


def test_a_curriculum_resumes_bit_for_bit(tmp_path):
    config = small(iterations=5)
    whole, first, second = Curriculum(), Curriculum(), Curriculum()
    train(config, tmp_path / "whole", callbacks=[whole])
    train(config, tmp_path / "parts", callbacks=[first, lambda i: i.number == 2 and i.stop("")])
    meta = train(config, tmp_path / "parts", resume=True, callbacks=[second])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    assert same_params(load(tmp_path / "whole"), meta)
    assert second.radius == whole.radius > 0.1
    assert np.array_equal(second.seen, whole.seen)
    assert len(whole.seen) == 15
    again = Curriculum()
    train(config, tmp_path / "parts", resume=True, start=0, callbacks=[again])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("hook", ["update", "saved"])
def test_a_curriculum_that_is_killed_resumes_bit_for_bit(tmp_path, hook):
    class Dying(Curriculum):
        name = "Curriculum"

        def update(self, iteration: Iteration) -> None:
            super().update(iteration)
            self.die("update", iteration)

        def saved(self, iteration: Iteration) -> None:
            self.die("saved", iteration)

        def die(self, place: str, iteration: Iteration) -> None:
            if (place, iteration.number) == (hook, 2):
                os.kill(os.getpid(), signal.SIGKILL)

    config = small(iterations=4)
    child = os.fork()
    if not child:
        train(config, tmp_path / "parts", callbacks=[Dying()])
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load(tmp_path / "parts").provenance["iteration"] == (1 if hook == "update" else 2)
    train(config, tmp_path / "parts", resume=True, callbacks=[Curriculum()])
    train(config, tmp_path / "whole", callbacks=[Curriculum()])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    assert same_params(load(tmp_path / "whole"), load(tmp_path / "parts"))


def test_a_missing_callback_is_named(tmp_path, capsys):
    folder = tmp_path / "run"
    train(small(iterations=1), folder, callbacks=[Curriculum()])
    with refused("Curriculum", "callbacks", error=RunError):
        train(small(), folder, resume=True)
    assert run("train", "--resume", str(folder)) == 2
    assert mentions(capsys.readouterr().err, "Curriculum", "--callback")
    train(small(), folder, resume=True, callbacks=[EarlyStopping(), Curriculum()])
    assert load(folder).provenance["iteration"] == 3


class Proposing(Callback):
    def __init__(self, found: Any) -> None:
        self.found = found

    def tasks(self, rng, count, family):
        return self.found


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (np.zeros((2, 2)), ["[2, 2]", "[3, 2]"]),
        (np.zeros((3, 1)), ["[3, 1]", "[3, 2]"]),
        (np.full((3, 2), np.nan), ["finite"]),
        ("far", ["[3, 2]"]),
    ],
)
def test_tasks_that_do_not_fit_the_family_are_refused(tmp_path, found, names):
    with refused("Proposing", *names):
        train(small(), tmp_path / "run", callbacks=[Proposing(found)])
    assert not (tmp_path / "run").exists()


def test_callbacks_of_wrong_kinds_are_refused(tmp_path):
    for given in ([3], [Curriculum], "mine", print):
        with refused("callback" if isinstance(given, list) else "callbacks"):
            train(small(), tmp_path / "run", callbacks=given)  # type: ignore[arg-type]
    other = Proposing(None)
    with refused("Curriculum", "Proposing"):
        CallbackList([Curriculum(), other])
    with refused("EarlyStopping", "name"):
        CallbackList([EarlyStopping(), EarlyStopping("gain")])
    second = EarlyStopping("gain")
    second.name = "second"
    assert CallbackList([EarlyStopping(), second])

    class Misspelt(Curriculum):
        def on_iteraton(self, iteration: Iteration) -> None: ...

    class Idle(Callback):
        def udpate(self, iteration: Iteration) -> None: ...

    with refused("Misspelt", "on_iteraton"):
        CallbackList([Misspelt()])
    with refused("Idle", "update"):
        CallbackList([Idle()])

    class Unreadable(Callback):
        def state(self) -> Mapping[str, Any]:
            return {"kept": 1}

    train(small(iterations=1), tmp_path / "run", callbacks=[Unreadable()])
    with refused("Unreadable", "load_state"):
        train(small(), tmp_path / "run", resume=True, callbacks=[Unreadable()])
    odd = Unreadable()
    for state in ({1: 2}, {"seen": {1: 2}}, {"seen": [{"of": {(0, 1): 2}}]}):  # JSON has texts
        odd.state = lambda state=state: state  # type: ignore[method-assign]
        with refused("Unreadable", "state"):
            CallbackList([odd]).states()
    odd.state = lambda: {"kept": print}  # type: ignore[method-assign]
    with refused("print"):
        CallbackList([odd]).states()


# Built on it --------------------------------------------------------------------------------------


class Metrics:
    """A run that exists in its metrics alone."""

    def __init__(self, folder: Path, family: str = "navigation-2d") -> None:
        folder.mkdir(exist_ok=True)
        policy = train(small(family, iterations=1), folder / "policy", resume="auto")
        options, measure = flat(policy.record["config"]), policy.domain.measure
        self.run = Run(folder, options, policy.source, measure, lambda: policy)
        self.number = 0

    def give(self, callback: Callback, **metrics: float) -> str:
        self.number += 1
        none: Any = None
        callback.update(Iteration(self.run, self.number, metrics, none, none, none, []))
        return self.run.stopped


def test_a_run_ends_early_without_improvement(tmp_path):
    run = Metrics(tmp_path)
    stopping = EarlyStopping(patience=2, min_delta=0.5)
    stopping.start(run.run)
    values = (1.0, 2.0, 2.4, 2.6, float("nan"), 3.0)
    assert [bool(run.give(stopping, return_post=v)) for v in values] == [False] * 5 + [True]
    state = stopping.state()
    resumed = EarlyStopping(patience=2, min_delta=0.5)
    again = Metrics(tmp_path)
    resumed.load_state(state)
    resumed.start(again.run)
    assert again.run.stopped
    longer, again = EarlyStopping(patience=4), Metrics(tmp_path)
    longer.load_state(state)
    longer.start(again.run)
    assert not again.run.stopped


def test_losses_are_to_become_smaller(tmp_path):
    run = Metrics(tmp_path, "sinusoid")
    stopping = EarlyStopping(patience=1)
    stopping.start(run.run)
    assert not run.give(stopping, loss_post=2.0)
    assert not run.give(stopping, loss_post=1.0)
    assert run.give(stopping, loss_post=1.5)


def test_wrong_options_of_early_stopping_are_refused(tmp_path):
    with refused("patience", 0):
        EarlyStopping(patience=0)
    with refused("min_delta", -1.0):
        EarlyStopping(min_delta=-1.0)
    with refused("mode", "up"):
        KeepBest(mode="up")
    for metric in ("return_poost", "returns"):
        with refused(metric):
            train(small(), tmp_path / metric, callbacks=[EarlyStopping(metric)])


def test_a_stopped_run_stays_stopped(tmp_path):
    config, folder = small(iterations=9), tmp_path / "run"
    for resume in (False, True):
        stopping = EarlyStopping("iteration", patience=2, mode="min")
        meta = train(config, folder, resume=resume, callbacks=[stopping])
        assert meta.provenance["iteration"] == 3
        assert mentions(meta.provenance["stopped"], "iteration")


def test_the_best_policy_is_the_one_that_was_measured(tmp_path):
    folder, config = tmp_path / "run", small(iterations=6, checkpoint_every=1)
    train(config, folder, callbacks=[KeepBest()])
    best = load(folder / "best.safetensors")
    returns = [row["return_post"] for row in read_metrics(folder)]
    before = int(np.argmax(returns))  # checkpoint i is measured by iteration i + 1
    assert best.provenance["iteration"] == before
    assert same_params(best, load(folder / "checkpoints" / f"{before:06d}.safetensors"))
    (folder / "best.safetensors").unlink()
    train(config, folder, resume=True, callbacks=[KeepBest()])
    assert same_params(best, load(folder / "best.safetensors"))
    # From an earlier checkpoint, it is the best until then, and later the same again.
    half = tmp_path / "half"
    train(small(iterations=3, checkpoint_every=1), half, callbacks=[KeepBest()])
    expected = load(half / "best.safetensors").provenance
    train(small(iterations=3, checkpoint_every=1), folder, resume=True, start=3,
          callbacks=[KeepBest()])  # fmt: skip
    assert load(folder / "best.safetensors").provenance["iteration"] == expected["iteration"]
    train(config, folder, resume=True, callbacks=[KeepBest()])
    assert same_params(best, load(folder / "best.safetensors"))


def test_the_state_is_in_the_checkpoint_as_documented(tmp_path):
    train(small(iterations=1), tmp_path / "run", callbacks=[Curriculum()])
    tensors, metadata = checkpoints.load(checkpoints.newest_checkpoint(tmp_path / "run"))
    assert tensors["callback.Curriculum/seen"].dtype == torch.float64
    assert set(metadata["callbacks"]["Curriculum"]) == {"radius"}


# Display and the command line ---------------------------------------------------------------------


def test_a_row_is_displayed_before_the_disk_is_written(tmp_path, monkeypatch):
    shown = threading.Event()
    save = recording.save_checkpoint

    def save_once_shown(folder: Path, *args: Any, **options: Any) -> None:
        assert shown.wait(60)
        save(folder, *args, **options)

    monkeypatch.setattr(recording, "save_checkpoint", save_once_shown)
    train(small(iterations=1), tmp_path / "run", display=lambda row: shown.set())
    assert load(tmp_path / "run").provenance["iteration"] == 1


def test_a_progress_bar_is_shown(tmp_path, capsys):
    train(small(iterations=2), tmp_path / "one", display=True)
    assert "2/2" in capsys.readouterr().err
    flags = "--family-options horizon=8 --tasks 3 --episodes 3 --iterations 2 --threads 1"
    assert run("train", "navigation-2d", *flags.split(), "--out", str(tmp_path / "run")) == 0
    assert "2/2" in capsys.readouterr().err


FLAGS = [
    "--family-options",
    "horizon=8",
    "--tasks",
    "3",
    "--episodes",
    "3",
    "--threads",
    "1",
    "--policy.hidden",
    "4",
]


def test_the_command_takes_callbacks_by_name(tmp_path, capsys):
    folder = str(tmp_path / "run")
    callbacks = ["--callback", "test_callbacks:Curriculum", "--callback", "metarl:KeepBest"]
    command = ["train", "navigation-2d", *callbacks, *FLAGS, "--iterations", "2", "--out", folder]
    assert run(*command) == 0
    assert (tmp_path / "run" / "best.safetensors").exists()
    assert run("train", "--resume", folder, "--iterations", "3") == 2
    assert run("train", "--resume", folder, "--iterations", "3", *callbacks) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["options"]
    capsys.readouterr()
    for name in ("Curricula", "Proposing"):  # unknown; needs an argument
        assert run("train", "navigation-2d", "--callback", f"test_callbacks:{name}", *FLAGS) == 2
        assert mentions(capsys.readouterr().err, name)


class Impatient(EarlyStopping):
    def __init__(self) -> None:
        super().__init__("iteration", patience=1, mode="min")


def test_a_command_that_a_callback_ends_is_done(tmp_path, capsys):
    folder = str(tmp_path / "run")
    command = ["train", "navigation-2d", *FLAGS, "--callback", "test_callbacks:Impatient"]
    assert run(*command, "--iterations", "5", "--out", folder) == 0
    assert mentions(capsys.readouterr().out, 2, "iteration")
    assert len(read_metrics(Path(folder))) == 2
