"""Times of whole models (bench_model.py) as tables: by phase, and worked out for more GPUs and for a larger model.

A phase of n processes is taken to last  a · share(n) + c  seconds, where share(n) is the part of the work that the
busiest process has: of the text's pieces for loss weights, of its segments for forward passes and sums, of the weights
of each step for solving. Reading, writing and the rest are not divided: share(n) = 1. Least squares over the measured
numbers of processes give a and c, neither below 0. Needs pandas, not torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from experiments.reporting.labels import METHODS, NONE
from experiments.reporting.table import Table

DIVIDED = ("loss", "forward", "sums", "solve")
PHASES = (*DIVIDED, "read", "write")
REST = "rest"  # of the command: imports, hashes of the model's files, the last bytes
SEGMENTS, BATCH_TOKENS, PIECE_TOKENS = 8, 16384, 32768  # of model/ranks.py, model/walk.py and capture/losses.py
MORE = (8, 64)  # GPUs that are worked out
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder; the fields are columns of bench_model.py's CSV."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def steps(self) -> list[list[tuple[int, int]]]:
        """(rows, columns) of the matrices that are quantized together, in a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inputs = [(queries, self.hidden), (keys, self.hidden), (keys, self.hidden)]
        gates = [(self.intermediate, self.hidden)] * 2
        return [inputs, [(self.hidden, queries)], gates, [(self.hidden, self.intermediate)]]

    @property
    def layer_weights(self) -> int:
        return sum(rows * columns for step in self.steps for rows, columns in step)

    @property
    def parameters(self) -> int:
        """Weights of matrices; embeddings and lm_head once."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden

    def forward(self, tokens: int, seq_len: int) -> float:
        """Operations of a pass through the layers, with causal attention."""
        attention = 2 * tokens * seq_len * self.heads * self.head_dim
        return self.layers * (2.0 * tokens * self.layer_weights + attention)

    def sums(self, tokens: int, weighted: bool, sequential: bool) -> float:
        """Operations of H, and in sequential calibration of D and R (model/sums.py). Unweighted, a step has one H."""
        total = 0
        for step in self.steps:
            total += step[0][1] ** 2 * (len(step) if weighted else 1) * (2 if sequential else 1)
            total += step[0][0] * step[0][1] if sequential and len(step) == 1 else 0
        return self.layers * 2.0 * tokens * total

    def solve(self) -> float:
        """N K² + K³ of each matrix: its products with K × K matrices, and their factors. The search grows with N K."""
        return self.layers * sum(float(n) * k**2 + k**3 for step in self.steps for n, k in step)

    def stored_inputs(self, tokens: int, sequential: bool) -> int:
        """Bytes of both streams, and of the inputs that are kept while a layer is quantized; 16 bits each."""
        if not sequential:
            return 2 * tokens * self.hidden
        queries = self.heads * self.head_dim
        original = 4 * self.hidden + queries + self.intermediate  # norms' inputs and outputs, o_proj's and down_proj's
        return 2 * tokens * (2 * self.hidden + original + queries + self.intermediate)


LARGE = Shape(80, 8192, 28672, 64, 8, 128, 128256)
LARGE_NAME = "70B"


def whole_model_tables(bench: pd.DataFrame) -> list[Table]:
    """For each case the seconds by phase, measured and worked out; last, a model of 70B from the smallest run."""
    timed = bench[bench["note"].isna() & bench["wall_s"].notna()]
    if timed.empty:
        return []
    tables = [_phases(here.sort_values("processes")) for _, here in timed.groupby("case", sort=False)]
    sequential = timed[(timed["processes"] == 1) & (timed["calibrate"] == "sequential")]
    return [*tables, *([_larger(sequential.iloc[0])] if len(sequential) else [])]


def shape_of(run: pd.Series) -> Shape:
    return Shape(**{f.name: int(run[f.name]) for f in fields(Shape)})


def seconds_of(run: pd.Series) -> dict[str, float]:
    found = {phase: float(run[f"{phase}_s"]) if pd.notna(run[f"{phase}_s"]) else 0.0 for phase in PHASES}
    return found | {REST: float(run["wall_s"]) - sum(found.values())}


def share(phase: str, processes: int, shape: Shape, tokens: int) -> float:
    """The part of a phase's work that the busiest of the processes has."""
    if phase == "loss":
        pieces = math.ceil(tokens / PIECE_TOKENS)
        return math.ceil(pieces / processes) / pieces
    if phase in ("forward", "sums"):
        segments = min(SEGMENTS, math.ceil(tokens / BATCH_TOKENS))
        return math.ceil(segments / processes) / segments
    if phase == "solve":
        busiest = sum(_busiest([n * k for n, k in step], processes) for step in shape.steps)
        return busiest / shape.layer_weights
    return 1.0


def _busiest(costs: Sequence[int], processes: int) -> int:
    """The largest load if each piece, the dearest first, goes to the process with the least so far."""
    load = [0] * processes
    for cost in sorted(costs, reverse=True):
        load[load.index(min(load))] += cost
    return max(load)


def fitted(shares: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, c) of  seconds = a · share + c  by least squares, neither below 0."""
    x, y = np.array(shares, float), np.array(seconds, float)
    spread = float(((x - x.mean()) ** 2).sum())
    a = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0
    c = float(y.mean() - a * x.mean())
    if a < 0:
        return 0.0, float(y.mean())
    return (a, c) if c >= 0 else (float((x * y).sum() / (x * x).sum()), 0.0)


def worked_out(runs: pd.DataFrame, processes: int) -> dict[str, float]:
    """Seconds by phase. runs: those of one case."""
    shape, tokens = shape_of(runs.iloc[0]), _tokens(runs.iloc[0])
    counts = [int(n) for n in runs["processes"]]
    found = [seconds_of(run) for _, run in runs.iterrows()]
    result = {}
    for phase in (*PHASES, REST):
        shares = [share(phase, n, shape, tokens) for n in counts]
        a, c = fitted(shares, [seconds[phase] for seconds in found])
        result[phase] = a * share(phase, processes, shape, tokens) + c
    return result


def _tokens(run: pd.Series) -> int:
    return int(run["sequences"]) * int(run["seq_len"])


def _phases(runs: pd.DataFrame) -> Table:
    first = runs.iloc[0]
    columns = {_gpus(run["processes"]): seconds_of(run) for _, run in runs.iterrows()}
    if len(runs) > 1:
        columns |= {f"{n} GPUs, worked out": worked_out(runs, n) for n in MORE if n > runs["processes"].max()}
    base = sum(seconds_of(first).values())
    frame = pd.DataFrame({"Operation": [*map(_phase, (*PHASES, REST)), "whole command", "speed-up", "memory, GiB"]})
    peaks = {_gpus(run["processes"]): run["peak_device_bytes"] for _, run in runs.iterrows()}
    for name, seconds in columns.items():
        total, peak = sum(seconds.values()), peaks.get(name)
        memory = NONE if peak is None or pd.isna(peak) else f"{peak / GIB:.1f}"
        faster = f"{base / total:.2f}×" if first["processes"] == 1 else NONE
        frame[name] = [*(f"{seconds[p]:.1f}" for p in (*PHASES, REST)), f"{total:.1f}", faster, memory]
    same = "all runs wrote the same bytes" if bool(runs["same_bytes"].astype(bool).all()) else "runs differ in bytes"
    notes = (
        f"{first['device']}, {first['sequences']:.0f} × {first['seq_len']:.0f} tokens, {first['weights'] / 1e9:.2f} "
        f"billion weights in {first['layers']:.0f} layers; {same}",
        "Seconds of the first process, with its waiting for the others; memory: the largest on its device",
    )
    return Table(_title(first), notes, frame)


def _gpus(processes: float) -> str:
    return "1 GPU" if processes == 1 else f"{processes:.0f} GPUs"


def _phase(name: str) -> str:
    return {"loss": "loss weights", "forward": "forward passes", "sums": "Hessians"}.get(name, name)


def _title(run: pd.Series) -> str:
    parts = [METHODS.get(run["method"], run["method"]), f"block {run['block_size']:.0f}", str(run["calibrate"])]
    if run["hessian_weighting"] == "loss":
        matmul = run["hessian_matmul"]
        weighting = "two-sided" if run["case"].startswith("two_sided") else "loss-weighted"
        parts.append(weighting + (f" in {matmul.upper()}" if isinstance(matmul, str) and matmul else ""))
    return ", ".join(parts)


def _larger(run: pd.Series) -> Table:
    """The times of one process, times the ratio of operations; memory from the bytes of each part."""
    small, tokens, seq_len = shape_of(run), _tokens(run), int(run["seq_len"])
    weighted, seconds = run["hessian_weighting"] == "loss", seconds_of(run)
    ratios = {
        "forward": LARGE.forward(tokens, seq_len) / small.forward(tokens, seq_len),
        "sums": LARGE.sums(tokens, False, True) / small.sums(tokens, weighted, True),
        "solve": LARGE.solve() / small.solve(),
        "read": LARGE.parameters / small.parameters,
        "write": LARGE.parameters / small.parameters,
    }
    rest = seconds[REST] * ratios["read"]
    times = {phase: seconds[phase] * ratio for phase, ratio in ratios.items()} | {REST: rest}
    lines = [[_phase(name), f"{seconds[name]:.1f} s", f"{value:.0f} s"] for name, value in times.items()]
    lines.append(["sum", f"{sum(seconds[name] for name in times):.0f} s", f"{sum(times.values()):.0f} s"])
    inputs = [shape.stored_inputs(tokens, True) / GIB for shape in (small, LARGE)]
    lines.append(["stored inputs", *(f"{value:.0f} GiB" for value in inputs)])
    peak = run["peak_device_bytes"]
    if pd.notna(peak):
        left = max(0.0, peak / GIB - inputs[0])
        grown = left * (LARGE.intermediate / small.intermediate) ** 2
        lines.append(["device memory beside them, at most", f"{left:.0f} GiB", f"{grown:.0f} GiB"])
    loss = [4 * shape.parameters / GIB for shape in (small, LARGE)]
    lines.append(["parameters in float32, for loss weights", *(f"{value:.0f} GiB" for value in loss)])
    frame = pd.DataFrame(lines, columns=["Operation", "measured", f"{LARGE_NAME}, worked out"])
    notes = (
        f"{LARGE_NAME}: {LARGE.layers} layers of width {LARGE.hidden} and {LARGE.intermediate}, the same text, one "
        "GPU, hessian=output, since the parameters do not fit in float32",
        "Times grow with the operations, which for solving are N K² + K³; reading, writing and the rest grow with the "
        "parameters",
        "Device memory grows at most with the square of the widest input, as Hessians do; stored inputs are on the CPU "
        "where they take more than half of a GPU's free memory",
    )
    return Table(f"A model of {LARGE_NAME}, worked out from {_title(run)}", notes, frame)
