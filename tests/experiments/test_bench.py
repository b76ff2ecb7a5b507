"""A small benchmark on a CPU: its CSV file, the options that it refuses, and its tables."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from experiments import bench
from experiments.measure import bench_peers
from experiments.measure.bench_cases import Case, sample_weight
from experiments.measure.bench_gram import GramTask, gram_cases, gram_task
from experiments.measure.bench_rows import BenchRow, to_csv
from experiments.reporting import ReportError
from experiments.reporting.pages import Material, fill
from experiments.reporting.scaling import scaling_tables
from experiments.reporting.speed import brief_speed_tables, speed_tables
from quantkit import FORMATS, METHODS, quantize
from quantkit.metrics import output_error

ROOT = Path(__file__).resolve().parents[2]

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


def test_bench_times_every_method_format_and_block_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "cpu.csv"
    arguments = ["--shapes", "8x64", "--backends", "reference", "--rounds", "2", "--device", "cpu", "--out", str(out)]
    assert bench.main(arguments) == 0
    table = pd.read_csv(out)
    kernels = table[table["kind"] == "kernel"]
    assert set(zip(kernels["format"], kernels["operation"], kernels["block_size"], strict=True)) == {
        (f, m, b) for f in FORMATS for m in METHODS if METHODS[m].needs != "gram" for b in FORMATS[f].block_sizes
    }
    assert (
        (table["iterations"] == 2).all() and (table["call_us_median"] > 0).all() and table["gpu_us_median"].isna().all()
    )
    assert (table["call_us_20"] <= table["call_us_80"]).all()
    naive = kernels[(kernels["operation"] == "naive") & (kernels["block_size"] == 16)]
    assert (naive["bytes"] == 8 * 64 * 2 + 8 * 64 // 2 + 8 * 64 // 16).all()
    assert "quantkit hessian mxfp4 32" in capsys.readouterr().out


def bench_with_gram(out: Path) -> pd.DataFrame:
    arguments = ["--gram", "--formats", "nvfp4", "--block-sizes", "16", "--shapes", "8x64", "--rounds", "1"]
    assert bench.main([*arguments, "--device", "cpu", "--backends", "reference", "--out", str(out)]) == 0
    return pd.read_csv(out)


def test_with_a_gram_matrix_every_method_has_its_output_error_beside_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a peer that is not installed has a line that says so."""
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    table = bench_with_gram(tmp_path / "gram.csv")
    ours = table[table["kind"] == "kernel"].set_index("operation")
    assert list(ours.index) == list(METHODS) and (ours["call_us_median"] > 0).all()
    task = gram_task(sample_weight(8, 64).bfloat16())
    found = quantize(task.weight, "nvfp4", 16, "gptq", gram=task.gram)
    want = output_error(task.tokens, task.weight, found.dequantize(torch.float32))
    assert ours.loc["gptq", "output_error"] == pytest.approx(100 * want, rel=1e-4)
    assert ours["output_error"].is_monotonic_decreasing  # from naive to descent, on the tokens of the Gram matrix
    peers = table[table["kind"] == "peer"]
    assert list(zip(peers["tool"], peers["operation"], peers["note"], strict=True)) == [
        (tool, operation, "not installed")
        for tool, operation in (
            ("modelopt", "gptq"),
            ("llmcompressor", "gptq"),
            ("qwantize", "gptq"),
            ("qwantize", "admm"),
        )
    ]
    assert peers[["gpu_us_median", "call_us_median", "output_error"]].isna().all(axis=None)


def test_a_peer_that_fails_has_its_error_as_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fails where its cases are made, or where it is called."""
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: object())

    def broken() -> object:
        raise RuntimeError("no\nkernel")

    def cases(task: object) -> Iterator[Case]:
        yield case(kind="peer", tool="llmcompressor", operation="gptq", call=broken)

    for name in ("modelopt", "qwantize"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(bench_peers, "_llmcompressor_gptq", cases)
    peers = bench_with_gram(tmp_path / "gram.csv").query("kind == 'peer'").set_index("tool")
    assert peers.loc["modelopt", "note"] == "RuntimeError: its NVFP4 kernels need a GPU"
    assert peers.loc["llmcompressor", "note"] == "RuntimeError: no kernel"
    assert (
        peers.loc["qwantize", "note"] == "ModuleNotFoundError: import of qwantize halted; None in sys.modules"
    ).all()


def test_a_peer_whose_result_is_not_finite_has_no_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: object())

    def cases(task: GramTask) -> Iterator[Case]:
        wrong = task.weight.float().index_fill(1, torch.tensor([3], device="cpu"), torch.nan)
        yield case(kind="peer", tool="qwantize", operation="admm", call=lambda: wrong, judge=task.judge)

    monkeypatch.setattr(bench_peers, "_qwantize_admm", cases)
    admm = bench_with_gram(tmp_path / "gram.csv").query("operation == 'admm'").iloc[0]
    assert admm["note"] == "ValueError: 8 of 512 values are not finite" and pd.isna(admm["output_error"])


def test_llm_compressor_quantizes_the_same_weight_under_the_same_gram_matrix() -> None:
    """Its GPTQ with scales from the blocks' amax lies between naive and quantkit's GPTQ."""
    pytest.importorskip("llmcompressor")
    task = gram_task(sample_weight(16, 128).bfloat16())
    peer = next(bench_peers.available(bench_peers.gram_peer_cases(task)[1:2]))
    before = task.gram.clone()
    error = task.judge(peer.call())
    methods = [case for case in gram_cases(task, ["reference"], ["nvfp4"], [16]) if case.judge]
    ours = {case.operation: task.judge(case.call().dequantize()) for case in methods}
    assert ours["gptq"] < error < ours["naive"]
    assert torch.equal(task.gram, before) and error == task.judge(peer.call())


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(bench, "run_shape", lambda *_: pytest.fail("timed for nothing"))
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "8x64", "--device", "cpu", "--out", str(tmp_path / "file" / "x.csv")])
    assert "x.csv cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "8x64", "--device", "cpu", "--out", str(tmp_path)])
    assert "cannot be written: a folder; name a file in it" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = bench.run_shape, tmp_path / "x.csv"

    def interrupted(shape: tuple[int, int], *rest: Any) -> Any:
        if shape[0] > 8:
            raise KeyboardInterrupt
        return whole(shape, *rest)

    monkeypatch.setattr(bench, "run_shape", interrupted)
    arguments = ["--shapes", "8x64,16x64", "--backends", "reference", "--rounds", "1", "--device", "cpu"]
    assert bench.main([*arguments, "--out", str(out)]) == 130
    assert "8x64    quantkit naive nvfp4 16" in capsys.readouterr().out
    assert pd.read_csv(out)["rows"].eq(8).all()


def case(**values: Any) -> Case:
    return Case(**{"kind": "kernel", "tool": "quantkit", "bytes": 0, "backend": "triton"} | values)


def test_compiling_ahead_calls_each_case_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together the processes call all cases. None of them measures or writes."""
    called: list[str] = []
    found = [case(operation=name, call=lambda name=name: called.append(name)) for name in "abcde"]
    found.append(case(operation="compiles nothing", call=lambda: called.append("f"), backend="reference"))
    peer = case(kind="peer", tool="other", operation="broken", call=lambda: 1 / 0)
    monkeypatch.setattr(bench, "cases_of", lambda shape, settings: (found, [iter([peer])]))

    def start(command: list[str]) -> SimpleNamespace:
        assert bench.main(command[2:]) == 0
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(bench.subprocess, "Popen", start)
    out = tmp_path / "times.csv"
    bench.compile_ahead(["--device", "cpu", "--out", str(out)], 3)
    assert sorted(called) == list("abcde") and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--shapes", "8x60"], "divisible by 32"),
        (["--backends", "cuda"], "triton, reference"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--block-sizes", "16,17"], "--block-sizes 16,17: known sizes: 16, 32"),
        (["--formats", "nvfp4,fp5"], "--formats nvfp4,fp5: known formats: nvfp4, mxfp4"),
        (["--device", "tpu"], "--device tpu: cpu, cuda"),
        pytest.param(["--device", "cuda"], "torch sees 0 GPUs; use device=cpu", marks=NO_CUDA),
        pytest.param(["--backends", "triton"], "'triton' needs a GPU tensor", marks=NO_CUDA),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert word in capsys.readouterr().err


def row(**values: object) -> dict[str, object]:
    line: dict[str, object] = dict.fromkeys((f.name for f in dataclasses.fields(BenchRow)), None)
    return line | {"device": "GPU", "rows": 8, "columns": 64, "dtype": "bfloat16", "versions": "torch=2"} | values


def test_speed_table_puts_the_tools_side_by_side() -> None:
    same = {"operation": "naive", "format": "nvfp4", "block_size": 16, "ratio_to_copy": 1.5, "floor_us": 1.0}
    frame = pd.DataFrame(
        [
            row(
                kind="copy",
                tool="torch",
                operation="copy",
                gpu_us_median=10.0,
                call_us_median=17.0,
                iterations=7,
                commit="abc",
            ),
            row(
                kind="kernel",
                tool="quantkit",
                backend="triton",
                global_scale="given",
                gpu_us_median=15.0,
                call_us_median=30.0,
                **same,
            ),
            row(
                kind="kernel",
                tool="quantkit",
                backend="triton",
                global_scale="amax",
                gpu_us_median=25.0,
                **same | {"ratio_to_copy": 2.5},
            ),
            row(kind="kernel", tool="quantkit", backend="reference", global_scale="given", gpu_us_median=99.0, **same),
            row(kind="peer", tool="modelopt", backend="triton", global_scale="given", gpu_us_median=45.0, **same),
        ]
    )
    (table,) = speed_tables(frame)
    (line,) = table.frame.to_dict("records")
    assert (line["GPU time, µs"], line["× copy"], line["PyTorch, µs"]) == ("15.0", "1.50", "99")
    assert (line["ModelOpt"], line["qwantize"]) == ("45", "–")
    assert (line["× copy, with amax"], line["Call, µs"]) == ("2.50", "30")
    assert "The copy takes 17 µs" in " ".join(table.notes)
    assert "A copy of the weight takes 10.0 µs" in " ".join(table.notes)


def scaled(us_per_row: dict[int, float], **case: Any) -> list[dict[str, Any]]:
    """Times of one case with 1000 columns: a launch of 4 µs, and a constant time per row."""
    written = 2 if case["operation"] == "copy" else 1.5
    return [
        row(rows=rows, columns=1000, gpu_us_median=4 + us * rows, bytes=int(written * 2000 * rows), **case)
        for rows, us in us_per_row.items()
    ]


def test_the_scaling_table_tells_each_further_megabyte_from_the_whole_call() -> None:
    even = dict.fromkeys((8, 10_000, 15_000, 20_000, 40_000), 0.001)
    copy = scaled(even, kind="copy", tool="torch", operation="copy")
    ours = {"kind": "kernel", "tool": "quantkit", "operation": "sse", "format": "nvfp4", "block_size": 16,
            "backend": "triton"}  # fmt: skip
    given = scaled(even | {8: 1.0, 40_000: 0.00125}, global_scale="given", **ours)
    amax = scaled(even, global_scale="amax", **ours)
    reference = scaled(even, global_scale="given", **ours | {"backend": "reference"})
    some = scaled(dict.fromkeys((10_000, 20_000), 0.001), global_scale="given", **ours | {"block_size": 32})
    launch = row(kind="launch", tool="torch", operation="launch", columns=1000, gpu_us_median=3.5)
    elsewhere = [{**line, "device": "Another GPU", "gpu_us_median": 99.0} for line in (*copy[:2], launch)]
    measured = [*given, *copy, *amax, *reference, *some, launch, *elsewhere]
    (table,) = scaling_tables(pd.DataFrame(measured))
    assert table.title == "10,000 to 40,000 rows × 1000, bfloat16"  # of 8 rows are less than 16 MiB
    sse, copied = table.frame.to_dict("records")
    assert (sse["Operation"], sse["Format"], sse["Block"]) == ("SSE", "NVFP4", "16")
    # 10 µs for 30 MB; then 50 - 20 = 30 for 60
    assert (sse["Each further MB, µs"], sse["Most / least"]) == ("0.333 to 0.500", "1.50")
    assert (copied["Operation"], copied["Most / least"]) == ("Copy", "1.00")
    assert [line["Most / least, with amax"] for line in (sse, copied)] == ["1.00", "–"]
    assert copied["All MB, most / least"] == f"{14 / 11:.2f}"
    assert "3.5 µs" in " ".join(table.notes) and "the 2 doublings" in " ".join(table.notes)
    assert scaling_tables(pd.DataFrame([*given[:4], *copy[:4]])) == []  # one doubling
    assert scaling_tables(pd.DataFrame(measured).assign(gpu_us_median=float("nan"))) == []


def test_the_brief_speed_table_has_eight_rows_and_the_numbers_of_the_full_one() -> None:
    measured = pd.read_csv(ROOT / "results" / "bench" / "h200.csv")
    (brief,), (full,) = brief_speed_tables(measured), speed_tables(measured)
    assert [tuple(row) for row in brief.frame[["Operation", "Format"]].to_numpy()] == [
        (operation, fmt) for fmt in ("NVFP4", "MXFP4") for operation in ("Naive", "SSE", "Hessian", "Dequantize")
    ]
    assert brief.title == f"{full.title}, block size 16"
    same = full.frame[(full.frame["Block"] == "16") & (full.frame["Operation"] != "Block Hessians")]
    for shown, source in (("GPU time, µs", "GPU time, µs"), ("× copy, with amax",) * 2, ("qwantize, µs", "qwantize")):
        assert brief.frame[shown].tolist() == same[source].tolist()


def test_every_shape_has_one_global_scale() -> None:
    small, large = (sample_weight(rows, 1024) for rows in (1, 4096))
    assert small.abs().max() == large.abs().max() == small[0, 0] == pytest.approx(0.106)
    assert large.std() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("kind", ["bench", "speed", "scaling"])
def test_a_missing_or_empty_benchmark_is_named(kind: str, tmp_path: Path) -> None:
    text = f"<!-- BEGIN GENERATED: {kind}:none -->\n<!-- END GENERATED: {kind}:none -->\n"
    with pytest.raises(ReportError, match=r"no results/bench/none\.csv; run .*bench\.py"):
        fill(text, "README.md", Material(tmp_path, {}, _no_frames()))
    path = tmp_path / "results" / "bench" / "none.csv"
    path.parent.mkdir(parents=True)
    path.write_text(to_csv([]))
    with pytest.raises(ReportError, match=r"results/bench/none\.csv has no times for it; run .*bench\.py"):
        fill(text, "README.md", Material(tmp_path, {}, _no_frames()))


def _no_frames() -> dict[str, pd.DataFrame]:
    from experiments.reporting.figures import FIGURES

    return {plot.name: pd.DataFrame() for plot in FIGURES}
