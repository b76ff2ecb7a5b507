"""Records → the data of each figure: one tidy frame per figure, which is also the CSV file beside its picture.

A frame holds one subject, so that no figure mixes models: one model, text, layer and so on, except for what the figure
compares. Its last columns have the sources of its numbers. A figure with an empty frame is not drawn. Errors are
fractions, times are microseconds. Needs pandas, neither torch nor matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.evaluation_record import EvaluationRecord
from experiments.record import RunRecord
from experiments.reporting import evaluations
from experiments.reporting.labels import BACKENDS, DEFAULT_RULES, FORMATS, GLOBAL_SCALES, GRIDS, METHODS
from experiments.reporting.scaling import us_per_further_mb
from experiments.reporting.speed import MATRIX

ONE_BLOCK = Path("results/records/one_block.json")  # experiments/one_block.py writes it
BENCH = Path("results/bench")  # timings of kernels on GPUs, one CSV file per device

# The files of results/records from which figures are made.
FIGURE_RECORDS = (
    *("main", "block_size", "scale_distance", "layers", "calibration_size", "global_scale", "timing"),
    *("layer_calibration", "scale_grids"),
)
SETTINGS = ("format", "block_size", "method")
# The common properties of a figure's lines, except for those that the figure compares.
SUBJECT = (
    *("model", "model_revision", "data", "data_hash", "data_split", "layer_index", "layer_module", "block_size"),
    *("seq_len", "tokens_calibration", "tokens_heldout", "seed"),
)
STANDS_ON = (
    *("model", "model_origin", "data", "layer_index", "layer_module", "block_size"),
    *("tokens_calibration", "tokens_heldout", "commit"),
)
ORDER = {name: list(labels) for name, labels in (("format", FORMATS), ("method", METHODS), ("backend", BACKENDS))}
ORDER["layer_module"] = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
]
ORDER["dtype"] = ["bfloat16", "float16", "float32"]
ORDER["operation"] = ["copy", *METHODS, "dequantize", "launch"]


@dataclass(frozen=True)
class Sources:
    """The data from which figures are made."""

    records: dict[str, list[RunRecord]]  # by the name of their file in results/records
    one_block: dict[str, Any] | None = None
    bench: pd.DataFrame | None = None
    evaluations: Sequence[EvaluationRecord] = ()  # of whole models
    gram_bench: pd.DataFrame | None = None  # of bench.py --gram

    @classmethod
    def read(
        cls, root: Path, records: dict[str, list[RunRecord]], evaluations: Sequence[EvaluationRecord] = ()
    ) -> Sources:
        path = root / ONE_BLOCK
        one_block = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        frames: dict[bool, list[pd.DataFrame]] = {False: [], True: []}  # whether by bench.py --gram, with other inputs
        for path in sorted((root / BENCH).glob("*.csv")):
            frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
            if "kind" in frame:  # else of bench_model.py, whose lines are whole models
                frames[path.stem.endswith("gram")].append(frame)
        bench, gram = (pd.concat(found, ignore_index=True) if found else None for found in frames.values())
        return cls(records, one_block, bench, evaluations, gram)

    def runs(
        self, name: str, by: Sequence[str], values: Sequence[str], also: Sequence[str] = (), free: Sequence[str] = ()
    ) -> pd.DataFrame:
        """The runs of one subject that have all `values`, one line for each combination of `by`, in order.

        Columns: `by`, `values`, `also` and STANDS_ON. free: properties that may also differ within the subject.

        The subject is the one with the most lines. Among equals, a model in its original precision precedes a quantized
        release, and then more calibration tokens precede fewer. For each line, the reference precedes Triton, and a
        newer run an older one.
        """
        found = [record.to_dict() for record in self.records.get(name, ()) if record.status == "ok"]
        if "global_scale" not in by:
            found = [run for run in found if _has_default_settings(run)]
        found = [run for run in found if all(run[value] is not None for value in values)]
        columns = [*by, *values, *also, *(fact for fact in STANDS_ON if fact not in by)]
        if not found:
            return pd.DataFrame(columns=columns)
        runs = pd.DataFrame(found)
        subjects = runs.groupby([fact for fact in SUBJECT if fact not in (*by, *free)], dropna=False, sort=False)
        _, runs = max(subjects, key=lambda subject: _preference(subject[1], by))
        runs = runs.sort_values(["backend", "started_at"], ascending=[False, True], kind="stable", na_position="first")
        return in_order(runs.drop_duplicates(list(by), keep="last"), by)[columns].reset_index(drop=True)


def in_order(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The frame sorted by the columns `by`. Names have the order of the tables, with unknown ones last."""

    def rank(column: pd.Series) -> pd.Series:
        names = ORDER.get(str(column.name))
        return column if names is None else column.map(lambda v: (names.index(v) if v in names else len(names), str(v)))

    return frame.sort_values(list(by), key=rank, kind="stable")


def output_error(sources: Sources) -> pd.DataFrame:
    return sources.runs("main", SETTINGS, ["output_error"], also=["output_error_heldout"])


def weight_and_output_error(sources: Sources) -> pd.DataFrame:
    return sources.runs("main", SETTINGS, ["weight_error", "output_error"])


def block_size(sources: Sources) -> pd.DataFrame:
    return sources.runs("block_size", ["layer_module", *SETTINGS], ["output_error", "output_error_heldout"])


def scale_shift(sources: Sources) -> pd.DataFrame:
    return _histogram(sources, "scale_shifts", "shift")


def candidates(sources: Sources) -> pd.DataFrame:
    return _histogram(sources, "candidate_counts", "candidates")


def _histogram(sources: Sources, counts: str, value: str) -> pd.DataFrame:
    """A line for each `value` that occurs, with the number and share of its blocks. Naive is left out."""
    runs = sources.runs("scale_distance", SETTINGS, [counts])
    facts = [fact for fact in STANDS_ON if fact in runs.columns and fact not in SETTINGS]
    lines = [
        {name: run[name] for name in SETTINGS}
        | {value: int(key), "blocks": count, "share": count / sum(run[counts].values())}
        | {name: run[name] for name in facts}
        for run in runs[runs["method"] != "naive"].to_dict("records")
        for key, count in sorted(run[counts].items(), key=lambda item: int(item[0]))
    ]
    return pd.DataFrame(lines, columns=[*SETTINGS, value, "blocks", "share", *facts])


def one_block(sources: Sources) -> pd.DataFrame:
    """A line for each objective and scale code. `chosen_by`: the methods that take this code, joined by +."""
    columns = [
        "objective",
        "code",
        "error",
        "error_to_least",
        "in_window",
        "chosen_by",
        "format",
        "block_size",
        "row",
        "block",
    ]
    facts = [fact for fact in STANDS_ON if fact not in (*columns, "tokens_calibration", "tokens_heldout")]
    found = sources.one_block
    if found is None:
        return pd.DataFrame(columns=columns)
    lines = []
    for objective, name in (("sse", "squared_error"), ("hessian", "hessian_error")):
        first, last = found["windows"][objective]
        for code, error in zip(found["code"], found[name], strict=True):
            chosen = [method for method in ("naive", objective) if found["chosen"][method] == code]
            lines.append(
                {"objective": objective, "code": code, "error": error, "error_to_least": error / min(found[name])}
                | {"in_window": first <= code <= last, "chosen_by": "+".join(chosen)}
                | {fact: found.get(fact) for fact in ("format", "block_size", "row", "block", *facts)}
            )
    return pd.DataFrame(lines, columns=[*columns, *facts])


def layers(sources: Sources) -> pd.DataFrame:
    """`reduction`: the share of the naive scales' held-out output error that a method removes."""
    by = ["format", "method", "layer_module", "layer_index"]
    runs = sources.runs("layers", by, ["output_error", "output_error_heldout"])
    naive = runs[runs["method"] == "naive"].set_index(["format", "layer_module", "layer_index"])["output_error_heldout"]
    keys = zip(runs["format"], runs["layer_module"], runs["layer_index"], strict=True)
    before = pd.Series([naive.get(key, float("nan")) for key in keys], index=runs.index, dtype=float)
    runs.insert(len(by) + 2, "reduction", 1 - runs["output_error_heldout"].astype(float) / before)
    return runs[(runs["method"] != "naive") & runs["reduction"].notna()].reset_index(drop=True)


def calibration_size(sources: Sources) -> pd.DataFrame:
    """The Hessian method for each number of tokens and seed, and SSE, which needs no tokens, as 0 tokens."""
    by = ["format", "method", "tokens_calibration", "seed"]
    values = ["output_error", "output_error_heldout"]
    runs = sources.runs("calibration_size", by, values)
    if runs.empty:
        return runs
    same = {
        name: runs[name].iloc[0]
        for name in ("model", "data", "layer_index", "layer_module", "block_size", "tokens_heldout")
    }
    seeds = set(runs["seed"])
    without = [
        record
        for record in sources.records.get("main", ())
        if record.method == "sse" and record.seed in seeds and all(getattr(record, k) == v for k, v in same.items())
    ]
    sse = Sources({"main": without}).runs("main", by, values).assign(tokens_calibration=0)
    return in_order(pd.concat([runs, sse], ignore_index=True) if len(sse) else runs, by).reset_index(drop=True)


def global_scale(sources: Sources) -> pd.DataFrame:
    # The data hash of a synthetic source depends on its standard deviation.
    by = ["format", "global_scale", "method", "weight_std"]
    return sources.runs("global_scale", by, ["weight_error"], free=["data_hash"])


def gram_time(sources: Sources) -> pd.DataFrame:
    """GPU time and output error of every method and of the peers' GPTQ on one Gram matrix, from bench.py --gram.

    Columns: tool, method, ms_median, ms_20, ms_80, output_error, format, block_size, MATRIX, commit. Device, matrix and
    format are those with the most lines, and among equals the last.
    """
    columns = ["tool", "method", "ms_median", "ms_20", "ms_80", "output_error"]
    columns += ["format", "block_size", *MATRIX, "commit"]
    if sources.gram_bench is None:
        return pd.DataFrame(columns=columns)
    lines = sources.gram_bench.dropna(subset=["output_error", "gpu_us_median"]).rename(columns={"operation": "method"})
    if lines.empty:
        return pd.DataFrame(columns=columns)
    groups = [group for _, group in lines.groupby([*MATRIX, "format", "block_size"], sort=False)]
    found = max(reversed(groups), key=len).astype({name: int for name in ("block_size", "rows", "columns")})
    times = {f"ms_{name}": found[f"gpu_us_{name}"] / 1e3 for name in ("median", "20", "80")}
    return found.assign(**times, output_error=found["output_error"] / 100)[columns].reset_index(drop=True)


def layer_calibration(sources: Sources) -> pd.DataFrame:
    by = ["layer_index", "format", "method", "tokens_calibration", "seed"]
    return sources.runs("layer_calibration", by, ["output_error", "output_error_heldout"], also=["in_features"])


def scale_grids(sources: Sources) -> pd.DataFrame:
    """Columns `elements` and `scales` are those of the format."""
    runs = sources.runs("scale_grids", ["format", "method"], ["output_error", "output_error_heldout"])
    runs = runs[runs["format"].isin(list(GRIDS))]
    grids = [GRIDS[name] for name in runs["format"]]
    runs = runs.assign(elements=[elements for elements, _ in grids], scales=[scales for _, scales in grids])
    rank = {name: number for number, name in enumerate(GRIDS)}
    return runs.sort_values("format", key=lambda names: names.map(rank), kind="stable").reset_index(drop=True)


TIMES = ("us_median", "us_20", "us_80")


def speed_up(sources: Sources) -> pd.DataFrame:
    """The reference's time over Triton's, of whole calls. `low`: its 20 % over Triton's 80 % point; `high`: reverse."""
    times = timings(sources, "call_us")
    columns = [*SETTINGS, "speed_up", "low", "high", "reference_us", "triton_us", *MATRIX, "commit"]
    both = pd.merge(
        times[times["backend"] == "reference"].drop(columns="commit"),
        times[times["backend"] == "triton"],
        on=[*SETTINGS, *MATRIX],
        suffixes=("_r", "_t"),
    )
    both["reference_us"], both["triton_us"] = both["us_median_r"], both["us_median_t"]
    both["speed_up"] = both["us_median_r"] / both["us_median_t"]
    both["low"] = both["us_20_r"] / both["us_80_t"]
    both["high"] = both["us_80_r"] / both["us_20_t"]
    return in_order(both, SETTINGS)[columns].reset_index(drop=True)


def time_error(sources: Sources) -> pd.DataFrame:
    """Triton's GPU time and the output error of the same settings on the main table's layer."""
    times = timings(sources, "gpu_us")
    times = times[times["backend"] == "triton"].drop(columns="backend").rename(columns={"commit": "commit_timing"})
    errors = output_error(sources).rename(columns={"commit": "commit_error"})
    both = pd.merge(times, errors, on=list(SETTINGS))
    first = [*SETTINGS, *TIMES, "floor_us", "output_error", "output_error_heldout"]
    return in_order(both, SETTINGS)[[*first, *both.columns.difference(first, sort=False)]].reset_index(drop=True)


def timings(sources: Sources, kind: str) -> pd.DataFrame:
    """The times of one matrix on one device; columns: SETTINGS, backend, TIMES, floor_us, MATRIX, commit.

    They come from the benchmark if it has any, else from the records. The matrix is the one with the most times, and
    among equals the last one. kind: gpu_us or call_us of the benchmark; records have only the time of the whole call.
    """
    columns = [*SETTINGS, "backend", *TIMES, "floor_us", *MATRIX, "commit"]
    times = _bench_timings(sources.bench, kind)
    if times.empty:
        times = _record_timings(sources)
    if times.empty:
        return pd.DataFrame(columns=columns)
    groups = in_order(times, ["dtype"]).groupby(["model", *MATRIX], dropna=False, sort=False)
    times = max(reversed([group for _, group in groups]), key=_most_timed)
    return in_order(times, [*SETTINGS, "backend"])[columns].reset_index(drop=True)


def _bench_timings(bench: pd.DataFrame | None, kind: str) -> pd.DataFrame:
    if bench is None:
        return pd.DataFrame()
    times = (
        bench[
            (bench["kind"] == "kernel")
            & (bench["tool"] == "quantkit")
            & bench["operation"].isin(list(METHODS))
            & bench["format"].isin(list(FORMATS))
        ]
        .rename(columns={"operation": "method"})
        .assign(model="")
    )
    default = times["format"].map(GLOBAL_SCALES)
    times = times[times["global_scale"].fillna(default) == default]
    for name in TIMES:
        times[name] = times[f"{kind}_{name.removeprefix('us_')}"]
    times = times.astype({name: int for name in ("block_size", "rows", "columns")})
    return times.dropna(subset=["us_median"]).drop_duplicates([*SETTINGS, "backend", *MATRIX], keep="last")


def scaling(sources: Sources) -> pd.DataFrame:
    """The benchmark's kernels, copy and launch on weights of one width on one device, over the number of rows.

    Columns: operation, format, rows, bytes, us_per_mb, us_per_further_mb, TIMES, columns, dtype, device, commit. Block
    size 16, given global scales. Width and device are those with the most numbers of rows, and among equals the last.
    us_per_further_mb: the time that doubling the rows adds, over the megabytes that it adds.
    """
    columns = ["operation", "format", "rows", "bytes", "us_per_mb", "us_per_further_mb", *TIMES]
    columns += ["columns", "dtype", "device", "commit"]
    bench = sources.bench
    if bench is None:
        return pd.DataFrame(columns=columns)
    kernels = bench["tool"].eq("quantkit") & bench["backend"].eq("triton") & bench["block_size"].eq(16)
    kernels &= bench["operation"].isin([*METHODS, "dequantize"]) & bench["global_scale"].ne("amax")
    lines = bench[kernels | bench["kind"].isin(["copy", "launch"])].dropna(subset=["gpu_us_median", "rows", "columns"])
    groups = [group for _, group in lines.groupby(["device", "columns", "dtype"], sort=False)]
    found = max(reversed(groups), key=lambda group: group["rows"].nunique(), default=lines)
    if found["rows"].nunique() < 3:
        return pd.DataFrame(columns=columns)
    found = found.rename(columns={f"gpu_{name}": name for name in TIMES}).astype({"rows": int, "columns": int})
    found = found.drop_duplicates(["operation", "format", "rows"], keep="last").reset_index(drop=True)
    found = found.assign(us_per_mb=found["us_median"] / (found["bytes"].where(found["bytes"] > 0) / 1e6))
    found["us_per_further_mb"] = pd.concat(
        [us_per_further_mb(part, "us_median") for _, part in found.groupby(["operation", "format"], dropna=False)]
    )
    return in_order(found, ["format", "operation", "rows"])[columns].reset_index(drop=True)


def kl_bits(sources: Sources) -> pd.DataFrame:
    return evaluations.kl_points(sources.evaluations, "bits_per_weight")


def kl_time(sources: Sources) -> pd.DataFrame:
    return evaluations.kl_points(sources.evaluations, "quantize_s")


def kl_position(sources: Sources) -> pd.DataFrame:
    return evaluations.kl_positions(sources.evaluations)


def kl_layers(sources: Sources) -> pd.DataFrame:
    return evaluations.kl_layers(sources.evaluations)


def _record_timings(sources: Sources) -> pd.DataFrame:
    """The times of the records, for settings in which the same timer timed both backends on the same device."""
    runs = [
        run
        for name in ("timing", "main")
        for record in sources.records.get(name, ())
        if record.status == "ok"
        and record.time_ms_median is not None
        and _has_default_settings(run := record.to_dict())
    ]
    if not runs:
        return pd.DataFrame()
    times = pd.DataFrame(runs).sort_values("started_at", kind="stable", na_position="first")
    times = times.rename(columns={"out_features": "rows", "in_features": "columns", "weight_dtype": "dtype"})
    times = times.assign(device=times["time_device"], floor_us=float("nan"))
    for name, field in zip(TIMES, ("time_ms_median", "time_ms_p20", "time_ms_p80"), strict=True):
        times[name] = 1e3 * times[field].astype(float)
    same = [*SETTINGS, "model", *MATRIX, "time_timer"]
    times = times.drop_duplicates([*same, "backend"], keep="last")
    return times[times.groupby(same, dropna=False)["backend"].transform("nunique") == len(BACKENDS)]


def _has_default_settings(run: dict[str, Any]) -> bool:
    scale = run["global_scale"]
    default = GLOBAL_SCALES.get(run["format"], scale)
    weighted = run.get("hessian_weighting") is not None
    return scale in (None, default) and run["scale_rule"] in (None, *DEFAULT_RULES) and not weighted


def _preference(runs: pd.DataFrame, by: Sequence[str]) -> tuple[Any, ...]:
    lines = len(runs.drop_duplicates(list(by)))
    return lines, bool(runs["model_origin"].isna().all()), runs["tokens_calibration"].fillna(0).max()


def _most_timed(times: pd.DataFrame) -> tuple[int, float]:
    return len(times.drop_duplicates([*SETTINGS, "backend"])), float(times["rows"].iloc[0] * times["columns"].iloc[0])
