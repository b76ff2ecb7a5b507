"""Reads files and tables of text into one string: plain text, JSON lines, CSV, Parquet, and folders saved by datasets.

A column holds texts, or chats: lists of messages with a role and a content. Chats are kept as JSON lines, because the
model's template renders them (chats.py). A damaged file raises SourceError, which names it. pyarrow, datasets and
fsspec are imported only when a table is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import DataConfig
from experiments.files import SourceError, one_line

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
KINDS = {
    "text": (".txt", ".raw", ".tokens"),
    "parquet": (".parquet",),
    "json": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
}


@dataclass(frozen=True)
class Content:
    """text: the text; with chat, one conversation per line, as a JSON list of messages."""

    text: str
    chat: bool = False


def kind_of(file: Path) -> str | None:
    """text, parquet, json or csv; "compressed text" for compressed text files; None for other names."""
    packed = file.suffix in COMPRESSED
    suffix = Path(file.stem).suffix if packed else file.suffix
    kind = next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), None)
    return {"text": "compressed text", "parquet": None}.get(str(kind), kind) if packed else kind


def read_files(kind: str, files: list[Path], data: DataConfig) -> Content:
    """The texts of the files, one after the other. Raises SourceError for one that is damaged, or lacks the column."""
    parts = [_read(kind, file, data) for file in files]
    if len({part.chat for part in parts}) > 1:
        raise SourceError(f"data.text_column={data.text_column}: texts in some files, chats in others; use one kind.")
    return Content("".join(part.text for part in parts), parts[0].chat)


def _read(kind: str, file: Path, data: DataConfig) -> Content:
    try:
        if kind == "text":
            return Content(file.read_bytes().decode("utf-8"))
        if kind == "parquet":
            return _parquet(file, data)
        if kind == "datasets":
            return _saved(file, data)
        if kind == "json":
            return _json(file, data)
        return _streamed(kind, file, data)
    except SourceError:
        raise
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text ({one_line(error)}). Convert it first.") from None
    except Exception as error:  # pyarrow, datasets and the decompressors raise dozens of types
        cause = error.__cause__ or error
        why = f"{type(cause).__name__}: {one_line(cause)[:200]}"
        raise SourceError(f"{file} cannot be read as {kind} ({why}). Copy it again, or give another file.") from None


def _parquet(file: Path, data: DataConfig) -> Content:
    import pyarrow.parquet

    _check_column(pyarrow.parquet.read_schema(file).names, data, file.name)
    values = pyarrow.parquet.read_table(file, columns=[data.text_column])[data.text_column].to_pylist()
    return column_content(values, data, file.name)


def _saved(folder: Path, data: DataConfig) -> Content:
    import datasets

    return table_content(datasets.load_from_disk(str(folder)), data, str(folder))


def _json(file: Path, data: DataConfig) -> Content:
    """One object per line, or one list of objects. Not by pyarrow, which a damaged file can crash."""
    import fsspec

    with fsspec.open(str(file), "rt", encoding="utf-8", compression="infer") as stream:
        text = stream.read()
    rows = (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.split("\n") if line.strip()]
    )
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise SourceError(
            f"{file}: row {wrong} is {_described(rows[wrong])}, no object with a column {data.text_column}."
        )
    _check_column(list(dict.fromkeys(name for row in rows for name in row)), data, file.name)
    content = column_content([row.get(data.text_column) for row in rows], data, file.name)
    content.text.encode("utf-8")  # raises for half a surrogate pair, which JSON can hold
    return content


def _streamed(kind: str, file: Path, data: DataConfig) -> Content:
    """Reads by streaming, because a copy in the datasets library's cache could outlive a change of the file."""
    import datasets

    options: dict[str, Any] = {}
    if kind == "compressed text":
        options = {"sample_by": "document"}
    elif file.name.removesuffix(file.suffix if file.suffix in COMPRESSED else "").endswith(".tsv"):
        options = {"sep": "\t"}
    builder = kind.rpartition(" ")[2]
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error has the same message
    try:
        rows = list(datasets.load_dataset(builder, data_files=str(file), split="train", streaming=True, **options))
    finally:
        datasets.logging.set_verbosity(verbosity)
    if kind == "compressed text":
        return Content("".join(row["text"] for row in rows))
    _check_column(list(dict.fromkeys(name for row in rows for name in row)), data, file.name)
    return column_content([row.get(data.text_column) for row in rows], data, file.name)


def hub_content(data: DataConfig, split: str) -> Content:
    """A split of a table on the hub. Raises SourceError."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    where = f"{data.repo} {data.subset or ''} split {split}"
    try:
        table = datasets.load_dataset(str(data.repo), data.subset, revision=data.revision, split=split)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            f"{where} cannot be loaded: {one_line(error)}. Use data.path for a local copy, or data=python_docs."
        ) from None
    return table_content(table, data, f"{data.repo} split {split}")


def table_content(table: Any, data: DataConfig, where: str) -> Content:
    """table: a datasets.Dataset."""
    _check_column(table.column_names, data, where)
    return column_content(table[data.text_column], data, where)


def _check_column(columns: list[str], data: DataConfig, where: str) -> None:
    if data.text_column not in columns:
        raise SourceError(f"data.text_column={data.text_column}: {where} has the columns {', '.join(columns)}.")


def column_content(values: Iterable[Any], data: DataConfig, where: str) -> Content:
    """A column's texts, joined, or its chats as JSON lines. Raises SourceError, with the row, for anything else."""
    rows = [(number, value) for number, value in enumerate(values) if value is not None]
    if all(isinstance(value, str) for _, value in rows):
        return Content(_join(value for _, value in rows))
    lines = []
    for number, value in rows:
        chat = _messages(value)
        if chat is None:
            raise SourceError(
                f"data.text_column={data.text_column}: row {number} of {where} is {_described(value)}, neither text "
                "nor a chat (a list of messages with role and content). Name a column that holds one of them."
            )
        lines.append(json.dumps(chat, ensure_ascii=False, sort_keys=True) + "\n")
    return Content("".join(lines), chat=True)


def _messages(value: Any) -> list[dict[str, str]] | None:
    """A chat as messages with role and content, from the same keys or ShareGPT's from and value; None if it is none."""
    names = {"from": "role", "value": "content"}
    roles = {"human": "user", "gpt": "assistant"}
    if not isinstance(value, list) or not value:
        return None
    chat = []
    for message in value:
        if not isinstance(message, dict):
            return None
        fields = {names.get(key, key): text for key, text in message.items()}
        role, content = fields.get("role"), fields.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            return None
        chat.append({"role": roles.get(role, role), "content": content})
    return chat


def _described(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    return f"of type {type(value).__name__}"


def _join(rows: Iterable[str]) -> str:
    """The rows of a table as one text. WikiText's rows have their line ends, other tables' rows get them."""
    return "".join(row if row.endswith("\n") else row + "\n" for row in rows)
