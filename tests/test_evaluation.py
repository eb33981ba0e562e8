"""Evaluation: its statistics, its protocol and what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import gaussian_policy, random_batch
from expecting import mentions, refused

from metarl import evaluate
from metarl.cli.results import results_folder
from metarl.config.options import Config
from metarl.config.resolve import reference_step_sizes, resolve
from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs import family_names, make_family
from metarl.envs.families.navigation import NavigationFamily, NavigationVectorEnv
from metarl.evaluation import stable_baselines
from metarl.evaluation.curves import RETURN, SQUARED_ERROR, Curve
from metarl.evaluation.groups import grouped
from metarl.evaluation.results import EvaluationResult
from metarl.evaluation.scratch import ScratchTrainer
from metarl.evaluation.step_sizes import FACTORS
from metarl.learning.advantages import Advantages
from metarl.models.networks import stack
from metarl.plots.figures import plot_evaluation
from metarl.policies.loading import random_meta_policy
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.folder import short_name
from metarl.sampling.rollouts import Collector, RandomKey


def navigator(algorithm: str = "maml-trpo", **changes) -> MetaPolicy:
    values = {
        "policy.hidden": (8,), "inner.step_sizes": (0.5,), "inner.test_step_sizes": (0.5, 0.25),
    }  # fmt: skip
    config = Config.of("navigation-2d", algorithm, {"horizon": 15})
    config = config.with_options({**values, **changes})
    return as_trained(initial(config, seed=3), config)


def as_trained(params: dict[str, torch.Tensor], config: Config) -> MetaPolicy:
    """Return a policy with the record of a run of this config."""
    return MetaPolicy(params, config.setup, record={"config": config.to_json(), "family": {}})


def initial(config: Config, seed: int) -> dict[str, torch.Tensor]:
    """Parameters of a config's network before training."""
    family = make_family(config.setup.family, **config.setup.family_options)
    model = config.setup.domain.model(config.setup.algorithm, config.setup.policy, family)
    return model.init(np.random.default_rng(seed))


def result(per_task: list[list[float]]) -> EvaluationResult:
    return EvaluationResult(Curve([0.1], np.array([per_task])), {})


def test_a_lead_is_paired_by_task_and_better_whatever_the_measure():
    # Tasks differ by far more than the policies do; of two seeds the mean counts.
    theirs = np.array([[[0.0, 10.0], [0.0, 200.0], [0.0, np.nan], [0.0, -3000.0]]])
    ours = np.stack([theirs[0] + 1.0, theirs[0] + 4.0])
    lead = Curve([0.1], ours).lead(Curve([0.1], theirs))
    assert (lead.mean, lead.low, lead.high) == pytest.approx((2.5, 2.5, 2.5))
    less = Curve([0.1], ours, measure=SQUARED_ERROR).lead(
        Curve([0.1], theirs, measure=SQUARED_ERROR)
    )
    assert (less.mean, less.low, less.high) == pytest.approx((-2.5, -2.5, -2.5))
    uneven = Curve([0.1], np.array([[[0.0, 1.0], [3.0, 5.0], [8.0, 9.0]]]))
    other = Curve([0.1], np.array([[[2.0, 0.0], [2.0, 2.0], [2.0, 4.0]]]))
    assert uneven.lead(other).mean == pytest.approx((1 + 3 + 5) / 3)
    assert uneven.lead(other, 0).mean == pytest.approx((-2 + 1 + 6) / 3)


def test_the_verdict_tells_a_gain_a_loss_and_neither():
    rows = [[0.0, 5.0], [1.0, 6.5], [2.0, 6.8], [3.0, 7.7], [4.0, 9.1], [5.0, 9.9]]
    gaining = result(rows)
    assert gaining.curve.gain()[0] == pytest.approx(5.0)
    assert mentions(gaining.verdict(), "5.0", "100 %")
    losing = result([row[::-1] for row in rows])
    assert losing.curve.gain()[0] == pytest.approx(-5.0)
    assert mentions(losing.verdict(), "5.0", "0 %")
    neither = result([[0.0, x] for x in (5.0, -4.0, 1.0, -3.0, 2.0, -1.0)])
    _, low, high = neither.curve.gain()
    assert low < 0.0 < high
    assert mentions(neither.verdict(), "0.0")
    assert mentions(result([[0.0, 1.0]]).verdict(), "1.0")
    assert mentions(result(rows[:4]).verdict(), 6)  # so many tasks are needed
    said = [r.verdict() for r in (gaining, losing, neither, result([[0.0, 1.0]]), result(rows[:4]))]
    assert len({re.sub(r"[\d.]+", "", verdict) for verdict in said}) == len(said)


def test_a_policy_that_cannot_adapt_gains_nothing():
    # A 95 % interval misses zero by chance once in twenty seeds.
    gains = [
        evaluate(
            navigator(), tasks=20, episodes=5, steps=1, step_sizes=[1e-9], seed=seed, threads=1
        ).curve.gain()
        for seed in range(6)
    ]
    assert sum(low <= 0.0 <= high for _, low, high in gains) >= 4


def test_k_steps_draw_k_plus_one_sets_of_episodes(monkeypatch):
    meta = navigator()
    keys = []
    from metarl.sampling.rollouts import Collector

    collect = Collector.collect

    def watch(self, params, tasks, key, **options):
        keys.append((key.split, key.inner_step))
        return collect(self, params, tasks, key, **options)

    monkeypatch.setattr(Collector, "collect", watch)
    found = evaluate(meta, tasks=3, episodes=2, steps=3, threads=1)
    assert keys == [("test", k) for k in range(4)] * 2  # the policy, then the random one
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
    of_numpy = returns(step_sizes=np.array([2.0, 1.0]))
    assert of_numpy.returns == returns(step_sizes=(2.0, 1.0)).returns
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
    far = MetaPolicy(meta.params, dataclasses.replace(meta.setup, family_options={"horizon": 9}))
    with refused("far", "horizon", 9, 15):
        evaluate(meta, tasks=1, episodes=1, references={"far": far}, threads=1)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"tasks": 0}, ["tasks", 0]),
        ({"episodes": -1}, ["episodes", -1]),
        ({"steps": -1}, ["steps", -1]),
        ({"step_sizes": [0.1, -0.5]}, ["step_sizes", -0.5]),
        ({"tasks": 2.5}, ["tasks", 2.5]),
        ({"episodes": True}, ["episodes", True]),
        ({"steps": "1"}, ["steps", "'1'"]),
        ({"threads": 0}, ["threads", 0]),
        ({"step_sizes": ["a"]}, ["step_sizes", "a"]),
        ({"step_sizes": "0.1"}, ["step_sizes", "'0.1'"]),
        ({"random_step_sizes": 0.1}, ["random_step_sizes", 0.1]),
        ({"step_sizes": np.array(0.1)}, ["step_sizes", 0.1]),
        ({"step_sizes": np.array([0.1, np.nan])}, ["step_sizes", "nan"]),
        (
            {"split": "validation", "tune_step_sizes": True},
            ["tune_step_sizes", "validation", "split", "test"],
        ),
    ],
)
def test_bad_numbers_are_refused(options, names):
    with refused(*names):
        evaluate(navigator(), **options)


def test_an_evaluation_is_json_and_a_plot(tmp_path):
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
    assert found.name in found.table()


class ReachingVectorEnv(NavigationVectorEnv):
    """Points that tell where they are within 0.2 of the goal."""

    def advance(self, ids, actions):
        reward, *flags, info = super().advance(ids, actions)
        return reward, *flags, {**info, "success": (reward > -0.2).astype(float)}


class ReachingFamily(NavigationFamily):
    def make_vec(self, num_tasks, episodes, **options):
        return ReachingVectorEnv(self, num_tasks, episodes, **options)


def test_success_rates_are_reported_if_the_family_has_them(monkeypatch):
    policy = navigator()
    silent = evaluate(policy, tasks=6, episodes=4, steps=1, threads=1)
    assert "success" not in silent.to_json()
    assert not mentions(silent.table(), "success")
    plain = policy.family
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    monkeypatch.setattr(MetaPolicy, "source", ReachingFamily(**values))
    policy = navigator()
    told = evaluate(policy, tasks=6, episodes=4, steps=1, threads=1)
    assert told.curve.per_task.tolist() == silent.curve.per_task.tolist()
    rates = told.to_json()["success"]
    # By hand: where the points of the initialization's episodes went.
    with ChunkPool(1) as pool:
        family = policy.family
        collector = Collector(family, policy.policy, 6, 4, pool, policy.setup.policy.action)
        goals = family.tasks.grid(6)
        params = stack(policy.params, 6)
        rollout = collector.collect(params, goals, RandomKey(0, split="test"))
    gap = (rollout.observation - torch.from_numpy(goals)[:, None, None]).norm(dim=-1)
    last = (rollout.last_observation - torch.from_numpy(goals)[:, None]).norm(dim=-1)
    done = ((gap[:, :, 1:] < 0.2) & rollout.valid[:, :, 1:]).any(-1) | (last < 0.2)
    assert 0 < int(done.sum()) < 24
    assert rates[0] == pytest.approx(float(done.double().mean()))
    assert np.mean(told.to_json()["success_per_task"], axis=0).tolist() == pytest.approx(rates)
    rows = [line.split() for line in told.table().splitlines()]
    assert [*told.name.split(), f"{100 * rates[0]:.1f}", f"{100 * rates[1]:.1f}"] in rows
    random = told.references["random"].success.mean(axis=0)
    assert ["random", f"{100 * random[0]:.1f}", f"{100 * random[1]:.1f}"] in rows


ROLES = {"maml-trpo": "meta-learner", "random": "untrained"}


def curve(algorithm: str, *per_seed: list[list[float]]) -> Curve:
    role = ROLES.get(algorithm, algorithm)
    return Curve([0.1], np.array(per_seed), algorithm, list(range(len(per_seed))), role=role)


def test_the_gap_closed_by_hand():
    tasks = 8
    own = curve("maml-trpo", [[1.0, 6.0]] * tasks)
    random = curve("random", [[-1.0, 5.0]] * tasks)  # only what it earns before any step counts
    oracle = curve("oracle", [[8.0, 10.0]] * tasks)  # 9: it takes no steps
    found = EvaluationResult(own, {"random": random, "oracle": oracle})
    for closed, share in zip(found.gap_closed(own) or [], (0.2, 0.7), strict=True):
        assert closed == pytest.approx((share, share, share))
    assert found.to_json()["gap_closed"] == pytest.approx([0.2, 0.7])
    assert mentions(found.table(), "0.20", "0.70")
    assert EvaluationResult(own, {"random": random}).gap_closed(own) is None
    poor = curve("oracle", [[-2.0, -2.0]] * tasks)
    assert EvaluationResult(own, {"random": random, "oracle": poor}).gap_closed(own) is None


@pytest.mark.parametrize("measure", [RETURN, SQUARED_ERROR])
def test_the_worst_tasks_by_hand(measure):
    scores = np.stack([np.arange(20.0), np.arange(20.0)[::-1]], axis=1)[None]
    scores[0, 7, 0] = np.nan
    told = Curve([0.1], scores, measure=measure).to_json()
    worst = [0.0, 0.0] if measure is RETURN else [19.0, 19.0]
    assert told["worst_task"] == pytest.approx(worst)
    assert [scores[0, t, k] for k, t in enumerate(told["worst"])] == worst
    # A tenth of 19 and of 20 tasks.
    away = [0.9 * 1.0 / 1.9, 0.5]
    expected = [w + a if measure is RETURN else w - a for w, a in zip(worst, away, strict=True)]
    assert told["cvar"] == pytest.approx(expected)
    gone = Curve([0.1], np.full((1, 3, 1), np.nan), measure=measure).to_json()
    assert (gone["worst"], gone["worst_task"], gone["cvar"]) == ([-1], [None], [None])


def test_seeds_give_an_interquartile_mean_over_seeds_and_tasks():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, 7, 2))
    found = EvaluationResult(Curve([0.1], scores, seeds=[0, 1, 2]), {})
    told = found.to_json()
    for k in range(2):
        ordered = np.sort(scores[:, :, k].ravel())  # 21 values: five are cut at either end
        assert told["iqm"][k] == pytest.approx(ordered[5:16].mean())
        low, high = told["iqm_ci95"][k]
        assert low < told["iqm"][k] < high
    assert told["per_task"] == scores.mean(axis=0).tolist()
    assert mentions(found.table(), *(f"{mean:.1f}" for mean in told["iqm"]))
    assert "iqm" not in EvaluationResult(Curve([0.1], scores[:1]), {}).to_json()


def test_a_task_whose_every_episode_diverged_is_left_out():
    per_task = [[float(t), t + 2.0] for t in range(7)]
    per_task[3] = [3.0, np.nan]
    told = json.loads(json.dumps(result(per_task).to_json(), allow_nan=False))
    assert told["gain"]["mean"] == pytest.approx(2.0)
    assert told["per_task"][3] == pytest.approx([3.0, None])


def test_success_is_the_mean_of_the_tasks_that_have_one():
    rates = np.array([[0.0, np.nan], [0.5, np.nan], [np.nan, np.nan], [1.0, np.nan]])
    scores = np.where(np.isnan(rates), np.nan, 1.0)[None]
    found = EvaluationResult(Curve([0.1], scores, "maml-trpo", [0], success=rates), {})
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["success"] == pytest.approx([0.5, None])
    assert found.table().splitlines()[-1].split() == [*found.name.split(), "50.0", "nan"]


def test_the_interquartile_mean_leaves_out_a_diverged_task():
    scores = np.arange(16.0).reshape(2, 8, 1)
    scores[:, 0] = np.nan  # the worst task diverged with both seeds
    told = EvaluationResult(Curve([0.1], scores, seeds=[0, 1]), {}).to_json()
    # 1 ... 7 and 9 ... 15: three are cut at either end of fourteen.
    assert told["iqm"] == pytest.approx([np.mean([4, 5, 6, 7, 9, 10, 11, 12])])
    assert told["iqm_ci95"][0][0] < told["iqm"][0] < told["iqm_ci95"][0][1]


def saved(folder, name: str, algorithm: str = "maml-trpo", **changes) -> str:
    config = Config.from_json(navigator(algorithm, **changes).record["config"])
    as_trained(initial(config, config.run.seed), config).save(folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


def test_no_policy_is_lost_to_anothers_name(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    names = [
        saved(tmp_path / "old", "run", tasks=6),
        saved(tmp_path / "new", "run", tasks=7),
        saved(tmp_path, "random", tasks=8),
        saved(tmp_path, "of-none", algorithm="random"),
    ]
    groups = grouped([*names, names[0]])
    assert list(groups) == [*names[:3], f"{names[0]} (2)", "random"]
    assert [list(group) for group in groups.values()] == [
        [name] for name in (*names[:3], names[0], names[3])
    ]


@pytest.mark.parametrize("name", ["random", "from scratch", "nearest prototype"])
def test_names_of_the_evaluations_own_rows_are_refused(name):
    few = {"tasks": 2, "episodes": 1, "steps": 1, "threads": 1}
    with refused(name):
        evaluate(navigator(), name=name, **few)
    with refused(name):
        evaluate(navigator(), references={name: navigator()}, **few)
    row = navigator("random")
    assert evaluate(navigator(), references={"random": row}, **few).rows.keys() >= {"random"}


def test_the_name_of_a_checkpoint_includes_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for run in ("cheetah-0", "cheetah-1", "other-1"):
        folder = tmp_path / run / "checkpoints"
        folder.mkdir(parents=True)
        tasks = 7 if run == "other-1" else 6
        names.append(saved(folder, "000040", seed=int(run[-1]), tasks=tasks))
    groups = grouped(names)
    assert {name: list(group) for name, group in groups.items()} == {
        "cheetah": names[:2],
        "other-1-000040": names[2:],
    }
    assert short_name(names[0]) == "cheetah-0-000040"
    assert str(results_folder(names[0])) == "runs/cheetah-0-000040-evaluation"


def test_the_random_policy_takes_steps_of_the_fitted_size():
    values = {"inner.step_sizes": (0.1, 0.05), "inner.test_step_sizes": (), "inner.min_kl": 0.5}
    made = random_meta_policy(MetaPolicy({}, navigator(**values).setup), 1)
    fitted = dataclasses.replace(made, params=made.params | {"step_factor": torch.tensor([7.0])})
    assert random_meta_policy(fitted).training_step_sizes == pytest.approx((0.7, 0.35))
    assert made.digest != fitted.digest == dataclasses.replace(fitted).digest


def test_seeds_form_one_group_and_references_come_last(tmp_path):
    names = [
        saved(tmp_path, "first-oracle", algorithm="oracle"),
        saved(tmp_path, "run-0", seed=0),
        saved(tmp_path, "run-1", seed=1, threads=2),
        saved(tmp_path, "run-1-again", seed=1),
        saved(tmp_path, "longer", seed=2, tasks=7),
        saved(tmp_path, "pre", algorithm="pretrained"),
    ]
    groups = grouped(names)
    assert {name: len(members) for name, members in groups.items()} == {
        "run": 2,
        "run-1-again": 1,
        "longer": 1,
        "oracle": 1,
        "pretrained": 1,
    }
    assert list(groups["run"]) == names[1:3]
    (name, members), *others = groups.items()
    found = evaluate(
        list(members.values()),
        references={key: list(other.values()) for key, other in others},
        tasks=6, episodes=2, steps=2, threads=1, name=name, pretrained_step_sizes=[0.3],
    )  # fmt: skip
    rows = list(found.rows)
    assert rows == ["run", "run-1-again", "longer", "pretrained", "random", "oracle"]
    assert found.references["pretrained"].step_sizes == [0.3, 0.3]
    assert found.references["oracle"].step_sizes == []
    assert found.curve.per_seed.shape == (2, 6, 3)
    assert mentions(found.verdicts(), "run", "longer")
    with refused("seed"):
        evaluate([names[1], names[4]], tasks=1)


def test_an_oracle_takes_no_step_and_is_sampled_afresh(tmp_path):
    name = saved(tmp_path, "told", algorithm="oracle")
    still = evaluate(navigator(), references={"oracle": name}, tasks=6, episodes=3, steps=1)
    before = evaluate(name, tasks=6, episodes=3, steps=0).curve
    oracle = still.references["oracle"]
    assert oracle.per_task[:, 0].tolist() == before.per_task[:, 0].tolist()
    assert oracle.per_task[:, 1].tolist() != before.per_task[:, 0].tolist()
    assert mentions(oracle.verdict(), "oracle")
    assert not re.search(r"\d", oracle.verdict())  # no gain is claimed


def test_references_have_the_step_sizes_of_their_preset():
    def sizes(algorithm, family="half-cheetah-dir", **changes):
        return reference_step_sizes(
            resolve("icml2017", family, algorithm, changes).setup, algorithm
        )

    assert sizes("pretrained") == (0.2, 0.1)
    assert sizes("random") == (1.0, 0.5)
    # On velocity the authors' evaluation takes others than on direction and ant.
    assert sizes("pretrained", "half-cheetah-vel") == (0.02, 0.01)
    assert sizes("random", "half-cheetah-vel") == (0.1, 0.05)
    for family in ("ant-dir", "ant-vel"):
        assert sizes("pretrained", family) == (0.2, 0.1)
        assert sizes("random", family) == (1.0, 0.5)
    assert sizes("oracle") == ()
    assert sizes("pretrained", "navigation-2d") == ()  # the authors' are 0.5 for all rows
    assert sizes("random", "walker2d-dir") == ()  # no task of theirs
    assert sizes("pretrained", **{"inner.test_step_sizes": (0.7,)}) == ()


def test_step_sizes_are_tuned_on_validation_tasks_by_one_procedure():
    # Each size's figure is what an evaluation with it gives on the validation tasks.
    meta = navigator()
    own = meta.algorithm.inner.step_sizes[0]
    found = evaluate(meta, tasks=8, episodes=5, steps=2, tune_step_sizes=True, threads=1)
    tried = found.setting["tried_step_factors"]
    assert set(tried) == {"this policy", "random"}
    for name, curve in (("this policy", found.curve), ("random", found.references["random"])):
        assert [factor for factor, _ in tried[name]] == list(FACTORS)
        best = max(tried[name], key=lambda pair: -math.inf if pair[1] is None else pair[1])[0]
        np.testing.assert_allclose(curve.step_sizes, [best * own, best * own / 2], rtol=1e-6)
    for factor, value in tried["this policy"][3:6]:
        sizes = [factor * own]
        alone = evaluate(
            meta, tasks=8, episodes=5, steps=1, step_sizes=sizes, split="validation", threads=1
        )
        assert alone.curve.returns[1] == value
    kept = evaluate(
        meta, tasks=4, episodes=2, steps=1, step_sizes=[0.3], tune_step_sizes=True, threads=1
    )
    assert kept.curve.step_sizes == pytest.approx([0.3])
    assert set(kept.setting["tried_step_factors"]) == {"random"}


def test_what_was_achieved_is_what_the_episodes_did():
    # The point's positions are its observations, so the rollout's say where episodes ended.
    meta = navigator()
    found = evaluate(meta, tasks=3, episodes=4, steps=1, threads=1)
    with ChunkPool(1) as pool:
        collector = Collector(meta.family, meta.policy, 3, 4, pool, "clip")
        goals = meta.family.tasks.grid(3)
        rollout = collector.collect(stack(meta.params, 3), goals, RandomKey(0, split="test"))
    ends = rollout.last_observation.mean(dim=1)
    for i, name in enumerate(("goal_x", "goal_y")):
        np.testing.assert_allclose(found.curve.achieved[name][:, 0], ends[:, i], atol=1e-5)
        path = found.curve.paths[name][:, 0]
        steps = rollout.observation[:, 0, 1:, i].masked_fill(~rollout.valid[:, 0, 1:], np.nan)
        ended = np.isnan(steps.numpy())  # an episode's last position is in no later observation
        np.testing.assert_allclose(path[:, :-1][~ended], steps.numpy()[~ended], atol=1e-5)
    speeds = evaluate(
        "half-cheetah-vel-icml2017", tasks=2, episodes=2, steps=0, threads=1
    ).curve.achieved["velocity"]
    assert speeds.shape == (2, 1)
    assert (speeds > 0.3).all()
    assert (speeds < 1.4).all()


@pytest.mark.parametrize("name", family_names())
def test_families_tell_what_they_say_is_achieved(name):
    if name.startswith(("metaworld", "meta-world")):
        pytest.skip("needs a package of its own")
    family = make_family(name)
    assert set(family.achieved) <= set(family.tasks.names)
    if family.achieved:
        env = family.make_vec(1, 1)
        env.reset(seed=0)
        info = env.step(env.action_space.sample())[-1]
        assert all(info[key].shape == (1,) for key in family.achieved.values())
        env.close()


# Baselines ----------------------------------------------------------------------------------------


def test_the_verdict_says_what_meta_training_earned():
    rng = np.random.default_rng(0)
    hard = 10.0 * rng.standard_normal(20)  # tasks differ more than policies do: only pairs tell

    def curve(gain, algorithm="maml-trpo", ahead=0.0):
        noise = 0.1 * rng.standard_normal(20)
        start = hard + ahead
        scores = np.stack([start, start + gain + noise], 1)[None]
        return Curve([0.1], scores, algorithm, role=ROLES.get(algorithm, algorithm))

    def said(own, ahead=0.0, **others):
        references = {"random": curve(3.0, "random"), **others}
        return EvaluationResult(curve(own, ahead=ahead), references).verdict()

    def intervals(sentence):
        return [tuple(map(float, ends)) for ends in re.findall(r"\[([+-]\S+), (\S+)\]", sentence)]

    def about(wanted, sentence):
        around = [(low - wanted, high - wanted) for low, high in intervals(sentence)]
        return sum(-0.15 < low <= 0.0 <= high < 0.15 for low, high in around)

    # What meta-training adds to the gain, and what it earns before any step.
    assert mentions(said(5.0), "random", 3.0)
    assert (about(2.0, said(5.0)), about(0.0, said(5.0))) == (1, 1)
    assert (about(2.0, said(3.0)), about(0.0, said(3.0))) == (0, 2)
    scratch = {"from scratch": curve(-1.0, "from-scratch")}
    assert about(6.0, said(5.0)) == 0
    assert about(6.0, said(5.0, **scratch)) == 1
    assert mentions(said(5.0, **scratch), "from scratch")
    # A better start is earned too, where the step itself gains no more than it does at random.
    assert about(4.0, said(3.0, ahead=4.0)) == 1


def test_training_from_scratch_is_adam_on_the_clipped_ratio_of_each_task_alone():
    # Three tasks train together as each alone does, by torch's Adam on the same batch.
    policy = gaussian_policy(observation_dim=3, action_dim=2, hidden=(4,))
    batch = random_batch(policy, 5, 30, seed=1).map(lambda x: x.float())
    trainer = ScratchTrainer(policy, 5, seed=3, learning_rate=0.01)
    start = trainer.params
    with ChunkPool(2) as pool:
        trainer.update(batch, pool)
    for t in range(5):
        leaves = {n: p[t].clone().requires_grad_() for n, p in start.items()}
        adam = torch.optim.Adam(leaves.values(), 0.01)
        one = batch.map(lambda x, t=t: x[t])
        for _ in range(10):
            dist = policy.dist(leaves, one.observation)
            ratio = (policy.log_prob(dist, one.action) - one.old_log_prob).exp()
            a = one.advantage
            loss = -(one.weight * torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        for name, p in leaves.items():
            assert torch.allclose(trainer.params[name][t], p, atol=1e-5), name
            assert not torch.equal(p, start[name][t])


def test_from_scratch_has_rows_with_one_and_ten_times_the_steps(monkeypatch):
    monkeypatch.setattr(stable_baselines, "installed", lambda: False)
    meta = navigator()
    options = {"tasks": 6, "episodes": 4, "steps": 2, "threads": 1}
    plain = evaluate(meta, **options)
    found = evaluate(meta, **options, from_scratch=True)
    assert found.curve.per_seed.tolist() == plain.curve.per_seed.tolist()
    short, long = (found.references[f"from scratch{x}"].per_task for x in ("", ", 10 x steps"))
    assert short.shape == long.shape == (6, 3)
    assert short[:, 0].tolist() == long[:, 0].tolist()  # both start from the same policies
    assert not np.array_equal(short[:, 1], long[:, 1])
    assert np.mean(long[:, 2] - long[:, 0]) > 0.0  # twenty batches teach something
    assert mentions(found.table(), "from scratch, 10 x steps")
    assert list(found.rows)[1:] == ["random", "from scratch", "from scratch, 10 x steps"]
    again = evaluate(meta, **{**options, "threads": 2}, from_scratch=True)
    assert again.references["from scratch"].per_task.tolist() == short.tolist()
    with refused("scratch_learning_rate", 0.0):
        evaluate(meta, scratch_learning_rate=0.0)
    with refused("scratch_learning_rate", "from_scratch"):
        evaluate(meta, scratch_learning_rate=1e-3)
    with refused("pretrained_step_sizes"):
        evaluate(meta, pretrained_step_sizes=[0.1])


def test_ppo_of_stable_baselines3_is_a_row_if_it_is_installed():
    # The corner of the plane is far: PPO's policies must learn to walk there in forty updates.
    pytest.importorskip("stable_baselines3")
    meta = navigator()
    options = {"tasks": 2, "episodes": 6, "steps": 1, "threads": 1}
    plain = evaluate(meta, **options)
    found = evaluate(meta, **options, from_scratch=True)
    assert found.curve.per_seed.tolist() == plain.curve.per_seed.tolist()
    names = [f"from scratch{by}{more}" for by in ("", ", SB3 PPO") for more in ("", ", 10 x steps")]
    assert list(found.rows)[1:] == ["random", *names]
    short, long = (found.references[name].per_task for name in names[2:])
    assert short[:, 0].tolist() == long[:, 0].tolist()
    assert np.isfinite(long).all()
    assert not np.array_equal(short[:, 1], long[:, 1])
    again = evaluate(meta, **options, from_scratch=True)
    assert again.references[names[3]].per_task.tolist() == long.tolist()


@pytest.mark.parametrize("mode", ["clip", pytest.param("scale", marks=pytest.mark.slow)])
def test_ppo_learns_on_each_task(mode):
    pytest.importorskip("stable_baselines3")
    family = make_family("navigation-2d", horizon=15)
    goals = np.array([[0.4, 0.4], [-0.4, 0.4]])
    trained = stable_baselines.train_by_ppo(
        family, goals, hidden=(16,), mode=mode, advantage=Advantages(), episodes=40, updates=8,
        measured={0, 8}, key=RandomKey(0),
    )  # fmt: skip
    returns = trained.means
    assert trained.episodes.shape == (2, 9, 40)
    assert np.isnan(returns[:, 1:8]).all()
    assert (returns[:, 8] > returns[:, 0] + 1.0).all()
