"""Rows → tables, one table per subject, so that no table mixes models. Errors are percent here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from experiments.record import RunRecord
from experiments.reporting.labels import BACKENDS, FORMATS, METHODS, NONE, as_factor, as_number, as_percent
from experiments.reporting.published import Published
from experiments.reporting.rows import Row, Subject, commit_label, make_rows, method_label, record_order
from experiments.reporting.table import Table


def make_tables(records: Iterable[RunRecord], published: Sequence[Published] = ()) -> list[Table]:
    """One table per subject, with published results beside the rows that they describe."""
    by_subject: dict[Subject, list[Row]] = {}
    for row in make_rows(records):
        by_subject.setdefault(row.subject, []).append(row)
    return [
        _subject_table(subject, rows, {(p.format, p.method): p for p in published if p.describes(subject)})
        for subject, rows in by_subject.items()
    ]


def summary_table(runs: pd.DataFrame) -> Table:
    """Format, method and the three errors of one subject's runs with the smallest block size.

    Columns of `runs`: format, block_size, method, the errors, model, layer_index, layer_module.
    """
    rows = runs[runs["block_size"] == runs["block_size"].min()]
    first = rows.iloc[0]
    columns = {
        "Format": [FORMATS.get(name, name) for name in rows["format"]],
        "Method": [METHODS.get(name, name) for name in rows["method"]],
        "Weight error": [as_percent(value) for value in rows["weight_error"]],
        "Output error": [as_percent(value) for value in rows["output_error"]],
        "Output error, held out": [as_percent(value) for value in rows["output_error_heldout"]],
    }
    layer = f"layer {first['layer_index']} {first['layer_module']}"
    return Table(f"{first['model']}, {layer}, block size {first['block_size']}", (), pd.DataFrame(columns))


def unfinished(records: Sequence[RunRecord]) -> list[str]:
    """A line for each reason why runs have no result, with the names of these runs."""
    finished = {(record.run_id, record.device_name) for record in records if record.status == "ok"}
    by_reason: dict[tuple[str, str], list[str]] = {}
    for record in sorted(records, key=record_order):
        if record.status == "ok" or (record.run_id, record.device_name) in finished:
            continue
        label = (
            f"{FORMATS.get(record.format, record.format)} {method_label(record)} "
            f"b{record.block_size} {BACKENDS.get(record.backend, record.backend)} on {record.model}"
        )
        labels = by_reason.setdefault((record.status, record.reason or "no reason recorded"), [])
        if label not in labels:
            labels.append(label)
    return [f"{status}: {', '.join(labels)}: {reason}" for (status, reason), labels in by_reason.items()]


def _subject_table(subject: Subject, rows: Sequence[Row], published: dict[tuple[str, str], Published]) -> Table:
    columns: dict[str, list[str]] = {
        "Format": [format_in(row, rows) for row in rows],
        "Method": [method_in(row, rows) for row in rows],
        "Weight error": [as_percent(row.weight_error) for row in rows],
        "Output error": [as_percent(row.output_error) for row in rows],
        "Output error, held out": [as_percent(row.output_error_heldout) for row in rows],
        "Triton speed-up": [as_factor(row.speedup) for row in rows],
        **_search_columns(rows),
    }
    if published:

        def beside(show: Callable[[Published], str]) -> list[str]:
            found = [published.get((row.format, row.method)) if row.hessian[0] is None else None for row in rows]
            return [NONE if p is None else show(p) for p in found]

        columns["Published weight error"] = beside(lambda p: as_percent(p.weight_error))
        columns["Published output error"] = beside(lambda p: as_percent(p.output_error))
        columns["Published speed-up"] = beside(lambda p: as_factor(p.speedup))
    layer = f"layer {subject.layer_index} {subject.layer_module}" if subject.layer_index is not None else "one layer"
    return Table(
        title=f"{subject.model}, {layer} ({subject.out_features} × {subject.in_features}), "
        f"block size {subject.block_size}",
        notes=tuple(_notes(subject, rows, published)),
        frame=pd.DataFrame(columns),
    )


def _search_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """For runs with record.blocks=true: how far scales moved, and how many were evaluated."""
    runs = [row.runs[0] for row in rows]
    if all(run.scale_shifts is None for run in runs):
        return {}
    return {
        "Scales moved": [as_percent(run.scales_moved) for run in runs],
        "Shift from naive": [_range(run.scale_shifts) for run in runs],
        "Candidates, mean": [NONE if run.candidates_mean is None else f"{run.candidates_mean:.1f}" for run in runs],
        "Candidates, most": [as_number(run.candidates_max) for run in runs],
    }


def _range(counts: dict[str, int] | None) -> str:
    """The least and the largest number of a histogram, such as ``−3 to +12``."""
    if not counts:
        return NONE
    found = [int(number) for number in counts]
    return " to ".join(f"{number:+d}".replace("-", "−") if number else "0" for number in (min(found), max(found)))


def source_notes(subject: Subject, rows: Sequence[Row]) -> list[str]:
    """Model, text, device and commits, and the formats' settings."""
    runs = [run for row in rows for run in row.runs]
    notes = list(dict.fromkeys(run.model_origin for run in runs if run.model_origin))
    split = f", split {subject.data_split}" if subject.data_split else ""
    tokens = f"{subject.tokens_calibration or 0:,} calibration tokens"
    held_out = f"{subject.tokens_heldout:,} held out" if subject.tokens_heldout else "none held out"
    sequences = f"{subject.sequences} sequences of up to {subject.seq_len} tokens: " if subject.sequences else ""
    notes.append(f"Data: {subject.data}{split}; {sequences}{tokens}, {held_out}; seed {subject.seed}")
    if any(run.substituted for run in runs):
        notes.append("An offline twin replaced the configured model or text.")
    commits = dict.fromkeys(commit_label(run) for run in runs)
    notes.append(f"Device: {subject.device_name}; commit {', '.join(commits)}")
    settings = dict.fromkeys(
        f"{FORMATS.get(row.format, row.format)} global scale {row.global_scale}"
        + (f", naive scale rule {row.scale_rule}" if row.scale_rule else "")
        for row in rows
    )
    notes.append("; ".join(settings))
    return notes


def _notes(subject: Subject, rows: Sequence[Row], published: dict[tuple[str, str], Published]) -> list[str]:
    notes = source_notes(subject, rows)
    if all(row.speedup is None for row in rows):
        notes.append("No speed-up: this device did not time both Triton and the reference.")
    notes += [f"Published figures: {source}" for source in dict.fromkeys(p.source for p in published.values())]
    disagree = [f"{format_in(row, rows)} {method_label(row.runs[0])}" for row in rows if not row.backends_agree]
    if disagree:
        notes.append(f"The backends disagree on {', '.join(disagree)}; the reference's errors are shown.")
    return notes


def method_in(row: Row, rows: Sequence[Row]) -> str:
    """The method's name, with those of its settings that differ within the table."""
    label = method_label(row.runs[0])
    others = [dict(other.settings) for other in rows if other.method == row.method]
    for name, value in row.settings:
        if len({other.get(name) for other in others}) > 1:
            label += f", {name} {value}"
    return label


def format_in(row: Row, rows: Sequence[Row]) -> str:
    """The format's name, with its settings if the table has it with several settings."""
    label = FORMATS.get(row.format, row.format)
    others = [other for other in rows if other.format == row.format]
    settings = []
    if len({other.global_scale for other in others}) > 1:
        settings.append(f"global scale {row.global_scale}")
    if len({other.scale_rule for other in others}) > 1:
        settings.append(str(row.scale_rule))
    return f"{label} ({', '.join(settings)})" if settings else label
