"""Evaluations in the model card of an export."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import card as door
from experiments.evaluate import evaluate
from experiments.model.export import EXPORT_NAME, export
from tests.experiments.model.conftest import evaluation
from tests.experiments.model.exported import quantized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card")
    export(quantized(root, "llama", "nvfp4", only="layers.0.mlp"), root / "out", "modelopt")
    return root / "out"


def test_the_table_of_evaluations_replaces_what_was_there(
    pair: SimpleNamespace, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_text()
    first = evaluate(evaluation(pair, tmp_path))
    second = evaluate(evaluation(pair, tmp_path, evaluate__protocol="llama_cpp"))
    runs = [tmp_path / "runs" / record.run_id for record in (first, second)]
    assert door.main([str(tmp_path / "out"), str(runs[0] / "record.json")]) == 0
    assert door.main([str(tmp_path / "out"), *map(str, runs)]) == 0
    assert str(tmp_path / "out" / "README.md") in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    section = text.partition("## Evaluation\n\n")[2].partition("\n\n## Serve")[0]
    assert text.replace(section, "Not evaluated yet: `python experiments/evaluate.py model.path=FOLDER`.") == before
    rows = section.splitlines()[2:4]
    for row, record in zip(rows, (first, second), strict=True):
        assert f"({record.protocol})" in row and f"| {record.tokens:,} |" in row
        assert f"| {record.kl_mean:.4g} [{record.kl_low:.4g}, {record.kl_high:.4g}] |" in row
    assert f"Against {first.reference}, both in float32; 95 % intervals over 12 sequences of 32 tokens." in section


def test_other_folders_and_files_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert door.main([str(folder), str(folder / EXPORT_NAME)]) == 1
    assert EXPORT_NAME in capsys.readouterr().err
    assert door.main([str(folder), str(tmp_path)]) == 1
    assert "record.json" in capsys.readouterr().err


def test_a_page_that_is_no_card_is_left_alone(
    pair: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = evaluate(evaluation(pair, tmp_path))
    (tmp_path / "README.md").write_text("# Mine\n")
    assert door.main([str(tmp_path), str(tmp_path / "runs" / record.run_id)]) == 1
    assert "no section Evaluation" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
