"""Records → rows, the lines of the main tables.

A row is one format and method on one subject: the same weight, tokens, block size and device. Its errors are the
reference's, or Triton's if the reference did not run. Its speed-up is the reference's median time over Triton's, if the
same timer timed both on the same device. Errors are fractions. Needs pandas, not torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pandas as pd

from experiments.record import FIELDS, SPARSE_FIELDS, RunRecord
from experiments.reporting.labels import BACKENDS, FORMATS, METHODS, rank

# Relative; the two backends' errors may differ by rounding, but not in a table's digits.
BACKEND_TOLERANCE = 1e-3

Hessian = tuple[str | None, int | None, int | None, str | None]
Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Subject:
    """The common properties of a table's rows. The order of the fields is the order of the tables."""

    model: str | None
    model_revision: str | None
    data: str | None
    data_hash: str | None
    data_split: str | None
    layer_index: int | None
    layer_module: str | None
    out_features: int | None
    in_features: int | None
    weight_dtype: str | None
    seq_len: int | None
    sequences: int | None
    tokens_calibration: int | None
    tokens_heldout: int | None
    seed: int | None
    device_name: str | None
    block_size: int

    @classmethod
    def of(cls, record: RunRecord) -> Subject:
        return cls(**{f.name: getattr(record, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class Row:
    subject: Subject
    format: str
    global_scale: str | float | None
    scale_rule: str | None
    method: str
    settings: Settings  # of the method, as (name, value)
    hessian: Hessian  # weighting, groups, samples, matmul; None if all tokens have the same weight
    runs: tuple[RunRecord, ...]  # the newest of each backend, the reference first

    @property
    def weight_error(self) -> float | None:
        return self.runs[0].weight_error

    @property
    def output_error(self) -> float | None:
        return self.runs[0].output_error

    @property
    def output_error_heldout(self) -> float | None:
        return self.runs[0].output_error_heldout

    @property
    def speedup(self) -> float | None:
        by_backend = {run.backend: run for run in self.runs}
        reference, triton = by_backend.get("reference"), by_backend.get("triton")
        if reference is None or triton is None or reference.time_ms_median is None or not triton.time_ms_median:
            return None
        if (reference.time_timer, reference.time_device) != (triton.time_timer, triton.time_device):
            return None
        return reference.time_ms_median / triton.time_ms_median

    @property
    def backends_agree(self) -> bool:
        for name in ("weight_error", "output_error", "output_error_heldout"):
            values = [value for run in self.runs if (value := getattr(run, name)) is not None]
            if values and max(values) - min(values) > BACKEND_TOLERANCE * max(values):
                return False
        return True


def make_rows(records: Iterable[RunRecord]) -> list[Row]:
    """The rows of the runs that ended well, in the order of the tables. A row has the newest run of each backend.

    A run that was not timed (timing=none) gets the time of an earlier run of the same code with the same errors.
    """
    newest: dict[tuple[Subject, str, str | float | None, str | None, str, Settings, Hessian], dict[str, RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started_at or ""):
        if record.status != "ok":
            continue
        setting = (record.format, record.global_scale, record.scale_rule, record.method)
        key = (Subject.of(record), *setting, _settings(record), _hessian(record))
        runs = newest.setdefault(key, {})
        runs[record.backend] = _timed_as(record, runs.get(record.backend))
    rows = [
        Row(*key, tuple(sorted(runs.values(), key=lambda run: rank(BACKENDS, run.backend))))
        for key, runs in newest.items()
    ]
    return sorted(rows, key=_row_order)


def _hessian(record: RunRecord) -> Hessian:
    return record.hessian_weighting, record.hessian_groups, record.hessian_samples, record.hessian_matmul


def _settings(record: RunRecord) -> Settings:
    return tuple((record.method_settings or {}).items())


def method_label(record: RunRecord) -> str:
    """The method's name, with the weighting of tokens in its Hessians if there is one."""
    label = METHODS.get(record.method, record.method)
    if record.hessian_weighting is not None:
        label += f", {record.hessian_weighting}-weighted"
    if record.hessian_matmul is not None:
        label += f" in {record.hessian_matmul.upper()}"
    if (record.hessian_groups or 1) > 1:
        label += f", {record.hessian_groups} row groups"
    if (record.hessian_samples or 1) > 1:
        label += f", {record.hessian_samples} labels per token"
    return label


def _timed_as(record: RunRecord, before: RunRecord | None) -> RunRecord:
    if before is None or record.time_timer is not None:
        return record
    same = ("commit", "dirty", "versions", "weight_error", "output_error", "output_error_heldout")
    if any(getattr(record, name) != getattr(before, name) for name in same):
        return record
    return replace(record, **{name: getattr(before, name) for name in FIELDS if name.startswith("time_")})


def row_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per row, with numeric columns, for CSV files, notebooks and figures."""
    settings = ("format", "global_scale", "scale_rule", "method")
    results = ("weight_error", "output_error", "output_error_heldout", "speedup")
    names = [*(f.name for f in fields(Subject)), "model_origin", "substituted", *settings, "backends", *results]
    rows = list(rows)
    sparse = [name for name in SPARSE_FIELDS if any(getattr(row.runs[0], name) is not None for row in rows)]
    names += sparse
    lines = [
        asdict(row.subject)
        | {name: getattr(row.runs[0], name) for name in ("model_origin", "substituted", *sparse)}
        | {name: getattr(row, name) for name in (*settings, *results)}
        | {"backends": "+".join(run.backend for run in row.runs)}
        for row in rows
    ]
    return pd.DataFrame(lines, columns=names).convert_dtypes()


def record_order(record: RunRecord) -> tuple[Any, ...]:
    """Sort key of records by subject and settings; committed records are in this order, too."""
    return (
        *_sortable(asdict(Subject.of(record)).values()),
        rank(FORMATS, record.format),
        *_sortable((record.global_scale, record.scale_rule)),
        rank(METHODS, record.method),
        _sortable(value for _, value in _settings(record)),
        *_sortable(_hessian(record)),
        rank(BACKENDS, record.backend),
        record.run_id,
    )


def _row_order(row: Row) -> tuple[Any, ...]:
    return record_order(row.runs[0])


def commit_label(record: RunRecord) -> str:
    return (record.commit or "unknown")[:10] + (" with uncommitted changes" if record.dirty else "")


def _sortable(values: Iterable[Any]) -> list[tuple[str, Any]]:
    """Sort keys for None, numbers and text together, which Python does not compare with each other."""
    return [
        ("", 0) if value is None else ("number", value) if isinstance(value, int | float) else ("text", str(value))
        for value in values
    ]
