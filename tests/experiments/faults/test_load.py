"""Load: memory of a capture, of a large weight and of a long sweep, and the report of many runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments import report
from experiments import run as entry
from experiments.capture import load
from experiments.config import CONF_DIR, REPO_ROOT
from experiments.console import Console
from experiments.record import RECORD_NAME, read_records
from quantkit import METHODS, quantize
from tests.experiments.faults.sizes import FULL, note, size
from tests.experiments.test_record import RECORD
from tests.experiments.test_run import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(size(300, 7200))]

GIB, MIB = 1 << 30, 1 << 20
# Above what it holds when the work begins, so without the packages and what the work is given.
PEAK = """
import json, resource, sys, time
def resident():
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew; ru_maxrss would have the parent process's
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def tell(before, started, **more):
    status = open("/proc/self/status").read()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps({"peak": peak - before, "seconds": time.perf_counter() - started, **more}))
"""
CAPTURE = """
import torch
from pathlib import Path
from experiments.capture.shards import Layout, ShardWriter
folder, sequences = Path(sys.argv[1]), int(sys.argv[2])
layout = Layout(width=1536, dtype=torch.bfloat16, seq_len=512, batch=8, sequences={"calibration": sequences},
                shard_bytes=256 << 20)
batch = torch.randn(8 * 512, 1536, dtype=torch.bfloat16)
before, started = resident(), time.perf_counter()
writer = ShardWriter([folder], layout, "cpu")
for first in range(0, sequences, 8):
    writer.add("calibration", first, batch[: 512 * min(8, sequences - first)])
writer.finish()
tell(before, started, rows=writer.rows["calibration"])
"""
QUANTIZE = """
import torch
from quantkit import quantize
rows, columns, method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
quantize(torch.randn(2048, 2048, dtype=torch.bfloat16), "nvfp4", 16, method)  # touches the libraries
weight = torch.empty(rows, columns, dtype=torch.bfloat16)
for part in weight.split(1024):
    part.normal_()
before, started = resident(), time.perf_counter()
result = quantize(weight, "nvfp4", 16, method)
tell(before, started, weight=weight.nbytes, result=result.codes.nbytes + result.scales.nbytes)
"""


def measured(code: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)],
        cwd=REPO_ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_capture_of_many_tokens_stays_within_2_gib(tmp_path: Path) -> None:
    """Above the model. Memory holds one shard and the Gram matrix, whatever the number of tokens."""
    sequences = size(80, 1954)  # of 512 tokens: 1,000,448
    found = measured(CAPTURE, tmp_path, sequences)
    assert found["rows"] == sequences * 512 and found["peak"] < 2 * GIB
    note("memory of a capture", tokens=int(found["rows"]), channels=1536, peak_mib=round(found["peak"] / MIB))


def test_a_large_weight_is_quantized_without_a_copy() -> None:
    """Beside the result: chunks of constant size, and a byte a block for the number of its candidates."""
    rows, columns = size((16_384, 4864), (65_536, 9728))
    found = measured(QUANTIZE, rows, columns, "naive")
    extra = found["peak"] - found["result"]
    assert extra < 128 * MIB  # a copy takes 152 MiB in CI, 1,216 MiB at full size, and twice that in float32
    note(
        "memory of a large weight",
        rows=rows,
        columns=columns,
        weight_mib=round(found["weight"] / MIB),
        result_mib=round(found["result"] / MIB),
        extra_mib=round(extra / MIB),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["naive", "sse", "hessian", "joint"])
def test_a_large_weight_is_quantized_on_a_gpu_without_a_copy(method: str) -> None:
    """At full size always. Beside weight, Hessians and result: their factors, and less than 64 MiB."""
    rows, columns, block = 65_536, 9728, 16
    weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_()
    hessian = torch.eye(block, dtype=torch.float32, device="cuda").repeat(columns // block, 1, 1)
    given = {} if METHODS[method].needs is None else {"hessian": hessian}
    quantize(weight[:64], "nvfp4", block, method, **given)  # compiles the kernel
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = quantize(weight, "nvfp4", block, method, **given)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - result.codes.nbytes - result.scales.nbytes
    assert result.shape == weight.shape and extra < 64 * MIB  # a copy takes 1,216 MiB
    name = f"memory of a large weight on a GPU, {method}"
    note(name, device="cuda", rows=rows, columns=columns, extra_mib=round(extra / MIB))


def test_a_long_sweep_keeps_flat_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run has a layer of its own. The newest layers stay in memory, here up to 1 MiB instead of 2 GiB."""
    monkeypatch.setattr(load, "MEMO_BYTES", MIB)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's keep every line
    runs, warm = size(15, 2000), size(8, 250)
    process, console, resident = psutil.Process(os.getpid()), Console(), 0
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        for seed in range(runs):
            overrides = [*SMALL, f"output_dir={tmp_path}", f"seed={seed}", "device=cpu"]
            entry.run(compose("config", overrides=overrides), console)
            if seed == warm:
                resident = process.memory_info().rss
    growth = process.memory_info().rss - resident
    assert console.counts["done"] == runs == len(read_records(tmp_path))
    assert growth < size(16, 4) * MIB
    note("memory of a sweep", runs=runs, growth_mib=round(growth / MIB))


def test_the_report_of_2000_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2000):
        (tmp_path / f"run-{seed}").mkdir()
        record = dataclasses.replace(RECORD, run_id=f"run-{seed}", seed=seed)
        (tmp_path / f"run-{seed}" / RECORD_NAME).write_text(record.to_json())
    started = time.process_time()  # of the processor: the machine may have other work
    assert report.main(["--runs", str(tmp_path)]) == 0
    seconds = time.process_time() - started
    assert len((tmp_path / "table.csv").read_text().splitlines()) > 1
    assert not FULL or seconds < 10
    capsys.readouterr()
    note("report of a sweep", runs=2000, processor_seconds=round(seconds, 1))
