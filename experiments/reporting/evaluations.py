"""Evaluations of whole models → rows and tables, one table per subject, so that none mixes models, texts or protocols.

A row is one method in one format; several calibration seeds of it are one row, with the mean and its spread. Rows are
in the order of falling KL within a format. Needs pandas, not torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import pandas as pd

from experiments.evaluation_record import PEER_LABELS, EvaluationRecord
from experiments.reporting.labels import FORMATS, METHODS, NONE, rank
from experiments.reporting.table import Table

NAME = "model"  # of the records' file
POSITION_ROWS = 5  # a figure shows no more
PLAIN = ("naive", "sse")  # methods that no calibration changes
USUAL = {"alpha": 0.5, "residual_alpha": 0.5, "rows": 32, "output_damping": 0.3}  # settings that a label leaves out


@dataclass(frozen=True)
class Evaluated:
    """What the rows of a table have in common, in the order of the tables."""

    reference: str | None
    reference_revision: str | None
    data: str | None
    data_hash: str | None
    data_split: str | None
    protocol: str | None
    seq_len: int | None
    sequences: int | None
    dtype: str | None
    seed: int | None

    @classmethod
    def of(cls, record: EvaluationRecord) -> Evaluated:
        return cls(**{f.name: getattr(record, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class Row:
    """label: method and calibration, or the name of another tool's model. runs: one for each calibration seed."""

    format: str | None
    block_size: int | None
    label: str
    runs: tuple[EvaluationRecord, ...]

    def mean(self, name: str) -> float | None:
        """Of a field, over the runs that have it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return fmean(values) if values else None

    @property
    def kl(self) -> float:
        return float(self.mean("kl_mean") or 0.0)


def make_rows(records: Iterable[EvaluationRecord]) -> dict[Evaluated, list[Row]]:
    """Subject → its rows. Of two evaluations of the same model, the newer one counts."""
    newest: dict[Evaluated, dict[tuple[str | None, int | None, str], dict[str, EvaluationRecord]]] = {}
    for record in sorted(records, key=lambda record: record.started_at or ""):
        if record.status == "ok" and record.kl_mean is not None:
            key = (record.format, record.block_size, label_of(record))
            newest.setdefault(Evaluated.of(record), {}).setdefault(key, {})[record.model] = record
    subjects = sorted(newest, key=lambda subject: tuple(map(str, vars(subject).values())))
    return {
        subject: sorted(
            (row for key, runs in newest[subject].items() for row in _rows(*key, list(runs.values()))),
            key=lambda row: (rank(FORMATS, row.format or ""), row.block_size or 0, -row.kl, row.label),
        )
        for subject in subjects
    }


def _rows(fmt: str | None, size: int | None, label: str, runs: list[EvaluationRecord]) -> list[Row]:
    """One row of several calibration seeds; else one for each run, named by its hash if there are several."""
    seeds = [(run.settings or {}).get("seed") for run in runs]
    if len(set(seeds)) == len(seeds):
        return [Row(fmt, size, label, tuple(runs))]
    return [Row(fmt, size, f"{label} ({run.model.rpartition('-')[2]})", (run,)) for run in runs]


def label_of(record: EvaluationRecord) -> str:
    """Method, Hessian and calibration in words; another tool's model has its own name."""
    if record.label is not None or record.method is None:
        return record.label or record.model
    parts, told = [METHODS.get(record.method, record.method)], record.settings or {}
    if record.method in PLAIN:
        return parts[0]
    if told.get("hessian_weighting") == "loss":
        matmul = told.get("hessian_matmul")
        weighting = "two-sided" if told.get("hessian_outputs") else "loss-weighted"
        parts.append(f"{weighting} in {matmul.upper()}" if matmul else weighting)
    if told.get("hessian_outputs"):
        parts += _unusual(told, {"rows": "panels of {:g} rows", "output_damping": "output damping {:g}"})
    if (told.get("hessian_groups") or 1) > 1:
        parts.append(f"{told['hessian_groups']} row groups")
    if told.get("calibrate") == "sequential":
        parts += _unusual(told, {"alpha": "α {:g}", "residual_alpha": "residual α {:g}"})
        if told.get("calibrate_damping") is not None:
            parts.append(f"targets' damping {told['calibrate_damping']:g}")
    else:
        parts.append("parallel")
    if told.get("weight_exponent") not in (None, 1.0):
        parts.append(f"weights^{told['weight_exponent']:g}")
    parts += [f"global scale {told['global_scale']}"] if told.get("global_scale") not in (None, "amax", "none") else []
    parts += ["from another model's codes"] if told.get("init") else []
    sweeps = (told.get("method_settings") or {}).get("sweeps")
    parts += [f"{sweeps} sweeps"] if sweeps else []
    size = told.get("sequences"), told.get("seq_len")
    parts += [f"{size[0]} × {size[1]} tokens"] if all(size) else []
    return ", ".join(parts)


def _unusual(told: Mapping[str, Any], words: Mapping[str, str]) -> list[str]:
    """Name → words with its value, for the settings that are not the usual ones."""
    return [text.format(told[name]) for name, text in words.items() if told[name] != USUAL[name]]


def evaluation_tables(records: Iterable[EvaluationRecord]) -> list[Table]:
    return [_table(subject, rows) for subject, rows in make_rows(records).items()]


def evaluation_summary(records: Iterable[EvaluationRecord]) -> Table | None:
    """The subject with the most rows, in five columns: the best row of each method, and of each other tool that has
    several; None without records."""
    found = make_rows(records)
    if not found:
        return None
    subject, rows = max(found.items(), key=lambda item: len(item[1]))
    best = {(row.format, row.block_size, row.runs[0].method or _package(row)): row for row in rows}  # in falling KL
    rows = [row for row in rows if row in best.values()]
    columns = {
        "Format": [_format(row) for row in rows],
        "Method": [row.label for row in rows],
        "KL, nats a token": [_kl(row) for row in rows],
        "Perplexity": [_number(row.mean("ppl"), 2) for row in rows],
        "Same top token": [_percent(row.mean("same_top")) for row in rows],
    }
    title = f"{subject.reference}, all linear layers: KL to the model itself (perplexity {_base(rows)})"
    return Table(title, tuple(_notes(subject, rows)[:2]), pd.DataFrame(columns))


def peer_table(records: Iterable[EvaluationRecord]) -> Table | None:
    """Other tools' models beside quantkit's of the same format, in falling KL; None without a model of peers.py.

    Of the subject that has the most of them. A note names the tools that have no row.
    """
    found = {
        subject: tools
        for subject, rows in make_rows(records).items()
        if (tools := [row for row in rows if tool_of(row) is not None])
    }
    if not found:
        return None
    subject, tools = max(found.items(), key=lambda item: len(item[1]))
    formats = {(row.format, row.block_size) for row in tools}
    rows = [row for row in make_rows(records)[subject] if (row.format, row.block_size) in formats]
    columns = {
        "Method": [f"quantkit: {row.label}" if row.runs[0].method else row.label for row in rows],
        "Calibration": [_calibration(row) for row in rows],
        "KL, nats a token": [_kl(row) for row in rows],
        "Same top token": [_percent(row.mean("same_top")) for row in rows],
        "Perplexity ratio": [_ratio(row) for row in rows],
        "Time, s": [_number(row.mean("quantize_s"), 0) for row in rows],
        "On": [row.runs[0].quantize_device or NONE for row in rows],
    }
    run = set(map(tool_of, tools))
    absent = [label for tool, label in PEER_LABELS.items() if tool not in run]
    notes = [
        *_notes(subject, rows),
        "Time of other tools is from the loaded model to the written checkpoint, with calibration",
    ]
    notes += [f"Not run: {'; '.join(absent)}"] if absent else []
    kinds = ", ".join(dict.fromkeys(_format(row) for row in tools))
    return Table(f"{subject.reference}, {kinds}, other tools beside quantkit", tuple(notes), pd.DataFrame(columns))


def _package(row: Row) -> str:
    tool = tool_of(row)
    return row.label if tool is None else PEER_LABELS[tool].partition(",")[0]


def tool_of(row: Row) -> str | None:
    """The name in peers.py of the tool that made a row's model; None for others."""
    return (row.runs[0].settings or {}).get("tool")


def _calibration(row: Row) -> str:
    """Its tokens; none for methods that see only weights."""
    told = row.runs[0].settings or {}
    if row.runs[0].method in PLAIN or not told.get("sequences"):
        return NONE
    return f"{told['sequences']} × {told['seq_len']}"


def _table(subject: Evaluated, rows: Sequence[Row]) -> Table:
    columns = {
        "Format": [_format(row) for row in rows],
        "Method": [row.label for row in rows],
        "Bits": [_number(row.mean("bits_per_weight"), 2) for row in rows],
        "KL, mean": [_kl(row) for row in rows],
        "Median": [_number(row.mean("kl_median"), 4) for row in rows],
        "99 %": [_number(row.mean("kl_p99"), 3) for row in rows],
        "99.9 %": [_number(row.mean("kl_p999"), 2) for row in rows],
        "Largest": [_number(row.mean("kl_max"), 1) for row in rows],
        "Same top token": [_percent(row.mean("same_top")) for row in rows],
        "Perplexity": [_number(row.mean("ppl"), 2) for row in rows],
        "Ratio": [_ratio(row) for row in rows],
        "Time, s": [_number(row.mean("quantize_s"), 0) for row in rows],
    }
    if any(run.paired_with for row in rows for run in row.runs):
        columns["Less the paired run's KL"] = [_paired(row) for row in rows]
    columns = {name: cells for name, cells in columns.items() if any(cell != NONE for cell in cells)}
    protocol = "" if subject.protocol == "all" else ", second half of each sequence (llama.cpp)"
    return Table(
        f"{subject.reference} on {subject.data}{protocol}", tuple(_notes(subject, rows)), pd.DataFrame(columns)
    )


def _notes(subject: Evaluated, rows: Sequence[Row]) -> list[str]:
    runs = [run for row in rows for run in row.runs]
    notes = list(dict.fromkeys(run.reference_origin for run in runs if run.reference_origin))
    tokens = ", ".join(dict.fromkeys(f"{run.tokens:,}" for run in runs if run.tokens))
    notes.append(
        f"KL(reference‖quantized) in nats a token, with its 95 % bootstrap interval over sequences; {subject.data}, "
        f"split {subject.data_split}, {subject.sequences} × {subject.seq_len} tokens, {tokens} scored"
    )
    notes.append(f"The reference's perplexity: {_base(rows)}; both models in {subject.dtype}, TF32 off")
    if any((run.settings or {}).get("calibrate") == "sequential" and run.method not in PLAIN for run in runs):
        notes.append(
            "Unless a row says otherwise: layers in sequence with α = residual α = "
            f"{USUAL['alpha']}; two-sided in panels of {USUAL['rows']} rows with an output damping of "
            f"{USUAL['output_damping']}"
        )
    if any(run.substituted for run in runs):
        notes.append("An offline twin replaced the configured text.")
    if any(run.calibrated_on for run in runs):
        notes.append("Some models were calibrated on some of these sequences; their KL is too low.")
    devices = ", ".join(dict.fromkeys(str(run.device_name) for run in runs))
    made = ", ".join(dict.fromkeys(run.quantize_device for run in runs if run.quantize_device))
    commits = ", ".join(dict.fromkeys((run.commit or "unknown")[:10] for run in runs))
    notes.append(f"Evaluated on {devices}" + (f", quantized on {made}" if made else "") + f"; commit {commits}")
    return notes


def _base(rows: Sequence[Row]) -> str:
    return _number(rows[0].mean("reference_ppl"), 2)


def _format(row: Row) -> str:
    if row.format is None:
        return NONE
    size = "" if row.block_size is None else f" {row.block_size}"
    return f"{FORMATS.get(row.format, row.format)}{size}"


def _kl(row: Row) -> str:
    """The mean with its interval; of several seeds, with the least and the largest."""
    values = [float(run.kl_mean or 0.0) for run in row.runs]
    if len(values) > 1:
        return f"{row.kl:.4f} ({len(values)} seeds, {min(values):.4f} to {max(values):.4f})"
    run = row.runs[0]
    return f"{row.kl:.4f}" + ("" if run.kl_low is None else f" [{run.kl_low:.4f}, {run.kl_high:.4f}]")


def _ratio(row: Row) -> str:
    run = row.runs[0]
    if len(row.runs) > 1 or run.ppl_ratio_low is None:
        return _number(row.mean("ppl_ratio"), 4)
    return f"{run.ppl_ratio:.4f} [{run.ppl_ratio_low:.4f}, {run.ppl_ratio_high:.4f}]"


def _paired(row: Row) -> str:
    run = row.runs[0]
    if run.paired_mean is None or run.paired_low is None:
        return NONE
    return f"{run.paired_mean:+.4f} [{run.paired_low:+.4f}, {run.paired_high:+.4f}] to {run.paired_with}"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


# ---- the data of the figures -----------------------------------------------------------------------------------------

FACTS = ("model", "model_origin", "data", "commit")  # the figures' sources, as figures.stands_on names them
KEYS = ("format", "block_size", "method", "label")


def _subject_rows(records: Iterable[EvaluationRecord]) -> list[Row]:
    """The rows of the subject that has the most."""
    return max(make_rows(records).values(), key=len, default=[])


def _line(row: Row, run: EvaluationRecord) -> dict[str, Any]:
    return {"format": row.format, "block_size": row.block_size, "method": run.method or "other", "label": row.label} | {
        "model": run.reference,
        "model_origin": run.reference_origin,
        "data": run.data,
        "commit": run.commit,
    }


def _frame(lines: list[dict[str, Any]], values: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(lines, columns=[*KEYS, *values, *FACTS])


def kl_points(records: Iterable[EvaluationRecord], value: str) -> pd.DataFrame:
    """A line for each row that has `value`: kl_mean with its interval; over several seeds, their least and largest."""
    lines = []
    for row in _subject_rows(records):
        first = row.runs[0]
        if row.mean(value) is None:
            continue
        kls = [run.kl_mean for run in row.runs if run.kl_mean is not None]
        low, high = (first.kl_low, first.kl_high) if len(kls) == 1 else (min(kls), max(kls))
        lines.append(_line(row, first) | {value: row.mean(value), "kl_mean": row.kl, "kl_low": low, "kl_high": high})
    return _frame(lines, (value, "kl_mean", "kl_low", "kl_high"))


def kl_positions(records: Iterable[EvaluationRecord]) -> pd.DataFrame:
    """A line for each group of positions, of the POSITION_ROWS rows of least KL: its first position and mean KL."""
    rows = sorted(_subject_rows(records), key=lambda row: row.kl)[:POSITION_ROWS]
    lines = [
        _line(row, row.runs[0])
        | {"name": ", ".join(part for part in (_format(row), row.label) if part != NONE)}
        | {"position": int(position), "kl_mean": mean}
        for row in rows
        for position, mean in row.runs[0].kl_by_position or []
    ]
    return _frame(lines, ("name", "position", "kl_mean"))


def kl_layers(records: Iterable[EvaluationRecord]) -> pd.DataFrame:
    """A line for each layer that was quantized alone, of the newest evaluation that has them."""
    found = [record for record in records if record.kl_by_layer and record.status == "ok"]
    if not found:
        return _frame([], ("layer", "layer_index", "layer_module", "kl_mean", "kl_error"))
    record = max(found, key=lambda record: record.started_at or "")
    row = Row(record.format, record.block_size, label_of(record), (record,))
    lines = []
    for entry in record.kl_by_layer or []:
        words = entry["layer"].replace(" ", ".").split(".")
        index = next(i for i, word in enumerate(words) if word.isdigit())
        lines.append(
            _line(row, record)
            | {"layer": entry["layer"], "layer_index": int(words[index]), "layer_module": ".".join(words[index + 1 :])}
            | {"kl_mean": entry["mean"], "kl_error": entry["error"]}
        )
    return _frame(lines, ("layer", "layer_index", "layer_module", "kl_mean", "kl_error"))
