"""Directives that write parts of pages from the package itself, and the style of docstrings.

| directive | what it inserts |
| --- | --- |
| `{commands}` | all commands and their options |
| `{api-index}`, `{api} PAGE` | the list of public names; the reference of one page |
| `{paper}` | paper and file of the page's algorithm |
| `{pseudocode}` | its pseudocode |
| `{spaces}` | spaces and data sets that it supports |
| `{results}` | its rows in the tables of docs/results |
| `{algorithm-options}` | its options |
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import algorithm_texts
import option_texts
from docutils import nodes
from public_names import GROUPS, find, names_of
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

from metarl.parts import Part


def api_index() -> str:
    """Return a table of public names for each page of the reference."""
    lines = []
    for group in GROUPS.values():
        lines += [f"## {group.title}\n", "| name | description |", "| --- | --- |"]
        for name in names_of(group):
            first = (inspect.getdoc(find(name)) or "").partition("\n\n")[0].replace("\n", " ")
            short = name.rpartition(".")[2]
            lines.append(f"| {{py:obj}}`{short} <{name}>` | {first.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def api(page: str) -> str:
    """Return the reference of one page."""
    lines = ["````{eval-rst}"]
    for name in names_of(GROUPS[page]):
        kind = "class" if inspect.isclass(found := find(name)) else "function"
        kind = "exception" if kind == "class" and issubclass(found, Exception) else kind
        lines.append(f".. auto{kind}:: {name}")
        lines += [] if kind == "function" else ["   :members:"]
        if inspect.isclass(found) and known_bases(found.__bases__):
            lines.append("   :show-inheritance:")
        lines.append("")
    return "\n".join([*lines, "````"])


def pseudocode(name: str) -> str:
    """Return an algorithm's pseudocode as a block, then its options as flags."""
    code, symbols = algorithm_texts.pseudocode(name)
    return f"```text\n{code}\n```\n\n{symbols}\n"


COLON = "\ue000"
"""Stands for a colon while napoleon reads a docstring."""

TEXTS: dict[str, Callable[..., str]] = {
    "commands": option_texts.command_page,
    "api-index": api_index,
    "api": api,
    "paper": algorithm_texts.paper,
    "pseudocode": pseudocode,
    "spaces": algorithm_texts.spaces,
    "results": algorithm_texts.results,
    "algorithm-options": option_texts.algorithm_options,
}


OF_PAGE = ("paper", "pseudocode", "spaces", "results", "algorithm-options")
"""Directives whose argument is by default the algorithm that a page is named after."""


class Generated(SphinxDirective):
    """Insert Markdown made by a function of `TEXTS`."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        page = [self.env.docname.rpartition("/")[2]] if self.name in OF_PAGE else []
        arguments = self.arguments or page
        return self.parse_text_to_nodes(TEXTS[self.name](*arguments), allow_section_headings=True)


@cache
def linked_names() -> dict[str, str]:
    """Return the public names by the texts that docstrings use for them."""
    found = {}
    for group in GROUPS.values():
        for full in names_of(group):
            short = full.rpartition(".")[2]
            found[full] = full
            if short[0].isupper():
                found[short] = full
                members = [name for name in vars(find(full)) if not name.startswith("_")]
                found |= {f"{short}.{name}": f"{full}.{name}" for name in members}
    return found


def known_bases(bases: Iterable[type]) -> list[type]:
    """Return the base classes that have a page."""
    known = [find(full) for group in GROUPS.values() for full in names_of(group)]
    return [base for base in bases if base in known]


class NameRole(PyXRefRole):
    """Role of single backticks in docstrings: a link for a public name, code for the rest."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        target = linked_names().get(self.text)
        if target is None:
            return [nodes.literal(self.rawtext, self.text, classes=["code"])], []
        self.refdomain, self.reftype, self.classes = "py", "obj", ["xref", "py", "py-obj"]
        self.title, self.target, self.has_explicit_title = self.text, target, True
        return self.create_xref_node()


def _link_names(app: Sphinx, tree: nodes.document) -> None:
    """Make links of public names that a page has as code, such as `metarl.train`."""
    for node in list(tree.findall(nodes.literal)):
        target = linked_names().get(node.astext().removesuffix("()"))
        inside = node.parent
        while inside is not None and not isinstance(inside, (nodes.reference, pending_xref)):
            inside = inside.parent
        if target is None or inside is not None:
            continue
        link = pending_xref(
            "", node.deepcopy(), refdomain="py", reftype="obj", reftarget=target,
            refdoc=app.env.docname, refexplicit=True,
        )  # fmt: skip
        node.replace_self(link)


def _docstring(
    app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]
) -> None:
    """Turn a plain docstring into RST: only single backticks, lists and indented code have a
    meaning."""
    for i, line in enumerate(lines):
        code = line.startswith("    ") and not _in_section(lines, i)
        if code:
            continue
        parts = re.split(r"(`[^`]*`)", line)
        lines[i] = "".join(p if p[:1] == "`" else _escaped(p) for p in parts)
        after = lines[i + 1 : i + 3]
        if line.endswith(":") and len(after) == 2 and not after[0] and after[1].startswith("    "):
            lines[i] += ":"
    if what == "property":
        lines[:] = GoogleDocstring(lines, app.config, app, "method", name, found, options).lines()
    if what in ("attribute", "property"):  # napoleon would take words before a colon for a type
        lines[:] = [line.replace(":", COLON) for line in lines]


def _escaped(text: str) -> str:
    text = re.sub(r"([*|\\])", r"\\\1", text)
    return re.sub(r"(?<![\w-])--[a-z][\w.-]*\w", r"``\g<0>``", text)


def _restored(
    app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]
) -> None:
    """Undo the protection of colons from napoleon."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def _bases(app: Sphinx, name: str, found: Any, options: Any, bases: list[type]) -> None:
    """Name only the base classes that have a page."""
    bases[:] = known_bases(bases)


def _in_section(lines: list[str], i: int) -> bool:
    """Return whether an indented line belongs to a section such as `Args:`."""
    for line in reversed(lines[:i]):
        if line and not line.startswith(" "):
            return line in ("Args:", "Returns:", "Raises:", "Yields:")
    return False


class _Factory:
    """Default of a dataclass field with a factory, in signatures."""

    def __repr__(self) -> str:
        return "..."


def _signature(
    app: Sphinx,
    what: str,
    name: str,
    found: Any,
    options: Any,
    text: str | None,
    returned: str | None,
) -> tuple[str, str] | None:
    """Leave out the fields of every part that users do not set; shorten factories to `...`."""
    if not (inspect.isclass(found) and dataclasses.is_dataclass(found)):
        if text is None:  # an attribute
            return None
        return _alias_names(text), _alias_names(returned or "")
    hidden = ("policies", "source") if issubclass(found, Part) else ()
    signature = signature_of(found, type_aliases=app.config.autodoc_type_aliases)
    factories = {
        field.name
        for field in dataclasses.fields(found)
        if field.default_factory is not dataclasses.MISSING
    }
    kept = [
        p.replace(default=_Factory()) if key in factories else p
        for key, p in signature.parameters.items()
        if key not in hidden
    ]
    signature = signature.replace(parameters=kept, return_annotation=signature.empty)
    return _alias_names(stringify_signature(signature, unqualified_typehints=True)), ""


def _alias_names(text: str) -> str:
    """Return a signature with the names of type aliases, also in unions, and short array types."""
    text = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
    return re.sub(r"ndarray\[tuple\[Any, \.\.\.\], dtype\[(\w+)\]\]", r"NDArray[\1]", text)


def _missing(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Accept types in signatures, and importable names, that have no page here."""
    if node.get("refdomain") != "py":
        return None
    try:
        if "refexplicit" in node:  # of a role, not of a signature
            find(node["reftarget"])
    except (AttributeError, ImportError, ValueError):
        return None
    return content


def setup(app: Sphinx) -> dict[str, Any]:
    for name in TEXTS:
        app.add_directive(name, Generated)
    app.add_role("name", NameRole())
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _restored, priority=600)
    app.connect("autodoc-process-bases", _bases)
    app.connect("autodoc-process-signature", _signature)
    app.connect("missing-reference", _missing)
    app.connect("doctree-read", _link_names)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
