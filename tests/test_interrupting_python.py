"""Ctrl-C in `metarl.train` and `metarl.evaluate`, called from a script."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest
import torch

import metarl
from metarl.learning.inner_loop import InnerLoop
from metarl.policies.loading import newest_checkpoint
from metarl.runs.metrics import read_metrics
from metarl.runs.stopping import stop_by_ctrl_c
from metarl.training.trainer import Trainer


def config(family="navigation-2d", **values):
    small = {"tasks": 2, "episodes": 2, "threads": 1, "workers": 0, "iterations": 50}
    options = {"family_options": {"horizon": 12}}
    return metarl.resolve(None, family, "maml-trpo", {**small, **options, **values})


def press(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_in_iteration(monkeypatch, number: int, times: int = 1) -> None:
    """Press Ctrl-C while an iteration samples."""
    iterate = Trainer.iterate

    def pressed(trainer, *arguments, **options):
        if trainer.state.iteration == number - 1:
            for _ in range(times):
                press()
        return iterate(trainer, *arguments, **options)

    monkeypatch.setattr(Trainer, "iterate", pressed)


@pytest.mark.parametrize("iteration", [1, 3])
def test_ctrl_c_saves_the_iteration_it_finishes_and_then_interrupts(
    tmp_path, monkeypatch, iteration
):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_in_iteration(patch, iteration)
        with pytest.raises(KeyboardInterrupt):
            metarl.train(config(), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert len(read_metrics(tmp_path / "run")) == iteration
    assert int(newest_checkpoint(tmp_path / "run").stem) == iteration
    meta = metarl.train(config(iterations=iteration + 1), tmp_path / "run", resume=True)
    assert meta.provenance["iteration"] == iteration + 1


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, monkeypatch):
    press_in_iteration(monkeypatch, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        metarl.train(config(), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 2
    assert int(newest_checkpoint(tmp_path / "run").stem) == 2


def test_ctrl_c_before_the_first_iteration_interrupts_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        metarl.train(config(), tmp_path / "run", started=press)
    assert not read_metrics(tmp_path / "run")


def test_a_callback_that_stops_ends_the_run_without_an_interrupt(tmp_path):
    rows = []
    meta = metarl.train(
        config(), tmp_path / "run", callbacks=[rows.append], stop=lambda: len(rows) == 2
    )
    assert meta.provenance["iteration"] == 2


def test_a_handler_of_the_scripts_own_stays(tmp_path):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        meta = metarl.train(config(iterations=2), tmp_path / "run", callbacks=[press])
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen
    assert meta.provenance["iteration"] == 2


def test_in_a_thread_handlers_are_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(metarl.train(config(iterations=1), tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert found[0].provenance["iteration"] == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_ctrl_c_asks_and_the_second_interrupts():
    with stop_by_ctrl_c() as stop:
        assert not stop()
        press()
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            press()


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_in_evaluate_interrupts_and_leaves_no_process(tmp_path, monkeypatch, workers):
    family = "conftest:counting_family"
    meta = metarl.train(config(family=family, family_options={}, iterations=1), tmp_path / "run")
    threads, run = torch.get_num_threads(), InnerLoop.run
    monkeypatch.setattr(InnerLoop, "run", lambda *a, **k: (press(), run(*a, **k))[1])
    with pytest.raises(KeyboardInterrupt):
        metarl.evaluate(meta, tasks=2, episodes=2, steps=1, threads=1, workers=workers)
    assert not multiprocessing.active_children()
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
