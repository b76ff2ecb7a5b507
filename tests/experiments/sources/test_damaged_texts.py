"""Texts that are damaged, compressed, in JSON, or chats: read, or refused in one line with file, value and remedy."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.config import DataConfig, DataSource, ModelConfig
from experiments.files import SourceError
from experiments.sources.chats import render_chats
from experiments.sources.readers import column_content
from experiments.sources.texts import load_text
from tests.experiments.tiny_models import configuration, train_tokenizer

ROWS = ["first", "second, é", "third"]
JOINED = "first\nsecond, é\nthird\n"
CHATS = [
    [{"role": "user", "content": "the quick fox?"}, {"role": "assistant", "content": "it jumps"}],
    [{"role": "user", "content": "again\nand again"}],
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"


def local(path: Path, **values: Any) -> DataConfig:
    return DataConfig("wikitext2", DataSource.hub, path=str(path), **values)


def json_lines(rows: list[Any], column: str = "text") -> bytes:
    return "".join(json.dumps({column: row, "n": 1}) + "\n" for row in rows).encode()


PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress,
                                               ".xz": lzma.compress}  # fmt: skip


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("whole_folder", [True, False])
def test_json_lines_and_compressed_texts_are_read(packed: str, whole_folder: bool, tmp_path: Path) -> None:
    plain = "one\r\ntwo é\n\nthree"
    for name, content in ((f"train.txt{packed}", plain.encode()), (f"valid.jsonl{packed}", json_lines(ROWS))):
        folder = tmp_path / "set" if whole_folder else tmp_path / name
        folder.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(PACKED[packed](content))
    train = tmp_path / "set" if whole_folder else tmp_path / f"train.txt{packed}" / f"train.txt{packed}"
    valid = tmp_path / "set" if whole_folder else tmp_path / f"valid.jsonl{packed}" / f"valid.jsonl{packed}"
    text = load_text(local(train), tmp_path)
    assert (text.split, text.read()) == ("train", plain if not packed else plain.replace("\r\n", "\n"))
    assert load_text(local(valid, split="validation"), tmp_path).read() == JOINED


def test_tables_of_values_between_commas_or_tabs_are_read(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,n\nfirst,1\n"second, é",2\nthird,3\n')
    (tmp_path / "test.tsv").write_text("n\ttext\n1\tfirst\n")
    assert load_text(local(tmp_path / "train.csv"), tmp_path).read() == JOINED
    assert load_text(local(tmp_path / "test.tsv"), tmp_path).read() == "first\n"


DAMAGED = {
    "train.parquet": b"PAR1 and no more",
    "train.jsonl": b'{"text": "whole"}\n{"text": "cut sh',
    "train.txt.gz": gzip.compress(b"words " * 4000)[:60],
    "train.jsonl.gz": b"no gzip at all",
    "train.txt.xz": lzma.compress(b"words" * 99)[:-9],
    "train.txt": b"caf\xe9",
    "train.csv": b'text\n"never closed',
    "train.jsonl.bz2": b"BZh9 no",
    "empty/train.parquet": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_with_its_name_and_a_remedy(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(DAMAGED[name])
    for source in (path, path.parent):
        with pytest.raises(SourceError) as caught:
            load_text(local(source), tmp_path / "cache").read()
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and len(message) < 500
        assert "Copy it again" in message or "Convert it" in message


@pytest.mark.parametrize("name", ["state.json", "data-00000-of-00001.arrow", "dataset_info.json", "dataset_dict.json"])
def test_a_damaged_folder_of_datasets_is_one_line(name: str, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "set"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ROWS})}).save_to_disk(folder)
    (damaged,) = folder.rglob(name)
    damaged.write_bytes(b"{")
    with pytest.raises(SourceError) as caught:
        load_text(local(folder), tmp_path / "cache").read()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json_lines(CHATS, "messages"))
    with pytest.raises(SourceError, match=r"data.text_column=text: train.jsonl has the columns messages, n"):
        load_text(local(tmp_path), tmp_path)


@pytest.mark.parametrize("value", [3, ["a", "b"], {"a": 1}, [{"role": "user"}], [], [{"role": "user", "content": 1}]])
def test_a_column_of_neither_text_nor_chats_names_row_and_remedy(value: Any) -> None:
    with pytest.raises(SourceError, match=r"data.text_column=text: row 1 of a.jsonl is .* Name a column") as caught:
        column_content([CHATS[0], value], local(Path()), "a.jsonl")
    assert "\n" not in str(caught.value)


def chats(tmp_path: Path, column: str = "messages", rows: list[Any] = CHATS) -> Any:
    (tmp_path / "train.jsonl").write_bytes(json_lines(rows, column))
    return load_text(local(tmp_path, text_column=column), tmp_path)


def model(tmp_path: Path, template: str | None) -> ModelConfig:
    """A folder with a tokenizer and no model: rendering needs no more."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    train_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return configuration(folder).model


def test_chats_are_rendered_by_the_tokenizers_template(tmp_path: Path) -> None:
    text = chats(tmp_path)
    assert text.chat and text.sha256.startswith("chat:")
    assert render_chats(text.read(), model(tmp_path, TEMPLATE), tmp_path) == (
        "<user>the quick fox?</><assistant>it jumps</><user>again\nand again</>"
    )


def test_chats_of_other_names_are_the_same(tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    other = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
    assert chats(tmp_path, "conversations", other).read() == chats(tmp_path).read()


def test_chats_without_a_template_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    text = render_chats(chats(tmp_path).read(), model(tmp_path, None), tmp_path)
    assert text.startswith("user: the quick fox?\nassistant: it jumps\n")
    assert [r.getMessage() for r in caplog.records] == [
        "tiny (local) has no chat template; chats are read as `role: content` lines"
    ]


def test_a_chat_that_the_template_refuses_is_one_line(tmp_path: Path) -> None:
    refusing = "{% if messages|length == 1 %}{{ raise_exception('two\nat least') }}{% endif %}"
    with pytest.raises(SourceError, match=r"chat 1 of the text: the template of tiny \(local\) refuses it \(two at"):
        render_chats(chats(tmp_path).read(), model(tmp_path, refusing), tmp_path)


def test_a_captured_chat_is_that_of_the_template(tmp_path: Path) -> None:
    """From the column to the token ids."""
    from experiments.capture.tokens import token_sequences

    (tmp_path / "train.jsonl").write_bytes(json_lines(CHATS * 9, "messages"))
    folder = Path(str(model(tmp_path, TEMPLATE).path))
    config = configuration(folder, tmp_path, data__text_column="messages", data__seq_len=8)
    seen: list[str] = []
    token_sequences(config, lambda text: seen.append(text) or list(range(64)))  # type: ignore[func-returns-value]
    assert seen[0].startswith("<user>the quick fox?</>")
