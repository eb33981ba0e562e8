"""Runs on supervised tasks: train, resume, evaluate, plot, report; faults; data from folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from expecting import mentions, refused, run
from PIL import Image

import metarl
from metarl.config.options import Config
from metarl.config.resolve import resolve
from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs import FewShotFamily, FunctionFamily, Uniform
from metarl.envs.registry import find_family
from metarl.evaluation import supervised as supervised_evaluation
from metarl.evaluation.evaluator import Options
from metarl.runs.metrics import read_metrics
from metarl.sampling.rollouts import RandomKey
from metarl.training.run import new_trainer, train

SMALL = ["--threads", "1", "--iterations", "4", "--tasks", "6"]
CHARACTERS = {"size": 8, "classes": 40, "drawings": 8, "queries": 2, "test_queries": 3}
FEW = [*SMALL, "--policy.filters", "4", "--family-options",
       *(f"{key}={value}" for key, value in CHARACTERS.items())]  # fmt: skip


def small(algorithm="maml-trpo", family="characters", **said):
    options = {"family_options": CHARACTERS} if family == "characters" else {}
    values = {"iterations": 4, "tasks": 6, "threads": 1, **options, **said}
    if family == "characters":
        values = {"policy.filters": 4, **values}
    return resolve(None, family, algorithm, values)


@pytest.fixture(scope="module")
def sinusoids(tmp_path_factory):
    """Two short runs on sinusoids: maml-trpo, pretrained."""
    folder = tmp_path_factory.mktemp("sinusoids")
    for name in ("maml-trpo", "pretrained"):
        train(small(name, "sinusoid"), folder / name)
    return folder


def test_a_supervised_run_records_its_config_and_metrics(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "sinusoid", "--shots", "5", *SMALL, "--out", str(out)) == 0
    said = capsys.readouterr()
    assert mentions(said.err, "adam")  # instead of a trust region
    assert mentions(said.out, 4, 360, "metarl evaluate")  # examples: 4 x 6 x (5 + 10)
    assert json.loads((out / "config.json").read_text())["config"]["family_options"]["shots"] == 5
    rows = read_metrics(out)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite([row["loss_pre"], row["loss_post"]]).all() for row in rows)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = train(small(family="sinusoid", iterations=6), tmp_path / "whole")
    train(small(family="sinusoid", iterations=3), tmp_path / "part")
    part = train(small(family="sinusoid", iterations=6), tmp_path / "part", resume=True)
    for name, p in whole.params.items():
        assert torch.equal(p, part.params[name]), name
    assert len(read_metrics(tmp_path / "part")) == 6


@pytest.mark.parametrize("algorithm", ["maml-trpo", "leopard"])
def test_threads_do_not_change_a_run(algorithm):
    found = []
    for threads in (1, 2):
        # So many activations that each task is a chunk of its own.
        with new_trainer(small(algorithm, threads=threads, **{"policy.filters": 64})) as trainer:
            trainer.iterate()
            found.append(trainer.state.params)
    for name, p in found[0].items():
        assert torch.equal(p, found[1][name]), name


@pytest.mark.parametrize(
    "algorithm",
    ["maml-trpo", "fomaml-trpo", "maml++", "meta-sgd", "anil", "cavia", "reptile", "imaml",
     "protomaml", "leopard", "pretrained"],
)  # fmt: skip
def test_every_algorithm_runs_on_characters(algorithm):
    with new_trainer(small(algorithm)) as trainer:
        before = {name: p.clone() for name, p in trainer.state.params.items()}
        row = trainer.iterate()
        moved = [
            name for name, p in trainer.state.params.items() if not torch.equal(p, before[name])
        ]
    assert "skipped" not in row
    assert moved
    assert np.isfinite(row["loss_pre"])


@pytest.mark.parametrize(
    "algorithm",
    ["maml-trpo", "fomaml-trpo", "maml++", "meta-sgd", "anil", "cavia", "reptile", "imaml",
     "pretrained", "oracle"],
)  # fmt: skip
def test_every_algorithm_learns_sinusoids(algorithm):
    config = resolve(None, "sinusoid", algorithm, {"threads": 1})
    with new_trainer(config) as trainer:
        rows = [trainer.iterate() for _ in range(60)]
        after = metarl.evaluate(trainer.meta_policy(), tasks=30, steps=1, threads=1)
    assert rows[-1]["skipped_updates"] == 0
    assert after.curve.returns[1] < after.references["random"].returns[1]


def test_tasks_of_several_sizes_in_one_run():
    options = {**CHARACTERS, "ways": (2, 4)}
    for algorithm in ("protomaml", "leopard", "maml-trpo"):
        with new_trainer(small(algorithm, family_options=options)) as trainer:
            row = trainer.iterate()
        assert "skipped" not in row, algorithm


def evaluator(meta, tasks):
    key, options = RandomKey(0, split="test"), Options(steps=2)
    with ChunkPool(1) as pool:
        return supervised_evaluation.PredictorEvaluator(
            meta.source, np.array(tasks), key, options, pool
        )


def test_an_evaluation_reports_the_error_after_each_step(sinusoids, capsys, monkeypatch):
    command = ["evaluate", str(sinusoids / "maml-trpo"), str(sinusoids / "pretrained")]
    assert run(*command, "--tasks", "30", "--steps", "2", "--threads", "1") == 0
    assert mentions(capsys.readouterr().out, 30, 10, "mean squared error")
    folder = sinusoids / "maml-trpo"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["references"].keys() == {"random", "pretrained"}
    assert (folder / "evaluation-functions.png").exists()
    # By hand: the first task's error before any step.
    meta = metarl.load(folder)
    _, _, query = next(evaluator(meta, found["tasks"]).groups())
    x = query.inputs[0]
    for i in range(3):
        x = x @ meta.params[f"layer{i}.weight"] + meta.params[f"layer{i}.bias"]
        x = x.relu() if i < 2 else x
    expected = float((x - query.targets[0]).square().mean())
    assert found["per_task"][0][0] == pytest.approx(expected, rel=1e-4)
    assert found["gain"]["mean"] == pytest.approx(found["returns"][0] - found["returns"][1])


def test_a_supervised_run_has_pictures_and_a_report(sinusoids, tmp_path, capsys):
    folder = str(sinusoids / "maml-trpo")
    assert run("plot", folder, "--out", str(tmp_path / "p.png")) == 0
    assert (tmp_path / "p.png").exists()
    out = tmp_path / "page.html"
    assert run("report", folder, "--tasks", "8", "--threads", "1", "--out", str(out)) == 0
    page = out.read_text()
    assert mentions(page, "mean squared error", "Functions")


def test_an_oracle_is_told_its_task(tmp_path):
    train(small("oracle", "sinusoid"), tmp_path / "oracle")
    result = metarl.evaluate(tmp_path / "oracle", tasks=8, steps=2, threads=1)
    assert result.curve.step_sizes == []
    assert len(set(result.curve.returns)) == 1


def test_accuracy_is_compared_with_nearest_prototype_and_from_scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(supervised_evaluation, "UPDATES", 3)
    train(small("protomaml"), tmp_path / "run")
    result = metarl.evaluate(tmp_path / "run", tasks=30, steps=2, threads=1, from_scratch=True)
    rows = result.rows
    assert {"nearest prototype", "random"} < rows.keys()
    assert all(0.0 <= x <= 100.0 for curve in rows.values() for x in curve.returns)
    # By hand: the nearest mean of a class's images.
    meta = metarl.load(tmp_path / "run")
    _, support, query = next(evaluator(meta, result.setting["tasks"]).groups())
    x, q = support.inputs[0].flatten(1), query.inputs[0].flatten(1)
    nearest = (q[:, None] - x[None]).square().sum(-1).argmin(1)  # one shot: an image a class
    expected = 100.0 * (nearest == query.targets[0]).double().mean()
    assert rows["nearest prototype"].per_task[0, 0] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("algorithm", "family"),
    [
        ("anil", "sinusoid"),
        ("cavia", "sinusoid"),
        ("oracle", "sinusoid"),
        ("leopard", "characters"),
    ],
)
def test_from_scratch_trains_what_the_algorithm_does_not_adapt(algorithm, family, monkeypatch):
    monkeypatch.setattr(supervised_evaluation, "UPDATES", 20)
    with new_trainer(small(algorithm, family)) as trainer:
        meta = trainer.meta_policy()
    result = metarl.evaluate(meta, tasks=8, steps=1, threads=1, from_scratch=True)
    curve = result.references["from scratch, 20 updates a step"]
    assert curve.per_task.shape == (8, 2)
    better = np.diff(curve.returns)[0] * curve.measure.sign
    assert better > 0.0


def slopes(interval=(-1.0, 1.0)) -> FunctionFamily:
    return FunctionFamily(
        name="slopes",
        description="lines through the origin",
        tasks=Uniform({"slope": (-1.0, 1.0)}),
        function=lambda x, tasks: tasks * x,
        interval=tuple(interval),
    )


def few(ways=3) -> FewShotFamily:
    images = np.random.default_rng(0).random((120, 8, 8))
    return FewShotFamily(images, np.repeat(np.arange(20), 6), ways=ways, queries=2, test_queries=3)


@pytest.mark.parametrize(("name", "like"), [("slopes", "sinusoid"), ("few", "characters")])
def test_a_function_that_returns_supervised_tasks_has_their_defaults(name, like):
    for algorithm in ("maml-trpo", "reptile"):
        own = resolve(None, f"{__name__}:{name}", algorithm)
        expected = resolve(None, like, algorithm)
        assert dataclasses.replace(own.setup, family=like) == expected.setup
        assert own.run == expected.run
    config = resolve("reptile2018", f"{__name__}:slopes", "reptile")
    assert config.options()["policy.hidden"] == (64, 64)
    with refused("preset", "icml2017", name):
        resolve("icml2017", f"{__name__}:{name}")


def steep(most: float) -> FunctionFamily:
    return slopes(interval=(-most, most))


def shown(ways: int) -> FewShotFamily:
    return few(ways)


def test_a_family_with_a_required_option_trains():
    # Made without its options the family's own values are not known.
    name = f"{__name__}:shown"
    config = resolve(None, name, "random", {"family_options": {"ways": 3}})
    with new_trainer(config) as trainer:
        trainer.iterate()


def test_a_missing_family_option_is_named_when_a_preset_is_given(tmp_path, capsys):
    words = ["train", f"{__name__}:steep", *SMALL, "--preset", "reptile2018"]
    words += ["--algorithm", "reptile", "--out", str(tmp_path / "run")]
    assert run(*words) == 2
    assert mentions(capsys.readouterr().err, "steep", "most", "--family-options")
    assert run(*words, "--family-options", "most=2") == 0


def test_one_component_is_trained_and_drawn(tmp_path, capsys):
    out, family = tmp_path / "run", f"{__name__}:slopes"
    assert (
        run("train", family, *SMALL, "--family-options", "interval=(-2, 2)", "--out", str(out)) == 0
    )
    said = capsys.readouterr()
    assert mentions(said.err, "adam")
    assert mentions(said.out, 480)
    assert run("evaluate", str(out), "--tasks", "4", "--steps", "1") == 0
    assert (out / "evaluation-tasks.png").exists()
    # A tuple among the options is a list in the run's files.
    config = resolve(None, family, overrides={"family_options": {"interval": (-2, 2)}})
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    again = ["train", family, *SMALL, "--family-options", "interval=(-2, 2)", "--out", str(out)]
    before = (out / "metrics.jsonl").read_bytes()
    assert run(*again, "--resume", "auto") == 0
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_task_with_fewer_classes_adapts_with_those_only(tmp_path, capsys):
    own = {**CHARACTERS, "ways": (2, 4)}
    meta = train(small(family_options=own, **{"inner.step_sizes": (3.0,)}), tmp_path / "run")
    words = ["adapt", str(tmp_path / "run"), "--task"]
    assert run(*words, "class_0=3", "class_1=-1", "class_2=5", "class_3=-1") == 0
    assert mentions(capsys.readouterr().out, 2)
    for classes, names in (
        ((3, 77, 5, -1), ("class_1", 0, 39, -1, 77)),
        ((3, 0.5, 5, -1), ("class_1", 0, 39, -1, 0.5)),
        ((3, 3, 5, -1), (2, 3, 5)),
        ((3, -1, -1, -1), (2, 3)),
    ):
        assert run(*words, *(f"class_{i}={c:g}" for i, c in enumerate(classes))) == 2
        assert mentions(capsys.readouterr().err, *names)
    rng = np.random.default_rng(0)
    images = rng.random((40, 8, 8)).astype(np.float32)
    for steps in (0, 1):
        found = meta.adapt_to(images[:4], np.array([0, 2, 2, 0]), steps=steps).predict(images)
        assert set(found) <= {0, 2}
    every = meta.adapt_to(images[:4], np.arange(4), steps=1)
    assert every.classes is None


def test_a_family_without_validation_classes_has_bounds():
    labels = np.repeat(np.arange(8), 6)
    family = FewShotFamily(
        np.random.default_rng(0).random((48, 5)), labels, ways=2, queries=2, test_queries=3,
        train=range(5), test=range(5, 8),
    )  # fmt: skip
    assert family.tasks.bounds()[1].tolist() == [7.0, 7.0]
    assert family.tasks.vector({"class_0": 7, "class_1": 0}).tolist() == [7.0, 0.0]


def test_one_task_is_adapted_to(sinusoids, capsys):
    folder = str(sinusoids / "maml-trpo")
    assert run("adapt", folder, "--task", "amplitude=2", "phase=1", "--steps", "3") == 0
    assert mentions(capsys.readouterr().out, "mean squared error")
    words = ["adapt", folder, "--task", "amplitude=2", "phase=1", "--episodes", "3"]
    assert run(*words) == 2
    assert mentions(capsys.readouterr().err, "--episodes", "sinusoid")
    meta = metarl.load(folder)
    x = np.linspace(-5, 5, 12)[:, None]
    adapted = meta.adapt_to(x, np.sin(x), steps=2)
    # By hand, with torch's own gradient.
    theta = {name: p.clone().requires_grad_() for name, p in meta.params.items()}
    inputs, targets = torch.from_numpy(x).float(), torch.from_numpy(np.sin(x)).float()

    def predicted(theta, x):
        for i in range(3):
            x = x @ theta[f"layer{i}.weight"] + theta[f"layer{i}.bias"]
            x = x.relu() if i < 2 else x
        return x

    for _ in range(2):
        loss = (predicted(theta, inputs) - targets).square().mean()
        slope = torch.autograd.grad(loss, list(theta.values()))
        theta = {n: (p - 0.01 * g).detach().requires_grad_()
                 for (n, p), g in zip(theta.items(), slope, strict=True)}  # fmt: skip
    expected = predicted(theta, inputs).detach().numpy()
    np.testing.assert_allclose(adapted.predict(x), expected, atol=1e-5)
    for inputs, targets, names in (
        (x[:, [0, 0]], x, ("inputs", "[n, [1]]", "[12, 2]")),
        (x, x[:5], ("targets", "[12, 1]", "[5, 1]")),
        (np.full_like(x, np.nan), x, ("inputs", "finite")),
    ):
        with refused(*names):
            meta.adapt_to(inputs, targets)


def test_step_sizes_are_chosen_by_the_error(sinusoids):
    result = metarl.evaluate(
        sinusoids / "maml-trpo", tasks=10, steps=1, threads=1, tune_step_sizes=True
    )
    tried = dict(result.setting["tried_step_factors"]["this policy"])
    best = min((f for f in tried if tried[f] is not None), key=tried.__getitem__)
    assert result.curve.step_sizes == pytest.approx([best * 0.01])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["sinusoid", "--algorithm", "promp"], ["promp", "sinusoid", "maml-trpo"]),
        (["characters", "--algorithm", "oracle"], ["oracle"]),
        (["sinusoid", "--preset", "icml2017"], ["preset", "icml2017", "sinusoid"]),
        (["navigation-2d", "--preset", "reptile2018"], ["preset", "reptile2018", "navigation-2d"]),
        (["sinusoid", "--episodes", "7"], ["episodes"]),
        (["sinusoid", "--advantage.gae-lambda", "0.5"], ["advantage.gae_lambda"]),
        (["sinusoid", "--outer.max-kl", "0.1"], ["outer.max_kl"]),
        (["sinusoid", "--policy.filters", "8"], ["policy.filters", "conv4"]),
        (["sinusoid", "--inner.min-kl", "0.3"], ["inner.min_kl"]),
        (["characters", "--ways", "90"], ["characters", "ways", 90, 80, 400]),
        (["characters", "--shots", "19"], ["characters", "shots", "queries", 19, 20, 34]),
        (["characters", "--policy.network", "impala"], ["policy.network", "impala", "conv4"]),
        (["sinusoid", "--shot", "3"], ["--shot"]),
        (["sinusoid", "--shots"], ["--shots"]),
        (["omniglot"], ["omniglot", "--family-options", "folder"]),
        (["characters", "--algorithm", "protomaml", "--inner.steps", "0"],
         ["protomaml", "inner.steps", 1]),
        (["sinusoid", "--policy.normalize"], ["policy.normalize"]),
    ],
)  # fmt: skip
def test_faults_are_named_in_one_line(words, names, tmp_path, capsys):
    assert run("train", *words, "--out", str(tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert mentions(err, *names)
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_commands_about_environments_are_refused(sinusoids, capsys):
    folder = str(sinusoids / "maml-trpo")
    for words in (["record", folder], ["check", "sinusoid"], ["benchmark", "sinusoid"]):
        assert run(*words) == 2
        assert mentions(capsys.readouterr().err, "sinusoid")
    assert run("evaluate", folder, "--episodes", "3") == 2
    assert mentions(capsys.readouterr().err, "episodes", "sinusoid")


# Folders and other data ---------------------------------------------------------------------------


def picture(path: Path, value: int, size: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)


def test_omniglot_folders_are_read(tmp_path):
    for place, alphabets in (("images_background", 2), ("images_evaluation", 1)):
        for a in range(alphabets):
            for c in range(9):
                for i in range(4):
                    where = tmp_path / place / f"Alphabet{a}" / f"character{c:02}"
                    picture(where / f"{a}_{i}.png", 255 - 10 * c)
    options = {"folder": str(tmp_path), "ways": 3, "queries": 2, "test_queries": 2, "size": 8}
    family = find_family("omniglot", **options)
    assert {part: len(c) for part, c in family.tasks.parts.items()} == {
        "train": 60, "validation": 12, "test": 36,
    }  # fmt: skip
    assert family.input_shape == (8, 8)
    assert sorted(set(family.pixels.ravel().tolist())) == [10 * c for c in range(9)]
    plain = find_family("omniglot", **options, rotations=False)
    assert len(plain.tasks.parts["test"]) == 9
    with refused(tmp_path / "images_background", "ALPHABET/CHARACTER"):
        find_family("omniglot", **{**options, "folder": str(tmp_path / "images_background")})


@pytest.mark.parametrize("layout", ["folders", "tables"])
def test_mini_imagenet_folders_are_read(tmp_path, layout):
    for part, count in (("train", 5), ("val", 3), ("test", 3)):
        lines = ["filename,label"]
        for c in range(count):
            for i in range(4):
                name = f"{part}{c}_{i}.png"
                lines.append(f"{name},n{part}{c}")
                where = f"{part}/n{part}{c}" if layout == "folders" else "images"
                picture(tmp_path / where / name, 20 * c)
        if layout == "tables":
            (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n")
    options = {"folder": str(tmp_path), "ways": 3, "queries": 2, "test_queries": 2, "size": 8}
    family = find_family("mini-imagenet", **options)
    assert {part: len(c) for part, c in family.tasks.parts.items()} == {
        "train": 5, "validation": 3, "test": 3,
    }  # fmt: skip
    assert family.input_shape == (8, 8, 3)


def test_a_damaged_image_is_named(tmp_path):
    for place in ("images_background", "images_evaluation"):
        folder = tmp_path / place / "A" / "c"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"no image")
    with refused("1.png"):
        find_family("omniglot", folder=str(tmp_path))


def vectors() -> FewShotFamily:
    rng = np.random.default_rng(0)
    return FewShotFamily(rng.standard_normal((400, 8)), np.arange(400) % 20, ways=2, shots=1)


def test_protomaml_needs_a_layer_to_learn(tmp_path):
    config = resolve(None, "test_supervised_runs:vectors", "protomaml", {"policy.hidden": ()})
    with refused("protomaml", "policy.hidden", "[8]"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    said = {"iterations": 1, "tasks": 2, "policy.hidden": (8,)}
    train(resolve(None, "test_supervised_runs:vectors", "protomaml", said), tmp_path / "run")


@pytest.mark.learning
def test_characters_are_learned(tmp_path):
    said = {"family_options": {"size": 14}, "iterations": 100, "tasks": 8, "policy.filters": 8}
    train(resolve(None, "characters", "protomaml", {**said, "threads": 1}), tmp_path / "run")
    result = metarl.evaluate(tmp_path / "run", tasks=100, steps=1, threads=2)
    # An untrained network has 37 %: prototypes of what it makes of images tell classes apart too.
    assert result.curve.returns[1] > result.references["random"].returns[1] + 10.0
