"""Small models are trained, reproducibly, and written as any model of the hub is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import train_small
from experiments.config import ModelConfig, ModelSource
from experiments.model.loading import load_network, tokenizer_of
from experiments.sources.models import model_identity
from tests.experiments.tiny_models import text


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "train.txt"
    path.write_text(text(600))
    return path


def trained(kind: str, texts: Path, out: Path, *more: str) -> dict:
    assert train_small.main([kind, "--text", str(texts), "--out", str(out), "--smoke", "--device", "cpu", *more]) == 0
    return json.loads((out / "training.json").read_text())


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_model_learns_and_is_read_back(kind: str, texts: Path, tmp_path: Path, one_thread: None) -> None:
    about = trained(kind, texts, tmp_path / kind, "--steps", "60")
    assert about["heldout_loss"][-1][1] < about["heldout_loss"][0][1] < math.log(300) + 0.5
    assert about["kind"] == kind and about["origin"].startswith("Trained here")
    model = ModelConfig(kind, ModelSource.hub, path=str(tmp_path / kind))
    network = load_network(model, tmp_path, "float32", "cpu")
    ids = torch.tensor([tokenizer_of(model, tmp_path)(text(30))[:32]])
    logits = network(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    # The best step was kept: the loss on such text is about what training.json says (bfloat16 weights, other tokens).
    assert float(loss) == pytest.approx(min(entry[1] for entry in about["heldout_loss"]), abs=0.7)
    assert network.config.model_type == {"dense": "qwen3", "moe": "qwen3_moe"}[kind]


def test_a_router_sends_tokens_to_every_expert(texts: Path, tmp_path: Path, one_thread: None) -> None:
    trained("moe", texts, tmp_path / "moe", "--steps", "60")
    model = ModelConfig("moe", ModelSource.hub, path=str(tmp_path / "moe"))
    network = load_network(model, tmp_path, "float32", "cpu")
    ids = torch.tensor(tokenizer_of(model, tmp_path)(text(200))[:1024]).view(-1, 32)
    for router in network(input_ids=ids, output_router_logits=True).router_logits:
        assert set(router.topk(2).indices.flatten().tolist()) == {0, 1, 2, 3}


def test_the_same_seed_gives_the_same_model(texts: Path, tmp_path: Path, one_thread: None) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, ("0", "0", "1"), strict=True):
        trained("dense", texts, folder, "--seed", seed)
    a, b, c = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert a == b != c
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[2] / "tokenizer.json").read_bytes()


def test_the_held_out_text_is_not_learnt() -> None:
    learnt, held = train_small.split_text(text(1000))
    assert learnt + held == text(1000) and learnt.endswith("\n")
    assert len(held) == pytest.approx(0.05 * len(text(1000)), rel=0.05)


def test_all_sequences_come_before_one_comes_again() -> None:
    steps = list(train_small.batches(10, train_small.Training(steps=5, batch=4)))
    assert sorted(i for step in steps for i in step) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize(("kind", "least", "most"), [("dense", 5e6, 2e7), ("moe", 5e6, 2e7)])
def test_the_sizes_are_those_of_the_table(kind: str, least: float, most: float) -> None:
    with torch.device("meta"):
        network = train_small.build(train_small.SIZES[kind], 512)
    assert least < sum(parameter.numel() for parameter in network.parameters()) < most
    assert all(p.shape[-1] % 32 == 0 for name, p in network.named_parameters() if p.ndim > 1 and "layers" in name)


def test_what_is_refused(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "train.txt"
    short.write_text("Too short.\n")
    for path, message in ((short, "Give more text"), (tmp_path / "no", "no such folder")):
        command = ["dense", "--text", str(path), "--out", str(tmp_path / "out"), "--smoke", "--device", "cpu"]
        assert train_small.main(command) == 1
        assert message in capsys.readouterr().err


def test_a_trained_model_has_an_identity(texts: Path, tmp_path: Path, one_thread: None) -> None:
    trained("dense", texts, tmp_path / "small_qwen3")
    model = ModelConfig("small_qwen3", ModelSource.hub, path=str(tmp_path / "small_qwen3"))
    assert model_identity(model).name == "small_qwen3 (local)"
