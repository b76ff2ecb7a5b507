"""Checkpoints that are refused before a capture, in one line that names file, value and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.capture.forward import capture_layers
from experiments.config import LayerConfig
from experiments.files import SourceError
from experiments.model.loading import tokenizer_of
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.decoder import build_decoder
from experiments.sources.resolved import resolve
from tests.experiments.tiny_models import configuration, qwen3, write_text


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    qwen3(folder, sharded=False)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(plain, tmp_path / "tiny"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, index: int = 1) -> str:
    with pytest.raises(SourceError) as refused:
        build_decoder(open_checkpoint(configuration(folder).model, folder), [LayerConfig(index)], "float32")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "method", ["fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors", "mxfp4", "modelopt", "a_method_to_come"]
)
def test_a_quantized_source_is_refused_by_its_configuration(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method})
    assert refusal(folder) == (
        f"tiny (local): config.json has quantization_config ({method}). Give the unquantized checkpoint (float16, "
        "bfloat16, float32 or float64)."
    )


def test_a_quantized_part_is_refused(folder: Path) -> None:
    edit_config(folder, text_config={"quantization_config": {"quant_method": "fp8"}})
    assert "config.json has quantization_config (fp8)" in refusal(folder)


def test_the_older_key_of_compressed_tensors_is_refused(folder: Path) -> None:
    edit_config(folder, compression_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    assert "config.json has compression_config (compressed-tensors). Give the unquantized checkpoint" in refusal(folder)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_quantized_source_is_refused_by_the_file_beside(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert f"{name} says that its weights are quantized. Give the unquantized checkpoint" in refusal(folder)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "weight_packed", "qweight", "SCB"])
def test_a_tensor_beside_codes_is_refused(folder: Path, suffix: str) -> None:
    name = f"model.layers.3.mlp.up_proj.{suffix}"
    edit_tensors(folder, lambda x: x.__setitem__(name, torch.ones(1, dtype=torch.float32, device="cpu")))
    assert f"{name} in model.safetensors belongs to codes. Give the unquantized checkpoint" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_values_of_a_dtype_of_codes_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.__setitem__(name, tensors[name].to(dtype)))
    message = refusal(folder)
    assert f"{name} is {str(dtype).removeprefix('torch.')}, so it holds codes instead of weights" in message
    assert "Give the unquantized checkpoint" in message and ".float()" not in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_of_these_dtypes_are_weights(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: x.to(dtype) for name, x in tensors.items()}))
    decoder = build_decoder(open_checkpoint(configuration(folder).model, folder), [LayerConfig(1)], "float32")
    assert decoder.weight(LayerConfig(1)).dtype == dtype
    assert decoder.stack[1].mlp.down_proj.weight.dtype == torch.float32


def test_a_models_own_code_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('run')")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.Config"})

    def asked(*_: Any) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    assert refusal(folder) == (
        "tiny (local): config.json has auto_map, code of its own (model_type own), which is not run. Give a model that "
        "transformers defines."
    )


def test_a_tokenizers_own_code_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenization_own.py").write_text("raise SystemExit('run')")
    (folder / "tokenizer.json").unlink()
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))

    def asked(*_: Any) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    checkpoint = open_checkpoint(configuration(folder).model, folder)
    with pytest.raises(SourceError, match=r"^tiny \(local\): its tokenizer cannot be loaded: .*$") as refused:
        checkpoint.tokenizer()
    assert "\n" not in str(refused.value)


def test_a_known_model_with_code_of_its_own_runs_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('run')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Model", "AutoConfig": "modeling_own.Config"})
    decoder = build_decoder(open_checkpoint(configuration(folder).model, folder), [LayerConfig(0)], "float32")
    assert type(decoder.model).__name__ == "Qwen3ForCausalLM"


def test_an_unknown_model_is_named(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model")
    assert "config.json has model_type no_such_model, which transformers" in refusal(folder)


def test_tied_weights_stored_as_lm_head_alone_load(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)

    def only_the_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(folder, only_the_head)
    decoder = build_decoder(open_checkpoint(configuration(folder).model, folder), [LayerConfig(0)], "float32")
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(decoder.model.get_input_embeddings().weight, stored)


def test_an_embedding_unlike_its_configuration(folder: Path) -> None:
    edit_config(folder, vocab_size=512)
    assert refusal(folder) == (
        "tiny (local): model.embed_tokens.weight is [300, 32] in the checkpoint and [512, 32] by config.json. Give the "
        "config.json of this checkpoint."
    )


def test_a_stored_tensor_that_the_model_does_not_use(folder: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(folder, lambda x: x.__setitem__(name, torch.ones(4, dtype=torch.float32, device="cpu")))
    assert f"the checkpoint has {name}, which qwen3 in transformers does not use" in refusal(folder)
    build_decoder(open_checkpoint(configuration(folder).model, folder), [LayerConfig(0)], "float32")


def test_token_ids_beyond_the_embedding(folder: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "texts")
    edit_config(folder, vocab_size=100)
    config = configuration(folder, tmp_path / "texts")
    with pytest.raises(SourceError, match=r"the tokenizer gives id \d+, config\.json has vocab_size 100\. Give the"):
        capture_layers(resolve(config), [config.layer])


def test_a_tokenizer_that_makes_no_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    ids = {"id": "A", "type_id": 0}
    drop = {"type": "TemplateProcessing", "single": [], "pair": [{"Sequence": ids}, {"Sequence": ids | {"id": "B"}}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": drop | {"special_tokens": {}}}))
    tokenize = open_checkpoint(configuration(folder).model, folder).tokenizer()
    assert tokenize("") == []
    with pytest.raises(SourceError, match=r"tiny \(local\): its tokenizer makes no tokens of the text\. Take the"):
        tokenize("a text")


def test_a_tokenizer_that_panics_in_rust_is_refused(folder: Path) -> None:
    """A panic is a BaseException and no Exception."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"model": values["model"] | {"continuing_subword_prefix": "/etc/passwd"}}))
    opened = open_checkpoint(configuration(folder).model, folder)
    for read in (opened.tokenizer, lambda: tokenizer_of(configuration(folder).model, folder)):
        with pytest.raises(SourceError, match=r"tiny \(local\): its tokenizer cannot be loaded: range end index"):
            read()


# --- every call of a module counts ------------------------------------------------------------------------------------


def test_a_module_called_twice_in_a_layer_counts_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3 import modeling_qwen3

    from experiments.capture.tap import InputTap

    def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner) + self.down_proj(2 * inner)

    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", twice)
    decoder = build_decoder(open_checkpoint(configuration(folder).model, folder), [LayerConfig(1)], "float32")
    tap = InputTap(decoder, [LayerConfig(1)])
    got: list[torch.Tensor] = []
    tap.run(torch.arange(12, dtype=torch.long, device="cpu").view(2, 6), lambda _, x: got.append(x))
    assert got[0].shape == (24, 64)
    assert torch.equal(got[0][12:], 2 * got[0][:12])


def test_a_model_that_repeats_its_layers_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3 import modeling_qwen3

    real = modeling_qwen3.Qwen3Model.forward

    def looped(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        first = real(self, input_ids=input_ids, **kwargs)
        return real(self, inputs_embeds=first.last_hidden_state, **kwargs)

    monkeypatch.setattr(modeling_qwen3.Qwen3Model, "forward", looped)
    assert "tiny (local) (qwen3) runs layer 0 again after later layers" in refusal(folder)
