"""The configuration of Sphinx; `make html` in this folder builds the pages.

torch, triton and safetensors are mocked, so that the build does not need them and signatures are the same everywhere.
generate.py writes the tables before Sphinx reads its sources.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import docstrings  # noqa: E402  (found through the path above)

autodoc_mock_imports = ["torch", "triton", "safetensors"]
with mock(autodoc_mock_imports):
    import generate

    import quantkit

    generate.write(HERE / "_generated")

project = "quantkit"
author = "the quantkit authors"
release = version = quantkit.__version__
copyright = "the quantkit authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated"]  # the generated tables are included by pages

html_theme = "furo"
html_title = "quantkit"
html_show_sphinx = False

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", docstrings.process)
