"""Returns against experience on a new task: measured, written, drawn."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from expecting import mentions, refused, run
from test_evaluation import navigator
from test_plots import check, drawn, lines_of  # noqa: F401  (a fixture)
from test_report import Page

from metarl import evaluate
from metarl.config.options import Config
from metarl.config.resolve import resolve
from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs import make_family
from metarl.evaluation import reinforcement, stable_baselines
from metarl.evaluation.curves import Curve, Experience
from metarl.evaluation.experience import mean_curve
from metarl.evaluation.results import EvaluationResult
from metarl.evaluation.tables import experience_table
from metarl.learning.advantages import Advantages
from metarl.plots.figures import plot_experience
from metarl.policies.loading import random_meta_policy
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.metrics import read_metrics
from metarl.sampling.rollouts import Collector, RandomKey

TASKS = [[0.4, 0.1], [-0.3, 0.2], [0.0, -0.4]]
SMALL = {"tasks": TASKS, "episodes": 4, "steps": 2, "seed": 5, "threads": 1}


@pytest.fixture(autouse=True)
def _without_stable_baselines3(monkeypatch):
    """Measure without PPO of stable-baselines3, which takes long."""
    monkeypatch.setattr(stable_baselines, "installed", lambda: False)


@pytest.fixture(scope="module")
def found() -> EvaluationResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stable_baselines, "installed", lambda: False)
        return evaluate(
            [navigator(seed=1), navigator(seed=4)], **SMALL, experience=6,
            episodes_per_step=[1, 3, 4], from_scratch=True, name="mine",
        )  # fmt: skip


def slow(meta: MetaPolicy, count: int, n: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Adapt to one task after another.

    Returns means over repeats of returns, and of steps in all episodes before, [tasks, count + 1].
    """
    means, used = np.zeros((2, repeats, len(TASKS), count + 2))
    with ChunkPool(1) as pool:
        for r in range(repeats):
            for t, task in enumerate(TASKS):
                collector = Collector(meta.family, meta.policy, 1, n, pool)
                loop, params = meta.inner_loop(pool)
                key = RandomKey(5, split="test", first_task=r * len(TASKS) + t)

                def sample(theta, k):
                    where = dataclasses.replace(key, inner_step=k)  # noqa: B023
                    rollout = collector.collect(theta, np.array([task]), where)  # noqa: B023
                    total = (rollout.reward * rollout.valid).sum(dim=2).mean()
                    means[r, t, k] = float(total)  # noqa: B023
                    used[r, t, k + 1] = used[r, t, k] + int(rollout.valid.sum())  # noqa: B023
                    return meta.batch(rollout, pool)

                loop.run(sample, params, 1, steps=count, query=True)
                collector.close()
    return means.mean(axis=0)[:, :-1], used.mean(axis=0)[:, :-1]


@pytest.mark.parametrize(("n", "steps", "repeats"), [(1, 6, 4), (3, 2, 2), (4, 1, 1)])
def test_curves_equal_a_plain_loop_over_tasks_and_repeats(found, n, steps, repeats):
    one = next(c for c in found.experience if c.episodes_per_step == n)
    assert one.curve.per_seed.shape == (2, 3, steps + 1)
    spent = []
    for seed, per_task in zip((1, 4), one.curve.per_seed, strict=True):
        means, used = slow(navigator(seed=seed), steps, n, repeats)
        assert per_task == pytest.approx(means, abs=2e-3)
        spent.append(used.mean(axis=0))
    assert one.experience.episodes == pytest.approx([n * k for k in range(steps + 1)])
    assert one.experience.env_steps == pytest.approx(np.mean(spent, axis=0), rel=0.01)
    assert one.curve.per_episode.shape == (2, 3, steps + 1, n * repeats)


def test_as_many_episodes_as_a_row_give_the_row(found):
    one = next(c for c in found.experience if c.episodes_per_step == SMALL["episodes"])
    np.testing.assert_allclose(one.curve.per_seed, found.curve.per_seed[..., :2])


def test_other_results_stay_the_same_with_experience(found):
    policies = [navigator(seed=1), navigator(seed=4)]
    plain = evaluate(policies, **SMALL, from_scratch=True, name="mine").to_json()
    whole = found.to_json()
    new = {"experience", "episodes_per_step", "experience_curves"}
    assert whole.keys() - plain.keys() == new
    assert {k: v for k, v in whole.items() if k not in new} == plain


def test_all_methods_have_the_same_tasks_and_random_numbers_of_the_seed(found, monkeypatch):
    seen = set()
    collect = Collector.collect

    def watch(self, params, tasks, key, **options):
        seen.add((tasks.tobytes(), key.seed, key.split))
        return collect(self, params, tasks, key, **options)

    monkeypatch.setattr(Collector, "collect", watch)
    policies = [navigator(seed=1), navigator(seed=4)]
    again = evaluate(
        policies, **{**SMALL, "threads": 3}, experience=6, episodes_per_step=[1, 3, 4],
        from_scratch=True, name="mine",
    )  # fmt: skip
    assert {(key, split) for _, key, split in seen} == {(5, "test")}
    assert {tasks for tasks, *_ in seen} == {np.array(TASKS).tobytes()}
    assert again.to_json() == found.to_json()  # for any number of threads
    other = evaluate(policies[0], **{**SMALL, "seed": 6}, experience=2, episodes_per_step=[1])
    assert other.experience[0].curve.returns[0] != found.experience[0].curve.returns[0]


def test_scratch_learns_for_ten_times_the_experience_one_update_per_batch(found):
    (scratch,) = (c for c in found.experience if c.curve.role == "from-scratch")
    assert scratch.episodes_per_step is None
    assert scratch.experience.episodes == pytest.approx([4.0 * n for n in range(16)])
    used = np.diff(scratch.experience.env_steps)
    assert scratch.experience.env_steps[0] == 0.0
    assert ((used > 30.0) & (used < 60.1)).all()  # an episode ends at its goal
    rows = [found.references[f"from scratch{more}"] for more in ("", ", 10 x steps")]
    whole = scratch.curve.per_seed[0]
    np.testing.assert_allclose(rows[0].per_task, whole[:, :3])
    np.testing.assert_allclose(rows[1].per_task[:, :2], whole[:, [0, 10]])


def test_env_steps_are_those_of_episodes_that_end_early():
    # A pole falls after some steps; the plain count is the length of all earlier episodes.
    config = Config.of("cartpole-length", "maml-trpo", {}).with_options({"policy.hidden": (8,)})
    meta = random_meta_policy(MetaPolicy({}, config.setup), 0)
    tasks = [[0.5], [1.0]]
    result = evaluate(
        meta, tasks=tasks, episodes=2, steps=1, threads=1, experience=4, episodes_per_step=[2],
        from_scratch=True,
    )  # fmt: skip
    for one in result.experience:
        # Every step pays 1, so the lengths of episodes are their returns.
        lengths = one.curve.per_episode[0].sum(axis=2).mean(axis=0)
        spent = [0.0, *np.cumsum(lengths)[:-1]]
        assert one.experience.env_steps == pytest.approx(spent)
        assert 0.0 < one.experience.env_steps[1] < 2 * 200


def test_deterministic_returns_do_not_count_as_experience():
    options = {**SMALL, "experience": 4, "episodes_per_step": [2]}
    sampled, mean = (evaluate(navigator(), **options, deterministic=d) for d in (False, True))
    assert mean.experience[0].experience == sampled.experience[0].experience
    assert mean.experience[0].curve.returns != sampled.experience[0].curve.returns


def test_ppo_of_stable_baselines3_counts_its_own_experience():
    pytest.importorskip("stable_baselines3")
    family = make_family("cartpole-length", horizon=50)
    trained = stable_baselines.train_by_ppo(
        family, np.array([[0.5]]), hidden=(4,), mode="clip", advantage=Advantages(), episodes=2,
        updates=2, measured={0, 2}, key=RandomKey(0),
    )  # fmt: skip
    assert trained.used_steps.tolist() == [[0.0, 100.0, 200.0]]
    # Poles of a new policy fall after about 20 steps; no episode takes more than 50.
    assert trained.used_episodes[0, 0] == 0.0
    assert 100 / 50 <= trained.used_episodes[0, 1] <= 100 / 8
    curve = trained.curve([0, 2], seed=3)
    assert curve.experience is not None
    assert curve.experience.episodes == pytest.approx(trained.used_episodes[0, [0, 2]])
    assert curve.experience.env_steps == pytest.approx([0.0, 200.0])
    assert np.isfinite(curve.per_seed).all()


def test_ppo_is_measured_after_doubling_numbers_of_updates(monkeypatch):
    called = {}

    def train(family, tasks, *, episodes, updates, measured, **options):
        called.update(updates=updates, measured=measured)
        nothing = np.zeros((len(tasks), updates + 1))
        return reinforcement.Trained(
            nothing, nothing[..., None], nothing + np.arange(updates + 1.0), nothing
        )

    monkeypatch.setattr(stable_baselines, "installed", lambda: True)
    monkeypatch.setattr(stable_baselines, "train_by_ppo", train)
    options = {**SMALL, "steps": 1, "experience": 8, "episodes_per_step": [4]}
    result = evaluate(navigator(), **options, from_scratch=True)
    assert called == {"updates": 20, "measured": {0, 1, 2, 4, 8, 16, 20, 10}}
    assert result.experience[-1].experience.episodes == pytest.approx([0, 1, 2, 4, 8, 16, 20])
    assert len({one.method for one in result.experience}) == 3


def test_a_method_without_inner_steps_is_measured_after_each_episode(found, monkeypatch):
    # As a recurrent policy has: its returns after 0 ... n episodes of a trial.
    curve = dataclasses.replace(
        found.curve, step_sizes=[], experience=Experience([0.0, 1.0, 2.0], [0.0, 15.0, 30.0])
    )
    steps = []

    def measure(evaluator, members, sizes):
        steps.append(evaluator.options.steps)
        return curve

    algorithm = type(navigator().algorithm)
    monkeypatch.setattr(algorithm, "takes_inner_steps", property(lambda self: False))
    monkeypatch.setattr(reinforcement.PolicyEvaluator, "curve", measure)
    result = evaluate(navigator(), **{**SMALL, "steps": 1}, experience=2)
    assert steps == [1, 1, 2]  # the policy and the random one in their rows, then by episodes
    assert [(c.method, c.episodes_per_step) for c in result.experience] == [("this policy", None)]
    assert result.experience[0].curve is curve


def test_an_oracle_is_a_level_line_and_alone_has_nothing_to_learn(tmp_path, drawn):  # noqa: F811
    oracle = random_meta_policy(navigator("oracle"), 0)
    result = evaluate(
        navigator(), **SMALL, experience=2, episodes_per_step=[1, 2], references={"oracle": oracle}
    )
    assert {one.method for one in result.experience} == {"this policy"}
    plot_experience(result, tmp_path / "experience.png")
    (line,) = lines_of(drawn[0], "oracle")
    assert set(line.get_ydata()) == {result.references["oracle"].returns[0]}
    with refused("experience"):
        evaluate(oracle, **SMALL, experience=2)


def test_repeats_are_averaged_without_diverged_ones():
    def curve(per_seed, episodes, env_steps):
        spent = Experience([0.0, 2.0], [0.0, env_steps])
        return Curve([0.1], np.array(per_seed), per_episode=np.array(episodes), experience=spent)

    nan = np.nan
    found = mean_curve(
        [
            curve([[[1.0, 4.0], [nan, nan]]], [[[[0.0, 2.0], [4.0, 4.0]], [[nan] * 2] * 2]], 10.0),
            curve([[[3.0, nan], [nan, 5.0]]], [[[[3.0, 3.0], [nan] * 2], [[nan] * 2] * 2]], 20.0),
        ]
    )
    assert found.per_seed[0, 0] == pytest.approx([2.0, 4.0])
    assert np.isnan(found.per_seed[0, 1, 0])
    assert found.per_seed[0, 1, 1] == pytest.approx(5.0)
    assert found.experience is not None
    assert found.experience.episodes == [0.0, 2.0]
    assert found.experience.env_steps == pytest.approx([0.0, 15.0])
    assert found.per_episode.shape == (1, 2, 2, 4)


def test_json_and_csv_hold_every_curve(found, tmp_path):
    evaluation = json.loads(json.dumps(found.to_json()))
    assert (evaluation["experience"], evaluation["episodes_per_step"]) == (6, [1, 3, 4])
    stored = evaluation["experience_curves"]
    for one, kept in zip(found.experience, stored, strict=True):
        assert (kept["method"], kept["episodes_per_step"]) == (one.method, one.episodes_per_step)
        assert kept["episodes"] == one.experience.episodes
        assert kept["env_steps"] == one.experience.env_steps
        assert kept["returns"] == one.curve.returns
        assert kept["per_task"] == one.curve.per_task.tolist()
    found.experience_to_csv(tmp_path / "all.csv")
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert len(rows) == sum(one.curve.per_seed.size for one in found.experience)
    ours = [row for row in rows if (row["method"], row["episodes_per_step"]) == ("mine", "3")]
    last = [row for row in ours if row["episodes"] == "6.0"]
    one = next(c for c in found.experience if c.episodes_per_step == 3)
    assert [float(row["env_steps"]) for row in last] == [one.experience.env_steps[2]] * 6
    assert [(row["seed"], row["task_goal_x"]) for row in last][3:] == [
        ("4", "0.4"), ("4", "-0.3"), ("4", "0.0"),
    ]  # fmt: skip
    assert [float(row["return"]) for row in last] == one.curve.per_seed[:, :, 2].ravel().tolist()
    assert {row["episodes_per_step"] for row in rows if row["algorithm"] == "from-scratch"} == {""}


def test_frame_has_the_cells_of_the_csv(found, tmp_path):
    pd = pytest.importorskip("pandas")
    found.experience_to_csv(tmp_path / "all.csv")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "all.csv"), found.experience_to_frame(), check_dtype=False
    )
    with refused("experience"):
        evaluate(navigator(), **SMALL).experience_to_frame()


def test_the_table_lists_the_policy_at_hand_after_some_episodes():
    curves = [
        {
            "method": "mine", "role": "meta-learner", "episodes_per_step": n, "episodes": episodes,
            "returns": returns, "ci95": [[r - 0.5, r + 0.5] for r in returns],
        }
        for n, episodes, returns in (
            (1, [0, 1, 2, 3, 4, 5], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
            (2, [0, 2, 4], [0.0, 2.5, 4.5]),
            (None, [0, 4, 8, 12], [0.0, 0.1, 0.2, 0.3]),
        )
    ]  # fmt: skip
    oracle = {"role": "oracle", "returns": [9.0]}
    table = experience_table(
        {
            "name": "mine", "role": "meta-learner", "returns": [0.0], "references": {"o": oracle},
            "experience": 5, "episodes_per_step": [1, 2], "experience_curves": curves,
            "optimal_returns": [10.0, 11.0],
        }
    )  # fmt: skip
    assert table.heads[1:] == ["0", "1", "2", "5", "10"]
    assert [[cell.partition(" ")[0] for cell in row[1:]] for row in table.rows] == [
        ["0.0", "1.0", "2.0", "5.0", ""],
        ["0.0", "0.0", "2.5", "4.5", ""],
        ["0.0", "0.0", "0.0", "0.1", "0.2"],
        ["9.0"],
        ["10.5"],
    ]
    assert len({row[0] for row in table.rows}) == 5


def test_a_picture_of_episodes_and_env_steps(found, tmp_path, drawn):  # noqa: F811
    files = plot_experience(found, tmp_path / "experience.png")
    assert [file.suffix for file in files] == [".png", ".svg"]
    (figure,) = drawn
    check(figure)
    episodes, env_steps = figure.axes
    assert mentions(episodes.get_xlabel(), "episodes")
    assert mentions(env_steps.get_xlabel(), "env", "steps")
    assert mentions(episodes.get_ylabel(), "return", "95")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(labels)) == len(labels) == len(found.experience) == 4
    shapes = set()
    for one, left, right in zip(found.experience, episodes.lines, env_steps.lines, strict=True):
        np.testing.assert_allclose(left.get_xdata(), one.experience.episodes)
        np.testing.assert_allclose(right.get_xdata(), one.experience.env_steps)
        np.testing.assert_allclose(left.get_ydata(), one.curve.returns)
        shapes.add((left.get_color(), left.get_marker()))
        # The policy is the same until the next step.
        assert left.get_drawstyle() == "steps-post"
        assert left.get_xdata()[-1] <= episodes.get_xlim()[1]
    assert len(shapes) == 4
    assert len({marker for _, marker in shapes}) == 4  # told apart in grey
    assert not any(text.get_parse_math() for text in episodes.get_xticklabels())
    assert {"0", "1", "10"} <= {text.get_text() for text in episodes.get_xticklabels()}
    assert plot_experience(evaluate(navigator(), **SMALL), tmp_path / "none.png") == []


def test_the_optimum_is_drawn_where_it_is_known(tmp_path, drawn):  # noqa: F811
    config = Config.of("bandit", "maml-trpo", {}).with_options({"policy.hidden": (4,)})
    meta = random_meta_policy(MetaPolicy({}, config.setup), 0)
    result = evaluate(meta, tasks=6, episodes=2, threads=1, experience=2, episodes_per_step=[2])
    plot_experience(result, tmp_path / "experience.png")
    (line,) = lines_of(drawn[0], "optimum")
    best = np.mean(result.setting["optimal_returns"])
    assert line.get_ydata() == pytest.approx([best, best])
    check(drawn[0])
    assert mentions(result.experience_table(), "optimum", f"{best:.1f}")


def test_evaluate_and_report_write_the_picture_and_remove_an_old_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_meta_policy(navigator(), 0).save(Path("policy.safetensors"))
    small = ["--tasks", "6", "--episodes", "2", "--steps", "1", "--threads", "1"]
    folder = Path("runs/policy-evaluation")
    given = ["--experience", "4", "--episodes-per-step", "1", "2"]
    assert run("evaluate", "policy.safetensors", *small, *given) == 0
    out = capsys.readouterr().out
    assert mentions(out, "experience.png", "experience.csv")
    kept = {name: (folder / f"experience.{name}").read_bytes() for name in ("png", "svg", "csv")}
    # A report reuses it, and an evaluation with other options repeats it.
    report = ["report", "policy.safetensors", "--no-video", "--threads", "1"]
    assert run(*report) == 0
    page = Page((folder / "report.html").read_text())
    assert len(page.sources("img")) == 4
    assert all(name in page.text for name in ("1 episode per step", "2 episodes per step"))
    assert {n: (folder / f"experience.{n}").read_bytes() for n in kept} == kept
    assert run(*report, "--tasks", "5") == 0
    now = json.loads((folder / "evaluation.json").read_text())
    assert (len(now["tasks"]), now["experience"], now["episodes_per_step"]) == (5, 4, [1, 2])
    assert run(*report, "--experience", "3", "--episodes-per-step", "3", "--from-scratch") == 0
    now = json.loads((folder / "evaluation.json").read_text())
    roles = [curve["role"] for curve in now["experience_curves"]]
    assert (now["experience"], roles) == (3, ["meta-learner", "from-scratch"])
    assert run("evaluate", "policy.safetensors", *small) == 0
    assert not list(folder.glob("experience.*"))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"experience": -1}, ["experience", -1]),
        ({"experience": 2.5}, ["experience", 2.5]),
        ({"episodes_per_step": [1]}, ["episodes_per_step", 1, "experience"]),
        ({"experience": 4, "episodes_per_step": [5]}, ["episodes_per_step", 5, "experience", 4]),
        ({"experience": 4, "episodes_per_step": [0]}, ["episodes_per_step", 0]),
        ({"experience": 4, "episodes_per_step": [2, 2]}, ["episodes_per_step"]),
        ({"experience": 4, "episodes_per_step": []}, ["episodes_per_step"]),
        ({"experience": 4, "episodes_per_step": "2"}, ["episodes_per_step", "'2'"]),
        ({"experience": 4, "episodes_per_step": 1.5}, ["episodes_per_step", 1.5]),
    ],
)
def test_bad_numbers_are_refused(options, names):
    with refused(*names):
        evaluate(navigator(), **SMALL, **options)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--experience", "-1"], ["experience", -1]),
        (["--experience", "many"], ["--experience", "'many'"]),
        (["--episodes-per-step", "5"], ["episodes_per_step", 5]),
        (["--experience", "4", "--episodes-per-step", "8"], ["episodes_per_step", 8]),
    ],
)
def test_bad_flags_give_one_line_and_exit_code_2(flags, names, capsys):
    assert run("evaluate", "navigation-2d-icml2017", "--tasks", "2", *flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert mentions(said, *names)


def test_data_sets_have_no_episodes_of_experience():
    meta = random_meta_policy(MetaPolicy({}, resolve(None, "sinusoid").setup), 0)
    with refused("experience", "sinusoid"):
        evaluate(meta, tasks=2, steps=1, threads=1, experience=4)


def test_numbers_that_allow_a_step_are_the_default():
    result = evaluate(navigator(), **SMALL, experience=7)
    assert [one.episodes_per_step for one in result.experience] == [1, 5]
    assert [one.experience.episodes[-1] for one in result.experience] == [7, 5]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    return importlib.import_module("which_method")


def test_the_script_trains_compares_and_continues(script, tmp_path, monkeypatch, capsys):
    options = ("tasks=2", "episodes=2")
    small = {
        "family": "bandit", "out": tmp_path, "algorithms": ("maml-trpo", "promp"), "tasks": 6,
        "options": options, "episodes": 2, "experience": 2, "episodes_per_step": (1,), "threads": 1,
    }  # fmt: skip
    # An iteration has 80 env steps; a run that was stopped early equals one that was not.
    script.trained(script.Arguments(**small, env_steps=100), "promp", 0)
    arguments = script.Arguments(**small, env_steps=200)
    assert script.main(arguments) == 0
    folder = tmp_path / "bandit"
    for name in small["algorithms"]:
        assert [row["env_steps"] for row in read_metrics(folder / f"{name}-0")] == [80, 160, 240]
    straight = dataclasses.replace(arguments, out=tmp_path / "straight")
    script.trained(straight, "promp", 0)
    rows = [
        [row["return_post"] for row in read_metrics(out / "bandit" / "promp-0")]
        for out in (tmp_path, straight.out)
    ]
    assert rows[0] == rows[1]
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert (folder / "table.md").read_text().splitlines() == lines
    methods = ("maml-trpo-0", "promp-0", "from scratch", "optimum")
    assert all(name in said for name in methods)
    assert len({line.count("|") for line in lines}) == 1
    # Called again, nothing is repeated; with other options, a run is not continued.
    monkeypatch.setattr(script, "evaluate_into", None)
    assert script.main(arguments) == 0
    with refused("tasks"):
        script.main(dataclasses.replace(arguments, options=("tasks=3", *options[1:])))
    with refused("--algorithms", "--policies"):
        script.main(script.Arguments("bandit", tmp_path))


def test_the_script_counts_the_episodes_to_the_best_return(script):
    def curve(method: str, n: int | None, episodes: list[float], returns: list[float | None]):
        return {
            "method": method, "role": "meta-learner" if n else "from-scratch",
            "episodes_per_step": n, "episodes": episodes, "returns": returns,
            "ci95": [[None, None]] * len(returns),
        }  # fmt: skip

    curves = [
        curve("a", 1, [0, 1, 2], [1.0, 5.0, 4.0]),
        curve("a", 2, [0, 2], [9.0, 3.0]),  # before any experience nothing is reached
        curve("b", None, [0, 10, 20], [0.0, None, 6.0]),
        curve("c", None, [0, 10], [0.0, 4.9]),
    ]
    text = script.table(
        {
            "name": "a", "role": "meta-learner", "returns": [1.0], "references": {},
            "experience": 2, "episodes_per_step": [1, 2], "experience_curves": curves,
        }
    )  # fmt: skip
    cells = [line.strip("| ").split(" | ")[-1] for line in text.splitlines()]
    assert mentions(cells[0], "5.0")
    assert cells[2:] == ["1", "0", "20", "more than 10"]
