"""Sizes of the tests of faults, load and bad input: small in CI, whole with QUANTKIT_FULL=1.

    QUANTKIT_FULL=1 python -m pytest -n 0 tests/experiments/faults/test_killed.py

At full size each test writes its counts into results/reliability.json, from which docs/reliability.md follows.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock

from experiments import provenance
from experiments.config import REPO_ROOT
from experiments.files import write_atomically

FULL = os.environ.get("QUANTKIT_FULL") == "1"
RECORD = REPO_ROOT / "results" / "reliability.json"

T = TypeVar("T")


def size(reduced: T, full: T) -> T:
    """The test's size in CI, or at full size."""
    return full if FULL else reduced


def note(test: str, record: Path | None = None, device: str = "cpu", **counts: Any) -> None:
    """Keep what a test at full size has found, with the machine, the versions and the day."""
    if not FULL and record is None:
        return
    path = record or RECORD
    with FileLock(path.with_name(f".{path.name}.lock")):
        found = json.loads(path.read_text()) if path.exists() else {}
        found[test] = {
            **counts,
            "commit": provenance.git_state()[0],
            "device": provenance.device_name(device),
            "torch": torch.__version__,
            "day": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        write_atomically(path, json.dumps(dict(sorted(found.items())), indent=1) + "\n")
