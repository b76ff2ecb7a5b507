"""The README's Python examples run, in their order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples():
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    assert blocks
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    for block in blocks:
        # Blank lines in front, so that a traceback names the README's own line.
        source = "\n" * README.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, "README.md", "exec"), scope)
    assert scope["metrics"].keys() >= {"weight_error", "output_error"}


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_links_lead_somewhere(target: str):
    assert (ROOT / target).exists()


def test_commands_name_targets_and_files_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python (\S+\.py)", README):
        assert (ROOT / script).is_file(), script
