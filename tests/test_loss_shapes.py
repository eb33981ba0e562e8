"""Losses return one number a task, and an algorithm's own inner loss is used or refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from expecting import refused

import metarl
from metarl.algorithms.table import ALGORITHMS, Algorithm
from metarl.learning.losses import (
    clipped_ratio,
    likelihood_ratio,
    log_likelihood,
    squared_error,
)
from metarl.models.predictors import Regressor
from metarl.training.trainer import Trainer

SMALL = {"tasks": 5, "episodes": 2, "threads": 1}
ROW = {"name": "mine", "description": "", "source": ""}


def mean_of_tasks(model, output, samples):
    return log_likelihood(model, output, samples).mean()


def each_sample(model, output, samples):
    return -samples.weight * samples.advantage * model.log_prob(output, samples.action)


def one_column(model, output, samples):
    return log_likelihood(model, output, samples).unsqueeze(1)


def plain_number(model, output, samples):
    return 0.0


def weighted(model, output, samples, *, factor):
    return factor * log_likelihood(model, output, samples).sum()


class CallableLoss:
    def __call__(self, model, output, samples):
        return log_likelihood(model, output, samples).sum()


def _iterate(monkeypatch, row, family="navigation-2d", **options):
    monkeypatch.setitem(ALGORITHMS, "mine", row)
    sizes = {} if family == "sinusoid" else SMALL
    with Trainer(metarl.resolve(None, family, "mine", {**sizes, **options})) as trainer:
        return trainer.iterate()


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (mean_of_tasks, ["mean_of_tasks", "[]"]),
        (each_sample, ["each_sample"]),
        (one_column, ["one_column"]),
        (plain_number, ["plain_number", "float"]),
        (partial(partial(weighted), factor=2.0), ["weighted"]),
        (CallableLoss(), ["CallableLoss"]),
    ],
)
@pytest.mark.parametrize("gradient", ["unrolled", "displacement"])
def test_an_inner_loss_of_another_shape_is_refused_by_name(monkeypatch, loss, names, gradient):
    row = Algorithm(**ROW, inner_loss=loss, gradient=gradient, outer="adam")
    named = [name for name in names if name.isidentifier()]
    with refused(*named) as caught:
        _iterate(monkeypatch, row)
    assert names[-1] in str(caught.value)


@pytest.mark.parametrize("algorithm", ["maml-trpo", "imaml", "maml++"])
def test_a_models_loss_of_another_shape_is_refused_by_name(monkeypatch, algorithm):
    def averaged(model, output, examples):
        return squared_error(model, output, examples).mean()

    monkeypatch.setattr(Regressor, "loss", property(lambda self: averaged))
    with refused("averaged"), Trainer(metarl.resolve(None, "sinusoid", algorithm)) as trainer:
        trainer.iterate()


def test_one_task_is_no_exception(monkeypatch):
    with refused("mean_of_tasks"):
        _iterate(monkeypatch, Algorithm(**ROW, inner_loss=mean_of_tasks), tasks=1)


def test_a_supervised_family_uses_the_algorithms_own_inner_loss(monkeypatch):
    calls = []

    def huber(model, output, examples):
        calls.append(len(examples.weight))
        gap = (output["prediction"] - examples.targets).squeeze(-1)
        return (examples.weight * torch.nn.functional.huber_loss(
            gap, torch.zeros_like(gap), reduction="none")).sum(1)  # fmt: skip

    own = _iterate(monkeypatch, Algorithm(**ROW, inner_loss=huber, outer="adam"), "sinusoid")
    usual = _iterate(monkeypatch, Algorithm(**ROW, outer="adam"), "sinusoid")
    assert calls
    assert own["loss_pre"] == usual["loss_pre"]
    assert own["loss_post"] != usual["loss_post"]


def test_a_loss_that_raises_is_heard_on_a_supervised_family(monkeypatch):
    def broken(model, output, examples):
        raise RuntimeError("called")

    with pytest.raises(RuntimeError):
        _iterate(monkeypatch, Algorithm(**ROW, inner_loss=broken, outer="adam"), "sinusoid")


def test_a_policys_loss_is_refused_on_a_supervised_family(monkeypatch):
    row = Algorithm(**ROW, inner_loss=partial(clipped_ratio, clip=0.2), outer="adam")
    with refused("mine", "clipped_ratio"):
        _iterate(monkeypatch, row, "sinusoid")


@pytest.mark.parametrize("loss", [log_likelihood, likelihood_ratio])
def test_the_usual_inner_losses_give_way_to_the_models(monkeypatch, loss):
    rows = [
        _iterate(monkeypatch, Algorithm(**ROW, inner_loss=used, outer="adam"), "sinusoid")
        for used in (loss, squared_error)
    ]
    assert rows[0]["loss_post"] == rows[1]["loss_post"]
