"""Which text a configuration means: from the hub, a local folder, or this Python's own documentation.

The text of a table (hub, parquet, datasets folder) is kept in the cache as plain text: a later run needs neither the
hub nor the libraries that read it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.config import DataConfig, DataSource
from experiments.files import SourceError, listing, one_line, sha256_file, sha256_json, write_atomically

log = logging.getLogger(__name__)

# A text of the same role, under the names that releases use.
SPLIT_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")


@dataclass(frozen=True)
class Text:
    """A text and its identity; `read` brings the text itself."""

    name: str
    split: str
    sha256: str
    read: Callable[[], str]


def load_text(data: DataConfig, cache: Path, split: str | None = None) -> Text:
    """split: exactly this one; None takes data.split, or in a local folder that lacks it the first that is there.

    Raises SourceError, which lists what was found.
    """
    if data.source == DataSource.python_docs:
        if split not in (None, data.split):
            raise SourceError(f"data.heldout_split={split}: data={data.name} is one text. Set it to null; "
                              "held-out sequences are then taken from the same text.")  # fmt: skip
        return _in_memory(data.name, data.split, _python_docs())
    if data.source == DataSource.synthetic:
        raise SourceError(
            "data=synthetic holds no text: it goes with model=synthetic. Use a text, such as data=python_docs."
        )
    if data.path is not None:
        return _local_text(data, cache, split)
    name = f"{data.repo}/{data.subset}" if data.subset else str(data.repo)
    wanted = split or data.split
    if data.revision is None:  # may move on: ask each time
        return _in_memory(name, wanted, _hub_text(data, wanted))
    return _memoised(name, wanted, _hub_identity(data, wanted), cache, lambda: _hub_text(data, wanted))


def is_kept(data: DataConfig, cache: Path) -> bool:
    """Whether load_text finds a hub's text, all its splits, in the cache."""
    splits = {data.split, data.heldout_split or data.split}
    return data.revision is not None and all(_kept(_hub_identity(data, split), cache).is_file() for split in splits)


def _hub_identity(data: DataConfig, split: str) -> dict[str, Any]:
    return {
        "repo": data.repo,
        "subset": data.subset,
        "revision": data.revision,
        "split": split,
        "column": data.text_column,
    }


def _kept(identity: dict[str, Any], cache: Path) -> Path:
    return cache / "texts" / f"{sha256_json(identity)[:16]}.json"


def _in_memory(name: str, split: str, text: str) -> Text:
    return Text(name, split, hashlib.sha256(text.encode()).hexdigest(), lambda: text)


def _memoised(name: str, split: str, identity: dict[str, Any], cache: Path, load: Callable[[], str]) -> Text:
    """The text, kept in the cache as plain text: a later run needs neither the hub nor the datasets library."""
    meta = _kept(identity, cache)
    file = meta.with_suffix(".txt")

    def store() -> str:
        text = load()
        write_atomically(file, text.encode())
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_atomically(meta, json.dumps({"identity": identity, "sha256": digest}, indent=1))
        return text

    def read() -> str:
        if not file.is_file() or sha256_file(file) != json.loads(meta.read_text())["sha256"]:
            return store()
        return file.read_bytes().decode()

    if not (meta.is_file() and file.is_file()):
        store()
    return Text(name, split, json.loads(meta.read_text())["sha256"], read)


def _python_docs() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise SourceError(
            f"data=python_docs: {sys.executable} carries no pydoc_data.topics. Install Python's standard library "
            "in full, or use data=wikitext2 with data.path."
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def _join(rows: Iterable[str | None]) -> str:
    """Rows of a table, joined to their text. Rows of WikiText end with a line break, those of other sets do not."""
    return "".join(row if row.endswith("\n") else row + "\n" for row in rows if row is not None)


def _hub_text(data: DataConfig, split: str) -> str:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(str(data.repo), data.subset, revision=data.revision, split=split)
    except (ValueError, OSError, RuntimeError) as error:
        raise SourceError(
            f"{data.repo} {data.subset or ''} split {split} cannot be loaded: {one_line(error)}. Use data.path for "
            "a local copy, or data=python_docs."
        ) from None
    return _column(table, data, f"{data.repo} split {split}")


def _column(table: Any, data: DataConfig, where: str) -> str:
    columns = table.column_names
    if data.text_column not in columns:
        raise SourceError(f"data.text_column={data.text_column}: {where} has the columns {', '.join(columns)}.")
    return _join(table[data.text_column])


def _local_text(data: DataConfig, cache: Path, split: str | None) -> Text:
    path = Path(str(data.path)).expanduser()
    if not path.exists():
        raise SourceError(
            f"data.path={path}: no such folder. Give one with train, valid or test .txt files, parquet files or a "
            "saved datasets folder."
        )
    splits = _local_splits(path, data.subset)
    if not splits:
        raise SourceError(
            f"data.path={path}: no text there; found {listing(path)}. Expected files named after their split, such as "
            "train.txt, valid.txt or test.parquet, or a folder saved by datasets."
        )
    chosen = _choose_split(splits, split or data.split, exact=split is not None, path=path)
    kind, files = splits[chosen]
    name = f"{data.name} ({path.resolve().name}, local)"
    if kind == "text":
        return _in_memory(name, chosen, "".join(_read_text(file) for file in files))
    # Parsing a table imports pyarrow or datasets, so its text is kept; size and time tell when the files change.
    listed = [file for entry in files for file in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])]
    stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in listed if file.is_file()]
    identity = {"files": stamps, "split": chosen, "column": data.text_column}
    load = _read_parquet if kind == "parquet" else _read_datasets_folder
    return _memoised(name, chosen, identity, cache, lambda: load(files, chosen, data))


def _choose_split(splits: dict[str, Any], wanted: str, exact: bool, path: Path) -> str:
    canonical = next((name for name, aliases in SPLIT_ALIASES.items() if wanted in aliases), wanted)
    for name in (wanted, canonical):
        if name in splits:
            return name
    if exact:
        raise SourceError(f"data.heldout_split={wanted}: {path} has the splits {', '.join(splits)}.")
    if canonical not in SPLIT_ALIASES:
        raise SourceError(f"data.split={wanted}: {path} has the splits {', '.join(splits)}.")
    chosen = next((name for name in SPLIT_ALIASES if name in splits), next(iter(splits)))
    _say_once(f"data.split={wanted}: {path} has only {', '.join(splits)}; calibrating on {chosen}")
    return chosen


@lru_cache
def _say_once(message: str) -> None:
    log.warning(message)


def _local_splits(path: Path, subset: str | None) -> dict[str, tuple[str, list[Path]]]:
    """split → (text | parquet | datasets, its files). A file belongs to the split that is a word of its name."""
    if path.is_file():
        kind = {".parquet": "parquet"}.get(path.suffix, "text")
        return {_split_of(path) or path.stem: (kind, [path])}
    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return {name: ("datasets", [path / name]) for name in names}
    if (path / "state.json").is_file():
        return {"train": ("datasets", [path])}
    for folder in (path / subset if subset else path, path, path / "data"):
        for kind, suffixes in (("text", TEXT_SUFFIXES), ("parquet", (".parquet",))):
            found: dict[str, list[Path]] = {}
            for file in sorted(folder.iterdir()) if folder.is_dir() else []:
                split = _split_of(file)
                if file.is_file() and file.suffix in suffixes and split:
                    found.setdefault(split, []).append(file)
            if found:
                return {name: (kind, found[name]) for name in SPLIT_ALIASES if name in found}
    return {}


def _split_of(file: Path) -> str | None:
    words = re.split(r"[._-]", file.name.lower())
    return next((name for name, aliases in SPLIT_ALIASES.items() if any(alias in words for alias in aliases)), None)


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 text ({error}). Convert it first.") from None


def _read_parquet(files: list[Path], split: str, data: DataConfig) -> str:
    import pyarrow.parquet

    parts = []
    for file in files:
        columns = pyarrow.parquet.read_schema(file).names
        if data.text_column not in columns:
            raise SourceError(f"data.text_column={data.text_column}: {file.name} has the columns {', '.join(columns)}.")
        parts.append(_join(pyarrow.parquet.read_table(file, columns=[data.text_column])[data.text_column].to_pylist()))
    return "".join(parts)


def _read_datasets_folder(files: list[Path], split: str, data: DataConfig) -> str:
    import datasets

    return _column(datasets.load_from_disk(str(files[0])), data, str(files[0]))
