"""Tables of the results of `verify`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from experiments.record import RunRecord
from experiments.reporting.labels import BACKENDS, FORMATS, NONE, OPTIMAL, as_number
from experiments.reporting.rows import commit_label, method_label, record_order
from experiments.reporting.table import Table


def verification_tables(records: Iterable[RunRecord]) -> list[Table]:
    """The results of verify in runs with verify=true, one table per model and text, one line per setting."""
    verified = sorted((r for r in records if r.verified_blocks is not None), key=record_order)
    by_source: dict[tuple[str | None, str | None], dict[tuple[Any, ...], RunRecord]] = {}
    for record in verified:
        setting = (record.layer_index, record.layer_module, record.format, record.global_scale, record.block_size)
        lines = by_source.setdefault((record.model, record.data), {})
        lines[(*setting, method_label(record), record.backend)] = record
    return [
        _verification_table(f"{model}, {data}: every scale against all representable ones", list(lines.values()))
        for (model, data), lines in by_source.items()
    ]


def _verification_table(title: str, records: list[RunRecord]) -> Table:
    notes = list(dict.fromkeys(r.model_origin for r in records if r.model_origin))
    notes.append(f"Device: {', '.join(dict.fromkeys(r.device_name or NONE for r in records))}")
    notes.append(f"Commit {', '.join(dict.fromkeys(commit_label(r) for r in records))}")
    searches = [r for r in records if r.method in OPTIMAL]
    total, broken = sum(r.verified_blocks or 0 for r in searches), sum(r.verified_violations or 0 for r in searches)
    notes.append(f"In all {total:,} blocks of the searches, {broken:,} violations of the contract of docs/theory.md")
    if wrong := sum(r.verified_wrong_codes or 0 for r in records):
        notes.append(f"{wrong:,} codes are not the nearest at their scale")
    lines: dict[tuple[Any, ...], list[RunRecord]] = {}
    for r in records:
        lines.setdefault((r.format, method_label(r), r.backend, r.block_size, r.global_scale), []).append(r)
    excess = [[r.verified_worst_excess for r in line if r.verified_worst_excess is not None] for line in lines.values()]
    columns = {
        "Format": [FORMATS.get(key[0], key[0]) for key in lines],
        "Method": [key[1] for key in lines],
        "Backend": [BACKENDS.get(key[2], key[2]) for key in lines],
        "Block size": [str(key[3]) for key in lines],
        "Global scale": [str(key[4]) for key in lines],
        "Layers": [_layers(line) for line in lines.values()],
        "Blocks": [f"{sum(r.verified_blocks or 0 for r in line):,}" for line in lines.values()],
        "Violations": [f"{sum(r.verified_violations or 0 for r in line):,}" for line in lines.values()],
        "Worst excess": [as_number(max(values, default=None)) for values in excess],
    }
    return Table(title, tuple(notes), pd.DataFrame(columns))


def _layers(records: list[RunRecord]) -> str:
    """The indices of each module's layers, such as ``0, 10, 20 mlp.down_proj``."""
    modules: dict[str, list[int]] = {}
    for r in records:
        modules.setdefault(r.layer_module or NONE, []).append(r.layer_index or 0)
    return "; ".join(f"{', '.join(map(str, sorted(set(found))))} {module}" for module, found in modules.items())
