"""The data of each figure from handmade records, its drawing without a screen, and its files by report.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest

from experiments import report
from experiments.record import RunRecord
from experiments.reporting import figure_data, figures
from experiments.reporting.figure_data import Sources
from tests.experiments.reporting.test_evaluations import LAYERS
from tests.experiments.reporting.test_evaluations import make as evaluated

ROOT = Path(__file__).resolve().parents[3]
PLOTS = {plot.name: plot for plot in figures.FIGURES}
ERRORS = {"naive": 0.06, "sse": 0.05, "hessian": 0.04}
REFERENCE_US = {"naive": 40.0, "sse": 200.0, "hessian": 2000.0}


def make(method: str = "sse", format: str = "nvfp4", **changes: Any) -> RunRecord:
    record = RunRecord(
        run_id="", sweep="s", status="ok", reason=None, format=format, block_size=16, method=method,
        backend="reference", requested_backend="auto", device="cpu", device_name="Some CPU",
        global_scale="amax" if format == "nvfp4" else "none", scale_rule="nearest" if format == "nvfp4" else "floor",
        model="tiny", model_origin="From a 4-bit release.", data="text", data_hash="d", layer_index=0,
        layer_module="mlp.down_proj", out_features=8, in_features=64, weight_dtype="float32", weight_std=0.02,
        seq_len=8, tokens_calibration=4096, tokens_heldout=512, seed=0, weight_error=0.09,
        output_error=ERRORS[method], output_error_heldout=ERRORS[method] + 0.001, commit="0123456789abcdef",
        started_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    record = replace(record, **changes)
    return replace(record, run_id=str(abs(hash(record.to_json()))))


def every(**changes: Any) -> list[RunRecord]:
    return [
        make(method, format, block_size=size, **changes)
        for format in ("mxfp4", "nvfp4")
        for size in (32, 16)
        for method in ("hessian", "sse", "naive")
    ]


def timed(method: str, backend: str, ms: float, **changes: Any) -> RunRecord:
    return make(
        method, backend=backend, device="cuda", time_ms_median=ms, time_ms_p20=0.9 * ms, time_ms_p80=1.1 * ms,
        time_timer="do_bench", time_device="Some GPU", **changes,
    )  # fmt: skip


def bench(**changes: Any) -> dict[str, Any]:
    times = {
        f"{kind}_{name}": t for kind, t in (("gpu_us", 10.0), ("call_us", 20.0)) for name in ("median", "20", "80")
    }
    line = {"kind": "kernel", "tool": "quantkit", "operation": "sse", "format": "nvfp4", "block_size": 16,
            "backend": "triton", "rows": 64, "columns": 128, "dtype": "bfloat16", "global_scale": "amax",
            "floor_us": 5.0, "device": "Some GPU", "commit": "c"}  # fmt: skip
    return line | times | changes


ONE_BLOCK = {
    "model": "tiny", "model_origin": "From a 4-bit release.", "data": "text", "layer_index": 0,
    "layer_module": "mlp.down_proj", "commit": "c", "format": "nvfp4", "block_size": 16, "row": 3, "block": 4,
    "chosen": {"naive": 2, "sse": 2, "hessian": 4}, "windows": {"sse": [1, 3], "hessian": [2, 4]},
    "code": [1, 2, 3, 4, 5], "squared_error": [4.0, 1.0, 2.0, 3.0, 5.0], "hessian_error": [9.0, 3.0, 4.0, 1.5, 6.0],
}  # fmt: skip
EVALUATIONS = [
    evaluated(method, kl, format=format, kl_by_layer=LAYERS)
    for format in ("nvfp4", "mxfp4")
    for method, kl in (("naive", 0.2), ("sse", 0.18), ("hessian", 0.09), ("gptq", 0.04), ("descent", 0.03))
]
HISTOGRAMS = {"scale_shifts": {"1": 30, "-1": 10, "0": 60}, "candidate_counts": {"9": 75, "10": 25}}


@pytest.fixture
def full() -> Sources:
    """Records for every figure."""
    layers = [
        make(method, format, layer_index=index, layer_module=module)
        for format in ("nvfp4", "mxfp4")
        for method in ERRORS
        for index in (0, 1)
        for module in ("mlp.up_proj", "self_attn.q_proj")
    ]
    sizes = [
        make("hessian", format, tokens_calibration=tokens, seed=seed, output_error_heldout=0.04 + seed / 100)
        for format in ("nvfp4", "mxfp4")
        for tokens in (128, 4096)
        for seed in (0, 1)
    ]
    scales = [
        make(method, global_scale=scale, weight_std=std, data_hash=str(std))
        for method in ERRORS
        for scale in ("none", "amax")
        for std in (0.1, 1.0)
    ]
    points = ("median", "20", "80")
    times = [
        bench(operation=method, format=format, block_size=size, backend=backend,
              global_scale="amax" if format == "nvfp4" else "none",
              **{f"call_us_{name}": REFERENCE_US[method] if backend == "reference" else 20.0 for name in points})
        for method in ERRORS
        for format in ("nvfp4", "mxfp4")
        for size in (16, 32)
        for backend in ("triton", "reference")
    ]  # fmt: skip
    scaled = [("kernel", "sse", "nvfp4"), ("kernel", "dequantize", "mxfp4"), ("copy", "copy", None)]
    times += [
        bench(kind=kind, operation=name, format=format, global_scale="given", rows=rows, bytes=1000 * rows)
        | ({} if kind == "kernel" else {"tool": "torch", "block_size": None})
        for rows in (64, 128, 256)
        for kind, name, format in (*scaled, ("launch", "launch", None))
    ]
    on_gram = [
        bench(tool=tool, operation=method, rows=rows, global_scale="given", output_error=error)
        for tool, method, error in (("quantkit", "sse", 5.0), ("quantkit", "gptq", 3.0), ("modelopt", "gptq", 4.0))
        for rows in ((512,) if tool == "modelopt" else (512, 640))
    ]
    on_gram.append(bench(tool="qwantize", operation="gptq", rows=512, output_error=None, gpu_us_median=None))
    modules = [record for module in ("mlp.up_proj", "self_attn.k_proj") for record in every(layer_module=module)]
    records = {
        "main": every(), "scale_distance": every(**HISTOGRAMS), "layers": layers, "calibration_size": sizes,
        "global_scale": scales, "block_size": modules,
        "layer_calibration": [replace(record, layer_index=index) for record in sizes for index in (0, 10)],
        "scale_grids": [
            make(method, format, scale_rule="floor" if format.startswith("mx") else "nearest", global_scale=scale)
            for format, scale in (("nvfp4", "amax"), ("int4_ue5m3", "none"), ("mxfp4", "none"), ("mxint4", "none"))
            for method in ERRORS
        ],
    }  # fmt: skip
    return Sources(records, ONE_BLOCK, pd.DataFrame(times), EVALUATIONS, gram_bench=pd.DataFrame(on_gram))


def test_errors_stand_in_the_order_of_the_tables(full: Sources):
    frame = figure_data.output_error(full)
    settings = list(frame[["format", "block_size", "method"]].itertuples(index=False, name=None))
    assert settings[:4] == [
        ("nvfp4", 16, "naive"),
        ("nvfp4", 16, "sse"),
        ("nvfp4", 16, "hessian"),
        ("nvfp4", 32, "naive"),
    ]
    assert len(settings) == 12
    assert settings[6][0] == "mxfp4"
    assert frame.loc[2, ["output_error", "output_error_heldout"]].tolist() == [0.04, 0.041]
    assert figure_data.weight_and_output_error(full)["weight_error"].eq(0.09).all()


def test_no_figure_mixes_subjects():
    """The most complete one is shown; among equals the one in original precision, then the one with more tokens."""
    few = [make("sse", model="few", model_origin=None, tokens_calibration=10**6)]
    quantized = every(model="release", tokens_calibration=8192)
    original = every(model="original", model_origin=None)
    longer = every(model="release", tokens_calibration=16384)

    def shown(*groups: list[RunRecord]) -> pd.DataFrame:
        frame = figure_data.output_error(Sources({"main": [record for group in groups for record in group]}))
        assert frame[["model", "tokens_calibration"]].drop_duplicates().shape[0] == 1
        return frame

    assert shown(few, quantized)["model"][0] == "release"
    assert shown(few, quantized, original)["model"][0] == "original"
    assert shown(quantized, longer)["tokens_calibration"][0] == 16384


def test_the_reference_goes_before_triton_and_newer_before_older_and_failures_are_left_out():
    later = "2026-02-01T00:00:00+00:00"
    records = [
        make("sse", output_error=0.3, started_at=later),
        make("sse", output_error=0.2),
        make("sse", output_error=0.1, backend="triton", started_at=later),
        make("sse", output_error=0.5, status="failed", reason="broken", started_at="2026-03-01T00:00:00+00:00"),
        make("sse", output_error=0.6, global_scale="none", started_at="2026-03-01T00:00:00+00:00"),
    ]
    assert figure_data.output_error(Sources({"main": records}))["output_error"].tolist() == [0.3]


def test_block_size_lists_modules_in_the_order_of_the_layer(full: Sources):
    frame = figure_data.block_size(full)
    assert list(frame["layer_module"].unique()) == ["self_attn.k_proj", "mlp.up_proj"]
    assert len(frame) == 2 * 12


def test_histograms_are_shares_of_blocks_in_rising_order(full: Sources):
    shifts = figure_data.scale_shift(full)
    assert set(shifts["method"]) == {"sse", "hessian"}
    first = shifts.iloc[:3]
    assert first["shift"].tolist() == [-1, 0, 1]
    assert first["blocks"].tolist() == [10, 60, 30]
    assert first["share"].tolist() == [0.1, 0.6, 0.3]
    assert figure_data.candidates(full)["candidates"].tolist()[:2] == [9, 10]


def test_one_block_has_both_objectives_over_their_least_error(full: Sources):
    frame = figure_data.one_block(full)
    hessian = frame[frame["objective"] == "hessian"]
    assert hessian["error_to_least"].tolist() == [6.0, 2.0, 8 / 3, 1.0, 4.0]
    assert hessian["in_window"].tolist() == [False, True, True, True, False]
    assert hessian["chosen_by"].tolist() == ["", "naive", "", "hessian", ""]
    assert frame.loc[frame["objective"] == "sse", "chosen_by"].tolist() == ["", "naive+sse", "", "", ""]


def test_layers_are_reductions_of_the_naive_error(full: Sources):
    frame = figure_data.layers(full)
    assert "naive" not in set(frame["method"])
    assert len(frame) == 2 * 2 * 4
    assert frame["layer_module"].tolist()[:2] == ["self_attn.q_proj", "self_attn.q_proj"]
    assert frame.loc[frame["method"] == "hessian", "reduction"].tolist() == pytest.approx([1 - 0.041 / 0.061] * 8)


def test_a_layer_without_a_naive_run_is_left_out():
    records = [make("naive"), make("sse"), make("sse", layer_index=1)]
    assert figure_data.layers(Sources({"layers": records}))["layer_index"].tolist() == [0]


def test_calibration_size_has_each_seed_once_and_sse_as_no_tokens(full: Sources):
    records = full.records | {"calibration_size": full.records["calibration_size"] * 2}
    frame = figure_data.calibration_size(replace(full, records=records))
    hessian = frame[(frame["format"] == "nvfp4") & (frame["method"] == "hessian")]
    assert list(zip(hessian["tokens_calibration"], hessian["seed"], strict=True)) == [
        (128, 0),
        (128, 1),
        (4096, 0),
        (4096, 1),
    ]
    assert frame.loc[frame["method"] == "sse", "tokens_calibration"].tolist() == [0, 0]
    other_text = {"main": every(data="another")}
    assert "sse" not in set(figure_data.calibration_size(replace(full, records=records | other_text))["method"])


def test_global_scale_compares_what_other_figures_leave_out(full: Sources):
    frame = figure_data.global_scale(full)
    assert len(frame) == 3 * 2 * 2
    assert set(frame["weight_std"]) == {0.1, 1.0}


def test_time_and_error_on_a_gram_matrix_are_of_one_matrix(full: Sources):
    frame = figure_data.gram_time(full)
    assert frame[["tool", "method"]].values.tolist() == [
        ["quantkit", "sse"],
        ["quantkit", "gptq"],
        ["modelopt", "gptq"],
    ]
    assert frame["ms_median"].eq(0.01).all() and frame["output_error"].tolist() == [0.05, 0.03, 0.04]
    assert "Timed on a 512 × 128 bfloat16 matrix, Some GPU." in figures.stands_on(frame)


def test_the_curve_over_tokens_has_each_layer_and_seed(full: Sources):
    frame = figure_data.layer_calibration(full)
    assert len(frame) == 2 * 2 * 2 * 2  # layers, formats, numbers of tokens, seeds
    assert frame["layer_index"].tolist() == [0] * 8 + [10] * 8 and frame["in_features"].eq(64).all()


def test_scale_grids_stand_by_elements_and_grid(full: Sources):
    frame = figure_data.scale_grids(full)
    grids = list(dict.fromkeys(frame[["elements", "scales"]].itertuples(index=False, name=None)))
    assert grids == [("E2M1", "E4M3"), ("E2M1", "UE8M0"), ("INT4", "UE5M3"), ("INT4", "UE8M0")]
    assert frame["method"].tolist()[:3] == ["naive", "sse", "hessian"]


def test_speed_up_from_the_benchmark(full: Sources):
    frame = figure_data.speed_up(full)
    assert len(frame) == 12
    assert frame["speed_up"].tolist() == [2.0, 10.0, 100.0] * 4


def test_speed_up_pairs_the_points_of_the_spread_against_each_other():
    records = [timed("sse", "reference", 10.0), timed("sse", "triton", 2.0), timed("naive", "triton", 1.0)]
    frame = figure_data.speed_up(Sources({"timing": records}))
    assert frame["method"].tolist() == ["sse"]
    assert frame.loc[0, ["speed_up", "low", "high"]].tolist() == pytest.approx([5.0, 9 / 2.2, 11 / 1.8])
    assert frame.loc[0, ["reference_us", "triton_us"]].tolist() == pytest.approx([10_000, 2_000])


@pytest.mark.parametrize("changes", [{"time_device": "Another GPU"}, {"time_timer": "another"}, {"out_features": 16}])
def test_no_speed_up_across_devices_timers_or_shapes(changes: dict[str, Any]):
    records = [timed("sse", "reference", 10.0), replace(timed("sse", "triton", 2.0), **changes)]
    assert figure_data.speed_up(Sources({"timing": records})).empty


def test_the_benchmark_is_of_one_matrix_and_of_this_library(full: Sources):
    lines = [
        bench(),
        bench(gpu_us_median=1.0, rows=32),
        bench(gpu_us_median=2.0, dtype="float32"),
        bench(gpu_us_median=3.0, tool="other"),
        bench(gpu_us_median=4.0, global_scale="none"),
        bench(gpu_us_median=6.0, kind="floor", backend=None),
        bench(gpu_us_median=7.0, operation="dequantize"),
        bench(gpu_us_median=8.0, kind="copy", operation="copy", format=None, block_size=None, rows=None, backend=None),
        bench(gpu_us_median=9.0, format="mxfp4", global_scale=None),
    ]
    frame = figure_data.time_error(replace(full, bench=pd.DataFrame(lines)))
    assert frame["us_median"].tolist() == [10.0, 9.0]
    assert "a 64 × 128 bfloat16" in figures.stands_on(frame)
    assert frame.loc[0, ["floor_us", "output_error", "method"]].tolist() == [5.0, 0.05, "sse"]


def test_scaling_is_of_one_device_and_width(full: Sources):
    frame = figure_data.scaling(full)
    assert frame.groupby("operation")["rows"].nunique()[["copy", "sse", "dequantize", "launch"]].eq(3).all()
    copy = frame[frame["operation"] == "copy"]
    assert copy["us_per_mb"].tolist() == pytest.approx([10 / 0.064, 10 / 0.128, 10 / 0.256])
    assert full.bench is not None
    elsewhere = full.bench.assign(device="Another GPU").query("rows < 200")
    assert figure_data.scaling(replace(full, bench=pd.concat([elsewhere, full.bench])))["device"].eq("Some GPU").all()
    assert figure_data.scaling(replace(full, bench=elsewhere)).empty


def test_each_further_megabyte_has_no_share_of_what_a_call_takes_at_least(full: Sources):
    assert full.bench is not None
    times = full.bench.assign(gpu_us_median=4 + full.bench["rows"] / 8)
    times["bytes"] *= times["operation"] != "launch"
    more = times[times["rows"] == 256].assign(rows=300, gpu_us_median=4 + 300 / 8)
    more["bytes"] *= 300 / 256
    frame = figure_data.scaling(replace(full, bench=pd.concat([more, times])))
    for name in ("copy", "dequantize"):
        further = frame[frame["operation"] == name].set_index("rows")["us_per_further_mb"]
        assert further.isna().tolist() == [True, False, False, True]  # 150 rows were not timed
        assert further.loc[[128, 256]].tolist() == pytest.approx([125.0] * 2)
    assert frame[frame["operation"] == "launch"]["us_per_further_mb"].isna().all()


def test_what_has_no_label_or_style_yet_is_drawn_all_the_same(full: Sources):
    """A format and a method that are new in the library."""
    assert full.bench is not None
    new = {"nvfp4": "fp4_new", "sse": "new"}

    def renamed(record: RunRecord) -> RunRecord:
        return replace(record, **{key: new.get(was := getattr(record, key), was) for key in ("format", "method")})

    records = {name: [*found, *map(renamed, found)] for name, found in full.records.items()}
    times = full.bench.replace({"format": new, "operation": new})
    sources = Sources(records, full.one_block, pd.concat([full.bench, times]), gram_bench=full.gram_bench)
    drawn = {plot.name: plot.data(sources) for plot in figures.FIGURES}
    assert "fp4_new" in set(drawn["output_error"]["format"]) and "new" in set(drawn["output_error"]["method"])
    for plot in figures.FIGURES:
        assert plot.pictures(drawn[plot.name])
    styles = [figures.COLOR[name] for name in ("naive", "sse", "hessian", "new")]
    assert len(set(styles)) == 4 and figures._bar_width(drawn["output_error"]) == pytest.approx(0.87 / 4 - 0.03)


@pytest.mark.parametrize("plot", figures.FIGURES, ids=lambda plot: plot.name)
def test_no_records_no_data(plot: figures.Plot):
    assert plot.data(Sources({})).empty
    assert "run `python" in plot.needs


@pytest.mark.parametrize("plot", figures.FIGURES, ids=lambda plot: plot.name)
def test_each_draws_at_paper_size_with_type_of_seven_points(plot: figures.Plot, full: Sources):
    from matplotlib.text import Text

    frame = plot.data(full)
    assert len(frame)
    figure = plot.figure(frame)
    assert figure.get_size_inches().tolist() == [plot.width, plot.height]
    assert plot.width in (3.4, 7.0)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7
    files = plot.pictures(frame)
    assert files[f"{plot.name}.png"].startswith(b"\x89PNG")
    assert files[f"{plot.name}.pdf"].startswith(b"%PDF")
    assert plot.pictures(frame) == files
    assert plot.caption in plot.markdown(frame)


@pytest.mark.parametrize("plot", figures.FIGURES, ids=lambda plot: plot.name)
def test_nothing_is_cut_off(plot: figures.Plot, full: Sources):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot.figure(plot.data(full))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())  # inches
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= plot.width
    assert box.y1 <= plot.height


def test_a_caption_names_what_the_figure_stands_on(full: Sources):
    said = figures.stands_on(figure_data.output_error(full))
    assert said == (
        "tiny, layer 0 mlp.down_proj, text text, 4,096 calibration tokens, 512 held out. "
        "From a 4-bit release. Commit 0123456789."
    )
    assert "Timed on a 64 × 128 bfloat16 matrix, Some GPU." in figures.stands_on(figure_data.time_error(full))


def test_the_map_of_layers_is_white_at_naive_and_red_where_it_is_worse() -> None:
    values = pd.Series([-10.0, 20.0, 60.0])
    norm = figures._around_zero(values)
    assert [float(norm(value)) for value in (-10.0, 0.0, 60.0)] == [0.0, 0.5, 1.0]
    only_better = figures._around_zero(pd.Series([20.0, 60.0]))
    assert float(only_better(0.0)) == 0.5 and float(only_better(20.0)) > 0.5
    worse, better = (matplotlib.colormaps[figures.BETTER_OR_WORSE](side) for side in (0.0, 1.0))
    assert worse[0] > worse[2] and better[2] > better[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scaling", ["marks: a call's time over all its MB", "dotted: time added by doubling the rows"]),
        ("global_scale", ["filled: no global scale", "open, dashed: from amax"]),
        ("layers", ["better", "worse"]),
    ],
)
def test_marks_and_lines_are_explained_on_the_picture(name: str, said: list[str], full: Sources):
    from matplotlib.text import Text

    figure = PLOTS[name].figure(PLOTS[name].data(full))
    texts = " ".join(text.get_text() for text in figure.findobj(Text))
    assert all(part in texts for part in said)


# The files that report.py writes.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    records = tmp_path / "results" / "records"
    records.mkdir(parents=True)
    (records / "main.jsonl").write_text("".join(f"{record.to_json()}\n" for record in every()))
    (tmp_path / "README.md").write_text(
        "<!-- BEGIN GENERATED: figure:output_error -->\n<!-- END GENERATED: figure:output_error -->\n"
    )
    assert report.main([], tmp_path) == 0
    return tmp_path


def test_rebuild_writes_what_has_records_and_says_what_has_none(root: Path, capsys: pytest.CaptureFixture[str]):
    folder = root / "results" / "figures"
    names = {"output_error", "weight_and_output_error"}
    assert {path.name for path in folder.iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("csv", "pdf", "png")
    } | {"README.md"}
    assert pd.read_csv(folder / "output_error.csv")["output_error"].tolist()[:3] == [0.06, 0.05, 0.04]
    assert "![Output error by format and method](results/figures/output_error.png)" in (root / "README.md").read_text()
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "](output_error.png)" in page
    assert "experiment=layers" in page
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert report.main([], root) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Nothing to change")
    assert "no figure layers: results/records/layers.jsonl" in shown.err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert report.main(["--check"], root) == 0


def test_check_fails_where_the_data_are_altered(root: Path, capsys: pytest.CaptureFixture[str]):
    path = root / "results" / "figures" / "output_error.csv"
    path.write_text(path.read_text().replace("0.041", "0.031", 1))
    assert report.main(["--check"], root) == 1
    assert "results/figures/output_error.csv" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["csv", "pdf", "png"])
def test_check_fails_where_a_file_is_missing(kind: str, root: Path, capsys: pytest.CaptureFixture[str]):
    (root / "results" / "figures" / f"output_error.{kind}").unlink()
    assert report.main(["--check"], root) == 1
    assert f"output_error.{kind}" in capsys.readouterr().out


def test_check_does_not_compare_the_bytes_of_pictures(root: Path):
    (root / "results" / "figures" / "output_error.png").write_bytes(b"of another version of matplotlib")
    assert report.main(["--check"], root) == 0


def test_a_figure_that_lost_its_records_is_found_and_removed(root: Path, capsys: pytest.CaptureFixture[str]):
    stale = root / "results" / "figures" / "layers.png"
    stale.write_bytes(b"")
    assert report.main(["--check"], root) == 1
    assert "results/figures/layers.png follows from no record" in capsys.readouterr().out
    assert report.main([], root) == 0
    assert not stale.exists()


def test_a_document_cannot_show_a_figure_that_is_none(root: Path, capsys: pytest.CaptureFixture[str]):
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("figure:output_error", "figure:layers"))
    assert report.main([], root) == 1
    assert "figure:layers" in capsys.readouterr().err


def test_the_committed_records_draw_without_torch_or_pyplot(tmp_path: Path):
    shutil.copytree(ROOT / "results" / "records", tmp_path / "results" / "records")
    code = (
        "import sys; from pathlib import Path; from experiments import report; "
        f"root = Path({str(tmp_path)!r}); (root / 'README.md').touch(); "
        "assert report.main([], root) == 0; "
        "assert not {'torch', 'quantkit', 'matplotlib.pyplot'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    made = {path.stem for path in (tmp_path / "results" / "figures").glob("*.png")}
    assert {"output_error", "one_block", "calibration_size", "scale_shift"} <= made
    assert json.loads((tmp_path / "results" / "records" / "one_block.json").read_text())["code"]
