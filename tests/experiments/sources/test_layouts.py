"""Checkpoints of other tools, in the layouts of engines, as model.path."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.files import SourceError
from experiments.model.checkpoint import load_dequantized, open_quantized
from experiments.sources.checkpoints import CodesCheckpoint, open_checkpoint
from experiments.sources.decoder import build_whole
from quantkit.layouts import get_layout
from tests.experiments.model.folders import open_source, source, write
from tests.experiments.sources.every_decoder import IDS, tiny_model
from tests.experiments.tiny_models import qwen3

pytestmark = pytest.mark.usefixtures("one_thread")
UP = "model.layers.1.mlp.up_proj"


def write_layout(own: Path, folder: Path, layout_name: str) -> Path:
    """The folder `own` of quantkit in one shard of another layout."""
    opened, layout = open_quantized(own), get_layout(layout_name)
    tensors = {name: opened.tensor(name) for name in opened.kept}
    for name in opened.names:
        tensors |= layout.to_tensors(name, opened.quantized(name))
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    first = opened.quantized(opened.names[0])
    files = layout.config(first.format, first.block_size, ["lm_head"])
    config = json.loads((own / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | files.pop("config.json")))
    for name, entries in files.items():
        (folder / name).write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("made")
    qwen3(root / "tiny")
    folders = {}
    for layout, options in (
        ("compressed_tensors", {"global_scale": 2.0**-12}),
        ("modelopt", {"global_scale": 0.003}),
    ):
        write(root / "own" / layout, open_source(root / "tiny"), **options)
        folders[layout] = write_layout(root / "own" / layout, root / layout, layout)
    return SimpleNamespace(root=root, own=root / "own", **folders)


def changed(folder: Path, target: Path, **entries: Any) -> Path:
    """A copy with other values in the quantization_config."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= entries
    (target / "config.json").write_text(json.dumps(config))
    return target


def opened(folder: Path) -> CodesCheckpoint:
    checkpoint = open_checkpoint(source(folder), folder.parent / "cache")
    assert isinstance(checkpoint, CodesCheckpoint)
    return checkpoint


@pytest.mark.parametrize("layout", ["compressed_tensors", "modelopt"])
def test_the_codes_are_read_bit_for_bit(made: SimpleNamespace, layout: str) -> None:
    checkpoint, own = opened(made.root / layout), open_quantized(made.own / layout)
    assert sorted(checkpoint.matrices.values()) == sorted(own.names)
    for name in own.names:
        want, got = own.quantized(name), checkpoint.quantized(name)
        for part in ("codes", "scales", "global_scale"):
            assert torch.equal(getattr(got, part), getattr(want, part))
        assert torch.equal(checkpoint.read([f"{name}.weight"])[f"{name}.weight"], want.dequantize())


@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        ("qwen3", "compressed_tensors", {"global_scale": 2.0**-12}),
        ("qwen3", "compressed_tensors", {"format": "mxfp4", "size": 32}),
        ("qwen3_moe", "compressed_tensors", {"global_scale": 2.0**-12}),
        ("qwen3_moe", "modelopt", {"global_scale": 0.003}),
        ("llama", "modelopt", {"global_scale": 0.003}),
    ],
)
def test_a_model_of_codes_computes_the_dequantized_models_logits(
    tmp_path: Path, kind: str, layout: str, options: dict[str, Any]
) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "source")
    write(tmp_path / "own", open_source(tmp_path / "source"), **options)
    folder = write_layout(tmp_path / "own", tmp_path / "other", layout)
    want, got = load_dequantized(tmp_path / "own", torch.float32), build_whole(opened(folder), "float32").model
    assert torch.equal(got(input_ids=IDS).logits, want(input_ids=IDS).logits)


def test_experts_of_gpt_oss_are_turned(tmp_path: Path) -> None:
    from experiments.model.checkpoint import CheckpointWriter, kept_tensors
    from tests.experiments.model.folders import IDENTITY, quantize_layer

    tiny_model("gpt_oss", intermediate_size=32).save_pretrained(tmp_path / "source")
    checkpoint = open_source(tmp_path / "source")
    decoder = build_whole(checkpoint, "float32")
    made = [quantize_layer(decoder, index, 32, format="mxfp4") for index in range(len(decoder.stack))]
    experts = [{name: q for name, q in quantized.items() if q.codes.dim() == 3} for quantized, _ in made]
    names = [name for quantized in experts for name in quantized]
    with CheckpointWriter(tmp_path / "own", IDENTITY, len(experts)) as writer:
        for index, quantized in enumerate(experts):
            writer.write_layer(index, quantized, kept_tensors(decoder, index, names), {}, made[index][1])
        writer.finish(kept_tensors(decoder, None, names), checkpoint, {})
    folder = write_layout(tmp_path / "own", tmp_path / "other", "gpt_oss")
    assert len(names) == 2 * len(experts)
    want, got = load_dequantized(tmp_path / "own", torch.float32), build_whole(opened(folder), "float32").model
    assert torch.equal(got(input_ids=IDS).logits, want(input_ids=IDS).logits)


def test_an_older_modelopt_folder_is_known_by_its_own_file(made: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(made.modelopt, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert opened(tmp_path / "old").layout.name == "modelopt"


def test_scales_of_activations_are_left_out_and_told(
    made: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(made.modelopt, tmp_path / "w4a4", quant_algo="NVFP4")
    tensors = load_file(folder / "model.safetensors")
    one = torch.ones((), dtype=torch.float32, device="cpu")
    extra = {f"{UP}.input_scale": one, "model.layers.1.self_attn.k_proj.k_scale": one.clone()}
    save_file(tensors | extra, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        checkpoint = opened(folder)
    assert "quantizes activations, too; only its weights are read" in caplog.text
    assert not set(extra) & set(checkpoint.names)
    build_whole(checkpoint, "float32")


@pytest.mark.parametrize(
    ("layout", "entries"),
    [
        ("compressed_tensors", {"format": "pack-quantized"}),
        ("compressed_tensors", {"format": None}),
        ("modelopt", {"quant_algo": "FP8"}),
        ("modelopt", {"quant_method": "awq"}),
    ],
)
def test_other_codes_are_refused(made: SimpleNamespace, tmp_path: Path, layout: str, entries: dict[str, Any]) -> None:
    folder = changed(made.root / layout, tmp_path / "other", **entries)
    with pytest.raises(SourceError, match="Give the unquantized checkpoint"):
        open_checkpoint(source(folder), tmp_path / "cache")


def test_a_folder_without_codes_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(made.compressed_tensors, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "weight_" not in name}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"has quantization_config \(compressed-tensors\)\. Give the"):
        open_checkpoint(source(folder), tmp_path / "cache")


def test_damaged_parts_name_the_matrix(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(made.modelopt, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{UP}.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=rf"{UP}\.weight_scale is missing"):
        build_whole(opened(folder), "float32")


def test_a_shard_cannot_lead_out_of_the_folder(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(made.modelopt, tmp_path / "other")
    index = {"weight_map": {"lm_head.weight": "../modelopt/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="leads out of the folder"):
        open_checkpoint(source(folder), tmp_path / "cache")
