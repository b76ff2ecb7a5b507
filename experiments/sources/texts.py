"""The configured text and its identity: from the hub, a local folder, or this Python's own documentation.

The text of a table (hub, parquet, datasets folder) is cached as plain text, so that a later run needs neither the hub
nor the libraries that read tables.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.config import DataConfig, DataSource
from experiments.files import (
    SourceError,
    listing,
    one_line,
    parse_json,
    read_sealed,
    sha256_file,
    sha256_json,
    write_atomically,
    write_sealed,
    writing,
)
from experiments.sources.hashes import file_hashes
from experiments.sources.readers import KINDS, Content, hub_content, kind_of, read_files
from experiments.sources.revisions import commit_of

log = logging.getLogger(__name__)

# Split → the names that releases give it.
SPLIT_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Text:
    """A text and its identity; `read` returns the text itself. chat: the text is chats, one per line, in JSON."""

    name: str
    split: str
    sha256: str
    read: Callable[[], str]
    chat: bool = False


def load_text(data: DataConfig, cache: Path, split: str | None = None) -> Text:
    """split: exactly this one. None means data.split, or the first split of a local folder that lacks it.

    Raises SourceError, which lists the splits or files that were found.
    """
    if data.source == DataSource.python_docs:
        if split not in (None, data.split):
            raise SourceError(f"data.heldout_split={split}: data={data.name} is one text. Set it to null; "
                              "held-out sequences are then taken from the same text.")  # fmt: skip
        return _in_memory(data.name, data.split, Content(_python_docs()))
    if data.source == DataSource.synthetic:
        raise SourceError(
            "data=synthetic holds no text: it goes with model=synthetic. Use a text, such as data=python_docs."
        )
    if data.path is not None:
        return _local_text(data, cache, split)
    name = f"{data.repo}/{data.subset}" if data.subset else str(data.repo)
    wanted = split or data.split
    if data.revision is None:  # it may move, so it is loaded each time
        return _in_memory(name, wanted, hub_content(data, wanted))
    return _memoised(name, wanted, _hub_identity(data, wanted), cache, lambda: hub_content(data, wanted))


def is_kept(data: DataConfig, cache: Path) -> bool:
    """Whether the cache has all configured splits of the hub's text, for load_text."""
    splits = {data.split, data.heldout_split or data.split}
    return data.revision is not None and all(_kept(_hub_identity(data, split), cache).is_file() for split in splits)


def _hub_identity(data: DataConfig, split: str) -> dict[str, Any]:
    return {
        "repo": data.repo,
        "subset": data.subset,
        "revision": commit_of(str(data.repo), data.revision, "dataset"),
        "split": split,
        "column": data.text_column,
    }


def _kept(identity: dict[str, Any], cache: Path) -> Path:
    return cache / "texts" / f"{sha256_json(identity)[:16]}.json"


def _in_memory(name: str, split: str, content: Content) -> Text:
    digest = hashlib.sha256(content.text.encode()).hexdigest()
    return Text(name, split, _identity_of(digest, content.chat), lambda: content.text, content.chat)


def _identity_of(digest: str, chat: bool) -> str:
    """Chats differ from a text of the same bytes, because they are rendered."""
    return f"chat:{digest}" if chat else digest


def _memoised(name: str, split: str, identity: dict[str, Any], cache: Path, load: Callable[[], Content]) -> Text:
    """The text, cached as plain text, so that a later run needs neither the hub nor the datasets library."""
    meta = _kept(identity, cache)
    file = meta.with_suffix(".txt")

    def store() -> str:
        content = load()
        with writing(cache):
            keep(content)
        return content.text

    def keep(content: Content) -> None:
        write_atomically(file, content.text.encode())
        digest = hashlib.sha256(content.text.encode()).hexdigest()
        write_sealed(meta, {"identity": identity, "sha256": digest, "chat": content.chat})

    def known() -> dict[str, Any] | None:
        try:
            values = {"chat": False} | read_sealed(meta)
            return values if re.fullmatch(r"[0-9a-f]{64}", str(values.get("sha256"))) else None
        except (OSError, ValueError, TypeError):
            return None

    def read() -> str:
        values = known()
        if values is None or not file.is_file() or sha256_file(file) != values["sha256"]:
            log.warning("%s is missing or damaged; reading the text again", file)
            return store()
        return file.read_bytes().decode()

    if known() is None or not file.is_file():
        store()
    values = known()
    assert values is not None
    return Text(name, split, _identity_of(values["sha256"], values["chat"]), read, values["chat"])


def _python_docs() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise SourceError(
            f"data=python_docs: {sys.executable} carries no pydoc_data.topics. Install Python's standard library "
            "in full, or use data=wikitext2 with data.path."
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


def _local_text(data: DataConfig, cache: Path, split: str | None) -> Text:
    path = Path(str(data.path)).expanduser()
    if not path.exists():
        raise SourceError(
            f"data.path={path}: no such folder. Give one with train, valid or test files (.txt, .jsonl, .csv, "
            ".parquet; .gz and the like of these), or a saved datasets folder."
        )
    splits = _local_splits(path, data.subset)
    if not splits:
        raise SourceError(
            f"data.path={path}: no text there; found {listing(path)}. Expected files named after their split, such as "
            "train.txt, valid.jsonl.gz or test.parquet, or a folder saved by datasets."
        )
    chosen = _choose_split(splits, split or data.split, exact=split is not None, path=path)
    kind, files = splits[chosen]
    name = f"{data.name} ({path.resolve().name}, local)"
    if kind == "text":
        return _in_memory(name, chosen, read_files(kind, files, data))
    # Parsing a table imports pyarrow or datasets, so its text is cached. Hashes detect changed files.
    listed = [file for entry in files for file in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])]
    hashes = file_hashes((file for file in listed if file.is_file()), cache)
    identity = {"files": [[f.name, digest] for f, digest in hashes.items()], "kind": kind, "column": data.text_column}
    return _memoised(name, chosen, identity, cache, lambda: read_files(kind, files, data))


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
    _say_once(f"data.split={wanted}: {path} has only {', '.join(splits)}; taking {chosen}")
    return chosen


@lru_cache
def _say_once(message: str) -> None:
    log.warning(message)


def _local_splits(path: Path, subset: str | None) -> dict[str, tuple[str, list[Path]]]:
    """split → (kind, files). A file belongs to the split whose name or alias is a word of the file's name."""
    if path.is_file():
        return {_split_of(path) or path.name.partition(".")[0]: (kind_of(path) or "text", [path])}
    if (path / "dataset_dict.json").is_file():
        return {name: ("datasets", [path / name]) for name in _saved_splits(path / "dataset_dict.json")}
    if (path / "state.json").is_file():
        return {"train": ("datasets", [path])}
    for folder in (path / subset if subset else path, path, path / "data"):
        files = [file for file in sorted(folder.iterdir()) if file.is_file()] if folder.is_dir() else []
        found: dict[str, tuple[str, list[Path]]] = {}
        for kind in (*KINDS, "compressed text"):
            for name in SPLIT_ALIASES:
                members = [file for file in files if kind_of(file) == kind and _split_of(file) == name]
                if members:
                    found.setdefault(name, (kind, members))
        if found:
            return {name: found[name] for name in SPLIT_ALIASES if name in found}
    return {}


def _saved_splits(file: Path) -> list[str]:
    try:
        return [str(name) for name in parse_json(file.read_bytes())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{file} is damaged ({one_line(error)}). Save the dataset again.") from None


def _split_of(file: Path) -> str | None:
    words = re.split(r"[._-]", file.name.lower())
    return next((name for name, aliases in SPLIT_ALIASES.items() if any(alias in words for alias in aliases)), None)
