"""Times of whole models as tables: what is measured, and what follows from it by the formulas of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import bench_model
from experiments.bench_model import ModelBenchRow, to_csv
from experiments.capture import losses
from experiments.model import ranks, walk
from experiments.reporting import whole
from experiments.reporting.pages import Material, fill
from experiments.reporting.whole import LARGE, Shape, fitted, share, whole_model_tables, worked_out

SMALL = Shape(36, 2560, 9728, 32, 8, 128, 151936)
TOKENS = 128 * 2048


def row(processes: int, **changes: Any) -> ModelBenchRow:
    """Loss 80 s, forward 16 s and sums 24 s of one process, divided without a constant; write takes 5 s."""
    part = {phase: share(phase, processes, SMALL, TOKENS) for phase in whole.DIVIDED}
    values: dict[str, Any] = {
        **{"case": "gptq", "processes": processes, "device": "Some GPU", "format": "nvfp4", "block_size": 16},
        **{"method": "gptq", "hessian_weighting": "loss", "hessian_matmul": "tf32", "calibrate": "sequential"},
        **{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__},
        **{"weights": SMALL.layers * SMALL.layer_weights, "sequences": 128, "seq_len": 2048, "same_bytes": True},
        **{"loss_s": 80 * part["loss"], "forward_s": 16 * part["forward"], "sums_s": 24 * part["sums"]},
        **{"solve_s": 20 * part["solve"], "read_s": 3.0, "write_s": 5.0, "peak_device_bytes": 30 * 2**30},
    }
    values |= changes
    phases = sum(values[f"{phase}_s"] for phase in whole.PHASES)
    return ModelBenchRow(**{"wall_s": phases + 12.0, "duration_s": phases + 2.0} | values)


def frame(*rows: ModelBenchRow, folder: Path) -> pd.DataFrame:
    path = folder / "some_model.csv"
    path.write_text(to_csv(rows))
    return pd.read_csv(path)


def test_the_constants_are_those_of_the_code() -> None:
    assert (ranks.SEGMENTS, walk.BATCH_TOKENS["cuda"]) == (whole.SEGMENTS, whole.BATCH_TOKENS)
    assert whole.PIECE_TOKENS == losses.PIECE_TOKENS
    assert set(whole.PHASES) == set(bench_model.PHASES)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_the_busiest_process_is_that_of_the_code(processes: int) -> None:
    for step in SMALL.steps:
        costs = [rows * columns for rows, columns in step]
        owners = ranks.Ranks(0, processes).shares(costs)
        load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == n) for n in range(processes)]
        assert whole._busiest(costs, processes) == max(load)


def test_a_shape_counts_its_weights_and_operations() -> None:
    assert SMALL.layer_weights == 100_925_440 and SMALL.parameters == 4_022_272_000
    assert LARGE.parameters == pytest.approx(69.5e9, rel=0.01)
    assert Shape(1, 2, 3, 1, 1, 2, 5).forward(10, 4) == 10 * 2 * (4 * 4 + 3 * 6) + 2 * 10 * 4 * 2
    square = Shape(1, 2, 2, 1, 1, 2, 5)  # every matrix is 2 × 2
    assert square.sums(10, weighted=False, sequential=False) == 2 * 10 * 4 * 4
    assert square.sums(10, weighted=True, sequential=False) == 2 * 10 * 4 * 7
    assert square.sums(10, weighted=True, sequential=True) == 2 * 10 * 4 * (14 + 2)
    assert square.solve() == 7 * 16


def test_the_busiest_process_has_the_largest_share() -> None:
    assert [share("loss", n, SMALL, TOKENS) for n in (1, 2, 3, 4, 8, 64)] == [1, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 8]
    assert [share("sums", n, SMALL, TOKENS) for n in (1, 4, 64)] == [1, 1 / 4, 1 / 8]
    two = (4096 * 2560 + 2560 * 4096 + 9728 * 2560 + 2560 * 9728) / SMALL.layer_weights
    assert share("solve", 1, SMALL, TOKENS) == 1
    assert share("solve", 2, SMALL, TOKENS) == share("solve", 64, SMALL, TOKENS) == pytest.approx(two)
    assert share("write", 64, SMALL, TOKENS) == 1


def test_the_fit_finds_what_is_divided_and_what_is_not() -> None:
    assert fitted([1, 0.5, 0.25], [11, 6, 3.5]) == pytest.approx((10, 1))
    assert fitted([1, 0.5], [5, 6]) == (0, 5.5)  # more processes took longer
    assert fitted([1, 0.5], [10, 4]) == pytest.approx((12 / 1.25, 0))  # better than linear
    assert fitted([1, 1], [4, 6]) == (0, 5)


def test_more_gpus_are_worked_out_from_the_measured_ones(tmp_path: Path) -> None:
    runs = frame(row(1), row(2), row(4), folder=tmp_path)
    eight = worked_out(runs, 8)
    assert (eight["loss"], eight["forward"], eight["sums"]) == pytest.approx((10, 2, 3))
    assert (eight["read"], eight["write"], eight["rest"]) == pytest.approx((3, 5, 12))
    assert worked_out(runs, 64) == eight  # there are 8 segments
    phases, larger = whole_model_tables(runs)
    assert list(phases.frame) == ["Operation", "1 GPU", "2 GPUs", "4 GPUs", "8 GPUs, worked out", "64 GPUs, worked out"]
    lines = phases.frame.set_index("Operation")
    assert lines.loc["loss weights"].tolist() == ["80.0", "40.0", "20.0", "10.0", "10.0"]
    assert lines.loc["whole command", "1 GPU"] == "160.0" and lines.loc["speed-up", "1 GPU"] == "1.00×"
    assert lines.loc["memory, GiB"].tolist() == ["30.0", "30.0", "30.0", "–", "–"]
    assert "the same bytes" in phases.notes[0] and phases.title == "GPTQ, block 16, sequential, loss-weighted in TF32"
    large = larger.frame.set_index("Operation")["70B, worked out"]
    assert large["write"] == f"{5 * LARGE.parameters / SMALL.parameters:.0f} s"
    assert large["forward passes"] == f"{16 * LARGE.forward(TOKENS, 2048) / SMALL.forward(TOKENS, 2048):.0f} s"
    assert large["parameters in float32, for loss weights"] == f"{4 * LARGE.parameters / 2**30:.0f} GiB" == "259 GiB"


def test_runs_that_failed_or_differ_are_told(tmp_path: Path) -> None:
    failed = ModelBenchRow("gptq", 2, note="ended after 9 s")
    (one, _) = whole_model_tables(frame(row(1), failed, folder=tmp_path))
    assert list(one.frame) == ["Operation", "1 GPU"]
    (other, _) = whole_model_tables(frame(row(1), row(2, same_bytes=False), folder=tmp_path))
    assert "runs differ in bytes" in other.notes[0]
    (two_sided, _) = whole_model_tables(frame(row(1, case="two_sided_descent", method="descent"), folder=tmp_path))
    assert two_sided.title == "Descent, block 16, sequential, two-sided in TF32"
    assert whole_model_tables(frame(failed, folder=tmp_path)) == []


def test_a_page_shows_them(tmp_path: Path) -> None:
    (tmp_path / "results/bench").mkdir(parents=True)
    frame(row(1), row(4), folder=tmp_path / "results/bench")
    page = "<!-- BEGIN GENERATED: whole_model:some_model -->\n<!-- END GENERATED: whole_model:some_model -->\n"
    text = fill(page, "docs/whole_models.md", Material(tmp_path, {}, {}))
    assert "**GPTQ, block 16, sequential, loss-weighted in TF32**" in text and "8 GPUs, worked out" in text
