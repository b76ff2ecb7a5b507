from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.record import FIELDS, SPARSE_FIELDS, RunRecord
from experiments.reporting.labels import DEFAULT_RULES, FORMATS, GLOBAL_SCALES, GRIDS, METHODS, OPTIMAL
from experiments.reporting.pivots import by_layer, by_method
from experiments.reporting.published import published_tables, read_published
from experiments.reporting.records_csv import records_csv
from experiments.reporting.rows import make_rows, row_frame
from experiments.reporting.table import Table
from experiments.reporting.tables import make_tables, unfinished
from experiments.reporting.verification import verification_tables

ROOT = Path(__file__).resolve().parents[3]

BASE = RunRecord(
    run_id="nvfp4-b16-sse-reference",
    sweep="s",
    status="ok",
    reason=None,
    format="nvfp4",
    block_size=16,
    method="sse",
    backend="reference",
    requested_backend="reference",
    device="cuda",
    device_name="Some GPU",
    global_scale="amax",
    scale_rule="nearest",
    model="tiny/Model",
    model_origin="They come from a 4-bit release.",
    data="text",
    data_split="train",
    substituted=False,
    layer_index=0,
    layer_module="mlp.down_proj",
    out_features=64,
    in_features=128,
    seq_len=32,
    sequences=8,
    tokens_calibration=4096,
    tokens_heldout=512,
    seed=0,
    weight_error=0.07894,
    output_error=0.04956,
    output_error_heldout=0.0512,
    time_ms_median=14.0,
    time_timer="do_bench",
    time_device="Some GPU",
    commit="0123456789abcdef",
    dirty=False,
    versions={"torch": "2.13.0"},
    started_at="2026-01-01T00:00:00+00:00",
)


def make(**changes: object) -> RunRecord:
    record = replace(BASE, **changes)  # type: ignore[arg-type]
    name = "-".join(
        str(v) for v in (record.model, record.format, f"b{record.block_size}", record.method, record.backend)
    )
    return replace(record, run_id=name) if "run_id" not in changes else record


def only_table(records: list[RunRecord]) -> Table:
    (table,) = make_tables(records, read_published(ROOT / "results" / "published"))
    return table


def test_a_row_shows_percent_with_two_decimals():
    frame = only_table([make()]).frame
    assert list(frame.columns) == [
        "Format",
        "Method",
        "Weight error",
        "Output error",
        "Output error, held out",
        "Triton speed-up",
    ]
    assert frame.values.tolist() == [["NVFP4", "SSE", "7.89 %", "4.96 %", "5.12 %", "–"]]


def test_title_and_notes_name_what_the_numbers_stand_on():
    table = only_table([make(substituted=True, dirty=True)])
    assert table.title == "tiny/Model, layer 0 mlp.down_proj (64 × 128), block size 16"
    text = "\n".join(table.notes)
    assert "They come from a 4-bit release." in table.notes
    assert (
        "Data: text, split train; 8 sequences of up to 32 tokens: 4,096 calibration tokens, 512 held out; seed 0"
        in text
    )
    assert "offline twin" in text
    assert "Device: Some GPU; commit 0123456789 with uncommitted changes" in text
    assert "NVFP4 global scale amax" in text
    assert "No speed-up" in text
    for shown in (table.markdown(), table.terminal()):
        assert table.title in shown
        assert all(note in shown for note in table.notes)


def test_rows_stand_in_the_order_of_formats_and_methods():
    records = [make(format=f, method=m) for m in ("hessian", "naive", "sse") for f in ("mxfp4", "nvfp4")]
    frame = only_table(records).frame
    methods = ["Naive", "SSE", "Hessian"]
    assert list(zip(frame["Format"], frame["Method"], strict=True)) == [
        (f, m) for f in ("NVFP4", "MXFP4") for m in methods
    ]


def test_a_run_that_was_not_timed_has_the_time_of_the_one_before():
    timed = [make(backend=backend, time_ms_median=ms) for backend, ms in (("reference", 20.0), ("triton", 2.0))]
    untimed = {"time_ms_median": None, "time_timer": None, "time_device": None}
    later = make(backend="triton", started_at="2026-01-02", **untimed)
    (row,) = make_rows([later, *timed])
    assert row.speedup == 10 and row.runs[1].started_at == "2026-01-02"
    for changed in ({"weight_error": 0.5}, {"commit": "f" * 40}, {"dirty": True}):
        (row,) = make_rows([*timed, replace(later, **changed)])  # of other code: its time may be another, too
        assert row.speedup is None


def test_models_and_block_sizes_and_devices_never_share_a_table():
    records = [make(), make(model="other"), make(block_size=32), make(device_name="Other GPU"), make(tokens_heldout=0)]
    found = make_tables(records)
    assert len(found) == 5
    assert all(len(table.frame) == 1 for table in found)
    assert any("none held out" in note for table in found for note in table.notes)


def test_a_pinned_offline_twin_shares_the_table():
    table = only_table([make(substituted=True), make(method="naive")])
    assert len(table.frame) == 2
    assert sum("offline twin" in note for note in table.notes) == 1


def test_speedup_is_the_ratio_of_medians_on_one_device():
    triton = make(backend="triton", time_ms_median=2.0)
    (row,) = make_rows([triton, make()])
    assert row.speedup == 7.0
    assert [run.backend for run in row.runs] == ["reference", "triton"]
    table = only_table([triton, make()])
    assert table.frame["Triton speed-up"].tolist() == ["7.0×"]
    assert not any("No speed-up" in note for note in table.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"time_ms_median": None, "time_timer": "interpreter"},
        {"time_timer": "interpreter"},
        {"time_device": "another"},
        {"status": "unsupported", "reason": "no GPU"},
    ],
)
def test_no_speedup_without_two_times_that_compare(change: dict[str, object]):
    triton: dict[str, object] = {"backend": "triton", "time_ms_median": 2.0}
    (row,) = make_rows([make(), make(**(triton | change))])
    assert row.speedup is None


def test_the_newest_run_counts():
    newer = make(weight_error=0.5, started_at="2026-02-01T00:00:00+00:00")
    (row,) = make_rows([newer, make()])
    assert row.weight_error == 0.5


def test_backends_that_disagree_are_told():
    agree = only_table([make(), make(backend="triton", weight_error=0.07894 * (1 + 1e-6))])
    differ = only_table([make(), make(backend="triton", weight_error=0.0796)])
    assert not any("disagree" in note for note in agree.notes)
    assert any("The backends disagree on NVFP4 SSE" in note for note in differ.notes)


def test_settings_of_a_format_are_told_apart():
    frame = only_table([make(global_scale="none"), make(global_scale="amax"), make(global_scale=0.5)]).frame
    assert sorted(frame["Format"]) == [
        "NVFP4 (global scale 0.5)",
        "NVFP4 (global scale amax)",
        "NVFP4 (global scale none)",
    ]


def with_damping(damping: float, **changes: object) -> RunRecord:
    return make(method="gptq", method_settings={"scale": "joint", "damping": damping}, **changes)


def test_settings_of_a_method_are_told_apart_where_they_differ():
    frame = only_table([make(), with_damping(0.1), with_damping(0.01, output_error=0.03)]).frame
    assert frame["Method"].tolist() == ["SSE", "GPTQ, damping 0.01", "GPTQ, damping 0.1"]
    assert frame["Output error"].tolist() == ["4.96 %", "3.00 %", "4.96 %"]
    assert only_table([make(), with_damping(0.1)]).frame["Method"].tolist() == ["SSE", "GPTQ"]


def test_held_out_errors_by_layer_and_their_mean_over_the_least():
    (table,) = by_layer(
        with_damping(damping, layer_index=layer, output_error_heldout=error)
        for damping, errors in ((0.01, (0.02, 0.04)), (0.1, (0.03, 0.03)))
        for layer, error in zip((10, 0), errors, strict=True)
    )
    assert table.frame.columns.tolist() == ["Format", "Method", "Layer 0", "Layer 10", "Over the least"]
    assert table.frame.values.tolist() == [
        ["NVFP4", "GPTQ, damping 0.01", "4.00 %", "2.00 %", "1.167"],
        ["NVFP4", "GPTQ, damping 0.1", "3.00 %", "3.00 %", "1.250"],
    ]
    assert "held-out tokens" in table.title and any("512 held out" in note for note in table.notes)


def test_a_setting_without_a_layer_has_no_mean():
    (table,) = by_layer([with_damping(0.01), with_damping(0.1), with_damping(0.1, layer_index=10)])
    assert table.frame["Over the least"].tolist() == ["–", "1.000"]
    assert table.frame["Layer 10"].tolist() == ["–", "5.12 %"]


def test_held_out_errors_of_formats_by_method():
    (table,) = by_method(
        [make(method="gptq", output_error_heldout=0.03), make(), make(format="mxint4", global_scale="none")]
    )
    assert table.frame.to_dict("list") == {
        "Elements": ["E2M1", "INT4"],
        "Scales": ["E4M3", "UE8M0"],
        "Format": ["NVFP4", "MXINT4"],
        "SSE": ["5.12 %", "5.12 %"],
        "GPTQ": ["3.00 %", "–"],
    }


@pytest.mark.parametrize("model", ["Qwen/Qwen3-4B", "Qwen3-4B (local)", "qwen3_4b"])
@pytest.mark.parametrize("data", ["Salesforce/wikitext/wikitext-2-raw-v1", "wikitext2 (some-folder, local)"])
def test_published_figures_stand_beside_their_model_only(model: str, data: str):
    qwen = {"model": model, "data": data, "out_features": 2560, "in_features": 9728}
    table = only_table([make(**qwen)])
    published = {column: table.frame[column].tolist() for column in table.frame.columns if "Published" in column}
    assert published == {
        "Published weight error": ["8.74 %"],
        "Published output error": ["6.04 %"],
        "Published speed-up": ["7.0×"],
    }
    assert any("Published figures: qwantize" in note for note in table.notes)
    for change in ({"layer_index": 1}, {"in_features": 64}, {"data": "python_docs"}, {"model": "Qwen/Qwen3-8B"}):
        assert "Published weight error" not in only_table([make(**(qwen | change))]).frame


def test_published_tables_say_that_they_are():
    found = published_tables(read_published(ROOT / "results" / "published"))
    assert [table.title.rpartition(" ")[2] for table in found] == ["16", "32"]
    assert all(table.title.startswith("Published, not measured here: Qwen/Qwen3-4B") for table in found)
    assert all(table.notes == ("Source: qwantize, docs/source/results.md",) for table in found)
    first = found[0].frame.iloc[0].tolist()
    assert first == ["NVFP4", "Naive", "10.05 %", "6.89 %", "2.8", "1.9", "1.5×"]


def test_unfinished_runs_are_listed_by_reason():
    lost = {"status": "unsupported", "reason": "Triton needs a GPU."}
    records = [
        make(),
        make(backend="triton", **lost),
        make(backend="triton", method="naive", **lost),
        make(format="mxfp4", status="failed", reason="K is 100."),
    ]
    assert unfinished(records) == [
        "unsupported: NVFP4 Naive b16 Triton on tiny/Model, NVFP4 SSE b16 Triton on tiny/Model: Triton needs a GPU.",
        "failed: MXFP4 SSE b16 reference on tiny/Model: K is 100.",
    ]


def test_a_run_that_ended_well_later_is_not_unfinished():
    assert unfinished([make(status="failed", reason="killed"), make()]) == []


def test_markdown_is_a_pipe_table():
    lines = only_table([make()]).markdown().splitlines()
    assert lines[0].startswith("**tiny/Model")
    header = next(i for i, line in enumerate(lines) if line.startswith("|"))
    assert lines[header - 1] == ""
    assert set(lines[header + 1]) <= set("|:-")
    assert [cell.strip() for cell in lines[header + 2].strip("|").split("|")][:3] == ["NVFP4", "SSE", "7.89 %"]


def test_csv_has_every_field_in_order_and_full_precision():
    text = records_csv([make(weight_error=0.1 + 0.2, output_error=None)])
    header, line = list(csv.reader(io.StringIO(text)))
    values = dict(zip(header, line, strict=True))
    assert tuple(header) == tuple(name for name in FIELDS if name not in SPARSE_FIELDS)
    sparse = records_csv([make(), make(method="gptq", method_settings={"scale": "joint"})])
    assert "method_settings" in sparse.splitlines()[0].split(",") and '{""scale"": ""joint""}' in sparse
    assert float(values["weight_error"]) == 0.1 + 0.2
    assert values["output_error"] == ""
    assert values["tokens_calibration"] == "4096"
    assert values["dirty"] == "false"
    assert values["versions"] == '{"torch": "2.13.0"}'


def test_row_frame_holds_numbers():
    frame = row_frame(make_rows([make(), make(backend="triton", time_ms_median=2.0)]))
    (line,) = frame.to_dict("records")
    assert line["speedup"] == 7.0
    assert line["backends"] == "reference+triton"
    assert line["weight_error"] == BASE.weight_error
    assert line["tokens_calibration"] == 4096
    assert row_frame([]).empty


def test_verification_table_counts_the_runs_that_were_verified() -> None:
    verified = replace(BASE, verified_blocks=1000, verified_violations=2, verified_worst_excess=0.5)
    hessian = replace(verified, run_id="h", method="hessian", verified_violations=0, verified_worst_excess=0.0)
    naive = replace(verified, run_id="n", method="naive", verified_violations=600)
    (table,) = verification_tables([hessian, verified, naive, BASE])
    assert table.frame["Method"].tolist() == ["Naive", "SSE", "Hessian"]
    assert table.frame["Violations"].tolist() == ["600", "2", "0"]
    assert table.frame["Worst excess"].tolist() == ["0.5", "0.5", "0"]
    assert "In all 2,000 blocks of the searches, 2 violations of the contract of docs/theory.md" in table.notes
    assert verification_tables([BASE]) == []


def test_every_format_and_method_of_the_library_has_its_label_and_defaults():
    """experiments/reporting/labels.py imports neither torch nor the library, so this test compares them."""
    import quantkit

    assert set(FORMATS) == set(quantkit.FORMATS) and (FORMATS["nvfp4"], FORMATS["mxfp4"]) == ("NVFP4", "MXFP4")
    assert list(FORMATS).index("nvfp4") < list(FORMATS).index("mxfp4")
    assert list(METHODS) == list(quantkit.METHODS)
    assert {name: f.default_global_scale for name, f in quantkit.FORMATS.items()} == GLOBAL_SCALES
    grids = {name: (f.element.name.upper(), f.scale.name.upper()) for name, f in quantkit.FORMATS.items()}
    assert grids == GRIDS
    assert {f.scale_rules[0] for f in quantkit.FORMATS.values()} == set(DEFAULT_RULES)
    assert not {rule for f in quantkit.FORMATS.values() for rule in f.scale_rules[1:]} & set(DEFAULT_RULES)
    assert tuple(name for name, method in quantkit.METHODS.items() if method.is_optimal) == OPTIMAL


def test_runs_with_loss_weighted_hessians_are_rows_of_their_own() -> None:
    plain = replace(BASE, method="hessian")
    weighted = replace(
        plain, run_id="w", hessian_weighting="loss", hessian_groups=1, hessian_samples=1, output_error=0.06
    )
    refined = replace(weighted, run_id="g", hessian_groups=4, hessian_samples=2, output_error=0.07)
    (table,) = make_tables([refined, weighted, plain])
    assert list(table.frame["Method"]) == [
        "Hessian",
        "Hessian, loss-weighted",
        "Hessian, loss-weighted, 4 row groups, 2 labels per token",
    ]
    assert list(table.frame["Output error"]) == ["4.96 %", "6.00 %", "7.00 %"]
    frame = row_frame(make_rows([plain, weighted]))
    assert frame["hessian_weighting"].fillna("output").tolist() == ["output", "loss"]
    assert "hessian_weighting" not in row_frame(make_rows([plain]))


def test_a_csv_has_columns_for_loss_weights_where_a_run_has_them() -> None:
    weighted = replace(BASE, hessian_weighting="loss", hessian_groups=4, hessian_samples=1)
    plain, both = (list(csv.DictReader(io.StringIO(records_csv(records)))) for records in ([BASE], [BASE, weighted]))
    assert not any(name.startswith("hessian") for name in plain[0])
    assert [line["hessian_groups"] for line in both] == ["", "4"]
