"""Sphinx's configuration: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import sys
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package
sys.path.insert(0, str(Path(__file__).parent))  # plain_math, source_links

import kornia_tinyvit

project = "kornia-tinyvit"
author = "the kornia-tinyvit contributors"
copyright = "2026, the kornia-tinyvit contributors"
version = release = kornia_tinyvit.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "plain_math",
    "source_links",
]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"  # in addition to return types
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

suppress_warnings = ["design.card_legacy"]  # the directives that replace the separators need a version after 0.6

html_theme = "furo"
pygments_dark_style = "github-dark"  # the default style underlines modules like links
html_math_renderer = "plain"
html_title = f"kornia-tinyvit {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_favicon = "_static/favicon.svg"


def setup(app):
    app.connect("autodoc-process-docstring", hide_attribute, priority=400)
    app.connect("autodoc-process-docstring", restore_attribute, priority=600)
    app.connect("doctree-read", drop_tildes)


# Napoleon, which runs in between, parses the start of ``A sentence: more text`` as an attribute's type.
attributes = {}


def hide_attribute(app, what, name, obj, options, lines):
    if what in ("attribute", "data", "property"):
        attributes[name] = list(lines)


def restore_attribute(app, what, name, obj, options, lines):
    if name in attributes:
        lines[:] = attributes.pop(name)


def drop_tildes(app, doctree):
    """Remove the prefix that autodoc leaves in types that combine ``Literal`` with a class."""
    for text in list(doctree.findall(nodes.Text)):
        if "~collections.abc." in text:
            text.parent.replace(text, nodes.Text(text.replace("~collections.abc.", "")))
