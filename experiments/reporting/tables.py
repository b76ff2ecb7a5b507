"""Records → rows → tables.

A row is one format and method on one subject: the same weight, tokens, block size and device. Its errors are those of
the reference where that ran, else of Triton; its speed-up is the reference's median time over Triton's, where both were
timed by one timer on one device. A table holds the rows of one subject, so that it never mixes models. Errors are
fractions in rows and CSV files, percent in tables. Needs pandas, not torch.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.record import FIELDS, RunRecord

NONE = "–"
FORMATS = {"nvfp4": "NVFP4", "mxfp4": "MXFP4"}  # name → label, in the order of the rows
# The default global scale and naive rule, those of the main tables; another choice is for a figure that compares it.
DEFAULTS = {"nvfp4": ("amax", "nearest"), "mxfp4": ("none", "floor")}
METHODS = {
    "naive": "Naive",
    "sse": "SSE",
    "hessian": "Hessian",
    "gptq": "GPTQ, blocks ordered, Hessian scales",  # published alone
}
OPTIMAL = ("sse", "hessian")  # methods that promise the least error; what others miss breaks no contract
BACKENDS = {"reference": "reference", "triton": "Triton"}
# The two backends' errors may differ by rounding, never visibly.
BACKEND_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Subject:
    """What the rows of a table have in common. The order of the fields is the order of the tables."""

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
class Published:
    """A figure of another project, from `results/published/`. Errors are fractions, times are milliseconds."""

    model: str
    layer_index: int
    layer_module: str
    out_features: int
    in_features: int
    data: str
    format: str
    block_size: int
    method: str
    weight_error: float
    output_error: float
    reference_ms: float | None
    triton_ms: float | None
    speedup: float | None  # as published: of unrounded times
    source: str

    def describes(self, subject: Subject) -> bool:
        """Same model, data, layer and block size, from the hub or from a local folder of that name."""
        same = ("layer_index", "layer_module", "out_features", "in_features", "block_size")
        return (
            all(getattr(self, name) == getattr(subject, name) for name in same)
            and _plain(subject.model) == _plain(self.model)
            and _plain(subject.data).startswith(_plain(self.data))
        )


@dataclass(frozen=True)
class Row:
    subject: Subject
    format: str
    global_scale: str | float | None
    scale_rule: str | None
    method: str
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


@dataclass(frozen=True)
class Table:
    title: str
    notes: tuple[str, ...]  # a line each: what every number in the table stands on
    frame: pd.DataFrame  # text, ready to print

    def markdown(self) -> str:
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"**{self.title}**\n\n{notes}\n{self._body('pipe')}\n"

    def terminal(self) -> str:
        notes = "".join(f"  {note}\n" for note in self.notes)
        return f"{self.title}\n{notes}\n{self._body('simple')}\n"

    def _body(self, style: str) -> str:
        align = ["left" if name in ("Format", "Method") else "right" for name in self.frame.columns]
        text = self.frame.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)
        return "\n".join(line.rstrip() for line in text.splitlines())


def make_rows(records: Iterable[RunRecord]) -> list[Row]:
    """The rows of the runs that ended well, in the order of the tables: of each, the newest run.

    One that was not timed (timing=none) has the time of the one before it, of the same code and with the same errors.
    """
    newest: dict[tuple[Subject, str, str | float | None, str | None, str], dict[str, RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started_at or ""):
        if record.status != "ok":
            continue
        key = (Subject.of(record), record.format, record.global_scale, record.scale_rule, record.method)
        runs = newest.setdefault(key, {})
        runs[record.backend] = _timed_as(record, runs.get(record.backend))
    rows = [
        Row(*key, tuple(sorted(runs.values(), key=lambda run: _rank(BACKENDS, run.backend))))
        for key, runs in newest.items()
    ]
    return sorted(rows, key=_row_order)


def _timed_as(record: RunRecord, before: RunRecord | None) -> RunRecord:
    if before is None or record.time_timer is not None:
        return record
    same = ("commit", "dirty", "versions", "weight_error", "output_error", "output_error_heldout")
    if any(getattr(record, name) != getattr(before, name) for name in same):
        return record
    return replace(record, **{name: getattr(before, name) for name in FIELDS if name.startswith("time_")})


def row_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line a row, numbers as numbers: for CSV files, notebooks and figures."""
    settings = ("format", "global_scale", "scale_rule", "method")
    results = ("weight_error", "output_error", "output_error_heldout", "speedup")
    names = [*(f.name for f in fields(Subject)), "model_origin", "substituted", *settings, "backends", *results]
    lines = [
        asdict(row.subject)
        | {name: getattr(row.runs[0], name) for name in ("model_origin", "substituted")}
        | {name: getattr(row, name) for name in (*settings, *results)}
        | {"backends": "+".join(run.backend for run in row.runs)}
        for row in rows
    ]
    return pd.DataFrame(lines, columns=names).convert_dtypes()


def make_tables(records: Iterable[RunRecord], published: Sequence[Published] = ()) -> list[Table]:
    """One table a subject; published figures stand beside the rows that they describe."""
    by_subject: dict[Subject, list[Row]] = {}
    for row in make_rows(records):
        by_subject.setdefault(row.subject, []).append(row)
    return [
        _subject_table(subject, rows, {(p.format, p.method): p for p in published if p.describes(subject)})
        for subject, rows in by_subject.items()
    ]


def verification_tables(records: Iterable[RunRecord]) -> list[Table]:
    """What verify found in the runs that asked for it, one table a model and text, one line a setting."""
    verified = sorted((r for r in records if r.verified_blocks is not None), key=record_order)
    by_source: dict[tuple[str | None, str | None], dict[tuple[Any, ...], RunRecord]] = {}
    for record in verified:
        setting = (record.layer_index, record.layer_module, record.format, record.global_scale, record.block_size)
        lines = by_source.setdefault((record.model, record.data), {})
        lines[(*setting, record.method, record.backend)] = record
    return [
        _verification_table(f"{model}, {data}: every scale against all representable ones", list(lines.values()))
        for (model, data), lines in by_source.items()
    ]


def _verification_table(title: str, records: list[RunRecord]) -> Table:
    notes = list(dict.fromkeys(r.model_origin for r in records if r.model_origin))
    notes.append(f"Device: {', '.join(dict.fromkeys(r.device_name or NONE for r in records))}")
    notes.append(f"Commit {', '.join(dict.fromkeys(_commit(r) for r in records))}")
    searches = [r for r in records if r.method in OPTIMAL]
    total, broken = sum(r.verified_blocks or 0 for r in searches), sum(r.verified_violations or 0 for r in searches)
    notes.append(f"In all {total:,} blocks of the searches, {broken:,} violations of the contract of docs/theory.md")
    if wrong := sum(r.verified_wrong_codes or 0 for r in records):
        notes.append(f"{wrong:,} codes are not the nearest at their scale")
    lines: dict[tuple[Any, ...], list[RunRecord]] = {}
    for r in records:
        lines.setdefault((r.format, r.method, r.backend, r.block_size, r.global_scale), []).append(r)
    excess = [[r.verified_worst_excess for r in line if r.verified_worst_excess is not None] for line in lines.values()]
    columns = {
        "Format": [FORMATS.get(key[0], key[0]) for key in lines],
        "Method": [METHODS.get(key[1], key[1]) for key in lines],
        "Backend": [BACKENDS.get(key[2], key[2]) for key in lines],
        "Block size": [str(key[3]) for key in lines],
        "Global scale": [str(key[4]) for key in lines],
        "Layers": [_layers(line) for line in lines.values()],
        "Blocks": [f"{sum(r.verified_blocks or 0 for r in line):,}" for line in lines.values()],
        "Violations": [f"{sum(r.verified_violations or 0 for r in line):,}" for line in lines.values()],
        "Worst excess": [_number(max(values, default=None)) for values in excess],
    }
    return Table(title, tuple(notes), pd.DataFrame(columns))


def _layers(records: list[RunRecord]) -> str:
    """``0, 10, 20 mlp.down_proj``: the indices of each module's layers."""
    modules: dict[str, list[int]] = {}
    for r in records:
        modules.setdefault(r.layer_module or NONE, []).append(r.layer_index or 0)
    return "; ".join(f"{', '.join(map(str, sorted(set(found))))} {module}" for module, found in modules.items())


OPERATIONS = {
    **METHODS,
    "dequantize": "Dequantize",
    "amax": "Global scale from amax",
    "block_hessians": "Block Hessians",
}
PEERS = {"qwantize": "qwantize", "modelopt": "ModelOpt"}
MATRIX = ("rows", "columns", "dtype", "device")  # of a line of the benchmark
CASE = ("kind", "tool", "operation", "format", "block_size", "backend", "global_scale")  # likewise
EVEN_BYTES = 16 << 20  # from this size of the weight on, time is to grow evenly with it


def speed_tables(bench: pd.DataFrame) -> list[Table]:
    """The benchmark's kernels beside a copy, PyTorch and the peers, one table a matrix; experiments/bench.py writes it.

    The floor of a two-level kernel counts its one pass over the weight.
    """
    tables = []
    done = bench[bench["kind"] != "copy"]
    for (device, rows, columns, dtype), copies in bench[bench["kind"] == "copy"].groupby(
        ["device", "rows", "columns", "dtype"], sort=False
    ):
        here = done[(done["device"] == device) & (done["columns"] == columns) & (done["dtype"] == dtype)]
        here = here[(here["rows"] == rows) | (here["operation"] == "block_hessians")]
        kernels = here[(here["tool"] == "quantkit") & (here["backend"] == "triton")]
        ours = kernels[(kernels["global_scale"] != "amax") | (kernels["operation"] == "amax")]
        lines = []
        for _, line in _in_order(ours).iterrows():
            same = here[(here["operation"] == line["operation"]) & (here["format"] == line["format"])]
            same = same[same["block_size"] == line["block_size"]]
            reference = same[(same["backend"] == "reference") & (same["global_scale"] != "amax")]
            from_amax = same[same.index.isin(kernels.index) & (same["global_scale"] == "amax")]
            lines.append(
                {
                    **_what(line),
                    "GPU time, µs": f"{line['gpu_us_median']:,.1f}",
                    "× copy": f"{line['ratio_to_copy']:.2f}",
                    "× copy, with amax": f"{from_amax['ratio_to_copy'].iloc[0]:.2f}" if len(from_amax) else NONE,
                    "Floor, µs": f"{line['floor_us']:,.1f}",
                    "Call, µs": f"{line['call_us_median']:,.0f}",
                    "PyTorch, µs": _microseconds(reference),
                    **{title: _microseconds(same[same["tool"] == tool]) for tool, title in PEERS.items()},
                }
            )
        if not lines:
            continue
        copy = copies.iloc[0]
        notes = (
            _machine(copies, ("qwantize", "nvidia-modelopt")),
            f"Median of {copy['iterations']} runs in turns, the caches overwritten before each; "
            f"a copy of the weight takes {copy['gpu_us_median']:.1f} µs",
            "A global scale, where the format has one, and the block Hessians are given, except in their own lines; "
            "with amax: with the pass over the weight that finds its largest magnitude",
            f"Call: from Python to the end on the GPU, check_finite=False; the copy {copy['call_us_median']:.0f} µs",
            "ModelOpt's naive writes dequantized weights, its searches write one value a block and no codes; qwantize "
            "writes float32 values, and its Hessian time includes the Hessian of 2,048 tokens",
        )
        tables.append(Table(f"{rows} × {columns}, {dtype}", notes, pd.DataFrame(lines)))
    return tables


def scaling_tables(bench: pd.DataFrame) -> list[Table]:
    """How evenly the GPU's time grows with the rows of the weight, from EVEN_BYTES on: one table for each device, width
    and dtype with two doublings of the rows or more."""
    tables = []
    timed = bench.dropna(subset=["gpu_us_median"]).drop_duplicates([*MATRIX, *CASE], keep="last")
    for same, here in timed.groupby(["device", "columns", "dtype"], sort=False):
        copies = here[here["operation"] == "copy"]
        large = copies.loc[copies["bytes"] >= 2 * EVEN_BYTES, "rows"]
        ours = (here["tool"] == "quantkit") & (here["backend"] == "triton") & (here["operation"] != "block_hessians")
        cases = here[here["rows"].isin(large) & (ours | here.index.isin(copies.index))]
        spreads = [_spread(times) for _, times in cases.groupby(list(CASE), dropna=False)]
        found = pd.DataFrame([spread for spread in spreads if spread["doublings"] > 1])
        if found.empty:
            continue
        lines = []
        for _, line in _in_order(found[found["global_scale"].ne("amax") | found["operation"].eq("amax")]).iterrows():
            case = found[found["operation"].eq(line["operation"]) & found["format"].eq(line["format"])]
            amax = case.loc[case["block_size"].eq(line["block_size"]) & case["global_scale"].eq("amax"), "further"]
            lines.append(
                {
                    **_what(line),
                    "Each further MB, µs": f"{line['least']:.3f} to {line['most']:.3f}",
                    "Most / least": f"{line['further']:.2f}",
                    "Most / least, with amax": f"{amax.iloc[0]:.2f}" if len(amax) else NONE,
                    "All MB, most / least": f"{line['whole']:.2f}",
                }
            )
        launches = here.loc[here["operation"] == "launch", "gpu_us_median"]
        least = f"; a launch alone takes {launches.median():.1f} µs" if len(launches) else ""
        notes = (
            _machine(cases),
            "Each further MB: GPU time of a call less that on half the rows, over the bytes that it reads and writes "
            f"more; the least and the most of the {found['doublings'].max()} doublings",
            "With amax: with the pass over the weight that finds its largest magnitude",
            f"All MB: GPU time of a call over all bytes that it reads and writes{least}",
        )
        rows = f"{large.min():,.0f} to {large.max():,.0f} rows"
        tables.append(Table(f"{rows} × {same[1]:.0f}, {same[2]}", notes, pd.DataFrame(lines)))
    return tables


def _spread(times: pd.DataFrame) -> dict[str, Any]:
    """The settings of one case, and the least and the most that its further and its whole megabytes take."""
    further = us_per_further_mb(times).dropna()
    whole = times["gpu_us_median"] / times["bytes"]
    return {
        **times.iloc[0][list(CASE)],
        "doublings": len(further),
        "least": further.min(),
        "most": further.max(),
        "further": further.max() / further.min(),
        "whole": whole.max() / whole.min(),
    }


def us_per_further_mb(times: pd.DataFrame, column: str = "gpu_us_median") -> pd.Series:
    """Of one case at several numbers of rows: its time less that with half the rows, over the bytes that it reads and
    writes more. NaN where half the rows were not timed."""
    halves = times.set_index("rows")[[column, "bytes"]].reindex(times["rows"] / 2).set_index(times.index)
    further = times["bytes"] - halves["bytes"]
    return (times[column] - halves[column]) / (further.where(further > 0) / 1e6)


def _in_order(lines: pd.DataFrame) -> pd.DataFrame:
    order = [*OPERATIONS, "copy"]
    return lines.sort_values(
        ["block_size", "format", "operation"],
        key=lambda column: column.map(order.index) if column.name == "operation" else column,
        ascending=[True, False, True],
        na_position="last",
        kind="stable",
    )


def _what(line: pd.Series) -> dict[str, str]:
    """The first columns of a line of the benchmark."""
    return {
        "Operation": OPERATIONS.get(line["operation"], str(line["operation"]).capitalize()),
        "Format": FORMATS.get(line["format"], NONE) if isinstance(line["format"], str) else NONE,
        "Block": f"{line['block_size']:.0f}" if pd.notna(line["block_size"]) else NONE,
    }


def _machine(lines: pd.DataFrame, peers: Sequence[str] = ()) -> str:
    """What lines of the benchmark were measured with, on one device."""
    known = dict(word.split("=") for versions in lines["versions"] for word in versions.split())
    used = [f"{name} {known[name]}" for name in ("torch", "triton", *peers) if name in known]
    commits = dict.fromkeys(str(commit)[:10] for commit in lines["commit"])
    return f"{lines['device'].iloc[0]}; {', '.join(used)}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def _microseconds(rows: pd.DataFrame) -> str:
    return f"{rows['gpu_us_median'].iloc[0]:,.0f}" if len(rows) else NONE


def published_tables(published: Iterable[Published]) -> list[Table]:
    """The published figures alone, one table a model, layer and block size."""
    by_subject: dict[tuple[Any, ...], list[Published]] = {}
    for line in published:
        layer = f"layer {line.layer_index} {line.layer_module} ({line.out_features} × {line.in_features})"
        key = (line.model, layer, line.data, line.block_size, line.source)
        by_subject.setdefault(key, []).append(line)
    return [
        Table(
            title=f"Published, not measured here: {model}, {layer}, {data}, block size {block_size}",
            notes=(f"Source: {source}",),
            frame=pd.DataFrame(
                {
                    "Format": [FORMATS.get(p.format, p.format) for p in lines],
                    "Method": [METHODS.get(p.method, p.method) for p in lines],
                    "Weight error": [_percent(p.weight_error) for p in lines],
                    "Output error": [_percent(p.output_error) for p in lines],
                    "PyTorch, ms": [_number(p.reference_ms) for p in lines],
                    "Triton, ms": [_number(p.triton_ms) for p in lines],
                    "Triton speed-up": [_times(p.speedup) for p in lines],
                }
            ),
        )
        for (model, layer, data, block_size, source), lines in by_subject.items()
    ]


def unfinished(records: Sequence[RunRecord]) -> list[str]:
    """A line for each reason why runs have no result, with those runs."""
    finished = {(record.run_id, record.device_name) for record in records if record.status == "ok"}
    by_reason: dict[tuple[str, str], list[str]] = {}
    for record in sorted(records, key=record_order):
        if record.status == "ok" or (record.run_id, record.device_name) in finished:
            continue
        label = (
            f"{FORMATS.get(record.format, record.format)} {METHODS.get(record.method, record.method)} "
            f"b{record.block_size} {BACKENDS.get(record.backend, record.backend)} on {record.model}"
        )
        labels = by_reason.setdefault((record.status, record.reason or "no reason recorded"), [])
        if label not in labels:
            labels.append(label)
    return [f"{status}: {', '.join(labels)}: {reason}" for (status, reason), labels in by_reason.items()]


def records_csv(records: Iterable[RunRecord]) -> str:
    """Every field of every record."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for record in records:
        writer.writerow([_cell(value) for value in record.to_dict().values()])
    return out.getvalue()


def read_published(folder: Path) -> list[Published]:
    """Every figure of every CSV file in `folder`."""
    lines: list[Published] = []
    for path in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(path).astype(object)
        for values in frame.where(frame.notna(), None).to_dict("records"):
            lines.append(Published(**{str(name): value for name, value in values.items()}))
    return lines


def record_order(record: RunRecord) -> tuple[Any, ...]:
    """A stable order, by what was measured; also that of the committed records."""
    return (
        *_sortable(asdict(Subject.of(record)).values()),
        _rank(FORMATS, record.format),
        *_sortable((record.global_scale, record.scale_rule)),
        _rank(METHODS, record.method),
        _rank(BACKENDS, record.backend),
        record.run_id,
    )


def _row_order(row: Row) -> tuple[Any, ...]:
    return record_order(row.runs[0])


def _subject_table(subject: Subject, rows: Sequence[Row], published: dict[tuple[str, str], Published]) -> Table:
    columns: dict[str, list[str]] = {
        "Format": [_format_label(row, rows) for row in rows],
        "Method": [METHODS.get(row.method, row.method) for row in rows],
        "Weight error": [_percent(row.weight_error) for row in rows],
        "Output error": [_percent(row.output_error) for row in rows],
        "Output error, held out": [_percent(row.output_error_heldout) for row in rows],
        "Triton speed-up": [_times(row.speedup) for row in rows],
    }
    if published:

        def beside(show: Callable[[Published], str]) -> list[str]:
            found = [published.get((row.format, row.method)) for row in rows]
            return [NONE if p is None else show(p) for p in found]

        columns["Published weight error"] = beside(lambda p: _percent(p.weight_error))
        columns["Published output error"] = beside(lambda p: _percent(p.output_error))
        columns["Published speed-up"] = beside(lambda p: _times(p.speedup))
    layer = f"layer {subject.layer_index} {subject.layer_module}" if subject.layer_index is not None else "one layer"
    return Table(
        title=f"{subject.model}, {layer} ({subject.out_features} × {subject.in_features}), "
        f"block size {subject.block_size}",
        notes=tuple(_notes(subject, rows, published)),
        frame=pd.DataFrame(columns),
    )


def _notes(subject: Subject, rows: Sequence[Row], published: dict[tuple[str, str], Published]) -> list[str]:
    runs = [run for row in rows for run in row.runs]
    notes = list(dict.fromkeys(run.model_origin for run in runs if run.model_origin))
    split = f", split {subject.data_split}" if subject.data_split else ""
    tokens = f"{subject.tokens_calibration or 0:,} calibration tokens"
    held_out = f"{subject.tokens_heldout:,} held out" if subject.tokens_heldout else "none held out"
    sequences = f"{subject.sequences} sequences of up to {subject.seq_len} tokens: " if subject.sequences else ""
    notes.append(f"Data: {subject.data}{split}; {sequences}{tokens}, {held_out}; seed {subject.seed}")
    if any(run.substituted for run in runs):
        notes.append("Without a hub, an offline twin stands in for the model or the text that was configured.")
    commits = dict.fromkeys(_commit(run) for run in runs)
    notes.append(f"Device: {subject.device_name}; commit {', '.join(commits)}")
    settings = dict.fromkeys(
        f"{FORMATS.get(row.format, row.format)} global scale {row.global_scale}"
        + (f", naive scale rule {row.scale_rule}" if row.scale_rule else "")
        for row in rows
    )
    notes.append("; ".join(settings))
    if all(row.speedup is None for row in rows):
        notes.append("No speed-up: Triton and the reference were not both timed on this device.")
    notes += [f"Published figures: {source}" for source in dict.fromkeys(p.source for p in published.values())]
    disagree = [
        f"{_format_label(row, rows)} {METHODS.get(row.method, row.method)}" for row in rows if not row.backends_agree
    ]
    if disagree:
        notes.append(f"The backends disagree on {', '.join(disagree)}; the reference's errors are shown.")
    return notes


def _format_label(row: Row, rows: Sequence[Row]) -> str:
    """The format's name, with its settings where the table holds more than one setting of it."""
    label = FORMATS.get(row.format, row.format)
    others = [other for other in rows if other.format == row.format]
    settings = []
    if len({other.global_scale for other in others}) > 1:
        settings.append(f"global scale {row.global_scale}")
    if len({other.scale_rule for other in others}) > 1:
        settings.append(str(row.scale_rule))
    return f"{label} ({', '.join(settings)})" if settings else label


def _commit(record: RunRecord) -> str:
    return (record.commit or "unknown")[:10] + (" with uncommitted changes" if record.dirty else "")


def _plain(name: str | None) -> str:
    """The last part of a path, without remarks and punctuation: `Qwen3-4B (local)` is `Qwen/Qwen3-4B`."""
    last = re.sub(r"\(.*\)", "", name or "").rpartition("/")[2]
    return re.sub(r"[^a-z0-9]", "", last.lower())


def _rank(order: dict[str, str], name: str) -> tuple[int, str]:
    return (list(order).index(name) if name in order else len(order), name)


def _sortable(values: Iterable[Any]) -> list[tuple[str, Any]]:
    """None, numbers and text do not compare with each other; of two kinds, the kinds do."""
    return [
        ("", 0) if value is None else ("number", value) if isinstance(value, int | float) else ("text", str(value))
        for value in values
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, bool):
        return str(value).lower()
    return value


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.2f} %"


def _times(factor: float | None) -> str:
    return NONE if factor is None else f"{factor:.1f}×"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"
