"""The documentation site: its generated parts, its links and the examples of algorithms."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
from docstring_parser import parse, parse_from_object
from expecting import run

from metarl.algorithms import algorithms, find_algorithm
from metarl.cli import main
from metarl.cli.options import command_type
from metarl.cli.parsing import flags_of, help_texts
from metarl.config.options import Config
from metarl.parts import Part

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "extensions"))
algorithm_texts = importlib.import_module("algorithm_texts")
option_texts = importlib.import_module("option_texts")
public_names = importlib.import_module("public_names")

PUBLIC = {
    name: public_names.find(name)
    for group in public_names.GROUPS.values()
    for name in public_names.names_of(group)
}
PAGES = {name: (DOCS / "algorithms" / f"{name}.md").read_text() for name in algorithms()}


def test_every_exported_name_is_in_the_reference():
    listed = [n for g in public_names.GROUPS.values() for n in public_names.names_of(g)]
    assert len(listed) == len(set(listed))
    assert public_names.exported() <= set(listed)


def test_every_page_of_the_reference_exists_and_is_listed():
    index = (DOCS / "api" / "index.md").read_text()
    for page in public_names.GROUPS:
        assert f"```{{api}} {page}\n" in (DOCS / "api" / f"{page}.md").read_text()
        assert re.search(rf"^{page}$", index, re.M)


def documented(found: object) -> set[str]:
    """Return the arguments that a function's or a class's docstrings describe."""
    texts = {p.arg_name for p in parse(inspect.getdoc(found) or "").params if p.description}
    names = {name.strip(" *") for text in texts for name in text.split(",")}
    for kind in inspect.getmro(found) if inspect.isclass(found) else ():
        if kind.__module__.startswith("metarl."):
            names |= {p.arg_name for p in parse_from_object(kind).params if p.description}
            names |= {p.arg_name for p in parse(kind.__init__.__doc__ or "").params}
            names |= set(help_texts(kind)) if issubclass(kind, Part) else set()
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_describe_their_arguments(name):
    found = PUBLIC[name]
    assert found.__doc__
    assert not found.__doc__.startswith(f"{found.__name__}(")  # a dataclass without a docstring
    missing = set(inspect.signature(found).parameters) - documented(found)
    assert not missing
    for key, value in vars(found).items() if inspect.isclass(found) else ():
        if inspect.isfunction(value) and not key.startswith("_"):
            assert inspect.getdoc(getattr(found, key)), key


def test_the_command_line_page_has_every_option_of_every_command():
    page = option_texts.command_page()
    sections = dict(re.findall(r"^## metarl (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert set(sections) == set(main.commands())
    everything = set(re.findall(r"--[a-z][\w.-]*", page))
    for name, text in sections.items():
        kind, _ = main.command_of(name)
        if hasattr(kind, "usual"):
            flags = set(flags_of(command_type(kind, Config.of("", "maml-trpo"))))
            own = {flag for flag in flags if "." not in flag}
            assert flags - own <= everything | _of_algorithms()
        else:
            own = set(flags_of(kind))
        assert own <= set(re.findall(r"--[a-z][\w.-]*", text)), name


def _of_algorithms() -> set[str]:
    entries = [e for name in algorithms() for e in option_texts.algorithm_entries(name)]
    return {flag for e in entries for flag in (e.flag.name, e.flag.switch_off)}


def test_every_option_of_the_site_has_a_help_text_and_a_true_default():
    for name in algorithms():
        config = Config.of(option_texts.usual_family(find_algorithm(name)), name)
        options = config.options()
        for entry in option_texts.algorithm_entries(name):
            assert entry.text, entry.flag.name
            assert entry.default == option_texts.shown(options[entry.key])
    for command in main.commands():
        kind, _ = main.command_of(command)
        for entry in option_texts.entries(kind):
            assert entry.text, entry.flag.name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((True, "on"), (False, "off"), (None, ""), ((), ""), ((0.1, 0.05), "0.1 0.05")),
        *(("cosine", "`cosine`"), (1e-5, "1e-05"), (64, "64"), (1234567, "1234567")),
    ],
)
def test_defaults_are_shown_as_words_of_a_command_line(value, text):
    assert option_texts.shown(value) == text


@pytest.mark.parametrize("name", PAGES)
def test_an_algorithm_has_its_page(name):
    page = PAGES[name]
    for directive in ("paper", "pseudocode", "spaces", "algorithm-options"):
        assert re.search(rf"^```{{{directive}}}.*\n```$", page, re.M)
    assert "\n## Results\n" in page
    assert re.search(r"arXiv:\d{4}\.\d{5}", find_algorithm(name).citation)
    index = (DOCS / "algorithms" / "index.md").read_text()
    assert re.search(rf"^\| \[`{re.escape(name)}`\]\({re.escape(name)}\.md\) \|", index, re.M)


@pytest.mark.parametrize("name", PAGES)
def test_pseudocode_names_options_that_the_algorithm_has(name):
    config = Config.of(option_texts.usual_family(find_algorithm(name)), name)
    options = {f"--{key}".replace("_", "-") for key in config.options()}
    found = algorithm_texts.symbols(name)
    assert found
    assert set(found) <= options


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_an_algorithms_page_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^## Example\n\n```bash\n(.*?)```", PAGES[name], re.M | re.S)
    train = shlex.split(block.splitlines()[0])[1:]
    small = ["--iterations", "1", "--tasks", "2", "--threads", "1"]
    if "characters" in train:
        small += ["--policy.filters", "4"]
    else:
        small += ["--episodes", "2"]
    assert run(*train, *small) == 0


def test_supported_spaces_follow_the_domains():
    def actions(name: str) -> int:
        return sum(row.endswith(f"| {algorithm_texts.YES} |") for row in rows(name))

    def rows(name: str) -> list[str]:
        return algorithm_texts.spaces(name).splitlines()

    assert actions("promp") == actions("maml-trpo") == 4
    assert actions("protomaml") == 0
    assert "regression and classification" in rows("maml-trpo")[-1]
    assert rows("oracle")[-1].endswith("regression.")
    assert rows("leopard")[-1].endswith("classification.")
    assert rows("promp")[-1].endswith("none.")


def test_an_algorithms_results_are_rows_of_the_results_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithm_texts, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    page = (
        "| algorithm | 1 step |\n| --- | --- |\n| promp | 1.5 |\n| anil | 3 |\n| maml-trpo | 2 |\n"
    )
    for file in algorithm_texts.RESULTS:
        (tmp_path / "results" / file).write_text(f"{page}\n```bash\nmake train\n```\n")
    text = algorithm_texts.results("promp")
    assert text.count("| promp | 1.5 |") == text.count("| maml-trpo | 2 |") == 2
    assert "anil" not in text
    assert "make train" in text
    with pytest.raises(ValueError, match="reptile"):
        algorithm_texts.results("reptile")


def test_links_to_the_repository_are_rewritten():
    pytest.importorskip("sphinx")
    links = importlib.import_module("repository_links")
    page = DOCS / "algorithms" / "index.md"
    text = "[a](../../metarl/parts.py) [b](promp.md#options) [c](../../examples) [d](https://x.org)"
    assert links.rewritten(text, page, page) == (
        "[a](repository:metarl/parts.py) [b](promp.md#options) [c](repository:examples/)"
        " [d](https://x.org)"
    )
    included = ROOT / "CONTRIBUTING.md"
    text = "[a](docs/faults.md#x) [b](README.md) [c](missing.md)\n```\n[d](README.md)\n```"
    assert links.rewritten(text, included, DOCS / "contributing.md") == (
        "[a](faults.md#x) [b](index.md) [c](missing.md)\n```\n[d](README.md)\n```"
    )


@pytest.mark.parametrize(
    ("address", "right"),
    [
        ("https://arxiv.org/abs/1703.03400", True),
        ("https://arxiv.org/abs/17.034", False),
        ("http://example.org", False),
        ("https://example", False),
        ("https://example.org/a b", False),
        ("https://example.org/a#b", True),
    ],
)
def test_external_addresses_are_checked_by_their_shape(address, right):
    pytest.importorskip("sphinx")
    links = importlib.import_module("repository_links")
    assert (links.wrong_address(address) == "") is right
