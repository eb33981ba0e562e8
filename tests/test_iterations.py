"""What each algorithm's iteration optimizes: a table by hand against what the trainer builds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import gaussian_policy, random_batch, same_params, small, timeless
from expecting import mentions, run

from metarl import train
from metarl.algorithms import algorithms, find_algorithm
from metarl.algorithms.e_maml import leave_one_out, sampling_credit
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.learning.gradient_steps import Adam, ClippedSurrogate
from metarl.learning.losses import Batch, dice, likelihood_ratio, log_likelihood
from metarl.learning.meta_gradients.implicit import ImplicitProblem
from metarl.learning.meta_gradients.problem import Objective
from metarl.learning.meta_gradients.reptile import ReptileProblem
from metarl.learning.meta_gradients.unrolled import UnrolledProblem
from metarl.learning.outer import NoUpdate, OuterOptimizer
from metarl.learning.trust_region import TrustRegion, fisher_samples
from metarl.parts import fixed
from metarl.sampling.seeding import stream
from metarl.sampling.trajectories import Rollout
from metarl.training.run import new_trainer, schedule_change

# The table ----------------------------------------------------------------------------------------

ITERATIONS = 100
MOMENTS = (0, 15, 50, 99)
"""Start, the middle of MAML++'s annealing, the middle and the end of a run."""


def ratio_loss(ratio, advantage):
    return -ratio * advantage


def clipped_loss(ratio, advantage, clip=0.3):
    return max(-ratio * advantage, -min(max(ratio, 1 - clip), 1 + clip) * advantage)


@dataclass(frozen=True)
class Row:
    """What an algorithm's iterations are, by its paper and the defaults of its row."""

    problem: type = UnrolledProblem
    outer: type = TrustRegion
    steps: dict[str, float] = dataclasses.field(default_factory=dict)
    """Options of the outer optimizer."""
    inner: Any = log_likelihood
    loss: Any = ratio_loss
    curvature: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    weights: tuple[tuple[float, ...], ...] = ((), (), (), ())
    rate: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    inner_kl: float = 0.0
    credit: bool = False
    batches: int = 2
    fast: str = "all"
    learned: str = "no"
    updates: int = 1
    proximal: float = 0.0
    step_sizes: tuple[float, ...] = (0.1,)
    context: int = 0


NO_CURVATURE = (0.0, 0.0, 0.0, 0.0)
REINFORCE = {"learning_rate": 3e-3, "steps": 1}
FIVE_STEPS = {"learning_rate": 1e-3, "steps": 5, "clip": 0.3}
TABLE = {
    "maml-trpo": Row(),
    "maml-reinforce": Row(outer=Adam, steps=REINFORCE),
    "maml-ppo": Row(outer=ClippedSurrogate, steps=FIVE_STEPS, loss=clipped_loss),
    "fomaml-trpo": Row(curvature=NO_CURVATURE),
    "fomaml-reinforce": Row(curvature=NO_CURVATURE, outer=Adam, steps=REINFORCE),
    "reptile": Row(
        problem=ReptileProblem, outer=Adam, steps=REINFORCE, inner=likelihood_ratio, batches=4
    ),
    "e-maml": Row(credit=True),
    "promp": Row(
        outer=ClippedSurrogate, steps=FIVE_STEPS, inner=likelihood_ratio, loss=clipped_loss,
        inner_kl=5e-4,
    ),
    "dice-maml": Row(inner=partial(dice, decay=0.8)),
    "imaml": Row(
        problem=ImplicitProblem, outer=Adam, steps=REINFORCE, inner=likelihood_ratio, updates=8,
        proximal=10.0, step_sizes=(0.05,),
    ),
    "maml++": Row(
        outer=Adam, steps=REINFORCE, batches=3, learned="layer", curvature=(0.0, 0.0, 1.0, 1.0),
        step_sizes=(0.1, 0.1),
        # Over the first 30 iterations from equal parts to the last alone.
        weights=((0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (0.0, 1.0)),
        rate=(1.0, 0.5 + 0.5 * math.cos(0.15 * math.pi), 0.5, 0.5 - 0.5 * math.cos(0.01 * math.pi)),
    ),
    "meta-sgd": Row(learned="parameter"),
    "anil": Row(fast="head", step_sizes=(0.5,)),
    "cavia": Row(fast="context", step_sizes=(10.0,), context=8),
    # No inner step is differentiated in these.
    "pretrained": Row(batches=1, curvature=NO_CURVATURE),
    "oracle": Row(batches=1, context=2, curvature=NO_CURVATURE),
    "random": Row(outer=NoUpdate, curvature=NO_CURVATURE),
    "rl2": Row(batches=1, curvature=NO_CURVATURE),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recorder(OuterOptimizer):
    """Takes the place of another outer optimizer, and keeps what it was to solve."""

    name: ClassVar[str] = "recorder"

    of: OuterOptimizer = fixed(TrustRegion())
    seen: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"option": False})

    def loss(self, loss):
        return self.of.loss(loss)

    def rate(self, progress):
        return self.of.rate(progress)

    def init(self, meta):
        return {}

    def step(self, problem, meta, state, rate=1.0):
        self.seen.update(problem=problem, meta=meta, rate=rate)
        return meta, state, {"finite": True}


def built(config: Config, iteration: int) -> tuple[dict[str, Any], list[Rollout]]:
    """What the trainer hands to the outer optimizer in an iteration."""
    recorder, rollouts = Recorder(of=config.setup.algorithm.outer), []
    with new_trainer(config) as trainer:
        trainer.state.iteration = iteration
        trainer.algorithm = dataclasses.replace(config.setup.algorithm, outer=recorder)
        trainer.iterate(rollouts.extend)
    return recorder.seen, rollouts


def table_config(name: str, **changes) -> Config:
    values = {"iterations": ITERATIONS, "tasks": 8, "episodes": 30, "threads": 1}
    return small(name, **(values | changes))


@pytest.mark.parametrize("name", [n for n, row in algorithms().items() if row.head == "meta"])
def test_the_outer_problem_is_the_one_of_the_algorithm(name):
    row, config = TABLE[name], table_config(name)
    assert type(config.setup.algorithm.outer) is row.outer
    assert {key: getattr(config.setup.algorithm.outer, key) for key in row.steps} == row.steps
    with new_trainer(config) as trainer:
        assert trainer.algorithm.outer is config.setup.algorithm.outer
    for i, iteration in enumerate(MOMENTS):
        found, rollouts = built(config, iteration)
        problem = found["problem"]
        assert type(problem) is row.problem
        assert found["rate"] == pytest.approx(row.rate[i], abs=1e-12)
        assert len(problem.batches) == row.batches
        check_adapter(row, problem)
        assert problem.sampled_with is found["meta"]
        assert len(problem.iterates) == row.batches - (row.problem is not ReptileProblem)
        if row.problem is ReptileProblem:
            continue
        check_loss(row, problem)
        if row.problem is ImplicitProblem:
            continue
        assert problem.curvature == row.curvature[i]
        assert problem.objective.step_weights == pytest.approx(row.weights[i])
        check_support_terms(row, problem, rollouts)
        if row.outer is TrustRegion:
            # Of 360 samples 200, or episodes of 12 with as many that are valid.
            chosen = fisher_samples(problem, config.setup.algorithm.outer.fisher_fraction)
            shapes = [samples.shape for samples in chosen]
            if name == "dice-maml":
                assert all(
                    tasks == 8 and 17 <= few < 30 and steps == 12 for tasks, few, steps in shapes
                )
            elif name == "rl2":
                assert shapes == [(8, 9, 24)]  # whole trials
            else:
                assert shapes == [(8, 200)] * row.batches


def check_support_terms(row: Row, problem, rollouts: list[Rollout]) -> None:
    """What is added to the query loss for the support samples: ProMP's KL, E-MAML's credit."""
    terms = problem.objective.support_terms
    assert len(terms) == (row.inner_kl > 0.0) + row.credit
    if not terms:
        return
    policy, batch = problem.adapter.model, problem.batches[0]
    moved = {name: x + 0.3 for name, x in batch.old.items()}
    found = terms[0](policy, moved, batch, slice(0, 8))
    if row.inner_kl:
        kl = (batch.weight * policy.kl(batch.old, moved)).sum(1)
        torch.testing.assert_close(found, row.inner_kl / (row.batches - 1) * kl)
    if row.credit:
        ratio = policy.log_prob(moved, batch.action) - batch.old_log_prob
        credit = -found / torch.where(batch.weight > 0, ratio, 0.0).sum(1)
        earned = rollouts[-1].mean_returns()
        beyond = earned - leave_one_out(rollouts[-1].tasks, earned)
        assert torch.equal(credit > 0, beyond > 0)


def check_adapter(row: Row, problem) -> None:
    adapter, batch = problem.adapter, problem.batches[0]
    assert (adapter.fast, adapter.learned) == (row.fast, row.learned)
    assert (adapter.updates, adapter.proximal) == (row.updates, row.proximal)
    assert adapter.step_sizes == row.step_sizes
    assert adapter.model.context_dim == row.context
    assert (batch.context is not None) == (row.context > 0)
    # The loss and its first two derivatives along a line, at the policy that sampled.
    found, expected = (
        line_derivatives(adapter.model, loss, batch) for loss in (adapter.loss, row.inner)
    )
    torch.testing.assert_close(found, expected)
    assert all(
        not torch.allclose(line_derivatives(adapter.model, other, batch), expected)
        for other in (log_likelihood, likelihood_ratio, partial(dice, decay=0.8), dice)
        if other is not row.inner and getattr(other, "func", 0) is not getattr(row.inner, "func", 1)
    )


def line_derivatives(policy, loss, batch):
    x = torch.zeros((), requires_grad=True)
    old = {name: value.detach() for name, value in batch.old.items()}
    dist = {"mean": old["mean"] + x * torch.cos(100 * old["mean"]), "log_std": old["log_std"] + x}
    value = loss(policy, dist, batch).sum()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    return torch.stack([value.detach(), first.detach(), second])


def check_loss(row: Row, problem) -> None:
    """The outer loss of single samples, some of their ratios beyond the clip."""
    policy, batch = problem.adapter.model, problem.batches[-1].map(lambda x: x[:1])
    dist = {name: x + 0.3 for name, x in batch.old.items()}
    ratio = (policy.log_prob(dist, batch.action) - batch.old_log_prob).exp()[0].tolist()
    assert min(ratio) < 0.7
    assert max(ratio) > 1.3
    samples = zip(batch.weight[0].tolist(), ratio, batch.advantage[0].tolist(), strict=True)
    expected = sum(w * row.loss(r, a) for w, r, a in samples)
    found = problem.objective.outer_loss(policy, dist, batch)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_given_clip_reaches_the_objective():
    found, _ = built(table_config("maml-ppo", **{"outer.clip": 0.1}), 0)
    check_loss(Row(loss=partial(clipped_loss, clip=0.1)), found["problem"])


# Fisher samples -----------------------------------------------------------------------------------

POLICY = gaussian_policy(observation_dim=2, action_dim=1, hidden=(3,))
EPISODES, HORIZON = 20, 50


def ragged(lengths: list[int]):
    """A batch whose task t has episodes of lengths[t] steps; 1000 samples a task."""
    batch = random_batch(POLICY, len(lengths), EPISODES * HORIZON, 0, ragged=False)
    steps = torch.arange(HORIZON).repeat(EPISODES)
    valid = (steps < torch.tensor(lengths).unsqueeze(1)).double()
    return dataclasses.replace(
        batch, weight=valid / valid.sum(1, keepdim=True).clamp(min=1), episodes=EPISODES
    )


def chosen_samples(name: str, fraction: float, *batches: Batch):
    """The Fisher samples of an algorithm's first iteration."""

    def permutation(n):
        return torch.from_numpy(stream(0, 0, "fisher").permutation(n))

    adapter = find_algorithm(name).inner.adapter(POLICY, log_likelihood)
    objective = Objective(likelihood_ratio)
    problem = UnrolledProblem(adapter, batches, ChunkPool(), objective, permutation=permutation)
    return fisher_samples(problem, fraction)


@pytest.mark.parametrize(
    ("name", "lengths", "least"),
    [
        # Of 1000, 500, 160, 20 and no valid samples: a tenth, or 200, or all there are.
        ("maml-trpo", [50, 25, 8, 1, 0], [200, 200, 160, 20, 0]),
        # Ten episodes of 20 steps; the others are chosen as many.
        ("dice-maml", [50, 25, 20, 0], [500, 250, 200, 0]),
    ],
)
def test_fisher_samples_are_counted_where_they_are_valid(name, lengths, least):
    batch = ragged(lengths)
    (some,) = chosen_samples(name, 0.1, batch)
    chosen = batch.select(some)
    assert (chosen.weight > 0).sum(dim=1).tolist() == least
    for indices in some.flatten(1):
        assert len(indices.unique()) == len(indices)
    assert chosen.episodes == (10 if name == "dice-maml" else 0)
    if name == "dice-maml":
        first = some[:, :, :1]
        assert torch.equal(some, first + torch.arange(HORIZON))
        assert not (first % HORIZON).any()


def test_fisher_samples_take_diverged_episodes_last():
    batch = ragged([50, 50])
    valid = torch.ones(2, EPISODES, HORIZON, dtype=torch.float64)
    valid[0, ::2] = 0.0
    flat = valid.flatten(1)
    batch = dataclasses.replace(batch, weight=flat / flat.sum(1, keepdim=True))
    (some,) = chosen_samples("dice-maml", 0.1, batch)
    assert some.shape == (2, 4, HORIZON)
    assert (batch.select(some).weight > 0).all()


def test_a_fraction_of_fisher_samples_is_one_of_valid_samples():
    support, query = ragged([25, 20]), ragged([50, 30])
    some = chosen_samples("maml-trpo", 0.6, support, query)
    counts = [
        (batch.select(samples).weight > 0).sum(dim=1).tolist()
        for batch, samples in zip((support, query), some, strict=True)
    ]
    # Rows are as long as the longest needs; the others are filled with further valid samples.
    assert counts == [[300, 300], [600, 600]]
    assert chosen_samples("maml-trpo", 0.6, ragged([3, 50]))[0].shape == (2, 600)
    assert chosen_samples("maml-trpo", 1.0, ragged([50, 3])) == [None]


# Credit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tasks", "dim"), [(20, 1), (40, 2), (7, 1), (40, 12)])
def test_a_task_is_predicted_from_the_others_alone(tasks, dim):
    rng = np.random.default_rng(tasks)
    goals = 5.0 + rng.standard_normal((tasks, dim))
    values = 3.0 - goals[:, 0] ** 2 + rng.standard_normal(tasks)
    found = leave_one_out(torch.from_numpy(goals), torch.from_numpy(values)).numpy()
    for t in range(tasks):
        others = np.arange(tasks) != t
        expected = values[others].mean()
        if tasks >= 4 * (1 + 2 * dim):  # enough for a regression
            x = np.hstack([np.ones((tasks, 1)), goals, goals**2])
            expected = x[t] @ np.linalg.lstsq(x[others], values[others], rcond=None)[0]
        assert found[t] == pytest.approx(expected, rel=1e-8)


def test_a_direction_is_predicted_by_the_others_of_its_side():
    goals = torch.tensor([-1.0, 1.0] * 8, dtype=torch.float64).unsqueeze(1)
    values = torch.arange(16, dtype=torch.float64)
    found = leave_one_out(goals, values)
    for t in range(16):
        side = [float(v) for i, v in enumerate(values) if i != t and i % 2 == t % 2]
        assert float(found[t]) == pytest.approx(np.mean(side))
    # A side that a task has for itself tells nothing of it.
    goals[:, 0] = 1.0
    goals[0] = -1.0
    assert float(leave_one_out(goals, values)[0]) == pytest.approx(np.arange(1, 16).mean())
    assert leave_one_out(goals[:1], values[:1]).tolist() == [0.0]


def credited(returns, lengths, diverged=(), scale=2.0) -> torch.Tensor:
    """Credit of tasks of two query episodes each, whose rewards are equal over their lengths."""
    tasks = len(returns)
    length = torch.tensor(lengths)
    valid = torch.arange(6) < length.unsqueeze(2)
    gone = torch.zeros(tasks, 2, dtype=torch.bool)
    for t in diverged:
        gone[t] = True
    valid = valid & ~gone.unsqueeze(2)
    reward = torch.tensor(returns).unsqueeze(2) / length.unsqueeze(2) * valid
    empty = torch.zeros(tasks, 2, 6, 1)
    after = Rollout(
        tasks=torch.zeros(tasks, 0, dtype=torch.float64), observation=empty,
        last_observation=empty[:, :, 0], action=empty, behaviour={}, reward=reward, valid=valid,
        terminated=~gone, truncated=gone, diverged=gone,
    )  # fmt: skip
    batch = random_batch(POLICY, tasks, 12, 0)
    scales = torch.tensor(scale, dtype=torch.float64).expand(tasks)
    return sampling_credit(dataclasses.replace(batch, rollout=after, advantage_scale=scales))


def test_credit_is_the_surplus_in_units_of_the_query_loss():
    # Mean returns 2, 5, 8; the others' means 6.5, 5, 3.5; mean lengths 3, 4, 5; scale 2.
    found = credited([[1.0, 3.0], [5.0, 5.0], [7.0, 9.0]], [[2, 4], [3, 5], [6, 4]])
    assert found.tolist() == pytest.approx([-4.5 / 6.0, 0.0, 4.5 / 10.0], abs=1e-6)


def test_a_task_whose_query_episodes_earn_the_same_has_no_boundless_credit():
    # The scales' root mean square is 2 sqrt(2 / 3); a tenth of it stands in for the scale 1e-8.
    returns, lengths = [[1.0, 3.0], [5.0, 5.0], [7.0, 9.0]], [[2, 4], [3, 5], [6, 4]]
    found = credited(returns, lengths, scale=[1e-8, 2.0, 2.0])
    least = 0.2 * (2.0 / 3.0) ** 0.5
    assert found.tolist() == pytest.approx([-4.5 / (3.0 * least), 0.0, 4.5 / 10.0], abs=1e-5)


def test_a_diverged_task_is_credited_nothing_and_changes_no_others_credit():
    returns = [[-9.0, -7.0], [-6.0, -4.0], [-1.0, -3.0], [-1.0, -1.0]]
    lengths = [[3, 3], [4, 4], [5, 5], [6, 6]]
    found = credited(returns, lengths, diverged=(1,))
    alone = credited([returns[i] for i in (0, 2, 3)], [lengths[i] for i in (0, 2, 3)])
    assert found[1] == 0.0
    assert found[[0, 2, 3]].tolist() == pytest.approx(alone.tolist())
    assert found[0] < 0 < found[3]


# Schedules ----------------------------------------------------------------------------------------


def test_a_schedule_spans_the_whole_run():
    config = table_config("maml++")
    for total in (10, 100, 501):
        rates = [config.setup.algorithm.outer.rate(i / total) for i in range(total)]
        assert rates[0] == 1.0
        assert all(a > b > 0.0 for a, b in itertools.pairwise(rates))
        assert config.setup.algorithm.outer.rate(1.0) == 0.0
        assert rates[total // 2] == pytest.approx(0.5, abs=1.6 / total)
        curvatures = [config.setup.algorithm.meta.curvature(i / total) for i in range(total)]
        assert curvatures.count(0.0) == math.ceil(0.3 * total)
        assert curvatures == sorted(curvatures)


@pytest.mark.parametrize("name", ["maml-trpo", "meta-sgd", "promp", "maml++"])
def test_an_exact_meta_gradient_may_have_a_share_of_the_curvature(name):
    config = table_config(name, **{"meta.second_order": 0.5})
    found = [built(config, i)[0]["problem"].curvature for i in MOMENTS]
    assert found == [share / 2 for share in TABLE[name].curvature]


def test_without_curvature_maml_is_first_order_maml(tmp_path):
    def params(name, **options):
        config = table_config(name, episodes=4, iterations=2, **options)
        return train(config, tmp_path / f"{name}-{options}")

    first_order = params("fomaml-trpo")
    assert same_params(params("maml-trpo", **{"meta.second_order": 0.0}), first_order)
    assert not same_params(params("maml-trpo", **{"meta.second_order": 0.5}), first_order)


def test_resuming_with_more_iterations_reports_the_changed_schedules(tmp_path, capsys):
    def config(iterations, name="maml++"):
        return small(name, iterations=iterations, threads=1)

    assert schedule_change(config(200).setup.algorithm, 200, 200, 100) is None
    said = schedule_change(config(200).setup.algorithm, 200, 100, 100)
    assert said is not None
    assert mentions(said, 200, 100, "outer.schedule", "0.50", "0.00")
    assert mentions(said, 60, 30)  # where the annealing ends
    assert schedule_change(config(200, "maml-trpo").setup.algorithm, 200, 100, 9) is None

    train(config(2), tmp_path / "run")
    seen: list[str] = []
    train(config(4), tmp_path / "run", resume=True, notice=seen.append)
    assert len(seen) == 1
    assert mentions(seen[0], 4, 2, "outer.schedule", "0.50")
    # To the same end it says nothing, and is the run that was never interrupted.
    rows: list[dict] = []
    whole = train(config(4), tmp_path / "whole")
    train(config(4), tmp_path / "parts", callbacks=[rows.append], stop=lambda: len(rows) == 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = train(config(4), tmp_path / "parts", resume=True)
    assert same_params(whole, parts)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    capsys.readouterr()
    assert run("train", "--resume", str(tmp_path / "parts"), "--iterations", "5") == 0
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if mentions(line, "outer.schedule")]
    assert mentions(line, 5, 4, "0.10")
