"""Times of quantizing a whole model, by phase, for several numbers of processes.

    python experiments/random_model.py qwen3_4b --text data/ --out MODEL
    python experiments/bench_model.py --out results/bench/NAME_model.csv --processes 1 2 4 \\
        model.path=MODEL data.path=data/ data.samples=128 data.seq_len=2048

Runs quantize_model.py with these overrides for each case and number of processes, under torchrun for more than one,
each from an empty cache and within --limit seconds. A line of the CSV is one run; the file is written after each.
`wall_s` is the whole command's time, `duration_s` that of its record, the others those of the record's phases, by the
clock of the first process, which includes waiting for the others. `same_bytes`: the model has the bytes of the case's
first run. Imports no torch.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.files import check_writable, parse_json, sha256_file, write_atomically
from experiments.model_record import ModelRecord
from experiments.record import RECORD_NAME, RecordError, read_record_of
from experiments.run_log import LOG_NAME

CASES: dict[str, tuple[str, ...]] = {
    "hessian": ("method=hessian", "hessian=output", "calibrate=parallel"),
    "gptq": ("method=gptq", "hessian=loss", "hessian.matmul=tf32", "calibrate=sequential"),
    "gptq_float32": ("method=gptq", "hessian=loss", "calibrate=sequential"),
    "descent": ("method=descent", "hessian=loss", "hessian.matmul=tf32", "calibrate=sequential"),
    "two_sided": ("method=gptq", "hessian=kronecker", "hessian.matmul=tf32", "calibrate=sequential"),
    "two_sided_descent": (
        *("method=descent", "method.sweeps=2", "hessian=kronecker", "hessian.matmul=tf32", "calibrate=sequential"),
    ),
}
PHASES = ("loss", "read", "forward", "sums", "solve", "write")
SCRIPT = Path(__file__).resolve().with_name("quantize_model.py")
LINES = 12  # of a failed run's output that are shown


@dataclass(frozen=True)
class ModelBenchRow:
    """One run; its fields are the columns of the CSV. Seconds and bytes; sizes from the model's config.json."""

    case: str
    processes: int
    device: str | None = None
    format: str | None = None
    block_size: int | None = None
    method: str | None = None
    hessian_weighting: str | None = None
    hessian_matmul: str | None = None
    calibrate: str | None = None
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    vocabulary: int | None = None
    weights: int | None = None  # quantized ones
    sequences: int | None = None
    seq_len: int | None = None
    wall_s: float | None = None
    duration_s: float | None = None
    loss_s: float | None = None
    read_s: float | None = None
    forward_s: float | None = None
    sums_s: float | None = None
    solve_s: float | None = None
    write_s: float | None = None
    peak_device_bytes: int | None = None
    same_bytes: bool | None = None  # as the case's first run
    commit: str | None = None
    dirty: bool | None = None
    versions: str | None = None
    note: str | None = None  # why there is no time


FIELDS = tuple(f.name for f in fields(ModelBenchRow))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a run failed."""
    options = parse(argv)
    started = time.monotonic()
    check_writable(options.out.parent)
    rows: list[ModelBenchRow] = []
    first: dict[str, str] = {}  # case → hash of the first run's manifest
    for processes in options.processes:
        for case in options.cases:
            left = options.deadline - (time.monotonic() - started)
            row = one_run(case, processes, options, min(options.limit, left), first)
            rows.append(row)
            write_atomically(options.out, to_csv(rows))
            print(line_of(row), flush=True)
    return 1 if any(row.note for row in rows) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="+", metavar="NAME=VALUE", help="of quantize_model.py; model.path is needed")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["hessian", "gptq"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1])
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds of one run")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds of all runs")
    parser.add_argument("--work", type=Path, help="folder of caches and models, which are removed; default: temporary")
    parser.add_argument("--records", type=Path, help="folder that keeps each run's record, layers.jsonl and run.log")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args(argv)
    if not any(override.startswith("model.path=") for override in options.overrides):
        parser.error("model.path=FOLDER is missing: its config.json has the sizes")
    return options


def one_run(
    case: str, processes: int, options: argparse.Namespace, limit: float, first: dict[str, str]
) -> ModelBenchRow:
    """first: case → hash of its first run's manifest; this run's is added if there is none."""
    row = ModelBenchRow(case, processes)
    if limit <= 0:
        return replace(row, note="not run: the deadline was over")
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix=f"{case}-{processes}-") as folder:
        work = Path(folder)
        folders = f"output_dir={work / 'models'}", f"cache.dir={work / 'cache'}"
        overrides = [*options.overrides, *CASES[case], *folders, "tracking=none"]
        threads = max(1, (os.cpu_count() or 1) // max(options.processes))  # the same for every number of processes
        seconds, error = run(command_of(processes, overrides), threads, limit)
        if options.records is not None:
            keep_records(work / "models", options.records / f"{case}-{processes}")
        if error is not None:
            return replace(row, wall_s=seconds, note=error)
        try:
            (path,) = (run / RECORD_NAME for run in runs_in(work / "models") if (run / RECORD_NAME).is_file())
            record = read_record_of(ModelRecord, path)
        except (ValueError, RecordError) as problem:
            return replace(row, wall_s=seconds, note=f"no record: {problem}")
        if record.status != "ok":
            return replace(row, wall_s=seconds, note=record.reason)
        digest = sha256_file(path.parent / "model" / "quantkit.json")
        same = first.setdefault(case, digest) == digest
        found = fields_of(record) | sizes_of(options.overrides)
        return replace(row, **found, wall_s=seconds, same_bytes=same)


def keep_records(models: Path, folder: Path) -> None:
    """Copy the small files of the run in `models`, also those of an unfinished one."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs_in(models):
        for pattern in (RECORD_NAME, LOG_NAME, "*/layers.jsonl"):
            for path in run.glob(pattern):
                shutil.copyfile(path, folder / path.name)


def runs_in(models: Path) -> list[Path]:
    """The folders of runs, without the link to the last one."""
    return [path for path in models.glob("*") if path.is_dir() and not path.is_symlink()]


def command_of(processes: int, overrides: Sequence[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else ()), str(SCRIPT), *overrides]


def run(command: Sequence[str], threads: int, limit: float) -> tuple[float, str | None]:
    """(seconds, None), or why the command failed. It ends with all its processes after `limit` seconds."""
    started = time.perf_counter()
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
            error = None if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            error = f"ended after {limit:.0f} s"
        finally:
            end(process)
        seconds = round(time.perf_counter() - started, 3)
        if error is not None:
            output.seek(0)
            print("".join(output.readlines()[-LINES:]), file=sys.stderr, flush=True)
    return seconds, error


def end(process: subprocess.Popen[Any]) -> None:
    """End what is left of the process's session, in which it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def fields_of(record: ModelRecord) -> dict[str, Any]:
    values = {name: value for name, value in record.to_dict().items() if name in FIELDS}
    seconds = {f"{phase}_s": record.seconds.get(phase) for phase in PHASES}
    versions = " ".join(f"{name}={version}" for name, version in record.versions.items())
    device = record.device_name or record.device
    return values | seconds | {"versions": versions, "device": device}


def sizes_of(overrides: Sequence[str]) -> dict[str, int]:
    folder = next(value for name, _, value in (item.partition("=") for item in overrides) if name == "model.path")
    config = parse_json((Path(folder) / "config.json").read_bytes())
    heads = config["num_attention_heads"]
    return {
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocabulary": config["vocab_size"],
    }


def to_csv(rows: Sequence[ModelBenchRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in asdict(row).items()} for row in rows)
    return text.getvalue()


def line_of(row: ModelBenchRow) -> str:
    """One run in a line of the console."""
    start = f"{row.case:<14}{row.processes:>3} processes"
    if row.note:
        return f"{start}   {row.note}"
    phases = "  ".join(f"{phase} {getattr(row, f'{phase}_s') or 0:.1f}" for phase in PHASES)
    memory = "" if row.peak_device_bytes is None else f"   {row.peak_device_bytes / 2**30:.1f} GiB"
    same = "" if row.same_bytes else "   OTHER BYTES"
    return f"{start}   {row.wall_s:.1f} s   {phases}{memory}{same}"


if __name__ == "__main__":
    sys.exit(main())
