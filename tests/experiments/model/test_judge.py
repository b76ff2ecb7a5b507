"""The blocks of other tools' checkpoints, judged against the original weights."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import judge as door
from experiments.files import SourceError
from experiments.model.export import export
from experiments.model.judge import judge, judge_model
from quantkit import quantize, verify
from tests.experiments.model.exported import SHARED_SCALE, build, quantized
from tests.experiments.model.folders import source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Naive and best scales of the same model, as a folder of quantkit and as two engines' layouts."""
    root = tmp_path_factory.mktemp("judged")
    folders = {}
    for method in ("naive", "sse"):
        own = quantized(root / method, "llama", "nvfp4", only="layers.0.", method=method)
        folders[method] = {"own": own.folder}
        for layout in ("compressed_tensors", "modelopt"):
            folders[method][layout] = root / f"{method}-{layout}"
            export(own, folders[method][layout], layout)
    return SimpleNamespace(root=root, original=root / "naive" / "llama-source", **folders)


@pytest.mark.parametrize("layout", ["own", "compressed_tensors", "modelopt"])
def test_naive_scales_are_counted_and_best_ones_are_not(made: SimpleNamespace, layout: str) -> None:
    model = build("llama")
    for method in ("naive", "sse"):
        rows = list(judge_model(source(getattr(made, method)[layout]), source(made.original), made.root / "cache"))
        assert len(rows) == 7
        for row in rows:
            weight = model.get_submodule(row.name).weight.detach().float()
            meant = verify(quantize(weight, method=method, global_scale=SHARED_SCALE), weight)
            assert (row.blocks, row.not_optimal, row.wrong_codes) == (meant.blocks, meant.violations, 0)
            assert row.worst_excess == meant.worst_excess
        if method == "sse":
            assert all(row.not_optimal == 0 and row.weight_error == row.least_error for row in rows)
        else:
            assert all(row.not_optimal > row.blocks / 4 and row.weight_error > row.least_error for row in rows)


def test_experts_are_judged_under_their_names_in_the_checkpoint(tmp_path: Path) -> None:
    own = quantized(tmp_path, "qwen3_moe", "nvfp4", only="layers.1.mlp")
    export(own, tmp_path / "out", "modelopt")
    original = source(tmp_path / "qwen3_moe-source")
    apart = list(judge_model(source(tmp_path / "out"), original, tmp_path / "cache"))
    joined = list(judge_model(source(own.folder), original, tmp_path / "cache"))
    assert len(apart) == 12 and len(joined) == 2
    assert {row.name for row in apart} > {"model.layers.1.mlp.experts.3.gate_proj"}
    assert sum(row.blocks for row in apart) == sum(row.blocks for row in joined)
    assert all(row.not_optimal == 0 for row in (*apart, *joined))


def test_gpt_oss_is_judged_in_its_own_orientation(tmp_path: Path) -> None:
    own = quantized(tmp_path, "gpt_oss", "mxfp4", only="experts")
    export(own, tmp_path / "out", "gpt_oss")
    original = source(tmp_path / "gpt_oss-source")
    for folder in (own.folder, tmp_path / "out"):
        rows = list(judge_model(source(folder), original, tmp_path / "cache"))
        assert len(rows) == 4 and all(row.not_optimal == row.wrong_codes == 0 for row in rows)


def test_a_block_of_zeros_may_have_the_scale_zero() -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(4, 64, generator=generator, dtype=torch.float32, device="cpu")
    weight[1, 16:32] = 0
    best = quantize(weight)
    scales = best.scales.clone()
    scales[1, 1] = 0
    assert judge("w", dataclasses.replace(best, scales=scales), weight).not_optimal == 0
    scales[2, 1] = 0  # a block that is not zero
    row = judge("w", dataclasses.replace(best, scales=scales), weight)
    assert (row.not_optimal, row.worst_excess) == (1, float("inf"))


def test_another_model_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    quantized(tmp_path, "qwen3_moe", "nvfp4")
    other = source(tmp_path / "qwen3_moe-source")
    with pytest.raises(SourceError, match=r"has no tensor .* Give the model that"):
        list(judge_model(source(made.sse["modelopt"]), other, tmp_path))
    with pytest.raises(SourceError, match="holds no codes that are read here"):
        list(judge_model(source(made.original), other, tmp_path))


def test_the_door_prints_and_writes_a_row_for_each_weight(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    assert door.main([str(made.naive["modelopt"]), str(made.original), "--csv", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 7 and printed[0].startswith(f"{rows[0]['name']}: ")
    wrong, blocks = sum(int(row["not_optimal"]) for row in rows), sum(int(row["blocks"]) for row in rows)
    assert printed[-1].startswith(f"7 weights: {wrong:,} of {blocks:,} blocks are not optimal by squared error")
    assert door.main([str(tmp_path / "none"), str(made.original)]) == 1
    assert "error: model.path=" in capsys.readouterr().err
