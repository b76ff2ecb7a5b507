"""Cached hashes of source files: a checkpoint of many GB is read once, and then only changed files are read.

A file counts as unchanged if its path, size, inode, `st_mtime_ns` and `st_ctime_ns` are the same. A program may set
back st_mtime, but not st_ctime. The hash of a file that changed within the last seconds is not cached, because a second
change could fall into the same tick of the file system's clock. Imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.files import SourceError, one_line, read_sealed, write_sealed

SETTLED_NS = 2_000_000_000  # a hash is cached if the last change is at least this old
BAR_BYTES = 1 << 30  # a progress bar is shown for at least this much to read
CHUNK = 1 << 22
THREADS = min(8, os.cpu_count() or 1)

_known: dict[str, Any] = {}  # path → stamp and hash, within this process


def file_hashes(paths: Iterable[Path], cache: Path | None = None) -> dict[Path, str]:
    """path → sha256 of the file's bytes. cache: the folder that keeps hashes between processes.

    Raises SourceError for a file that cannot be read.
    """
    found: dict[Path, str] = {}
    unread: list[Path] = []
    try:
        for path in paths:
            entry = _recall(path, cache)
            if entry is None:
                unread.append(path)
            else:
                found[path] = entry
        found |= _read_all(unread, cache)
    except OSError as error:
        why = error.strerror or one_line(error)
        raise SourceError(f"{error.filename or 'a file'} cannot be read ({why}).") from None
    return found


def _stamp(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _note(path: Path, cache: Path) -> Path:
    return cache / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"


def _recall(path: Path, cache: Path | None) -> str | None:
    entry = _known.get(str(path.resolve()))
    if entry is None and cache is not None:
        try:
            entry = read_sealed(_note(path, cache))
        except (OSError, ValueError):
            return None
    if not isinstance(entry, dict) or entry.get("stamp") != _stamp(path) or not isinstance(entry.get("sha256"), str):
        return None
    return str(entry["sha256"])


def _remember(path: Path, cache: Path | None, stamp: list[int], sha256: str) -> None:
    if stamp != _stamp(path) or time.time_ns() - max(stamp[2:]) < SETTLED_NS:
        return
    entry = {"path": str(path.resolve()), "stamp": stamp, "sha256": sha256}
    _known[str(path.resolve())] = entry
    if cache is not None:
        try:
            write_sealed(_note(path, cache), entry)
        except OSError:  # the hash is valid even if it is not cached
            return


def _read_all(paths: list[Path], cache: Path | None) -> dict[Path, str]:
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in paths)
    found = {}
    with tqdm(total=total, desc="hash", unit="B", unit_scale=True, disable=True if total < BAR_BYTES else None) as bar:

        def read(path: Path) -> tuple[list[int], str]:
            stamp, digest = _stamp(path), hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
            return stamp, digest.hexdigest()

        with ThreadPoolExecutor(THREADS) as pool:  # hashlib and reading release Python's GIL
            for path, (stamp, digest) in zip(paths, pool.map(read, paths), strict=True):
                found[path] = digest
                _remember(path, cache, stamp, digest)
    return found
