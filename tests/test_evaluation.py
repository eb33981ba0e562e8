"""Evaluation: its statistics, its protocol and what it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from envs.errors import UserError
from envs.navigation import NavigationFamily, NavigationVectorEnv
from metarl import evaluate
from metarl.config import Config, InnerConfig, PolicyConfig
from metarl.meta_policy import MetaPolicy, policy_for, random_meta_policy
from metarl.parallel import ChunkPool
from metarl.plots import plot_evaluation
from metarl.policies import stack
from metarl.results import Curve, EvaluationResult
from metarl.rollouts import Address, Collector


def navigator(**changes) -> MetaPolicy:
    config = Config(
        **{
            "family": "navigation-2d",
            "family_options": {"horizon": 15},
            "policy": PolicyConfig(hidden=(8,)),
            "inner": InnerConfig(step_sizes=(0.5,), test_step_sizes=(0.5, 0.25)),
            **changes,
        }
    )
    from envs import make_family

    family = make_family(config.family, **config.family_options)
    return MetaPolicy(policy_for(config, family).init(np.random.default_rng(3)), config)


def result(per_task: list[list[float]]) -> EvaluationResult:
    return EvaluationResult(Curve([0.1], np.array([per_task])), {})


def test_the_verdict_tells_a_gain_a_loss_and_neither():
    rows = [[0.0, 5.0], [1.0, 6.5], [2.0, 6.8], [3.0, 7.7], [4.0, 9.1], [5.0, 9.9]]
    gaining = result(rows)
    assert gaining.verdict().startswith("Adaptation gains 5.0 ± ")
    assert "(100 % of tasks improve)" in gaining.verdict()
    losing = result([row[::-1] for row in rows])
    assert losing.verdict().startswith("Adaptation LOSES 5.0 ± ")
    neither = result([[0.0, x] for x in (5.0, -4.0, 1.0, -3.0, 2.0, -1.0)])
    assert "cannot be told from zero" in neither.verdict()
    assert "single task" in result([[0.0, 1.0]]).verdict()
    assert "at least 6 tasks" in result(rows[:4]).verdict()


def test_a_policy_that_cannot_adapt_is_told_so():
    # A 95 % interval misses zero by chance once in twenty seeds.
    verdicts = [
        evaluate(
            navigator(), tasks=20, episodes=5, steps=1, step_sizes=[1e-9], seed=seed, threads=1
        ).verdict()
        for seed in range(6)
    ]
    assert sum("cannot be told from zero" in verdict for verdict in verdicts) >= 4


def test_k_steps_take_k_plus_one_samples_of_their_own(monkeypatch):
    meta = navigator()
    addresses = []
    from metarl.rollouts import Collector

    collect = Collector.collect

    def watch(self, params, tasks, address, **options):
        addresses.append((address.split, address.inner_step))
        return collect(self, params, tasks, address, **options)

    monkeypatch.setattr(Collector, "collect", watch)
    found = evaluate(meta, tasks=3, episodes=2, steps=3, threads=1)
    assert addresses == [("test", k) for k in range(4)] * 2  # the policy, then the random one
    assert found.curve.per_task.shape == (3, 4)
    assert found.curve.step_sizes == [0.5, 0.25, 0.25]
    assert found.references["random"].step_sizes == [0.5, 0.25, 0.25]


def test_each_task_starts_from_the_initialization():
    # A task's curve is the same whatever other tasks there are.
    meta = navigator()
    few = evaluate(meta, tasks=2, episodes=3, steps=2, drawn=True, threads=1)
    many = evaluate(meta, tasks=6, episodes=3, steps=2, drawn=True, threads=2)
    np.testing.assert_allclose(few.curve.per_task, many.curve.per_task[:2], rtol=1e-5)


def test_tasks_cover_the_test_split_or_are_drawn_from_it():
    def tasks(**options):
        found = evaluate(navigator(), tasks=5, episodes=1, steps=0, threads=1, **options)
        return found.setting["tasks"]

    assert tasks() == tasks(seed=1) == navigator().family.tasks.grid(5).tolist()
    drawn = [tasks(drawn=True), tasks(drawn=True, seed=1), tasks(split="validation")]
    assert drawn[0] == tasks(drawn=True)
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_policy_is_left_as_it_was():
    meta = navigator()
    before = {name: p.clone() for name, p in meta.params.items()}
    evaluate(meta, tasks=2, episodes=2, steps=1, threads=1)
    assert all(torch.equal(before[name], meta.params[name]) for name in before)


def test_step_sizes_seed_split_and_deterministic_actions_are_heeded():
    meta = navigator()

    def returns(**options):
        options = {"tasks": 3, "episodes": 3, "steps": 1, "threads": 1, **options}
        return evaluate(meta, **options).curve

    base = returns()
    assert returns().returns == base.returns
    assert returns(seed=1).returns != base.returns
    assert returns(split="validation").returns != base.returns
    larger = returns(step_sizes=[2.0])
    assert larger.returns[0] == base.returns[0]
    assert larger.returns[1] != base.returns[1]
    still = returns(deterministic=True).per_task
    spread = returns(deterministic=True, episodes=1).per_task
    assert still[:, 0] == pytest.approx(spread[:, 0])  # no chance before adaptation


def test_references_are_evaluated_on_the_same_tasks_and_must_share_the_family():
    meta = navigator()
    other = random_meta_policy(meta, seed=9)
    found = evaluate(meta, tasks=3, episodes=2, steps=1, references={"other": other}, threads=1)
    assert set(found.references) == {"random", "other"}
    alone = evaluate(other, tasks=3, episodes=2, steps=1, threads=1)
    assert found.references["other"].returns == alone.curve.returns
    far = dataclasses.replace(
        meta, config=dataclasses.replace(meta.config, family_options={"horizon": 9})
    )
    with pytest.raises(UserError, match="far was trained on"):
        evaluate(meta, tasks=1, episodes=1, references={"far": far}, threads=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"episodes": -1}, "episodes must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"step_sizes": [0.1, -0.5]}, "step sizes must be positive, got -0.5"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        evaluate(navigator(), **options)


def test_json_and_plot(tmp_path):
    found = evaluate(navigator(), tasks=4, episodes=2, steps=2, threads=1)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    settings = {"family", "preset", "tasks", "episodes", "step_sizes"}
    assert settings | {"returns", "ci95", "per_task", "references"} <= set(data)
    assert np.array(data["per_task"]).shape == (4, 3)
    assert np.array(data["ci95"]).shape == (3, 2)
    assert len(data["tasks"]) == 4
    keys = {"step_sizes", "returns", "ci95", "per_task"}
    assert keys <= set(data["references"]["random"])
    plot_evaluation(found, tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    single = evaluate(navigator(), tasks=1, episodes=2, steps=0, threads=1)
    assert json.loads(json.dumps(single.to_json(), allow_nan=False))["ci95"] == [[None, None]]
    plot_evaluation(single, tmp_path / "single.png")
    assert "this policy" in found.table()


class ReachingVectorEnv(NavigationVectorEnv):
    """Points that tell where they are within 0.2 of the goal."""

    def _advance(self, ids, actions):
        reward, *flags, info = super()._advance(ids, actions)
        return reward, *flags, {**info, "success": (reward > -0.2).astype(float)}


class ReachingFamily(NavigationFamily):
    tells_success = True

    def make_vec(self, num_tasks, episodes, **options):
        return ReachingVectorEnv(self, num_tasks, episodes, **options)


def test_success_rates_are_reported_where_the_family_tells(monkeypatch):
    policy = navigator()
    silent = evaluate(policy, tasks=6, episodes=4, steps=1, threads=1)
    assert "success" not in silent.to_json()
    assert "success" not in silent.table()
    plain = policy.family
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    monkeypatch.setattr(MetaPolicy, "family", ReachingFamily(**values))
    policy = navigator()
    told = evaluate(policy, tasks=6, episodes=4, steps=1, threads=1)
    assert told.curve.per_task.tolist() == silent.curve.per_task.tolist()
    rates = told.to_json()["success"]
    # By hand: where the points of the initialization's episodes went.
    with ChunkPool(1) as pool:
        family = policy.family
        collector = Collector(family, policy.policy, 6, 4, pool, policy.config.policy.action)
        goals = family.tasks.grid(6)
        params = stack(policy.params, 6)
        rollout = collector.collect(params, goals, Address(0, split="test"))
    gap = (rollout.observation - torch.from_numpy(goals)[:, None, None]).norm(dim=-1)
    last = (rollout.last_observation - torch.from_numpy(goals)[:, None]).norm(dim=-1)
    done = ((gap[:, :, 1:] < 0.2) & rollout.valid[:, :, 1:]).any(-1) | (last < 0.2)
    assert 0 < int(done.sum()) < 24
    assert rates[0] == pytest.approx(float(done.double().mean()))
    assert np.mean(told.to_json()["success_per_task"], axis=0).tolist() == pytest.approx(rates)
    head, *lines = told.table().split("success rate, %")[1].splitlines()[1:]
    assert head.split() == ["this", "policy", f"{100 * rates[0]:.1f}", f"{100 * rates[1]:.1f}"]
    assert lines[0].startswith("random")
