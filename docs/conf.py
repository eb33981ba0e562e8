"""Configuration of the documentation site; `make docs` builds it."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

from repository_links import source_address

project = "metarl"
author = "the metarl developers"
copyright = f"2026, {author}"
version = release = version_of("metarl-gradient")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.linkcode",
    "generated_pages",
    "repository_links",
    "built_links",
]
source_suffix = {".md": "markdown"}
nitpicky = True
smartquotes_action = "D"  # dashes

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_url_schemes = {"https": None, "http": None, "mailto": None, "repository": None}

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
ALIASES = """
    ArrayLike Bools Data Dist Factory Family Fit Floats Loss OuterState Params Regularizer
    Reward SupportTerm TaskWeights Tasks Values What
"""
autodoc_type_aliases = {name: name for name in ALIASES.split()}
default_role = "name"
napoleon_numpy_docstring = False
add_module_names = False
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
linkcode_resolve = source_address

html_theme = "furo"
html_title = f"metarl {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
