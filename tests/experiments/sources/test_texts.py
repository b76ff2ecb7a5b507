"""Texts: this Python's documentation, local folders, the hub."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from experiments.config import DataConfig, DataSource
from experiments.files import SourceError
from experiments.sources import readers
from experiments.sources.texts import load_text

HUB_DATA = DataConfig(
    "wikitext2", DataSource.hub, repo="Salesforce/wikitext", subset="wikitext-2-raw-v1", revision="b08"
)


def test_python_docs_is_this_pythons_text(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    text = load_text(DataConfig("python_docs", DataSource.python_docs), tmp_path)
    assert topics["for"] in text.read()
    assert text.sha256 == hashlib.sha256(text.read().encode()).hexdigest()
    with pytest.raises(SourceError, match=r"data.heldout_split=test: data=python_docs is one text"):
        load_text(DataConfig("python_docs", DataSource.python_docs), tmp_path, "test")


def local(path: Path, **values: Any) -> DataConfig:
    return DataConfig("wikitext2", DataSource.hub, path=str(path), **values)


@pytest.mark.parametrize(
    "names", [("train.txt", "valid.txt", "test.txt"), ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")]
)
def test_a_folder_of_text_files(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "README.md").write_text("not a text")
    for name in names:
        (tmp_path / name).write_bytes(f"text of {name}\r\né\n".encode())
    assert load_text(local(tmp_path), tmp_path).read() == f"text of {names[0]}\r\né\n"
    assert load_text(local(tmp_path, split="validation"), tmp_path).read().startswith(f"text of {names[1]}")
    held = load_text(local(tmp_path), tmp_path, "test")
    assert (held.split, held.read()[:12]) == ("test", f"text of {names[2]}"[:12])


def test_a_folder_without_the_split_calibrates_on_the_first_that_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for name in ("test.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    for _ in range(2):
        assert load_text(local(tmp_path), tmp_path).split == "validation"
    assert [record.getMessage() for record in caplog.records] == [
        f"data.split=train: {tmp_path} has only validation, test; taking validation"
    ]
    with pytest.raises(SourceError, match=r"data.heldout_split=train: .* has the splits validation, test"):
        load_text(local(tmp_path), tmp_path, "train")
    with pytest.raises(SourceError, match=r"data.split=dialogue: .* has the splits validation, test"):
        load_text(local(tmp_path, split="dialogue"), tmp_path)


ROWS = ["", " = Title = \n", "first\n", "second without end"]
JOINED = "\n = Title = \nfirst\nsecond without end\n"


@pytest.mark.parametrize(
    "layout", ["train.parquet", "data/train-00000-of-00001.parquet", "wikitext-2-raw-v1/train-0.parquet"]
)
def test_parquet(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "set" / layout
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "n": [1, 2, 3, 4]}), path)
    data = local(tmp_path / "set", subset="wikitext-2-raw-v1")
    assert load_text(data, tmp_path).read() == JOINED
    with pytest.raises(SourceError, match=r"data.text_column=words: .* has the columns text, n"):
        load_text(local(tmp_path / "set", subset="wikitext-2-raw-v1", text_column="words"), tmp_path)

    # Read once: the text is kept, until the file's bytes change.
    monkeypatch.setattr(readers, "_parquet", lambda *args: readers.Content("read again"))
    assert load_text(data, tmp_path).read() == JOINED
    os.utime(path, (1, 1))
    assert load_text(data, tmp_path).read() == JOINED
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "n": [1, 2, 3, 5]}), path)
    assert load_text(data, tmp_path).read() == "read again"


def test_a_saved_datasets_folder(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ROWS})
    datasets.DatasetDict({"test": table, "validation": table.select([1, 2])}).save_to_disk(tmp_path / "set")
    text = load_text(local(tmp_path / "set"), tmp_path)
    assert (text.split, text.read()) == ("validation", " = Title = \nfirst\n")
    assert load_text(local(tmp_path / "set"), tmp_path, "test").read() == JOINED


def test_paths_that_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data.path=.*nowhere: no such folder"):
        load_text(local(tmp_path / "nowhere"), tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "notes.md").write_text("")
    with pytest.raises(SourceError, match=r"no text there; found notes.md. Expected files named after their split"):
        load_text(local(tmp_path / "set"), tmp_path)
    (tmp_path / "set" / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match=r"not UTF-8"):
        load_text(local(tmp_path / "set"), tmp_path)
    with pytest.raises(SourceError, match=r"data=synthetic holds no text"):
        load_text(DataConfig("synthetic", DataSource.synthetic), tmp_path)


def test_a_text_of_the_hub_is_loaded_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(repo: str, subset: str, revision: str, split: str) -> Any:
        asked.append((repo, subset, revision, split))
        return datasets.Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        assert load_text(HUB_DATA, tmp_path).read() == JOINED
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "b08", "train")]
    (kept,) = (tmp_path / "texts").glob("*.txt")
    kept.write_text("damaged")
    assert load_text(HUB_DATA, tmp_path).read() == JOINED


def test_a_text_of_the_hub_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Unknown split")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError, match=r"split train cannot be loaded: Unknown split. Use data.path"):
        load_text(HUB_DATA, tmp_path)
