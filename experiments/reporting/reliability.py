"""The table of what the tests of faults, load and bad input found at full size, from results/reliability.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.reporting import ReportError
from experiments.reporting.labels import NONE
from experiments.reporting.table import Table

RELIABILITY = Path("results/reliability.json")
HOW = "run `QUANTKIT_FULL=1 python -m pytest -n 0 tests/experiments/faults`"
ORIGIN = ("commit", "device", "torch", "day")  # of a test's counts


def reliability_table(root: Path) -> Table:
    """One line for each test that has run at full size. Raises ReportError if none has."""
    path = root / RELIABILITY
    if not path.exists():
        raise ReportError(f"there is no {RELIABILITY}; {HOW}")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    columns = {
        "Test": [name[0].upper() + name[1:] for name in found],
        "Found": [_counts(values) for values in found.values()],
        "Day": [values.get("day", NONE) for values in found.values()],
        "Commit": [str(values.get("commit", NONE))[:10] for values in found.values()],
    }
    devices = ", ".join(sorted({str(values.get("device", NONE)) for values in found.values()}))
    versions = ", ".join(sorted({str(values.get("torch", NONE)) for values in found.values()}))
    notes = (f"Device: {devices}; torch {versions}", "Counts: numbers of cases, unless the name has a unit")
    return Table("At full size", notes, pd.DataFrame(columns))


def _counts(values: dict[str, Any]) -> str:
    """Each count by its name; those of a part in brackets."""
    parts = []
    for name, value in values.items():
        if name in ORIGIN:
            continue
        words = name.replace("_", " ")
        if isinstance(value, dict):
            inner = ", ".join(f"{key} {count:,}" for key, count in value.items())
            parts.append(f"{words}: {sum(value.values()):,} ({inner})")
        else:
            parts.append(f"{words}: {value:,}")
    return "; ".join(parts)
