"""The report: one page that holds all it shows."""

from __future__ import annotations

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from expecting import mentions, run
from test_evaluation import navigator

from metarl import evaluate
from metarl.plots import figures as plots
from metarl.plots.report import write_report
from metarl.plots.video import Video
from metarl.policies.loading import random_meta_policy
from metarl.training.diagnosis import findings


class Page(HTMLParser):
    """Tags and text; every tag that is opened is closed."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def sources(self, tag: str) -> list[str]:
        return [attributes["src"] for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path):
    found = evaluate(navigator(), tasks=7, episodes=2, steps=1, threads=1, name="<me & mine>")
    (tmp_path / "evaluation.json").write_text(json.dumps(found.to_json()))
    plots.plot_evaluation(found, tmp_path / "evaluation.png")
    plots.plot_tasks(found, tmp_path / "evaluation-tasks.png")
    return tmp_path


def test_a_report_is_one_page_with_all_parts(folder):
    frames = np.random.default_rng(0).integers(255, size=(6, 32, 64, 3)).astype(np.uint8)
    Video(frames, 20.0).save(folder / "video.mp4")
    started = {
        "config": {"family": "navigation-2d", "note": "</pre><b>"},
        "versions": {"torch": "2"},
    }
    write_report(folder, folder / "report.html", "a run", run=started)
    text = (folder / "report.html").read_text()
    page = Page(text)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["verdict"] in page.text
    assert "<me & mine>" in page.text  # escaped in the source
    assert "</pre><b>" in page.text
    for name in ("random", f"{evaluation['returns'][1]:.1f}"):
        assert name in page.text
    pictures = [base64.b64decode(source.partition(",")[2]) for source in page.sources("img")]
    names = ("evaluation.svg", "evaluation-tasks.svg")
    assert pictures == [(folder / name).read_bytes() for name in names]
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    mp4, webm = page.sources("source")
    assert base64.b64decode(mp4.partition(",")[2]) == (folder / "video.mp4").read_bytes()
    assert mp4.startswith("data:video/mp4")
    assert webm.startswith("data:video/webm")
    # Nothing is fetched: no address but in the data, no script, no style sheet.
    bare = re.sub(r"data:[^'\"]+", "", text)
    assert "http" not in bare
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )
    assert '"torch"' in page.text


def test_a_page_without_a_video_says_why(folder):
    write_report(folder, folder / "report.html", "a policy", no_video="no video: nothing draws")
    page = Page((folder / "report.html").read_text())
    assert "no video: nothing draws" in page.text
    assert not page.sources("source")


@pytest.mark.parametrize("steps", [0, 1])
def test_the_diagnosis_of_adaptation_is_shown_only_for_runs_that_adapt_in_training(folder, steps):
    row = {"env_steps": 9, "seconds_iteration": 1.0, "return_pre": -3.0, "gain": 0.1}
    row["return_post"] = -2.9
    rows = [{"iteration": i, **row} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(folder, folder / "report.html", "a run", adapts=steps > 0)
    text = Page((folder / "report.html").read_text()).text
    said = findings(rows)
    assert said
    assert [sentence in text for sentence in said] == [steps == 1] * len(said)


def test_a_report_measures_the_policy_it_names_and_keeps_other_evaluations(
    tmp_path, monkeypatch, capsys, undrawn
):
    # Two files of one name share a folder; and a file may be written anew.
    monkeypatch.chdir(tmp_path)
    films = []
    frames = np.zeros((3, 32, 64, 3), np.uint8)

    def film(*_):
        films.append(len(films))
        return Video(frames, 20.0)

    monkeypatch.setattr("metarl.cli.commands.report.film", film)
    small = ["--tasks", "3", "--episodes", "1", "--steps", "1", "--threads", "1"]
    stored = Path("runs/policy-evaluation/evaluation.json")
    found = []
    for seed in (0, 1):
        Path(str(seed)).mkdir()
        random_meta_policy(navigator(), seed).save(Path(f"{seed}/policy.safetensors"))
        for _ in range(2):
            assert run("report", f"{seed}/policy.safetensors", *small) == 0
            found.append(stored.read_bytes())
    assert found[0] == found[1] != found[2] == found[3]
    assert len(films) == 2
    (name,) = Path("1").iterdir()
    later = stored.stat().st_mtime + 60.0
    os.utime(name, (later, later))
    assert run("report", str(name), *small) == 0
    assert len(films) == 3
    # What several seeds earned together stays.
    several = json.loads(stored.read_text()) | {"seeds": [0, 1]}
    stored.write_text(json.dumps(several))
    capsys.readouterr()
    assert run("report", str(name), "--episodes", "2", "--threads", "1") == 0
    assert mentions(capsys.readouterr().out, "set-aside-1")
    kept = stored.with_name("evaluation.json.set-aside-1")
    assert json.loads(kept.read_text()) == several
    now = json.loads(stored.read_text())
    assert (now["seeds"], len(now["tasks"]), now["episodes"]) == ([0], 3, 2)
    # So does how it was measured.
    other = ["evaluate", str(name), *small, "--drawn", "--deterministic", "--seed", "3"]
    assert run(*other, "--out", str(stored.parent)) == 0
    random_meta_policy(navigator(), 2).save(name)
    assert run("report", str(name), "--tasks", "4") == 0
    now = json.loads(stored.read_text())
    assert (len(now["tasks"]), now["episodes"], len(now["returns"])) == (4, 1, 2)
    assert (now["drawn"], now["deterministic"], now["seed"]) == (True, True, 3)
    for damaged in ("[]", "null", '{"policy": 1, "tasks": 3}'):
        stored.write_text(damaged)
        assert run("report", str(name), *small) == 0
        assert json.loads(stored.read_text())["seeds"] == [0]
