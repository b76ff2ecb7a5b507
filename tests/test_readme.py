"""README.md and the guides: their Python examples run, each page's as one program, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
WITH_EXAMPLES = ("README.md", "docs/quickstart.md", "docs/pipeline.md")


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_python_examples(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    for block in blocks:
        # Blank lines in front, so that a traceback has the page's line number.
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, page, "exec"), scope)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        assert (path.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        assert anchor in anchors(path.parent / target if target else path), (target, anchor)


def anchors(page: Path) -> set[str]:
    """Of its headings, both as docutils and as GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings} | {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


def test_the_readme_is_short_and_opens_with_what_a_reader_needs():
    """Claim, use, one figure, the tables of a layer and of a model, the commands, links: then the first heading."""
    assert README.count("\n") <= 165
    first = README.partition("\n## ")[0]
    assert "```python" in first and first.count("<img ") == 1 and len(re.findall(r"^\|:-", first, re.M)) == 2
    assert all(
        word in first
        for word in ("make run", "make model", "make test", "quantize_model.py", "docs/quickstart.md", "default method")
    )
    example = re.search(r"```python\n(.*?)```", first, re.DOTALL)
    assert example is not None and example[1].count("\n") == 6


def test_commands_name_targets_and_files_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python (\S+\.py)", README):
        assert (ROOT / script).is_file(), script


def test_one_word_for_the_models_and_texts_that_need_no_hub():
    """It is "offline twin"."""
    folders = ("conf", "docs", "experiments", "notebooks", "quantkit")
    found = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".md", ".py", ".yaml", ".ipynb")
    ]
    for path in (ROOT / "README.md", ROOT / "Makefile", *found):
        assert not re.search(r"\bstand-?ins?\b", path.read_text(encoding="utf-8"), re.IGNORECASE), path
