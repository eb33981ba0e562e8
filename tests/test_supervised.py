"""Supervised tasks: gradients against closed forms or finite differences; families."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from expecting import refused

from metarl.algorithms import find_algorithm
from metarl.config.resolve import resolve
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.lookup import domain_of
from metarl.envs import FewShotFamily, FunctionFamily, Uniform
from metarl.envs.registry import find_family, make_family
from metarl.envs.supervised.characters import draw_characters
from metarl.learning.adapter import Adapter
from metarl.learning.inner_loop import Adapted
from metarl.learning.meta_gradients.problem import Objective, Sampled
from metarl.models.encoders import FourBlocks, normalize_batch
from metarl.models.networks import MLP, flatten, stack, unflatten
from metarl.models.predictors import (
    Classifier,
    Regressor,
    accuracy,
    class_means,
    cross_entropy,
    squared_error,
)
from metarl.models.samples import Examples

D = torch.float64
TASKS, SHOTS, DIM = 3, 6, 4


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def doubled(model, seed=0):
    return {n: p.to(D) for n, p in model.init(np.random.default_rng(seed)).items()}


def regression_examples(seed, count=SHOTS, context=None):
    x, y = numbers(TASKS, count, DIM, seed=seed), numbers(TASKS, count, 1, seed=seed + 50)
    weight = torch.full((TASKS, count), 1.0 / count, dtype=D)
    return Examples(x, y, weight, context=context)


def class_examples(seed, classes=3, each=2, shape=(DIM,), missing=False):
    """Of each class the same number; with `missing`, the first task lacks the last class."""
    count = classes * each
    targets = torch.arange(classes).repeat_interleave(each).expand(TASKS, count).contiguous()
    x = numbers(TASKS, count, *shape, seed=seed) + targets.view(TASKS, count, *[1] * len(shape))
    valid = torch.ones(TASKS, count, dtype=D)
    there = torch.ones(TASKS, classes, dtype=torch.bool)
    if missing:
        there[0, -1] = False
        valid = valid * there.gather(1, targets)
    return Examples(x, targets, valid / valid.sum(1, keepdim=True), there if missing else None)


# Linear regression --------------------------------------------------------------------------------
#
# With the loss |X w + b - y|^2 / N the slope is H w' - g in w' = (w, b), where X' has a column of
# ones, H = 2 X'X' / N and g = 2 X'y / N. K steps of size a are affine in w'; the gradients
# are products of (I - aH) and the query's slope.


def affine_form(examples):
    x = torch.cat([examples.inputs, torch.ones(TASKS, examples.inputs.shape[1], 1, dtype=D)], 2)
    n = x.shape[1]
    return 2 * x.transpose(1, 2) @ x / n, 2 * (x.transpose(1, 2) @ examples.targets)[..., 0] / n


def regressor(**options):
    return Regressor(network=MLP(**options))


def classifier(*, head="meta", **options):
    return Classifier(network=MLP(**options), head=head)


LINEAR = regressor(hidden=(), inputs=(DIM,), outputs=1)
SIZE = 0.07


def gradient_of(name, model, batches, meta, *, steps, loss, progress=0.75, **said):
    """The gradient of the algorithm's own problem, [P]; late in a run, where annealing is over."""
    algorithm = resolve(None, "sinusoid", name, {"inner.steps": steps, **said}).setup.algorithm
    adapter = algorithm.inner.adapter(model, loss)
    meta = adapter.init(meta) if meta.keys() != adapter.shapes().keys() else meta
    with ChunkPool(1) as pool:
        adapted = Adapted([], {}, meta, batches=list(batches))
        objective = Objective(algorithm.outer.loss(algorithm.outer_loss or loss))
        problem = algorithm.meta.problem(
            Sampled(adapter, adapted, pool, objective, progress=progress)
        )
        gradient, stats = problem.gradient(meta)
    return gradient, stats, meta, adapter, problem


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["maml-trpo", "maml-reinforce", "fomaml-trpo", "fomaml-reinforce"])
def test_gradients_on_linear_regression_have_their_closed_form(name, steps):
    support, query = regression_examples(1), regression_examples(2, count=9)
    meta = doubled(LINEAR)
    gradient, stats, *_ = gradient_of(
        name, LINEAR, [support] * steps + [query], meta, steps=steps, loss=squared_error,
        **{"inner.step_sizes": (SIZE,)},
    )  # fmt: skip
    (h, g), (hq, gq) = affine_form(support), affine_form(query)
    w = torch.cat([meta["layer0.weight"][:, 0], meta["layer0.bias"]]).expand(TASKS, -1)
    jacobian = torch.eye(DIM + 1, dtype=D).expand(TASKS, -1, -1)
    for _ in range(steps):
        w = w - SIZE * (torch.einsum("tij,tj->ti", h, w) - g)
        jacobian = (torch.eye(DIM + 1, dtype=D) - SIZE * h) @ jacobian
    slope = torch.einsum("tij,tj->ti", hq, w) - gq
    if name.startswith("maml"):
        slope = torch.einsum("tji,tj->ti", jacobian, slope)
    torch.testing.assert_close(gradient, slope.mean(0), rtol=1e-9, atol=1e-12)
    loss = (torch.cat([query.inputs, torch.ones(TASKS, 9, 1, dtype=D)], 2) @ w[..., None]
            - query.targets).square().mean()  # fmt: skip
    assert stats["loss"] == pytest.approx(float(loss), rel=1e-9)
    assert stats["kl"] == 0.0


def test_reptile_on_linear_regression_equals_gradient_descent():
    batches = [regression_examples(seed) for seed in (1, 2, 3)]
    meta = doubled(LINEAR)
    gradient, *_ = gradient_of(
        "reptile", LINEAR, batches, meta, steps=3, loss=squared_error,
        **{"inner.step_sizes": (SIZE,)},
    )  # fmt: skip
    start = torch.cat([meta["layer0.weight"][:, 0], meta["layer0.bias"]]).expand(TASKS, -1)
    w = start
    for batch in batches:
        h, g = affine_form(batch)
        w = w - SIZE * (torch.einsum("tij,tj->ti", h, w) - g)
    torch.testing.assert_close(gradient, (start - w).mean(0), rtol=1e-9, atol=1e-12)


def test_imaml_on_linear_regression_has_its_closed_form():
    # The proximal problem's solution is (H + lambda)^-1 (g + lambda w); its Jacobian in w is
    # lambda (H + lambda)^-1.
    support, query = regression_examples(1), regression_examples(2)
    meta, pull = doubled(LINEAR), 3.0
    said = {"inner.step_sizes": (0.1,), "inner.proximal": pull, "inner.updates": 400}
    gradient, stats, *_ = gradient_of(
        "imaml", LINEAR, [support, query], meta, steps=1, loss=squared_error, **said
    )
    (h, g), (hq, gq) = affine_form(support), affine_form(query)
    w = torch.cat([meta["layer0.weight"][:, 0], meta["layer0.bias"]]).expand(TASKS, -1)
    inverse = torch.linalg.inv(h + pull * torch.eye(DIM + 1, dtype=D))
    solution = torch.einsum("tij,tj->ti", inverse, g + pull * w)
    slope = torch.einsum("tij,tj->ti", hq, solution) - gq
    expected = torch.einsum("tij,tj->ti", pull * inverse, slope).mean(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)
    assert stats["unsolved"] == stats["low_curvature"] == 0.0


# Finite differences -------------------------------------------------------------------------------


def numerical(function, meta, names=None, step=1e-5):
    """Central differences of a function of meta-parameters, [P]."""
    flat = flatten(meta)
    found = torch.zeros_like(flat)
    for i in range(len(flat)):
        shift = torch.zeros_like(flat)
        shift[i] = step
        high, low = (function(unflatten(flat + s * shift, meta)) for s in (1.0, -1.0))
        found[i] = (high - low) / (2 * step)
    return found


def objective(adapter, batches, weights):
    """The mean query loss after adaptation, step by step, without the problem's code."""

    def value(meta):
        fast, slow, sizes = adapter.split(meta)
        *support, query = batches
        theta = adapter.start(stack(fast, TASKS), slow, support[0])
        total = 0.0
        for k, batch in enumerate(support):
            theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
            loss = adapter.loss(adapter.model, adapter.output(theta, slow, batch), batch)
            slope = dict(
                zip(theta, torch.autograd.grad(loss.sum(), list(theta.values())), strict=True)
            )
            theta = {n: (p - sizes[n][min(k, len(sizes[n]) - 1)] * slope[n]).detach()
                     for n, p in theta.items()}  # fmt: skip
            if weights[k]:
                after = adapter.loss(adapter.model, adapter.output(theta, slow, query), query)
                total = total + weights[k] * float(after.mean().detach())
        return total

    return value


SMALL = {"hidden": (5,), "activation": "tanh", "inputs": (DIM,)}


@pytest.mark.parametrize("name", ["maml-trpo", "maml++", "meta-sgd", "anil", "cavia"])
def test_gradients_of_a_regressor_equal_finite_differences(name):
    context = 2 if name == "cavia" else 0
    model = regressor(outputs=1, context_dim=context, **SMALL)
    support, query = regression_examples(3), regression_examples(4, count=8)
    batches = [support, support, query]
    said = {"inner.step_sizes": (0.3, 0.2)}
    gradient, _, meta, adapter, problem = gradient_of(
        name, model, batches, doubled(model), steps=2, loss=squared_error, **said
    )
    weights = problem.objective.step_weights or (0.0, 1.0)
    expected = numerical(objective(adapter, batches, weights), meta)
    torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=1e-8)
    assert gradient.norm() > 1e-3
    if name == "maml++":
        assert sum(n.startswith("step_size.") for n in meta) == 4


def test_every_step_of_maml_plus_plus_is_judged_by_the_query():
    # At the start of annealing the losses of all iterates count alike, and the order is 1.
    model = regressor(outputs=1, **SMALL)
    support, query = regression_examples(3), regression_examples(4, count=8)
    batches = [support, support, query]
    said = {"inner.step_sizes": (0.3, 0.2), "meta.anneal_fraction": 1.0}
    _, stats, meta, adapter, problem = gradient_of(
        "maml++", model, batches, doubled(model), steps=2, loss=squared_error, progress=0.0, **said
    )
    assert problem.objective.step_weights == (0.5, 0.5)
    assert stats["loss"] == pytest.approx(objective(adapter, batches, (0.5, 0.5))(meta), rel=1e-9)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("name", "head"), [("protomaml", "prototypes"), ("leopard", "generated")])
def test_gradients_through_a_generated_last_layer_equal_finite_differences(name, head, missing):
    model = classifier(outputs=3, head=head, **{**SMALL, "hidden": (5, 4)})
    support, query = (class_examples(seed, missing=missing) for seed in (5, 6))
    batches = [support, support, query]
    said = {"inner.step_sizes": (0.2, 0.1)}
    gradient, _, meta, adapter, _ = gradient_of(
        name, model, batches, doubled(model), steps=2, loss=cross_entropy, **said
    )
    assert not any(n.startswith("layer2.") for n in meta)
    expected = numerical(objective(adapter, batches, (0.0, 1.0)), meta)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    parts = unflatten(gradient, meta)
    assert all(p.abs().max() > 0 for n, p in parts.items()), [
        n for n, p in parts.items() if not p.abs().max()
    ]


# Algorithms of classification ---------------------------------------------------------------------


def test_protomamls_first_logits_are_the_prototypical_networks_distances():
    model = classifier(outputs=3, head="prototypes", **SMALL)
    params = doubled(model)
    support, query = class_examples(5), class_examples(6)
    start = model.start(params, support)
    logits = model.output({**params, **start}, query)["logits"]
    x, c = (model.network.embed(params, part.inputs) for part in (query, support))
    for t in range(TASKS):
        for n in range(query.inputs.shape[1]):
            distances = []
            for k in range(3):
                prototype = c[t][support.targets[t] == k].mean(0)
                distances.append(-(x[t, n] - prototype).square().sum())
            gap = logits[t, n] - torch.stack(distances)
            torch.testing.assert_close(gap, gap[:1].expand(3), rtol=0, atol=1e-12)


def test_leopards_last_layer_is_the_mean_of_the_generated_ones():
    model = classifier(outputs=3, head="generated", **SMALL)
    params = doubled(model)
    support = class_examples(5)
    start = model.start(params, support)
    assert start["layer1.weight"].shape == (TASKS, 5, 3)
    for t, k in ((0, 0), (2, 1)):
        made = []
        for n in (support.targets[t] == k).nonzero()[:, 0]:
            e = model.network.embed(params, support.inputs[t, n : n + 1])
            hidden = torch.tanh(e @ params["generator0.weight"] + params["generator0.bias"])
            made.append((hidden @ params["generator1.weight"] + params["generator1.bias"])[0])
        mean = torch.stack(made).mean(0)
        torch.testing.assert_close(start["layer1.weight"][t, :, k], mean[:-1])
        torch.testing.assert_close(start["layer1.bias"][t, k], mean[-1])


def test_leopards_lower_layers_and_generator_do_not_adapt():
    model = classifier(outputs=3, head="generated", **{**SMALL, "hidden": (5, 4)})
    adapter = Adapter(model, cross_entropy, (0.1,), fast="upper", learned="layer")
    fast, slow, sizes = adapter.split(adapter.init(doubled(model)))
    assert set(fast) == {"layer1.weight", "layer1.bias"}
    assert {"layer0.weight", "generator0.weight"} <= set(slow)
    assert set(sizes) == {*fast, "layer2.weight", "layer2.bias"}


def test_a_generated_last_layer_takes_any_number_of_classes():
    model = classifier(outputs=3, head="prototypes", **SMALL)
    params = doubled(model)
    support = dataclasses.replace(
        class_examples(5, classes=4), classes=torch.ones(TASKS, 4, dtype=torch.bool)
    )
    start = model.start(params, support)
    assert model.output({**params, **start}, support)["logits"].shape == (TASKS, 8, 4)


def test_a_class_that_a_task_lacks_changes_nothing():
    model = classifier(outputs=3, **SMALL)
    params = doubled(model)
    examples = class_examples(5, missing=True)
    loss = cross_entropy(model, model.output(params, examples), examples)
    logits = model.network.forward(params, examples.inputs[0, :4])[:, :2]
    alone = torch.nn.functional.cross_entropy(logits, examples.targets[0, :4])
    torch.testing.assert_close(loss[0], alone)
    assert torch.isfinite(loss).all()


# Losses and the network ---------------------------------------------------------------------------


def test_losses_equal_torch():
    output, examples = {"logits": numbers(TASKS, 6, 3, seed=9)}, class_examples(5)
    found = cross_entropy(None, output, examples)
    hits = accuracy(None, output, examples)
    for t in range(TASKS):
        alone = torch.nn.functional.cross_entropy(output["logits"][t], examples.targets[t])
        torch.testing.assert_close(found[t], alone)
        right = (output["logits"][t].argmax(1) == examples.targets[t]).double().mean()
        torch.testing.assert_close(hits[t], right)
    examples = regression_examples(1)
    prediction = numbers(TASKS, SHOTS, 1, seed=3)
    error = squared_error(None, {"prediction": prediction}, examples)
    torch.testing.assert_close(error[1], (prediction[1] - examples.targets[1]).square().mean())


def test_batch_normalization_equals_torch_and_leaves_out_examples_without_weight():
    x, scale, shift = numbers(2, 5, 3, 4, 4, seed=1), numbers(2, 3, seed=2), numbers(2, 3, seed=3)
    weight = torch.ones(2, 5, dtype=D)
    weight[1, 3:] = 0.0
    found = normalize_batch(x, scale, shift, weight)
    for t, count in ((0, 5), (1, 3)):
        alone = torch.nn.functional.batch_norm(
            x[t, :count], None, None, scale[t], shift[t], training=True
        )
        torch.testing.assert_close(found[t, :count], alone)


@pytest.mark.parametrize("shape", [(9, 12), (8, 32), (30, 12), (3, 16, 16), (12, 12, 3)])
def test_four_blocks_equal_torchs_layers(shape):
    encoder = FourBlocks(shape, filters=4)
    model = classifier(outputs=3, encoder=encoder, hidden=(), inputs=shape)
    params = doubled(model)
    images = numbers(TASKS, 5, *shape, seed=4)
    found = encoder.encode(params, images)
    assert found.shape == (TASKS, 5, encoder.features)
    x = images[1]
    x = x[:, None] if len(shape) == 2 else x.permute(0, 3, 1, 2) if shape[-1] == 3 else x
    for i in range(4):
        x = torch.nn.functional.conv2d(x, params[f"block{i}.weight"], padding=1)
        x = torch.nn.functional.batch_norm(x, None, None, training=True).relu()
        x = torch.nn.functional.max_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x
    torch.testing.assert_close(found[1], x.flatten(1))
    stacked = encoder.encode(stack(params, TASKS), images)
    torch.testing.assert_close(stacked, found)


def test_class_means_leave_out_examples_without_weight():
    examples = class_examples(5, missing=True)
    means = class_means(examples.inputs, examples, 3)
    torch.testing.assert_close(means[1, 2], examples.inputs[1, 4:].mean(0))
    assert not means[0, 2].any()


# Families -----------------------------------------------------------------------------------------


def test_sinusoids_are_sinusoids():
    family = find_family("sinusoid", shots=7)
    tasks = family.tasks.sample(np.random.default_rng(0), 5)
    support, query = family.draw(tasks, np.random.default_rng(1), supports=1, queries=9)
    assert support.inputs.shape == (5, 7, 1)
    assert query.targets.shape == (5, 9, 1)
    expected = tasks[:, :1] * np.sin(query.inputs[..., 0] - tasks[:, 1:])
    np.testing.assert_allclose(query.targets[..., 0], expected, atol=1e-5)
    assert np.abs(support.inputs).max() <= 5.0
    assert family.tasks.describe() == "amplitude in [0.1, 5], phase in [0, 3.14159]"


def pictures(classes=10, each=8, size=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    images = rng.random((classes * each, size, size)).astype(dtype)
    images[:, 0, 0] = np.repeat(np.arange(classes), each)
    return images, np.repeat([f"c{i:02}" for i in range(classes)], each)


def few_shot(ways=3, shots=2, **options):
    options = {"queries": 3, "test_queries": 3, **options}
    return FewShotFamily(*pictures(16), ways, shots, **options)


def test_episodes_have_their_classes_and_no_example_twice():
    family = few_shot()
    rng = np.random.default_rng(0)
    tasks = family.tasks.sample(rng, 6)
    assert all(len(set(task)) == 3 for task in tasks.tolist())
    support, query = family.draw(tasks, rng, supports=1, queries=3)
    assert support.inputs.shape == (6, 6, 8, 8)
    # The first pixel tells the class, the others which of its examples it is.
    np.testing.assert_array_equal(
        support.inputs[:, :, 0, 0], np.take_along_axis(tasks, support.targets, 1)
    )
    for t in range(6):
        seen = np.concatenate([support.inputs[t], query.inputs[t]]).reshape(15, -1)
        assert len(np.unique(seen, axis=0)) == 15


def test_further_supports_share_nothing_with_the_query():
    family = few_shot()
    tasks = family.tasks.sample(np.random.default_rng(0), 4)
    *supports, query = family.draw(tasks, np.random.default_rng(1), supports=3, queries=3)
    assert len(supports) == 3
    assert (supports[0].inputs != supports[1].inputs).any()
    for t in range(4):
        asked = {x.tobytes() for x in query.inputs[t]}
        assert not asked & {x.tobytes() for s in supports for x in s.inputs[t]}


def test_train_validation_and_test_classes_are_disjoint():
    family = FewShotFamily(*pictures(25), 4, 2, queries=3, test_queries=3)
    rng = np.random.default_rng(0)
    drawn = {
        p: set(family.tasks.sample(rng, 200, p).ravel()) for p in ("train", "validation", "test")
    }
    assert [len(drawn[p]) for p in ("train", "validation", "test")] == [16, 4, 5]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & (drawn["test"] | drawn["train"])
    np.testing.assert_array_equal(family.tasks.grid(5), family.tasks.grid(5))


def test_tasks_have_different_numbers_of_classes():
    family = few_shot(ways=(2, 4), test=["c00", "c01", "c02", "c03"])
    tasks = family.tasks.sample(np.random.default_rng(0), 50)
    assert set((tasks >= 0).sum(axis=1)) == {2, 3, 4}
    (support,) = family.draw(tasks, np.random.default_rng(1), supports=1, queries=0)
    assert support.classes is not None
    np.testing.assert_array_equal(support.classes, tasks >= 0)
    np.testing.assert_array_equal(support.valid.sum(1), 2 * (tasks >= 0).sum(1))


def test_bytes_are_scaled_and_floats_are_not():
    images, labels = pictures()
    family = FewShotFamily((images * 20).astype(np.uint8), labels, 2, 2, queries=3, test_queries=3)
    data = family.draw(family.tasks.grid(2), np.random.default_rng(0), supports=1, queries=0)[0]
    assert data.inputs.dtype == np.float32
    assert data.inputs.max() <= 1.0


def test_ways_may_be_a_numpy_integer():
    assert few_shot(ways=np.int64(3)).outputs == few_shot(ways=3).outputs


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"shots": 7}, ["c00", "shots", 7, 8, 10]),
        ({"test": ["c01"], "train": ["c00", "c01"]}, ["c01", "train", "test"]),
        ({"ways": 4}, ["ways", "test", 4, 3]),
        ({"ways": 1}, ["ways", 2, 1]),
        ({"ways": (8, 3)}, ["ways", "(8, 3)"]),
        ({"shots": 0}, ["shots", 0]),
        ({"test": ["c01", "c77", "c02"]}, ["test", "c77"]),
    ],
)
def test_faults_of_a_data_set_are_named_in_one_line(options, names):
    with refused(*names) as caught:
        few_shot(**options)
    assert "\n" not in str(caught.value)


def test_pixels_that_are_not_finite_are_refused():
    images, labels = pictures()
    images[17, 2, 3] = np.nan
    with refused("image", 17):
        FewShotFamily(images, labels, 3, 2, queries=3, test_queries=3)


def used_on(family: str, name: str):
    """An algorithm as it is used on a family."""
    found = find_family(family)
    return domain_of(found).algorithm(find_algorithm(name), found.name)


@pytest.mark.parametrize("name", ["e-maml", "promp", "dice-maml", "maml-ppo"])
def test_algorithms_that_need_a_policy_are_refused(name):
    with refused(name, "sinusoid", "maml-trpo"):
        used_on("sinusoid", name)


def test_algorithms_of_classification_are_refused_elsewhere():
    config = resolve(None, "sinusoid", "protomaml")
    with refused("protomaml", "sinusoid"):
        config.setup.domain.model(
            config.setup.algorithm, config.setup.policy, find_family("sinusoid")
        )
    with refused("leopard", "navigation-2d"):
        used_on("navigation-2d", "leopard")


def test_supervised_families_are_refused_as_environments():
    with refused("sinusoid"):
        make_family("sinusoid")
    with refused("sinusoids", "sinusoid"):
        find_family("sinusoids")


def test_supervised_tasks_replace_a_trust_region_by_adam():
    assert used_on("sinusoid", "maml-trpo").outer.name == "adam"
    assert used_on("navigation-2d", "maml-trpo").outer.name == "trust-region"


def test_characters_are_a_function_of_the_seed_and_differ():
    some = draw_characters(classes=3, drawings=4, size=16)
    np.testing.assert_array_equal(some, draw_characters(classes=5, drawings=4, size=16)[:3])
    assert (some != draw_characters(classes=3, drawings=4, size=16, seed=1)).any()
    assert some.shape == (3, 4, 16, 16)
    flat = some.reshape(3, 4, -1).astype(float)
    assert (flat.std(axis=1).max(axis=1) > 20).all()  # drawings of one character differ
    within = np.mean([np.linalg.norm(a - b) for c in flat for a in c for b in c])
    between = np.mean([np.linalg.norm(a - b) for a in flat[0] for b in flat[1]])
    assert between > within


def test_a_user_defined_function_family_draws_its_function():
    family = FunctionFamily(
        name="lines", tasks=Uniform({"slope": (-1.0, 1.0)}), interval=(0.0, 1.0),
        function=lambda x, tasks: tasks * x, shots=3,
    )  # fmt: skip
    tasks = family.tasks.grid(4)
    (data,) = family.draw(tasks, np.random.default_rng(0), supports=1, queries=0)
    np.testing.assert_allclose(data.targets[..., 0], tasks * data.inputs[..., 0], atol=1e-6)
