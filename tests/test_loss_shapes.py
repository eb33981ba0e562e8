"""Losses return one number a task, and an algorithm's own inner loss is used or refused."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from expecting import refused

import metarl
from metarl.algorithms import Algorithm
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import clipped_ratio, dice, likelihood_ratio, log_likelihood
from metarl.learning.meta_gradients.reptile import Reptile
from metarl.learning.meta_gradients.unrolled import Unrolled
from metarl.models.predictors import Regressor, squared_error
from metarl.training.run import new_trainer

SMALL = {"tasks": 5, "episodes": 2, "threads": 1}


def mine(loss=None, meta=None):
    return Algorithm(
        name="mine", inner=GradientUpdate(loss=loss), meta=meta or Unrolled(), outer="adam"
    )


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


def _iterate(algorithm, family="navigation-2d", **options):
    sizes = {} if family == "sinusoid" else SMALL
    with new_trainer(metarl.resolve(None, family, algorithm, {**sizes, **options})) as trainer:
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
@pytest.mark.parametrize("meta", [Unrolled(), Reptile()])
def test_an_inner_loss_of_another_shape_is_refused_by_name(loss, names, meta):
    named = [name for name in names if name.isidentifier()]
    with refused(*named) as caught:
        _iterate(mine(loss, meta))
    assert names[-1] in str(caught.value)


@pytest.mark.parametrize("algorithm", ["maml-trpo", "imaml", "maml++"])
def test_a_models_loss_of_another_shape_is_refused_by_name(monkeypatch, algorithm):
    def averaged(model, output, examples):
        return squared_error(model, output, examples).mean()

    monkeypatch.setattr(Regressor, "loss", property(lambda self: averaged))
    with refused("averaged"), new_trainer(metarl.resolve(None, "sinusoid", algorithm)) as trainer:
        trainer.iterate()


@pytest.mark.parametrize("family", ["navigation-2d", "sinusoid"])
def test_an_outer_loss_of_another_shape_is_refused_by_name(family):
    def averaged_query(model, output, samples):
        usual = squared_error if family == "sinusoid" else likelihood_ratio
        return usual(model, output, samples).mean()

    with refused("averaged_query"):
        _iterate(Algorithm(name="mine", outer_loss=averaged_query), family)


def test_one_task_is_no_exception():
    algorithm = Algorithm(name="mine", inner=GradientUpdate(loss=mean_of_tasks))
    with refused("mean_of_tasks"):
        _iterate(algorithm, tasks=1)


def test_a_supervised_family_uses_the_algorithms_own_inner_loss():
    calls = []

    def huber(model, output, examples):
        calls.append(len(examples.weight))
        gap = (output["prediction"] - examples.targets).squeeze(-1)
        return (examples.weight * torch.nn.functional.huber_loss(
            gap, torch.zeros_like(gap), reduction="none")).sum(1)  # fmt: skip

    own, usual = (_iterate(mine(loss), "sinusoid") for loss in (huber, None))
    assert calls
    assert own["loss_pre"] == usual["loss_pre"]
    assert own["loss_post"] != usual["loss_post"]


@pytest.mark.parametrize("loss", [partial(clipped_ratio, clip=0.2), dice])
def test_a_policys_loss_is_refused_on_a_supervised_family(loss):
    name = "dice" if loss is dice else "clipped_ratio"
    with refused("mine", name):
        _iterate(mine(loss), "sinusoid")
    with refused("mine", name):
        _iterate(Algorithm(name="mine", outer_loss=loss), "sinusoid")


@pytest.mark.parametrize("loss", [log_likelihood, likelihood_ratio])
def test_the_usual_losses_give_way_to_the_models(loss):
    usual = _iterate(mine(), "sinusoid")["loss_post"]
    assert _iterate(mine(loss), "sinusoid")["loss_post"] == usual
    assert _iterate(mine(squared_error), "sinusoid")["loss_post"] == usual
    algorithm = Algorithm(name="mine", outer_loss=loss, outer="adam")
    assert _iterate(algorithm, "sinusoid")["loss_post"] == usual


def failing(*arguments):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("family", "where"),
    [("navigation-2d", "inner"), ("navigation-2d", "outer_loss"), ("navigation-2d", "regularizer"),
     ("navigation-2d", "task_weights"), ("sinusoid", "inner"), ("sinusoid", "outer_loss")],
)  # fmt: skip
def test_an_error_in_a_users_function_names_it(family, where):
    part = GradientUpdate(loss=partial(failing)) if where == "inner" else failing
    name = "failing" if where in ("inner", "outer_loss") else where
    with refused(name, "ZeroDivisionError"):
        _iterate(dataclasses.replace(mine(), **{where: part}), family)
