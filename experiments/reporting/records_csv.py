"""Records → CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.evaluation_record import FIELDS as EVALUATION_FIELDS
from experiments.evaluation_record import EvaluationRecord
from experiments.record import FIELDS, SPARSE_FIELDS, RunRecord

# The figures' CSV files have them, one value per line.
LISTS = ("kl_by_position", "kl_by_layer")
EVALUATION_COLUMNS = tuple(name for name in EVALUATION_FIELDS if name not in LISTS)


def records_csv(records: Iterable[RunRecord]) -> str:
    """Every field of every record. SPARSE_FIELDS are included if a record has them."""
    lines = [record.to_dict() for record in records]
    columns = [name for name in FIELDS if name not in SPARSE_FIELDS or any(name in line for line in lines)]
    return _csv(columns, lines)


def evaluations_csv(records: Iterable[EvaluationRecord]) -> str:
    """Every field of every record but the LISTS."""
    return _csv(EVALUATION_COLUMNS, [record.to_dict() for record in records])


def _csv(columns: Sequence[str], lines: list[dict[str, Any]]) -> str:
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
