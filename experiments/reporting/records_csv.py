"""Records → CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

from experiments.record import FIELDS, SPARSE_FIELDS, RunRecord


def records_csv(records: Iterable[RunRecord]) -> str:
    """Every field of every record. SPARSE_FIELDS are included if a record has them."""
    lines = [record.to_dict() for record in records]
    columns = [name for name in FIELDS if name not in SPARSE_FIELDS or any(name in line for line in lines)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        writer.writerow([_cell(line.get(name)) for name in columns])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, bool):
        return str(value).lower()
    return value
