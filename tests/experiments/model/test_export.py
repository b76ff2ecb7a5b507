"""Exports of tiny models, loaded by transformers, compressed-tensors and gguf, against the dequantized model."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError, sha256_file
from experiments.model import export as export_module
from experiments.model import gguf_file
from experiments.model.card import About
from experiments.model.checkpoint import load_dequantized, open_quantized
from experiments.model.export import EXPORT_NAME, export, read_verdict
from experiments.model.given import GivenCodes
from experiments.model.loading import load_network
from experiments.model.selfcheck import load_in_transformers
from experiments.model.stored_names import skeleton
from experiments.sources.checkpoints import GgufCheckpoint, open_checkpoint
from experiments.sources.exported import check_export_intact
from experiments.sources.quantized import QuantizedCheckpoint
from quantkit.formats import MXFP4, NVFP4
from tests.experiments.model.exported import ROPES, build, quantize_source, quantized
from tests.experiments.sources.test_decoder import write_gguf
from tests.experiments.tiny_models import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
request = {"prompt": json.loads(sys.argv[2]), "n_predict": 1, "temperature": 0.0, "n_probs": 20}
answer = xllamacpp.Server(params).handle_completions(request)
answer = json.loads(answer) if isinstance(answer, str) else answer
print(json.dumps(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]), flush=True)
"""
FORMATS_AND_SIZES = {"nvfp4": (NVFP4, 16), "mxfp4": (MXFP4, 32)}
IDS = torch.arange(3, 67, dtype=torch.int64, device="cpu").view(2, 32)
LONG = torch.arange(200, dtype=torch.int64, device="cpu").view(1, 200) * 37 % 297 + 1
DENSE = [
    ("qwen3", "nvfp4", "compressed_tensors"),
    ("qwen3", "mxfp4", "compressed_tensors"),
    ("qwen3", "nvfp4", "modelopt"),
    ("qwen3", "nvfp4", "gguf"),
    ("llama", "nvfp4", "compressed_tensors"),
    ("llama", "mxfp4", "compressed_tensors"),
    ("llama", "nvfp4", "gguf"),
    ("llama", "mxfp4", "gguf"),
]
GGUF = [
    *((kind, format, "gguf") for kind in ("mistral", "qwen3_moe") for format in ("nvfp4", "mxfp4")),
    *((kind, "mxfp4", "gguf") for kind in ("qwen2", "qwen3", "gpt_oss", *ROPES)),
]
EXPERTS = [
    ("qwen3_moe", "mxfp4", "compressed_tensors"),
    ("mixtral", "mxfp4", "compressed_tensors"),
    ("gpt_oss", "mxfp4", "gpt_oss"),
]
WRONG_IN_TRANSFORMERS = [("qwen3_moe", "nvfp4", "compressed_tensors"), ("mixtral", "nvfp4", "compressed_tensors")]
UNREAD_BY_TRANSFORMERS = [("qwen3_moe", "nvfp4", "modelopt")]


class Made:
    """Makes each quantized model and each export once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources: dict[tuple[str, str], QuantizedCheckpoint] = {}
        self.folders: dict[tuple[str, str, str], Path] = {}

    def source(self, kind: str, format: str) -> QuantizedCheckpoint:
        key = (kind, format)
        if key not in self.sources:
            self.sources[key] = quantized(self.root, kind, format, only="experts" if kind == "gpt_oss" else "")
        return self.sources[key]

    def folder(self, kind: str, format: str, layout: str) -> Path:
        key = (kind, format, layout)
        if key not in self.folders:
            self.folders[key] = self.root / "-".join(key)
            export(self.source(kind, format), self.folders[key], layout)
        return self.folders[key]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("exports"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "kind, format, layout", [case for case in DENSE + EXPERTS if "gguf" not in case and "modelopt" not in case]
)
def test_transformers_computes_the_dequantized_models_logits(made: Made, kind: str, format: str, layout: str) -> None:
    loaded = load_in_transformers(made.folder(kind, format, layout), layout)
    if kind not in ("qwen3", "llama"):
        loaded.set_experts_implementation("eager")  # as the other model's; kernels sum in another order
    wanted = load_dequantized(made.source(kind, format).folder, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize(
    "kind, format, layout", DENSE + GGUF + EXPERTS + WRONG_IN_TRANSFORMERS + UNREAD_BY_TRANSFORMERS
)
def test_every_stored_weight_is_what_was_quantized(made: Made, kind: str, format: str, layout: str) -> None:
    verdict = read_verdict(made.folder(kind, format, layout))
    assert verdict is not None and verdict.ok and verdict.problems == []
    assert verdict.layout == layout and verdict.weights == verdict.equal >= 4
    assert bool(verdict.warnings) == ((kind, format, layout) in WRONG_IN_TRANSFORMERS)
    assert not made.folder(kind, format, layout).with_name(f".{kind}-{format}-{layout}.partial").exists()


@pytest.mark.parametrize("kind, format, layout", WRONG_IN_TRANSFORMERS)
def test_the_defect_of_transformers_with_nvfp4_experts_is_warned_of(
    made: Made, kind: str, format: str, layout: str
) -> None:
    """If this fails, transformers has mended it: EXPERTS_DEFECT and docs/serving.md say otherwise."""
    verdict = read_verdict(made.folder(kind, format, layout))
    assert verdict is not None and "without their global scale" in verdict.warnings[0]
    loaded = load_in_transformers(made.folder(kind, format, layout), layout)
    wanted = load_dequantized(made.source(kind, format).folder, torch.bfloat16)
    name = "model.layers.0.mlp.experts.down_proj"
    with torch.no_grad():
        ratio = loaded.get_parameter(name).abs().max() / wanted.get_parameter(name).abs().max()
    assert float(ratio) > 1000


def test_transformers_reads_the_gguf_file_of_a_llama_with_its_tokenizer(made: Made) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, source = made.folder("llama", "mxfp4", "gguf"), made.source("llama", "mxfp4")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16).eval()
    wanted = load_dequantized(source.folder, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, wanted(IDS).logits)
    ours = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    theirs = AutoTokenizer.from_pretrained(source.folder)
    text = "The quick brown fox, 123 times.\n  Naïve<|end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("kind, format, layout", [case for case in DENSE if "gguf" in case] + GGUF)
def test_a_gguf_file_is_read_as_the_dequantized_model(made: Made, kind: str, format: str, layout: str) -> None:
    """As model.path: every code and scale, and the logits, to the bit."""
    folder, source = made.folder(kind, format, layout), made.source(kind, format)
    for path in (folder, folder / "model.gguf"):
        model = ModelConfig("read", ModelSource.hub, path=str(path))
        checkpoint = open_checkpoint(model, made.root / "cache")
        assert isinstance(checkpoint, GgufCheckpoint)
        given = GivenCodes(str(path), made.root / "cache", *FORMATS_AND_SIZES[format])
        for name in source.names:
            want = source.quantized(name)
            shaped = SimpleNamespace(full_name=name)
            got = given.matrix(skeleton(source.folder), shaped, want.shape)
            assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
            assert torch.equal(got.dequantize(), want.dequantize())
    loaded = load_network(model, made.root / "cache", "float32", "cpu")
    wanted = load_dequantized(source.folder, torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize("kind", ROPES)
def test_a_scaled_rotary_embedding_comes_back_from_a_gguf_file(made: Made, kind: str) -> None:
    """At positions beyond original_max_position_embeddings, where an unscaled one gives other logits."""
    folder, source = made.folder(kind, "mxfp4", "gguf"), made.source(kind, "mxfp4")
    loaded = load_network(ModelConfig("m", ModelSource.hub, path=str(folder)), made.root / "cache", "float32", "cpu")
    wanted = load_dequantized(source.folder, torch.float32)
    assert loaded.config.rope_parameters == wanted.config.rope_parameters == ROPES[kind]
    with torch.no_grad():
        logits = wanted(LONG).logits
        assert torch.equal(loaded(LONG).logits, logits)
        config = copy.deepcopy(wanted.config)
        config.rope_parameters = {"rope_type": "default", "rope_theta": ROPES[kind]["rope_theta"]}
        plain = type(wanted)(config)
        plain.load_state_dict(wanted.state_dict())
        assert (plain(LONG).logits - logits)[0, 32:].abs().max() > 0.2


@pytest.mark.parametrize("kind", ["llama3", "llama_linear"])
def test_an_export_of_an_export_scales_as_before(made: Made, tmp_path: Path, kind: str) -> None:
    path = made.folder(kind, "mxfp4", "gguf") / "model.gguf"
    original = open_checkpoint(ModelConfig("m", ModelSource.hub, path=str(path)), tmp_path)
    export(quantize_source(original, tmp_path / "own", kind, "mxfp4"), tmp_path / "out", "gguf")
    before, after = (GGUFReader(file) for file in (path, tmp_path / "out" / "model.gguf"))
    keys = [key for key in before.fields if ".rope" in key]
    assert len(keys) >= 3 and keys == [key for key in after.fields if ".rope" in key]
    assert [after.fields[key].contents() for key in keys] == [before.fields[key].contents() for key in keys]
    factors = [
        [tensor.data.tolist() for tensor in read.tensors if tensor.name == "rope_freqs.weight"]
        for read in (before, after)
    ]
    assert factors[0] == factors[1] and len(factors[0]) == (kind == "llama3")


def test_a_gguf_file_without_its_frequency_factors_is_a_problem(made: Made, tmp_path: Path) -> None:
    source = made.source("llama3", "mxfp4")
    path = tmp_path / "model.gguf"
    written = (made.folder("llama3", "mxfp4", "gguf") / "model.gguf").read_bytes()
    path.write_bytes(written)
    (factors,) = (tensor for tensor in GGUFReader(path, "r+").tensors if tensor.name == "rope_freqs.weight")
    assert factors.data.tolist()[0] == 1.0 and factors.data.tolist()[-1] == 8.0 and len(factors.data) == 8
    factors.data[3] *= 2
    *_, problems, _ = gguf_file.check(source, tmp_path)
    assert problems == ["rope_freqs.weight has not the factors of config.json"]
    model = ModelConfig("m", ModelSource.hub, path=str(path))
    with pytest.raises(SourceError, match=r"quantkit.rope_parameters does not give its rope_freqs.weight"):
        open_checkpoint(model, tmp_path)
    path.write_bytes(written.replace(b"rope_freqs.weight", b"rope_freqz.weight"))
    *_, problems, _ = gguf_file.check(source, tmp_path)
    assert problems[0] == "rope_freqs.weight is missing"


def test_a_gguf_file_splits_text_as_the_file_that_the_model_came_from(tmp_path: Path) -> None:
    """transformers' copy of that tokenizer does not say how; digits of smollm are apart, unlike gpt-2's."""
    write_gguf(tmp_path / "source.gguf", tmp_path / "tokenizer")
    original = open_checkpoint(ModelConfig("m", ModelSource.hub, path=str(tmp_path / "source.gguf")), tmp_path)
    assert isinstance(original, GgufCheckpoint) and original.matrices == {}
    source = quantize_source(original, tmp_path / "own", "llama", "mxfp4")
    assert export(source, tmp_path / "out", "gguf").warnings == []
    before, after = (GGUFReader(path).fields for path in (tmp_path / "source.gguf", tmp_path / "out" / "model.gguf"))
    same = [
        key for key in before if key.startswith(("llama.", "tokenizer.ggml.")) and not key.endswith("unknown_token_id")
    ]
    assert "tokenizer.ggml.pre" in same and len(same) > 12
    assert {key: after[key].contents() for key in same} == {key: before[key].contents() for key in same}


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_warned_of(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.source("llama", "mxfp4").folder, tmp_path / "own")
    path = tmp_path / "own" / "tokenizer.json"
    described = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
    path.write_text(json.dumps(described))
    manifest = json.loads((tmp_path / "own" / "quantkit.json").read_text())
    manifest["files"]["tokenizer.json"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    del manifest["checksum"]
    (tmp_path / "own" / "quantkit.json").write_text(json.dumps(manifest))
    (warning,) = export(open_quantized(tmp_path / "own"), tmp_path / "out", "gguf").warnings
    assert "names no pre-tokenizer" in warning
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert "tokenizer.ggml.tokens" in fields and "tokenizer.ggml.pre" not in fields


@pytest.mark.parametrize("kind, format, layout", [case for case in DENSE if "gguf" in case] + GGUF)
def test_llama_cpp_computes_what_the_dequantized_model_does(made: Made, kind: str, format: str, layout: str) -> None:
    """Up to llama.cpp's 8-bit activations: a scale, row or norm that it read otherwise changes much more than 0.1.

    pip install xllamacpp: llama.cpp in a wheel.
    """
    pytest.importorskip("xllamacpp")
    folder, source = made.folder(kind, format, layout), made.source(kind, format)
    ids = LONG[0].tolist() if kind in ROPES else [5, 17, 40, 99, 3, 250, 120, 33]
    told = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, str(folder / "model.gguf"), json.dumps(ids)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {entry["id"]: entry["logprob"] for entry in json.loads(told.splitlines()[-1])}
    with torch.no_grad():
        ids_tensor = torch.tensor([ids], dtype=torch.int64, device="cpu")
        wanted = load_dequantized(source.folder, torch.float32)(ids_tensor).logits[0, -1].log_softmax(-1)
    assert len(found) == 20 and next(iter(found)) == int(wanted.argmax())
    assert max(abs(float(wanted[token]) - logprob) for token, logprob in found.items()) < 0.05
    assert float(wanted.std()) > 0.5


def test_experts_have_the_names_of_the_models_own_checkpoints(made: Made) -> None:
    index = json.loads(
        (made.folder("mixtral", "mxfp4", "compressed_tensors") / "model.safetensors.index.json").read_text()
    )
    names = {name for name in index["weight_map"] if ".experts." in name and "layers.1." in name}
    parent = "model.layers.1.block_sparse_moe.experts"
    parts = ("weight_packed", "weight_scale")
    assert names == {f"{parent}.{e}.{w}.{part}" for e in range(4) for w in ("w1", "w2", "w3") for part in parts}


def test_the_folder_is_in_the_hubs_layout(made: Made) -> None:
    folder, source = made.folder("qwen3", "nvfp4", "compressed_tensors"), made.source("qwen3", "nvfp4")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", EXPORT_NAME} <= names
    assert "quantkit.json" not in names and "layers.jsonl" not in names
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {name: shard.name for shard in folder.glob("*.safetensors") for name in load_file(shard)}
    assert index["weight_map"] == stored
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"] and config["dtype"] == "bfloat16"
    for name in source.kept:
        assert torch.equal(load_file(folder / stored[name])[name], source.tensor(name))
    assert (folder / "tokenizer.json").read_bytes() == (source.folder / "tokenizer.json").read_bytes()


def test_routers_are_in_the_list_of_layers_to_ignore(made: Made) -> None:
    folder = made.folder("qwen3_moe", "nvfp4", "modelopt")
    entries = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert entries == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, format, layout, message",
    [
        ("llama", "mxfp4", "modelopt", "modelopt cannot hold mxfp4 with block size 32; .* compressed_tensors or gguf"),
        ("llama", "mxfp4", "gpt_oss", "leave it unquantized, or use compressed_tensors"),
        ("gpt_oss", "mxfp4", "compressed_tensors", "Export gpt-oss with mxfp4"),
        ("mixtral", "mxfp4", "gguf", r"use export=compressed_tensors, and convert the folder with llama\.cpp's"),
        ("gpt_oss", "nvfp4", "gguf", "llama.cpp misreads global scales of gpt_oss models, so nvfp4 would be wrong"),
        ("qwen2", "nvfp4", "gguf", "llama.cpp misreads global scales of qwen2 models, so nvfp4 would be wrong"),
        ("llama", "nvfp4", "awq", "unknown layout 'awq'; known layouts: compressed_tensors"),
    ],
)
def test_what_cannot_be_expressed_is_refused_before_anything_is_written(
    made: Made, tmp_path: Path, kind: str, format: str, layout: str, message: str
) -> None:
    source = made.source(kind, format)
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "cannot tell llama.cpp of norm_topk_prob=False"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "cannot tell llama.cpp of decoder_sparse_step=2"),
        ("mistral", {"sliding_window": 32}, "cannot tell llama.cpp of sliding_window=32"),
        ("qwen2", {"use_sliding_window": True}, "cannot tell llama.cpp of use_sliding_window=True"),
        ("llama", {"attention_bias": True}, "without biases"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "no model with scaled rotary embeddings"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "windows in every second layer"),
    ],
)
def test_what_llama_cpp_would_not_know_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    config = build(kind).config.to_dict()
    gguf_file.check_config(config)
    with pytest.raises(SourceError, match=message):
        gguf_file.check_config(config | changes)


def test_unequal_fused_scales_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    for name, parameter in model.named_parameters():
        amax = 2688 * (2.0**-12 if "q_proj" in name else 2.0**-13)  # global scales that a divisor inverts exactly
        parameter.data.clamp_(-amax, amax)
    model.save_pretrained(tmp_path / "llama-source")
    train_tokenizer(tmp_path / "llama-source")
    source = quantized(tmp_path, "llama", "nvfp4", global_scale="amax")
    with pytest.raises(ValueError, match=r"engines join these layers.* or export gguf"):
        export(source, tmp_path / "out", "compressed_tensors")
    assert not (tmp_path / "out").exists()
    assert export(source, tmp_path / "gguf", "gguf").ok


def test_a_folder_with_other_files_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SourceError, match=r"holds mine\.txt, and no export of this model"):
        export(made.source("llama", "nvfp4"), tmp_path, "modelopt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_another_models_export_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder("llama", "nvfp4", "modelopt"), tmp_path / "out")
    text = (tmp_path / "out" / EXPORT_NAME).read_text().replace("0123456789", "9876543210")
    (tmp_path / "out" / EXPORT_NAME).write_text(text)
    with pytest.raises(SourceError, match="no export of this model"):
        export(made.source("llama", "nvfp4"), tmp_path / "out", "modelopt")


def test_an_export_that_the_check_finds_wrong_is_not_finished(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = export_module.get_layout("compressed_tensors")

    def inverted(name: str, q: Any) -> Any:
        tensors = layout.pack(name, q)
        return {key: 1 / t if key.endswith("global_scale") else t for key, t in tensors.items()}

    monkeypatch.setattr(export_module, "get_layout", lambda name: dataclasses.replace(layout, pack=inverted))
    with pytest.raises(SourceError, match=r"is inverted.*It is not finished"):
        export(made.source("llama", "nvfp4"), tmp_path / "out", "compressed_tensors")
    assert not (tmp_path / "out").exists()


# --- again, and interrupted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["compressed_tensors", "modelopt", "gguf"])
def test_the_same_model_gives_the_same_bytes(made: Made, tmp_path: Path, layout: str) -> None:
    export(made.source("llama", "nvfp4"), tmp_path / "out", layout)
    assert contents(tmp_path / "out") == contents(made.folder("llama", "nvfp4", layout))


def test_a_finished_export_is_not_written_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made.folder("llama", "nvfp4", "modelopt")
    monkeypatch.setattr(export_module, "_write", None)
    assert export(made.source("llama", "nvfp4"), folder, "modelopt") == read_verdict(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("modelopt", "model-00001-of-00003.safetensors"),
        ("compressed_tensors", "model-00003-of-00003.safetensors"),
        ("compressed_tensors", "config.json"),
        ("gguf", "model.gguf"),
    ],
)
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_finished_export_that_is_damaged_later_is_refused_and_written_again(
    made: Made, tmp_path: Path, layout: str, name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made.folder("llama", "nvfp4", layout), out)
    damage(out / name)
    with pytest.raises(SourceError, match=rf"out is damaged: {name} .* Run the command that exported it again"):
        check_export_intact(out)
    export(made.source("llama", "nvfp4"), out, layout)
    assert f"is damaged and is written again: {name}" in caplog.text
    check_export_intact(out)
    assert contents(out) == contents(made.folder("llama", "nvfp4", layout))


def test_an_export_without_its_verdict_is_no_finished_one(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder("llama", "nvfp4", "modelopt"), tmp_path / "out")
    flip(tmp_path / "out" / EXPORT_NAME)
    (tmp_path / "out" / EXPORT_NAME).write_text("{")
    with pytest.raises(SourceError, match="no export of this model"):
        export(made.source("llama", "nvfp4"), tmp_path / "out", "modelopt")


def test_a_card_keeps_its_evaluations_when_the_export_is_written_again(made: Made, tmp_path: Path) -> None:
    out, table = tmp_path / "out", "| KL |\n| --- |\n| 0.01 |"
    export(made.source("llama", "nvfp4"), out, "modelopt", About(tables=[table]))
    export(made.source("llama", "nvfp4"), out, "modelopt", force=True)
    assert table in (out / "README.md").read_text()


def test_an_export_shows_no_progress_bars(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(made.source("qwen3_moe", "mxfp4"), tmp_path / "moe", "compressed_tensors")
    export(made.source("llama", "nvfp4"), tmp_path / "dense", "compressed_tensors")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("layout", ["compressed_tensors", "modelopt", "gguf"])
def test_killed_at_random_moments_and_started_again_it_has_the_same_bytes(
    made: Made, tmp_path: Path, layout: str
) -> None:
    source, out = made.source("llama", "nvfp4"), tmp_path / "out"
    wanted = contents(made.folder("llama", "nvfp4", layout))
    started = time.monotonic()
    export(source, tmp_path / "timed", layout)
    seconds = time.monotonic() - started
    moments = random.Random(0)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            logging.disable()
            export(source, out, layout)
            os._exit(0)
        time.sleep(moments.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():  # finished before the kill
            assert contents(out) == wanted
            shutil.rmtree(out)
    export(source, out, layout)
    assert contents(out) == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "timed"]


def test_processes_that_export_to_one_folder_wait_for_each_other(made: Made, tmp_path: Path) -> None:
    source, out = made.source("llama", "nvfp4"), tmp_path / "out"
    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                logging.disable()
                export(source, out, "modelopt")
                status = 0
            finally:
                os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert contents(out) == contents(made.folder("llama", "nvfp4", "modelopt"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_forced_export_that_is_interrupted_leaves_the_old_one(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = made.source("llama", "nvfp4"), tmp_path / "out"
    export(source, out, "modelopt")
    wanted = contents(out)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "check_export", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(source, out, "modelopt", force=True)
    assert contents(out) == wanted
    export(source, out, "modelopt", force=True)
    assert contents(out) == wanted and [path.name for path in tmp_path.iterdir()] == ["out"]


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_an_operator_needs(made: Made, tmp_path: Path) -> None:
    table = "| model | KL |\n| --- | --- |\n| this | 0.01 |"
    about = About(command="python experiments/quantize_model.py model=tiny export=modelopt", tables=[table])
    export(made.source("llama", "nvfp4"), tmp_path / "out", "modelopt", about)
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# tiny llama, NVFP4 with block size 16",
        "| method | sse |",
        table,
        "vllm serve FOLDER --quantization modelopt",
        "trtllm-serve FOLDER",
        "14 of 14 stored weights are bit for bit what was quantized",
        "outside the decoder layers: lm_head",
        about.command,
        "| torch | ",
    ):
        assert part in text
    card = (made.folder("llama", "nvfp4", "modelopt") / "README.md").read_text()
    assert "Not evaluated yet" in card


def test_the_card_repeats_the_warnings(made: Made) -> None:
    card = (made.folder("qwen3_moe", "nvfp4", "compressed_tensors") / "README.md").read_text()
    assert "- Note: transformers " in card and "without their global scale" in card
