"""Sphinx: how the pages of this folder become a site. `nox -s docs` builds it with every warning an error."""

from __future__ import annotations

import tensorway

project = "Tensorway"
author = "The Tensorway authors"
copyright = author
version = release = tensorway.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"Tensorway {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# `[text](page.md#heading)` works for headings down to this level; tests/docs/test_links.py holds the same.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
suppress_warnings = ["myst.header"]

# Docstrings are plain text with names in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
# What nitpicky mode cannot know: the standard library, attrs, pluggy and pytest have their own sites, and the builds
# must work without a network.
nitpick_ignore_regex = [(r"py:.*", r"(?!tensorway).*")]
# Names of tensorway are never ignored, but for these: other classes on their page have the same short names, which
# would mean either, so these are shown and are no targets.
nitpick_ignore = [("py:class", f"tensorway_eplb.{name}") for name in ("background.State", "gate.Decision")]
# A type variable, and what an engine to try things with has inside, are shown and no targets either.
nitpick_ignore += [("py:class", "tensorway.testing.servers._Server")]
nitpick_ignore += [("py:class", f"tensorway_kv.reference.{name}") for name in ("rank.Ranks", "serve._Plan")]
