"""Rows → tables of held-out errors alone, with one column for each layer, or for each method. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from experiments.record import RunRecord
from experiments.reporting.labels import GRIDS, METHODS, NONE, as_percent
from experiments.reporting.rows import Row, Subject, make_rows
from experiments.reporting.table import Table
from experiments.reporting.tables import format_in, method_in, source_notes

__all__ = ["by_layer", "by_method"]


def by_layer(records: Iterable[RunRecord]) -> list[Table]:
    """A line for each setting with its errors in all layers, and the mean of their ratios to the least one of a layer.

    Settings are format, global scale, method and the method's settings. One table per subject, layers aside.
    """
    subjects: dict[Subject, list[Row]] = {}
    for row in make_rows(records):
        subjects.setdefault(replace(row.subject, layer_index=None), []).append(row)
    return [_by_layer(subject, rows) for subject, rows in subjects.items()]


def _by_layer(subject: Subject, rows: Sequence[Row]) -> Table:
    errors: dict[tuple[Any, ...], dict[int | None, float | None]] = {}
    for row in rows:
        setting = (format_in(row, rows), method_in(row, rows))
        errors.setdefault(setting, {})[row.subject.layer_index] = row.output_error_heldout
    layers = sorted({row.subject.layer_index for row in rows}, key=lambda layer: -1 if layer is None else layer)
    least = {layer: min([e for found in errors.values() if (e := found.get(layer))], default=None) for layer in layers}
    columns = {
        "Format": [setting[0] for setting in errors],
        "Method": [setting[1] for setting in errors],
        **{f"Layer {layer}": [as_percent(found.get(layer)) for found in errors.values()] for layer in layers},
        "Over the least": [_mean_ratio(found, least) for found in errors.values()],
    }
    return Table(_title(subject), tuple(source_notes(subject, rows)), pd.DataFrame(columns))


def _mean_ratio(found: dict[int | None, float | None], least: dict[int | None, float | None]) -> str:
    """The mean of error / least error over the layers; nothing where a layer is missing."""
    ratios = [error / best for layer, best in least.items() if best and (error := found.get(layer))]
    return f"{sum(ratios) / len(ratios):.3f}" if ratios and len(ratios) == len(least) else NONE


def by_method(records: Iterable[RunRecord]) -> list[Table]:
    """A line for each format, with its elements and scales, and the errors of all methods. One table per subject."""
    subjects: dict[Subject, list[Row]] = {}
    for row in make_rows(records):
        subjects.setdefault(row.subject, []).append(row)
    return [_by_method(subject, rows) for subject, rows in subjects.items()]


def _by_method(subject: Subject, rows: Sequence[Row]) -> Table:
    methods = [name for name in METHODS if any(row.method == name for row in rows)]
    errors: dict[str, dict[str, float | None]] = {}
    for row in rows:
        errors.setdefault(row.format, {})[row.method] = row.output_error_heldout
    formats = [name for name in GRIDS if name in errors] + [name for name in errors if name not in GRIDS]
    labels = {row.format: format_in(row, rows) for row in rows}
    grids = [GRIDS.get(name, (NONE, NONE)) for name in formats]
    columns = {
        "Elements": [elements for elements, _ in grids],
        "Scales": [scales for _, scales in grids],
        "Format": [labels[name] for name in formats],
        **{METHODS[method]: [as_percent(errors[name].get(method)) for name in formats] for method in methods},
    }
    title = f"{_title(subject)}, layer {subject.layer_index}"
    return Table(title, tuple(source_notes(subject, rows)), pd.DataFrame(columns))


def _title(subject: Subject) -> str:
    layer = f"{subject.layer_module} ({subject.out_features} × {subject.in_features})"
    return f"{subject.model}, {layer}, block size {subject.block_size}: output error on held-out tokens"
