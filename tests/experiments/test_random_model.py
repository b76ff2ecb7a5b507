"""A model with random weights has a known one's shapes, and is read as any model of the hub is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import random_model
from experiments.config import ModelConfig, ModelSource
from experiments.model.loading import load_network, tokenizer_of
from tests.experiments.tiny_models import text


def made(tmp_path: Path, name: str, *more: str) -> Path:
    texts = tmp_path / "text.txt"
    texts.write_text(text(200))
    arguments = ["tiny", "--text", str(texts), "--out", str(tmp_path / name), "--device", "cpu", *more]
    assert random_model.main(arguments) == 0
    return tmp_path / name


def test_the_folder_is_read_as_a_model_of_the_hub(tmp_path: Path, one_thread: None) -> None:
    folder = made(tmp_path, "model", "--layers", "3")
    model = ModelConfig("random", ModelSource.hub, path=str(folder))
    network = load_network(model, tmp_path, "float32", "cpu")
    assert len(network.model.layers) == 3 and network.lm_head.weight is network.model.embed_tokens.weight
    assert network.config.vocab_size == 512
    ids = torch.tensor([tokenizer_of(model, tmp_path)(text(30))[:64]])
    with torch.no_grad():
        entropy = torch.distributions.Categorical(logits=network(input_ids=ids).logits).entropy().mean()
    assert 0.9 * math.log(512) < float(entropy) <= math.log(512)  # it knows nothing


def test_weights_have_their_spread_and_the_residual_ones_a_smaller(tmp_path: Path, one_thread: None) -> None:
    folder = made(tmp_path, "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    network = load_network(ModelConfig("random", ModelSource.hub, path=str(folder)), tmp_path, "bfloat16", "cpu")
    layer = network.model.layers[1]
    assert float(layer.mlp.up_proj.weight.float().std()) == pytest.approx(random_model.STD, rel=0.05)
    assert float(layer.mlp.down_proj.weight.float().std()) == pytest.approx(random_model.STD / 2, rel=0.05)  # √(2 · 2)
    assert float(layer.input_layernorm.weight.float().mean()) == pytest.approx(1, abs=0.1)
    stored = {name: tensor for name, tensor in network.state_dict().items() if name != "lm_head.weight"}
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, one_thread: None) -> None:
    folders = [made(tmp_path, name, "--seed", seed) for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))]
    for file in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        a, b, c = ((folder / file).read_bytes() for folder in folders)
        assert a == b != c


def test_qwen3_4b_has_its_number_of_parameters() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**random_model.SHAPES["qwen3_4b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_022_468_096


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert random_model.main(["tiny", "--text", str(tmp_path / "none.txt"), "--out", str(tmp_path / "m")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        random_model.main(["tiny", "--text", "python_docs", "--out", str(tmp_path / "m"), "--layers", "0"])
    assert "--layers 0: at least 1" in capsys.readouterr().err
