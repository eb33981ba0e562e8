"""The command line as its user meets it: help, output, exit codes and messages."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from expecting import mentions, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import metarl
from metarl.algorithms import algorithms
from metarl.config.options import Config
from metarl.envs.errors import UserError
from metarl.policies.loading import run_config
from metarl.runs.metrics import read_metrics

SMALL = [
    "--tasks", "4", "--episodes", "3", "--policy.hidden", "8", "--threads", "1",
    "--family-options", "horizon=10",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_train_evaluate_resume(tmp_path, capsys):
    train = ["train", "navigation-2d", *SMALL, "--iterations", "2", "--out", "run"]
    assert run(*train) == 0
    out, err = capsys.readouterr()
    assert mentions(out, 2, "metarl evaluate run")
    assert mentions(err, "return")  # the progress bar
    assert run("train", "--resume", "run", "--iterations", "3") == 0
    assert run("train", "navigation-2d", "--resume", "run", "--iterations", "4", "--seed", "0") == 0
    assert len(read_metrics(tmp_path / "run")) == 4
    capsys.readouterr()
    assert run("train", "--resume", "run", "--iterations", "2") == 0
    assert mentions(capsys.readouterr().out, "run", 4)
    assert len(read_metrics(tmp_path / "run")) == 4
    evaluate = ["evaluate", "run", "--tasks", "3", "--episodes", "2", "--steps", "2"]
    assert run(*evaluate) == 0
    rows = [line.split(maxsplit=1)[:1] for line in capsys.readouterr().out.splitlines()]
    assert ["run"] in rows
    assert ["random"] in rows
    assert (tmp_path / "run" / "evaluation.png").exists()
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert run(*evaluate, "--json", "--step-sizes", "0.5", "0.2", "--out", "elsewhere") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["step_sizes"] == [0.5, 0.2]
    assert printed == json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())
    assert printed["returns"][0] == stored["returns"][0]
    assert len(printed["per_task"]) == 3


def test_adapt_record_plot_and_report(tmp_path, capsys, undrawn):
    for seed in ("0", "1"):
        train = ["train", "navigation-2d", *SMALL, "--iterations", "2", "--seed", seed]
        assert run(*train, "--out", f"run-{seed}") == 0
    assert run("adapt", "run-0", "--task", "goal_x=0.3", "goal_y=-0.2", "--steps", "2",
               "--episodes", "3", "--save", "adapted") == 0  # fmt: skip
    assert mentions(capsys.readouterr().out, 2, 3, "metarl record adapted")
    assert metarl.load_policy("adapted").provenance["task"] == [0.3, -0.2]
    far = ["--task", "goal_x=9", "goal_y=0", "--episodes", "1"]
    assert run("adapt", "run-0", *far) == 0
    err = capsys.readouterr().err
    assert mentions(err, "goal_x", 9, -0.5, 0.5)
    assert not mentions(err, "goal_y")
    assert err.count("\n") == 1
    assert run("record", "adapted", "--out", "films/adapted.mp4") == 0
    assert run("record", "run-0", "--tensorboard", "--episodes", "2", "--speed", "2") == 0
    for name in ("films/adapted.mp4", "films/adapted.gif", "run-0/video.mp4", "run-0/video.gif"):
        assert (tmp_path / name).stat().st_size > 1000
    assert list((tmp_path / "run-0" / "video").glob("events.out.tfevents.*"))
    capsys.readouterr()
    assert run("plot", "run-0", "--against", "time", "run-1") == 0  # names after flags
    assert capsys.readouterr().out.strip() == "run-0/learning.png, run-0/learning.svg"
    small = ["--tasks", "6", "--episodes", "2", "--steps", "1"]
    assert run("evaluate", "run-0", "--step-sizes", "0.2", "0.1", "run-1", *small) == 0
    out = capsys.readouterr().out
    evaluation = tmp_path / "run-0" / "evaluation.json"
    stored = json.loads(evaluation.read_text())
    assert mentions(out, *(f"{mean:.1f}" for mean in stored["iqm"]))
    assert (stored["name"], stored["seeds"], stored["step_sizes"]) == ("run", [0, 1], [0.2])
    events = EventAccumulator(str(tmp_path / "run-0" / "evaluation")).Reload()
    told = events.Scalars("adaptation/return_after_steps")
    assert [e.step for e in told] == [0, 1]
    assert [e.value for e in told] == pytest.approx(stored["returns"])
    # Figures of several seeds are not this run's own.
    assert run("report", "run-0", *small) == 0
    stored = json.loads(evaluation.read_text())
    assert (stored["name"], stored["seeds"]) == ("run-0", [0])
    # The report takes what is there, and makes what is not.
    assert run("report", "run-0") == 0
    assert json.loads(evaluation.read_text()) == stored
    page = (tmp_path / "run-0" / "report.html").read_text()
    assert stored["verdict"] in page
    assert page.count("<img") == 4
    assert "data:video/mp4" in page
    assert run("report", "run-1", "--no-video", *small, "--out", "page.html") == 0
    assert "data:video" not in (tmp_path / "page.html").read_text()
    assert run("train", "--resume", "run-1", "--iterations", "3") == 0
    assert run("report", "run-1", "--no-video", *small) == 0  # its evaluation was of another policy
    stored = json.loads((tmp_path / "run-1" / "evaluation.json").read_text())
    assert stored["trained"]["iteration"] == 3
    assert run("report", "run-1", "--no-video", "--tasks", "5", "--steps", "1") == 0  # as asked for
    stored = json.loads((tmp_path / "run-1" / "evaluation.json").read_text())
    assert len(stored["tasks"]) == 5


def test_without_gl_a_report_has_everything_except_the_video(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    small = ["--tasks", "2", "--episodes", "1", "--steps", "1"]
    assert run("report", "half-cheetah-dir-icml2017", *small) == 0
    assert mentions(capsys.readouterr().out, "MUJOCO_GL=disabled")
    (page,) = tmp_path.rglob("report.html")
    assert mentions(page.read_text(), "libegl1")
    assert run("record", "half-cheetah-dir-icml2017", "--episodes", "1") == 2
    err = capsys.readouterr().err
    assert mentions(err, "MUJOCO_GL=disabled", "libegl1")
    assert err.count("\n") == 1


def test_hyper_parameters_and_config_are_in_tensorboard(tmp_path):
    flags = [*SMALL, "--outer.max-kl", "0.03", "--iterations", "1", "--out", "run"]
    assert run("train", "navigation-2d", *flags) == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert "config/text_summary" in events.Tags()["tensors"]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["outer.max_kl"].number_value == 0.03
    assert told["policy.hidden"].string_value == "[8]"
    assert told["algorithm"].string_value == "maml-trpo"


@pytest.mark.parametrize("family", ["navigation-2d", "sinusoid"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_every_option_is_a_documented_flag(algorithm, family, capsys):
    try:
        config = Config.of(family, algorithm)
    except UserError:
        pytest.skip(f"{algorithm} is not for {family}")
    assert run("train", family, "--algorithm", algorithm, "--preset", "None", "--help") == 0
    flags = documented(capsys.readouterr().out)
    for key in ["preset", "algorithm", "family_options", *config.options()]:
        assert flags.get(f"--{key.replace('_', '-')}"), key


def documented(text: str) -> dict[str, str]:
    """The flags of a help page, with what it says of them in plain words."""
    found: dict[str, list[str]] = {}
    said: list[str] = []
    again = False  # another name of the same flag follows
    for word in re.sub(r"[│╭╮╰╯─]", " ", text).split():
        if word.startswith("--") and word.strip("-"):
            said = said if again else []
            found.setdefault(word.rstrip(","), said)
            again = word.endswith(",")
        elif word.isalpha() and not word.isupper():
            said.append(word)
    return {flag: " ".join(words) for flag, words in found.items()}


def test_a_help_text_is_one_paragraph(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "800")
    assert run("train", "--help") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--resume " in line]
    assert mentions(line, "auto", "--out")  # after a line break in the source


@pytest.mark.parametrize(
    ("command", "operand"),
    [("train", "[FAMILY]"), ("check", "[FAMILY]"), ("evaluate", "POLICY ..."), ("plot", "RUN ...")],
)
def test_help_names_the_arguments_of_each_command(command, operand, capsys):
    assert run(command, "--help") == 0
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert mentions(usage, operand)


def test_presets_fill_in_options_that_are_not_given(tmp_path):
    arguments = ["--preset", "icml2017", "--iterations", "1", "--tasks", "1", "--episodes", "1"]
    assert run("train", "half-cheetah-vel", *arguments, "--out", "run") == 0
    config = run_config(tmp_path / "run")
    assert config.setup.family_options == {"variant": "icml2017"}
    assert config.options()["policy.hidden"] == (100, 100)
    assert config.options()["policy.activation"] == "relu"
    assert config.setup.algorithm.inner.sizes_in_evaluation == (0.1, 0.05)
    assert config.setup.preset == "icml2017"


@pytest.mark.parametrize(
    ("words", "preset", "variant", "fitted"),
    [
        (["half-cheetah-dir"], "metarl2026", "icml2017", 0.5),
        (["--threads", "1", "half-cheetah-dir"], "metarl2026", "icml2017", 0.5),
        (["half-cheetah-vel", "--algorithm", "random"], "metarl2026", "icml2017", 0.5),
        (["half-cheetah-dir", "--family-options", "variant=stock"], "metarl2026", "stock", 0.5),
        (["half-cheetah-dir", "--preset", "None"], None, None, 0.0),
        (["--preset=None", "half-cheetah-dir"], None, None, 0.0),
        (["bandit"], None, None, 0.0),
    ],
)
def test_a_family_with_a_recorded_preset_uses_it_by_default(
    words, preset, variant, fitted, tmp_path
):
    small = ["--iterations", "1", "--tasks", "2", "--episodes", "1", "--policy.hidden", "8"]
    assert run("train", *words, *small, "--out", "run") == 0
    config = run_config(tmp_path / "run")
    assert (config.setup.preset, config.setup.family_options.get("variant")) == (preset, variant)
    assert config.setup.algorithm.inner.min_kl == fitted


def test_families_algorithms_help_and_version_are_printed(capsys):
    assert run("families") == 0
    out = capsys.readouterr().out
    assert mentions(out, "half-cheetah-vel", "velocity", "[0, 2]", "variant=stock", "direction")
    assert run("algorithms") == 0
    assert "arXiv:1703.03400" in capsys.readouterr().out
    assert run("--help") == 0
    assert "benchmark" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("metarl 0.")


def test_benchmark_prints_one_object(capsys):
    arguments = ["--tasks", "2", "--episodes", "2", "--repeats", "1", "--threads", "2", "--json"]
    arguments += ["--workers", "0"]  # MuJoCo without batches steps in workers by default
    assert run("benchmark", *arguments, "--family-options", "horizon=20") == 0
    result = json.loads(capsys.readouterr().out)
    for key in [
        "machine",
        "versions",
        "ceiling_env_steps_per_second",
        "collect_env_steps_per_second",
        "train_env_steps_per_second",
        "seconds",
        "peak_memory_bytes",
    ]:
        assert result[key]
    assert result["preset"] == "pearl2019"
    parts = {"rollout_environment", "rollout_inference", "rollout_rest", "baseline"}
    phases = {"rollout", "gradient", "conjugate_gradient", "line_search"}
    assert parts | phases <= set(result["seconds"])
    assert result["seconds"]["rollout_inference"] > 0.0
    assert all(rate > 0.0 for rate in result["rates"].values())
    samples, weights = 2 * 2 * 2 * 20, 17 * 64 + 64 * 64 + 64 * 6
    assert result["network_flops"] > 3 * samples * 2 * weights  # a forward and a backward pass
    assert run("benchmark", "navigation-2d", *arguments, "--family-options", "horizon=20") == 0
    assert json.loads(capsys.readouterr().out)["ceiling_env_steps_per_second"] is None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train"], ["FAMILY", "metarl families"]),
        (["train", "half-cheeta-vel"], ["half-cheeta-vel", "half-cheetah-vel"]),
        (["trian"], ["trian", "train"]),
        (["train", "navigation-2d", "--preset", "icml"], ["preset", "icml", "icml2017"]),
        (["train", "navigation-2d", "--algorithm", "mamltrpo"], ["mamltrpo", "maml-trpo"]),
        (["train", "navigation-2d", "--itertions", "3"], ["--itertions", "--iterations"]),
        (["train", "navigation-2d", "--iterations", "many"], ["--iterations", "many"]),
        (["train", "navigation-2d", "--tasks", "0"], ["tasks", 0]),
        (["benchmark", "--checkpoint-every=4"], ["--checkpoint-every"]),
        (["evaluate", "x", "--rank-timeout", "0"], ["--rank-timeout", 0]),
        (["train", "navigation-2d", "--inner.step-sizes", "-0.1"], ["inner.step_sizes", -0.1]),
        (["train", "navigation-2d", "--outer.max-kl", "0"], ["outer.max_kl", 0]),
        (["train", "navigation-2d", "--family-options", "horizn=3"], ["horizn", "horizon"]),
        (["train", "navigation-2d", "--family-options", "horizon"], ["horizon", "name=value"]),
        (["train", "navigation-2d", "--device", "tpu"], ["device", "tpu", "cpu", "cuda"]),
        (["train", "navigation-2d", "--family-options", "horizon=2.5"], ["horizon", 2.5]),
        (["train", "half-cheetah-vel", "--family-options", "low=x"], ["low", "high", "x"]),
        (
            ["train", "tabular-mdp", "--family-options", "states=x"],
            ["tabular-mdp", "states", "x", "TypeError"],
        ),
        (["train", "--resume", "nowhere"], ["nowhere", "config.json"]),
        (["train", "nowhere:family"], ["nowhere", "PYTHONPATH"]),
        (["check"], ["FAMILY", "metarl families"]),
        (["check", "half-cheeta-vel"], ["half-cheeta-vel", "half-cheetah-vel"]),
        (["check", "navigation-2d", "--family-options", "horizn=3"], ["horizn", "horizon"]),
        (["evaluate"], ["evaluate"]),
        (["evaluate", "--tasks", "0", "navigation-2d-icml2017"], ["tasks", 0]),
        (["adapt", "navigation-2d-icml2017"], ["--task", "goal_x", "goal_y"]),
        (["adapt", "navigation-2d-icml2017", "--task", "goal_x=1"], ["goal_y"]),
        (["adapt", "navigation-2d-icml2017", "--task", "x=1"], ["x", "goal_x", "goal_y"]),
        (["adapt", "navigation-2d-icml2017", "--task", "goal_x=far"], ["goal_x", "far"]),
        (["adapt"], ["policy"]),
        (["plot"], ["plot"]),
        (["plot", "nowhere"], ["nowhere", "config.json"]),
        (["plot", "nowhere", "--against", "steps"], ["--against", "steps", "env-steps"]),
        (["record", "nowhere"], ["nowhere", "navigation-2d-icml2017"]),
        (["record", "navigation-2d-icml2017", "--speed", "0"], ["speed", 0]),
        (["report"], ["report"]),
        (["report", "nowhere"], ["nowhere", "navigation-2d-icml2017"]),
        (
            ["evaluate", "half-cheetah-dir-icml"],
            ["half-cheetah-dir-icml", "half-cheetah-dir-icml2017"],
        ),
        (["benchmark", "--repeats", "0"], ["repeats", 0]),
    ],
)
def test_bad_input_is_one_line_that_names_it_with_exit_code_2(arguments, names, capsys, tmp_path):
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert mentions(err, *names)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_resume_with_other_options_is_refused(capsys):
    assert run("train", "navigation-2d", *SMALL, "--iterations", "1", "--out", "run") == 0
    for extra, names in (
        (["--tasks", "9"], ["tasks", 4, 9]),
        (["--preset", "icml2017"], ["preset", "metarl2026", "icml2017"]),
        (["--out", "other"], ["--out", "--resume"]),
    ):
        capsys.readouterr()
        assert run("train", "--resume", "run", *extra) == 2
        assert mentions(capsys.readouterr().err, *names)
    assert run("train", "half-cheetah-vel", "--resume", "run") == 2
    assert mentions(capsys.readouterr().err, "family", "navigation-2d", "half-cheetah-vel")
    assert run("train", "navigation-2d", *SMALL, "--out", "run") == 2
    assert mentions(capsys.readouterr().err, "--resume run", "--out")


def test_a_file_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert run("train", "navigation-2d", *SMALL, "--out", "file/run") == 2
    assert mentions(capsys.readouterr().err, "file/run")


def test_numbers_of_a_run_are_json(tmp_path):
    assert run("train", "navigation-2d", *SMALL, "--iterations", "1", "--out", "run") == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert np.isfinite(row["return_post"])
