"""Tables of the benchmark that has a Gram matrix."""

from __future__ import annotations

import pandas as pd

from experiments.reporting.speed import gram_tables


def _line(tool: str, operation: str, **changes: object) -> dict[str, object]:
    line: dict[str, object] = {
        "kind": "kernel" if tool == "quantkit" else "peer", "tool": tool, "operation": operation, "format": "nvfp4",
        "block_size": 16.0, "rows": 8, "columns": 32, "dtype": "bfloat16", "device": "Some GPU", "commit": "abc",
        "versions": "torch=2.0 triton=3.0 llmcompressor=1.2", "gpu_us_median": 1500.0, "output_error": 4.567,
        "note": None,
    }  # fmt: skip
    return line | changes


def test_a_line_for_each_method_that_was_judged_and_a_note_for_each_peer_that_was_not() -> None:
    bench = pd.DataFrame(
        [
            _line("torch", "copy", kind="copy", output_error=None),
            _line("quantkit", "gptq"),
            _line("llmcompressor", "gptq", gpu_us_median=9000.0, output_error=8.0),
            _line("qwantize", "gptq", gpu_us_median=None, output_error=None, note="has no GPTQ"),
        ]
    )
    (table,) = gram_tables(bench)
    assert table.title == "8 × 32, bfloat16, NVFP4, block size 16"
    assert table.frame.to_numpy().tolist() == [
        ["quantkit", "GPTQ", "1.50", "4.57 %"],
        ["llm-compressor", "GPTQ", "9.00", "8.00 %"],
    ]
    assert "qwantize has no GPTQ" in table.notes
    assert "llmcompressor 1.2" in table.notes[0]


def test_a_benchmark_without_gram_has_no_such_table() -> None:
    assert gram_tables(pd.DataFrame([_line("quantkit", "sse", output_error=None)])) == []
