"""The benchmark as tables: each kernel beside a copy, PyTorch and the peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.reporting.labels import FORMATS, METHODS, NONE
from experiments.reporting.table import Table

OPERATIONS = {
    **METHODS,
    "dequantize": "Dequantize",
    "amax": "Global scale from amax",
    "block_hessians": "Block Hessians",
}
PEERS = {"qwantize": "qwantize", "modelopt": "ModelOpt"}
GRAM_PEERS = {**PEERS, "llmcompressor": "llm-compressor"}
BRIEF_OPERATIONS = ("naive", "sse", "hessian", "dequantize")
BRIEF_COLUMNS = {  # of a full table → of a brief one
    **{name: name for name in ("Operation", "Format", "GPU time, µs", "× copy", "× copy, with amax", "Call, µs")},
    **{"PyTorch, µs": "PyTorch, µs", "qwantize": "qwantize, µs", "ModelOpt": "ModelOpt, µs"},
}
MATRIX = ("rows", "columns", "dtype", "device")  # columns of the benchmark that identify the weight and the device
CASE = ("kind", "tool", "operation", "format", "block_size", "backend", "global_scale")  # columns that identify a case


def speed_tables(bench: pd.DataFrame) -> list[Table]:
    """The benchmark's kernels beside a copy, PyTorch and the peers, one table per matrix.

    bench: the CSV of experiments/bench.py. The floor of a two-level kernel counts one pass over the weight.
    """
    others = bench[bench["kind"] != "copy"]
    copies = bench[bench["kind"] == "copy"].groupby(["device", "rows", "columns", "dtype"], sort=False)
    found = (_speed_table(matrix, group, others) for matrix, group in copies)
    return [table for table in found if table is not None]


def brief_speed_tables(bench: pd.DataFrame) -> list[Table]:
    """speed_tables with fewer rows and columns: the searches and dequantize, at the smallest block size."""
    kernels = bench[bench["operation"].isin([*BRIEF_OPERATIONS, "copy"])]
    sizes = kernels["block_size"]
    found = speed_tables(kernels[sizes.isna() | (sizes == sizes.min())])
    return [
        Table(
            f"{table.title}, block size {table.frame['Block'].iloc[0]}",
            table.notes,
            table.frame[list(BRIEF_COLUMNS)].rename(columns=BRIEF_COLUMNS),
        )
        for table in found
    ]


def _speed_table(matrix: tuple[Any, ...], copies: pd.DataFrame, others: pd.DataFrame) -> Table | None:
    """The table of one matrix (device, rows, columns, dtype), None without kernel times. copies: its copy's lines."""
    device, rows, columns, dtype = matrix
    here = others[(others["device"] == device) & (others["columns"] == columns) & (others["dtype"] == dtype)]
    here = here[(here["rows"] == rows) | (here["operation"] == "block_hessians")]
    kernels = here[(here["tool"] == "quantkit") & (here["backend"] == "triton")]
    ours = kernels[(kernels["global_scale"] != "amax") | (kernels["operation"] == "amax")]
    lines = [_speed_line(line, here) for _, line in in_order(ours).iterrows()]
    if not lines:
        return None
    return Table(f"{rows} × {columns}, {dtype}", _speed_notes(copies), pd.DataFrame(lines))


def _speed_line(line: pd.Series, here: pd.DataFrame) -> dict[str, str]:
    """The table's row of one kernel. here: all lines of the same matrix, with the reference, the peers and amax."""
    same = here[(here["operation"] == line["operation"]) & (here["format"] == line["format"])]
    same = same[same["block_size"] == line["block_size"]]
    amax = same["global_scale"] == "amax"
    reference = same[(same["backend"] == "reference") & ~amax]
    from_amax = same[(same["tool"] == "quantkit") & (same["backend"] == "triton") & amax]
    return {
        **case_labels(line),
        "GPU time, µs": f"{line['gpu_us_median']:,.1f}",
        "× copy": f"{line['ratio_to_copy']:.2f}",
        "× copy, with amax": f"{from_amax['ratio_to_copy'].iloc[0]:.2f}" if len(from_amax) else NONE,
        "Floor, µs": f"{line['floor_us']:,.1f}",
        "Call, µs": f"{line['call_us_median']:,.0f}",
        "PyTorch, µs": _microseconds(reference),
        **{title: _microseconds(same[same["tool"] == tool]) for tool, title in PEERS.items()},
    }


def _speed_notes(copies: pd.DataFrame) -> tuple[str, ...]:
    copy = copies.iloc[0]
    return (
        machine_note(copies, ("qwantize", "nvidia-modelopt")),
        f"Median of {copy['iterations']} runs in turns; the caches are overwritten before each. "
        f"A copy of the weight takes {copy['gpu_us_median']:.1f} µs",
        "Global scales and block Hessians are given, except in the lines that measure them. With amax: plus the pass "
        "over the weight that finds its largest magnitude",
        "Call: from the Python call to its end on the GPU, with check_finite=False. "
        f"The copy takes {copy['call_us_median']:.0f} µs",
        "ModelOpt's naive writes dequantized weights. Its searches write one value per block and no codes. "
        "qwantize writes float32 values, and its Hessian time includes building the Hessian of 2,048 tokens",
    )


def gram_tables(bench: pd.DataFrame) -> list[Table]:
    """Time and output error of every method and of the peers' GPTQ, from `bench.py --gram`: one table per matrix."""
    judged = bench[(bench["kind"] != "copy") & bench["output_error"].notna()]
    groups = judged.groupby(["rows", "columns", "dtype", "format", "block_size"], sort=False)
    return [_gram_table(name, lines, bench) for name, lines in groups]


def _gram_table(name: tuple[Any, ...], lines: pd.DataFrame, bench: pd.DataFrame) -> Table:
    rows, columns, dtype, layout, block_size = name
    own = lines[lines["tool"] == "quantkit"]
    absent = bench[(bench["kind"] == "peer") & bench["note"].notna() & (bench["rows"] == rows)]
    frame = pd.DataFrame(
        {
            "Tool": ["quantkit" if tool == "quantkit" else GRAM_PEERS.get(tool, tool) for tool in lines["tool"]],
            "Method": [METHODS.get(method, method) for method in lines["operation"]],
            "GPU time, ms": [f"{time / 1e3:,.2f}" for time in lines["gpu_us_median"]],
            "Output error": [f"{error:.2f} %" for error in lines["output_error"]],
        }
    )
    notes = (
        machine_note(own, ("nvidia-modelopt", "llmcompressor", "qwantize")),
        "The Gram matrix of synthetic activations is given, as are block Hessians and the global scale. Output error: "
        "of the dequantized weight under this matrix",
        *(f"{GRAM_PEERS.get(tool, tool)} {note}" for tool, note in zip(absent["tool"], absent["note"], strict=True)),
    )
    return Table(f"{rows} × {columns}, {dtype}, {FORMATS[layout]}, block size {block_size:.0f}", notes, frame)


def in_order(lines: pd.DataFrame) -> pd.DataFrame:
    order = [*OPERATIONS, "copy"]
    return lines.sort_values(
        ["block_size", "format", "operation"],
        key=lambda column: column.map(order.index) if column.name == "operation" else column,
        ascending=[True, False, True],
        na_position="last",
        kind="stable",
    )


def case_labels(line: pd.Series) -> dict[str, str]:
    """The first cells of a table's row."""
    return {
        "Operation": OPERATIONS.get(line["operation"], str(line["operation"]).capitalize()),
        "Format": FORMATS.get(line["format"], NONE) if isinstance(line["format"], str) else NONE,
        "Block": f"{line['block_size']:.0f}" if pd.notna(line["block_size"]) else NONE,
    }


def machine_note(lines: pd.DataFrame, peers: Sequence[str] = ()) -> str:
    """A note on the device, versions and commits of benchmark lines."""
    known = dict(word.split("=") for versions in lines["versions"] for word in versions.split())
    used = [f"{name} {known[name]}" for name in ("torch", "triton", *peers) if name in known]
    commits = dict.fromkeys(str(commit)[:10] for commit in lines["commit"])
    return f"{lines['device'].iloc[0]}; {', '.join(used)}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def _microseconds(rows: pd.DataFrame) -> str:
    return f"{rows['gpu_us_median'].iloc[0]:,.0f}" if len(rows) else NONE
