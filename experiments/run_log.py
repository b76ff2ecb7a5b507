"""The log file of a run, and the status of one that failed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOG_NAME = "run.log"
AGAIN_LOG_NAME = "again.log"  # of a forced run, while an earlier record is kept


def status_of(error: Exception) -> str:
    from quantkit import BackendUnavailableError

    return "unsupported" if isinstance(error, BackendUnavailableError) else "failed"


class _LogFile(logging.FileHandler):
    """Without logging's own tracebacks where the disk is full: writing the record says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """A context whose log messages go to this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)  # the file gets the traceback of a failed run, whatever hydra.job_logging says
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        with suppress(OSError):
            handler.close()
