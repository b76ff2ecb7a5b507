"""Loading a layer: the files that are read, the modules that are built, and inputs equal to the whole model's."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch

from experiments.capture.tap import InputTap
from experiments.config import LayerConfig, ModelConfig, ModelSource
from experiments.files import SourceError
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.decoder import build_decoder, build_whole
from experiments.sources.gguf_names import MODULES
from tests.experiments.tiny_models import NUM_LAYERS, SEVEN, WIDTH, configuration, qwen3, text, train_tokenizer


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("qwen3")
    return SimpleNamespace(folder=folder, model=qwen3(folder))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the safetensors files that were opened."""
    names: set[str] = set()
    real = safetensors.safe_open

    def safe_open(path: Path, *args: Any, **kwargs: Any) -> Any:
        names.add(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", safe_open)
    return names


def whole_models_inputs(model: Any, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    seen = {}

    def hook(key: tuple[int, str]) -> Any:
        return lambda module, args: seen.__setitem__(key, args[0].reshape(-1, args[0].shape[-1]))

    handles = [
        model.model.layers[i].get_submodule(name).register_forward_pre_hook(hook((i, name)))
        for i in range(NUM_LAYERS)
        for name in SEVEN
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


IDS = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("index", [0, 2])
def test_only_the_shards_of_the_embedding_and_the_layers_below_are_opened(
    sharded: SimpleNamespace, opened: set[str], tmp_path: Path, index: int
) -> None:
    layer = LayerConfig(index)
    checkpoint = open_checkpoint(configuration(sharded.folder).model, tmp_path)
    decoder = build_decoder(checkpoint, [layer], "float32")
    decoder.weight(layer)

    assert opened == {f"model-{part:05d}-of-00006.safetensors" for part in range(1, index + 3)}
    on_meta = [all(p.is_meta for p in layer.parameters()) for layer in decoder.stack]
    assert on_meta == [i > index for i in range(NUM_LAYERS)]
    assert not any(p.is_meta for layer in decoder.stack[: index + 1] for p in layer.parameters())
    assert decoder.model.model.norm.weight.is_meta and decoder.model.lm_head.weight.is_meta


def test_a_whole_model_computes_the_models_logits(sharded: SimpleNamespace, tmp_path: Path) -> None:
    decoder = build_whole(open_checkpoint(configuration(sharded.folder).model, tmp_path), "float32")
    assert torch.equal(decoder.model(input_ids=IDS).logits, sharded.model(input_ids=IDS).logits)


def test_what_was_left_out_raises_when_it_is_reached(sharded: SimpleNamespace, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(configuration(sharded.folder).model, tmp_path)
    decoder = build_decoder(checkpoint, [LayerConfig(1)], "float32")
    with pytest.raises(SourceError, match=r"model\.layers\.2 was reached, which was not loaded"):
        decoder.model(input_ids=IDS)
    for module in (decoder.model.model.norm, decoder.model.lm_head, decoder.stack[3]):
        with pytest.raises(SourceError, match="was reached, which was not loaded"):
            module(torch.zeros(1, WIDTH, dtype=torch.float32, device="cpu"))


def test_inputs_are_those_of_the_whole_model(sharded: SimpleNamespace, tmp_path: Path) -> None:
    layers = [LayerConfig(i, name) for i in (0, 2) for name in SEVEN]
    checkpoint = open_checkpoint(configuration(sharded.folder).model, tmp_path)
    tap = InputTap(build_decoder(checkpoint, layers, "float32"), layers)
    got: dict[int, torch.Tensor] = {}
    tap.run(IDS, lambda group, x: got.__setitem__(group, x.clone()))
    want = whole_models_inputs(sharded.model, IDS)
    for group, members in enumerate(tap.groups):
        for layer in members:
            torch.testing.assert_close(got[group], want[layer.index, layer.module], rtol=1e-6, atol=1e-6)


def test_modules_that_share_an_input_are_one_group(sharded: SimpleNamespace, tmp_path: Path) -> None:
    layers = [LayerConfig(1, name) for name in SEVEN]
    checkpoint = open_checkpoint(configuration(sharded.folder).model, tmp_path)
    tap = InputTap(build_decoder(checkpoint, layers, "float32"), layers)
    assert [[layer.module for layer in group] for group in tap.groups] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert tap.widths == [WIDTH, WIDTH, WIDTH, 2 * WIDTH]


def test_the_forward_pass_stops_at_the_wanted_input(sharded: SimpleNamespace, tmp_path: Path) -> None:
    layers = [LayerConfig(1, "self_attn.q_proj"), LayerConfig(0, "mlp.up_proj")]
    checkpoint = open_checkpoint(configuration(sharded.folder).model, tmp_path)
    decoder = build_decoder(checkpoint, layers, "float32")
    calls: list[str] = []
    for index in (0, 1):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            module = decoder.stack[index].get_submodule(name)
            module.register_forward_hook(lambda *_, name=f"{index} {name}": calls.append(name))
    tap = InputTap(decoder, layers)
    calls.clear()
    tap.run(IDS, lambda group, x: None)
    assert calls == ["0 self_attn.o_proj", "0 mlp.down_proj"]


def test_the_weight_keeps_the_checkpoints_dtype(sharded: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(sharded.folder, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(shard)
        safetensors.torch.save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, shard)
    checkpoint = open_checkpoint(configuration(folder).model, tmp_path)
    weight = build_decoder(checkpoint, [LayerConfig(3)], "float32").weight(LayerConfig(3))
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, sharded.model.model.layers[3].mlp.down_proj.weight.bfloat16())
    assert build_decoder(checkpoint, [LayerConfig(0)], "float32").stack[0].mlp.down_proj.weight.dtype == torch.float32


def test_a_checkpoint_of_one_file(tmp_path: Path, opened: set[str]) -> None:
    model = qwen3(tmp_path / "single", sharded=False)
    checkpoint = open_checkpoint(configuration(tmp_path / "single").model, tmp_path)
    weight = build_decoder(checkpoint, [LayerConfig(1)], "float32").weight(LayerConfig(1))
    assert torch.equal(weight, model.model.layers[1].mlp.down_proj.weight)
    assert opened == {"model.safetensors"}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerConfig(9), "layer.index=9: .* has 4 layers, 0 to 3"),
        (LayerConfig(0, "mlp.down"), r"layer.module=mlp.down: no such linear .*self_attn.q_proj, .*mlp.down_proj"),
        (LayerConfig(0, "mlp"), "no such linear module"),
    ],
)
def test_a_layer_that_is_not_there(
    sharded: SimpleNamespace, opened: set[str], tmp_path: Path, layer: LayerConfig, message: str
) -> None:
    checkpoint = open_checkpoint(configuration(sharded.folder).model, tmp_path)
    with pytest.raises(SourceError, match=message):
        build_decoder(checkpoint, [layer], "float32")
    assert not opened  # the mistake costs no reading


def test_a_broken_checkpoint_says_what_is_missing(sharded: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(sharded.folder, folder)
    (folder / "model-00002-of-00006.safetensors").unlink()
    checkpoint = open_checkpoint(configuration(folder).model, tmp_path)
    with pytest.raises(SourceError, match=r"shard model-00002-of-00006.safetensors is missing"):
        build_decoder(checkpoint, [LayerConfig(0)], "float32")

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(configuration(folder).model, tmp_path)
    with pytest.raises(SourceError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        build_decoder(checkpoint, [LayerConfig(1)], "float32")

    shutil.copy(sharded.folder / "model-00002-of-00006.safetensors", folder)
    shard = folder / "model-00001-of-00006.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(SourceError, match=rf"{shard.name} is damaged .*Download the checkpoint again"):
        build_decoder(checkpoint, [LayerConfig(0)], "float32")

    for part in folder.glob("*token*"):
        part.unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer: none of tokenizer\.json"):
        checkpoint.tokenizer()

    for weights in folder.glob("model*"):
        weights.unlink()
    with pytest.raises(SourceError, match=r"neither model.safetensors.index.json nor model.safetensors"):
        open_checkpoint(configuration(folder).model, tmp_path)


def test_from_the_hub_only_what_is_needed_is_downloaded(
    sharded: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def hf_hub_download(repo: str, name: str, revision: str) -> str:
        assert (repo, revision) == ("Qwen/Qwen3-4B", "abc")
        asked.append(name)
        if not (sharded.folder / name).is_file():
            raise EntryNotFoundError(name)
        return str(sharded.folder / name)

    def snapshot_download(repo: str, revision: str, allow_patterns: list[str]) -> str:
        assert not any("safetensors" in pattern or "*" in pattern for pattern in allow_patterns)
        return str(sharded.folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = ModelConfig("qwen3_4b", ModelSource.hub, repo="Qwen/Qwen3-4B", revision="abc")
    checkpoint = open_checkpoint(model, tmp_path)
    assert checkpoint.name == "Qwen/Qwen3-4B"
    build_decoder(checkpoint, [LayerConfig(1)], "bfloat16")
    assert checkpoint.tokenizer()("the quick brown fox")
    assert sorted(set(asked)) == [
        "config.json",
        "model-00001-of-00006.safetensors",
        "model-00002-of-00006.safetensors",
        "model-00003-of-00006.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_download_that_fails_is_a_source_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def hf_hub_download(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    model = ModelConfig("qwen3_4b", ModelSource.hub, repo="Qwen/Qwen3-4B", revision="abc")
    with pytest.raises(SourceError, match=r"config.json is not cached and the hub was not reached"):
        open_checkpoint(model, tmp_path)


# --- GGUF: transformers' reader is the oracle -------------------------------------------------------------------------


def write_gguf(path: Path, tokenizer_folder: Path) -> None:
    """A tiny Llama of 2 layers with grouped heads and 4-bit weights, as llama.cpp's converter writes it."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    train_tokenizer(tokenizer_folder)
    bpe = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_uint32("llama.block_count", 2)
    writer.add_uint32("llama.context_length", 128)
    writer.add_uint32("llama.embedding_length", 64)
    writer.add_uint32("llama.feed_forward_length", 96)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_uint32("llama.rope.dimension_count", 16)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_uint32("llama.vocab_size", len(tokens))
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [3] + [1] * (len(tokens) - 1))
    writer.add_array("tokenizer.ggml.merges", [" ".join(pair) for pair in bpe["merges"]])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 0)
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    four_bit = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (len(tokens), 64), **four_bit}.items():
        kind = GGMLQuantizationType.Q8_0 if name.startswith("token") else GGMLQuantizationType.Q4_1
        values = quantize(rng.standard_normal(shape).astype(np.float32) * 0.1, kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "blk.1.attn_norm", "blk.1.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", 1 + 0.1 * rng.standard_normal(64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("gguf")
    path = folder / "tiny.Q4_1.gguf"
    write_gguf(path, folder / "tokenizer")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ModelConfig(
        "tiny", ModelSource.pypi_gguf, path=str(path), dtype="float32", filename=path.name, sha256=digest
    )


def test_gguf_agrees_with_transformers(gguf: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = Path(str(gguf.path))
    whole = AutoModel.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    checkpoint = open_checkpoint(gguf, tmp_path)
    assert checkpoint.name == "tiny"
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "max_position_embeddings", "rms_norm_eps", "vocab_size", "rope_parameters"):  # fmt: skip
        assert getattr(checkpoint.config, name) == getattr(whole.config, name), name
    decoder = build_decoder(checkpoint, [LayerConfig(1)], "float32")
    for name, parameter in decoder.model.model.named_parameters():
        if name == "norm.weight":
            assert parameter.is_meta
        else:
            assert torch.equal(parameter, whole.get_parameter(name)), name
    weight = build_decoder(checkpoint, [LayerConfig(1, "self_attn.k_proj")], "float32").weight(
        LayerConfig(1, "self_attn.k_proj")
    )
    assert torch.equal(weight, whole.layers[1].self_attn.k_proj.weight)

    sample = text(5) + "in 1984 we  had\n\n12 <unk> é"
    want = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(sample, add_special_tokens=False).input_ids
    assert checkpoint.tokenizer()(sample) == want
    assert checkpoint.tokenizer()(sample) == want  # from the kept tokenizer


def test_a_whole_gguf_model_computes_the_logits_of_transformers(gguf: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = Path(str(gguf.path))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    decoder = build_whole(open_checkpoint(gguf, tmp_path), "float32")
    ids = torch.arange(40, dtype=torch.long, device="cpu").view(2, 20)
    assert torch.equal(decoder.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    head = decoder.model.lm_head.weight
    assert head is decoder.model.model.embed_tokens.weight and not head.requires_grad


def test_gguf_builds_only_the_layers_needed(gguf: ModelConfig, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf, tmp_path)
    decoder = build_decoder(checkpoint, [LayerConfig(0)], "float32")
    assert [all(p.is_meta for p in layer.parameters()) for layer in decoder.stack] == [False, True]
    with pytest.raises(SourceError, match=r"tiny has 2 layers, 0 to 1"):
        build_decoder(checkpoint, [LayerConfig(2)], "float32")


def test_the_gguf_names_cover_the_seven_modules() -> None:
    assert set(SEVEN) <= set(MODULES)
