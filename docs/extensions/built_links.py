"""Check of the built pages: every link inside the site has its file and its anchor."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)


class Page(HTMLParser):
    """Anchors of a page, and the addresses that it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.addresses: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.addresses.add(value)


def broken(folder: Path) -> Iterator[str]:
    """Yield a line for each link without a target in a folder of HTML pages."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        for address in sorted(page.addresses):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            name = path.relative_to(folder)
            if not target.is_file():
                yield f"{name}: {address} does not exist"
            elif target in pages and unquote(parts.fragment) not in {"", *pages[target].anchors}:
                yield f"{name}: {address} has no such anchor"


def _finished(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        for line in broken(Path(app.outdir).resolve()):
            log.warning("%s", line)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("build-finished", _finished)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
