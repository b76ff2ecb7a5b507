"""Writing in the cache: one process at a time, and a full disk in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from experiments.files import writing

__all__ = ["lock", "writing"]

log = logging.getLogger(__name__)


def lock(path: Path) -> Any:
    """A context in which no other process writes the folder or file `path`; waits for one that does."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        log.warning("waiting for another process that captures %s", path.name)
        return lock.acquire()
