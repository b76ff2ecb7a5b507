"""The committed notebooks: executed from top to bottom, without traces of the machine. nbmake runs them."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDERS_OF_A_MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|opt|usr)/")


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_quickstart", "02_results", "03_qwen3_4b", "04_whole_model"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_clean_outputs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not FOLDERS_OF_A_MACHINE.search(re.sub(r'"image/png": ".*"', "", text))
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert not any(cell.metadata for cell in notebook.cells)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "Warning" not in "".join(o.get("text", "") for o in outputs)


def test_the_figures_shown_are_those_of_results() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "02_results.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    kept = [path.read_bytes() for path in (ROOT / "results" / "figures").glob("*.png")]
    assert sorted(shown) == sorted(kept), "run `make notebooks`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        assert (path.parent / target).exists(), target
