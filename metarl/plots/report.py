"""One HTML page about a run: gain of adaptation, figures, a video, the config and the versions.

The page contains all its content and opens without a network.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metarl.evaluation.tables import Table, described, experience_table, sampled, tables
from metarl.plain_json import json_text
from metarl.plots.video import to_webm
from metarl.runs.checkpoints import machine, versions
from metarl.runs.files import write_atomically
from metarl.runs.metrics import read_metrics
from metarl.training.diagnosis import findings

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 60rem; margin: 0 auto; padding: 0 1rem 3rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.verdict { font-size: 1.25rem; padding: .75rem 1rem; background: #eef4fa;
  border-left: .4rem solid #0072b2; }
figure { margin: 1.5rem 0; } figcaption { color: #555; font-size: .95rem; }
img, video { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
tr.own { font-weight: bold; }
pre { background: #f5f5f5; padding: .75rem; overflow-x: auto; white-space: pre; font-size: .85rem; }
"""

_PICTURES = (
    ("evaluation", "Adaptation", "Held-out tasks after each number of inner steps."),
    ("experience", "Returns against experience", "Held-out tasks after some experience on each."),
    ("evaluation-tasks", "Task by task", "Each held-out task before and after adaptation."),
    ("evaluation-functions", "Functions", "True function, and predictions by inner steps."),
    ("evaluation-paths", "Paths", "One episode of some tasks after each number of inner steps."),
    ("learning", "Meta-training", "Training tasks, pre-adaptation and post-adaptation."),
)


def write_report(
    folder: Path,
    out: Path,
    title: str,
    *,
    adapts: bool = True,
    stratified: bool = False,
    run: Mapping[str, Any] | None = None,
    no_video: str = "",
) -> None:
    """Write the page from the files that commands wrote to a folder.

    Args:
        folder: contains `evaluation.json`, and figures and a video if they exist.
        out: file to write.
        title: title of the page.
        adapts: whether training takes inner steps, so that its metrics measure adaptation.
        stratified: whether training spreads its tasks evenly.
        run: content of the run's `config.json`; None for a policy without a run.
        no_video: reason for a missing video.
    """
    evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    parts = [f"<h1>{html.escape(title)}</h1>", _setting(evaluation)]
    parts.append(f'<p class="verdict">{html.escape(evaluation["verdict"])}</p>')
    parts.append(_tables(tables(evaluation), evaluation["name"]))
    if adapts and (said := findings(read_metrics(folder), stratified=stratified)):
        parts.append("<h2>Diagnosis</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in said]
    for name, heading, caption in _PICTURES:
        picture = folder / f"{name}.svg"
        if picture.exists():
            source = _data("image/svg+xml", picture.read_bytes())
            parts.append(
                f"<h2>{heading}</h2><figure><img alt='{html.escape(caption)}' src='{source}'>"
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
            if name == "experience":
                parts.append(_tables([experience_table(evaluation)], evaluation["name"]))
    parts.append("<h2>Video</h2>")
    if (folder / "video.mp4").exists():
        parts.append(_video(folder / "video.mp4"))
    else:
        parts.append(f"<p>{html.escape(no_video or 'No video was recorded.')}</p>")
    if run is not None:
        parts.append(f"<h2>Config</h2>{_json(run['config'])}")
        parts.append(f"<h2>Versions of the training</h2>{_json(run['versions'])}")
    elif evaluation["trained"].get("versions"):
        parts.append(f"<h2>Versions of the training</h2>{_json(evaluation['trained']['versions'])}")
    parts.append(f"<h2>Versions of this report</h2>{_json({**versions(), **machine()})}")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    write_atomically(out, page.encode())


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _video(path: Path) -> str:
    # Two codecs: some browsers lack H.264, others VP9.
    mp4 = _data("video/mp4", path.read_bytes())
    webm = _data("video/webm", to_webm(path))
    return (
        "<figure><video controls autoplay loop muted playsinline>"
        f"<source type='video/mp4' src='{mp4}'><source type='video/webm' src='{webm}'></video>"
        "<figcaption>One task from the same initial state, pre-adaptation and post-adaptation."
        "</figcaption></figure>"
    )


def _json(values: Any) -> str:
    return f"<pre>{html.escape(json_text(values, indent=2))}</pre>"


def _setting(evaluation: Mapping[str, Any]) -> str:
    options = "".join(f" {k}={v}" for k, v in evaluation["family_options"].items())
    trained = evaluation["trained"]
    after = ""
    if "env_steps" in trained:
        count, unit = trained["env_steps"], evaluation["unit"]
        after = f" after {trained['iteration']} iterations, {count:,} {unit}"
    how = ", drawn at random," if evaluation.get("drawn") else ""
    if evaluation.get("deterministic"):
        how += " with deterministic actions"
    text = (
        f"{evaluation['algorithm']} on {evaluation['family']}{options}{after};"
        f" evaluated on {described(evaluation)}{how} with"
        f" {sampled(evaluation)}."
        " ± is half the width of the 95 % bootstrap interval over tasks."
    )
    return f"<p>{html.escape(text)}</p>"


def _tables(found: Sequence[Table], name: str) -> str:
    """Return tables as HTML; the rows of the policy with this name are bold."""
    lines = []
    for table in found:
        lines.append(_row(table.heads, "th"))
        for row in table.rows:
            own = ' class="own"' if row[0] == name else ""
            lines.append(_row(row, "td", own))
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _row(cells: Sequence[str], kind: str, attributes: str = "") -> str:
    return (
        f"<tr{attributes}>"
        + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)
        + "</tr>"
    )
