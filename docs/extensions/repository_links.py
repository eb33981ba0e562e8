"""Links from pages to files of the repository outside of docs, and the check of external links.

A page links to `../metarl/parts.py` as on a code host. On the site the link opens a page with the
highlighted file. A link to a folder becomes plain text. The check needs no network: it accepts
https addresses of the usual form.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the root that have a page in docs."""
SCHEME = "repository:"
ARXIV = re.compile(r"/(?:abs|pdf)/\d{4}\.\d{4,5}(?:v\d+)?")

_FENCE = re.compile(r"^(`{3,}|~{3,}|:{3,}).*?^\1\s*$", re.M | re.S)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_LEXERS = {".py": "python", ".toml": "toml", ".sh": "bash", ".xml": "xml", ".yaml": "yaml"}

log = logging.getLogger(__name__)


def rewritten(text: str, file: Path, page: Path) -> str:
    """Return a page's text with links that are valid on the site.

    Args:
        text: text of a Markdown file.
        file: the file; its links are relative to it.
        page: file of the page that shows the text.
    """

    def replace(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        target = Path(os.path.normpath(file.parent / path))
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[0]  # reported as a broken link
        name = str(target.relative_to(ROOT))
        target = DOCS / MOVED[name] if name in MOVED else target
        if target.is_relative_to(DOCS):
            return os.path.relpath(target, page.parent) + anchor
        return f"{SCHEME}{name}{'/' if target.is_dir() else ''}"

    parts, last = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(replace, text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, _LINK.sub(replace, text[last:])])


def wrong_address(address: str) -> str:
    """Return what is wrong with an external address; "" if nothing is."""
    parts = urlsplit(address)
    if parts.scheme != "https":
        return "does not begin with https"
    if not re.fullmatch(r"(?:[a-z0-9-]+\.)+[a-z]{2,}", parts.netloc):
        return "has no valid host"
    if re.search(r"[\s<>\"{}|\\^`]", address):
        return "has a character that must be quoted"
    if parts.netloc == "arxiv.org" and not ARXIV.fullmatch(parts.path):
        return "is no arXiv identifier"
    return ""


def source_address(domain: str, info: Mapping[str, str]) -> str | None:
    """Return the address of an object's source, for sphinx.ext.linkcode."""
    found: Any = sys.modules.get(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return None
    if not found.__module__.startswith("metarl."):
        return None
    try:
        line = inspect.getsourcelines(found)[1]
    except OSError:  # made by a function, such as the part of an optimizer of torch
        return None
    module = Path(*found.__module__.removeprefix("metarl.envs").split("."))
    module = "envs" / module if found.__module__.startswith("metarl.envs") else module
    package = (ROOT / module).is_dir()
    return f"{SCHEME}{module / '__init__.py' if package else f'{module}.py'}#line-{line}"


def _read(app: Sphinx, name: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    content[0] = rewritten(content[0], page, page)


def _read_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    content[0] = rewritten(content[0], Path(os.path.normpath(DOCS / path)), DOCS / f"{parent}.md")


def _resolved(app: Sphinx, tree: nodes.document, name: str) -> None:
    for node in list(tree.findall(nodes.reference)):
        address = node.get("refuri", "")
        if address.startswith(SCHEME):
            path, _, anchor = address.removeprefix(SCHEME).partition("#")
            if path.endswith("/"):
                node.replace_self(node.children)
                continue
            app.env.metarl_sources.add(path)
            page = app.builder.get_relative_uri(name, f"source/{path}")
            node["refuri"] = f"{page}#{anchor}" if anchor else page
            node["internal"], node["classes"] = True, []
        elif "://" in address:
            app.env.metarl_addresses.add(address)
            if fault := wrong_address(address):
                log.warning("%s: %s %s", name, address, fault, location=node)


def _source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path in sorted(app.env.metarl_sources):
        text = (ROOT / path).read_text("utf-8", "replace")
        lexer = _LEXERS.get(Path(path).suffix, "text")
        code = app.builder.highlighter.highlight_block(
            text, lexer, linenos="inline", lineanchors="line"
        )
        body = f"<h1>{path}</h1>\n{code}"
        yield f"source/{path}", {"title": path, "body": body}, "page.html"


def _finished(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        lines = "\n".join(sorted(app.env.metarl_addresses))
        (Path(app.outdir) / "external-links.txt").write_text(f"{lines}\n", "utf-8")


def _started(app: Sphinx) -> None:
    app.env.metarl_sources, app.env.metarl_addresses = set(), set()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _started)
    app.connect("source-read", _read)
    app.connect("include-read", _read_included)
    app.connect("doctree-resolved", _resolved)
    app.connect("html-collect-pages", _source_pages)
    app.connect("build-finished", _finished)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": False}
