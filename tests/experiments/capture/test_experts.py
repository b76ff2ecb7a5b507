"""Mixture of experts: an expert's inputs are the tokens that the router sends to it, as the record says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.capture import forward, load
from experiments.capture.inputs import LayerInputs
from experiments.capture.limit import limit_calibration
from experiments.capture.tokens import token_sequences
from experiments.config import Config, LayerConfig, MethodConfig
from experiments.files import SourceError
from experiments.run import measure
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.decoder import build_decoder
from experiments.sources.resolved import resolve
from tests.experiments.sources.every_decoder import hooked, tiny_model
from tests.experiments.tiny_models import configuration, train_tokenizer, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("qwen3_moe", "mixtral", "gpt_oss")
MATRICES = ("gate_proj", "up_proj", "down_proj")
LAYER, EXPERT = 2, 3


@pytest.fixture(scope="module", params=KINDS)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param, vocab_size=300, moe_intermediate_size=32)
    model.save_pretrained(root / "tiny")
    train_tokenizer(root / "tiny")
    write_text(root / "texts")
    return SimpleNamespace(kind=request.param, folder=root / "tiny", texts=root / "texts", model=model)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "MIB", 1 << 15)
    monkeypatch.setattr(forward, "BATCH_TOKENS", 64)
    monkeypatch.setattr(load, "_memo", type(load._memo)())


def config_for(moe: SimpleNamespace, module: str, **changes: Any) -> Config:
    return configuration(moe.folder, moe.texts, layer__index=LAYER, layer__module=module, **changes)


def captured(config: Config) -> LayerInputs:
    return load.load_layer_inputs(resolve(config))


def tokens_of(config: Config) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(config.model, config.cache.folder)
    return token_sequences(config, checkpoint.tokenizer()).ids


def plain_loop(moe: SimpleNamespace, ids: Tensor, matrix: str) -> Tensor:
    """[tokens, in_features] that reach the expert's matrix, by a loop over tokens on the whole model."""
    block = moe.model.model.layers[LAYER].mlp
    with hooked(block) as calls:
        moe.model(input_ids=ids, use_cache=False)
    hidden = calls[0][0].reshape(-1, calls[0][0].shape[-1])
    router = block.router if moe.kind == "gpt_oss" else block.gate
    rows = []
    for choice in (0, 1):  # the model takes the tokens that have the expert for their first choice first
        for x in hidden:
            logits = router.weight @ x + (router.bias if moe.kind == "gpt_oss" else 0)
            if logits.topk(2).indices[choice] == EXPERT:
                rows.append(x if matrix != "down_proj" else activated(moe, block.experts, x))
    inner = block.experts.down_proj.shape[1 if moe.kind == "gpt_oss" else 2]
    width = inner if matrix == "down_proj" else hidden.shape[1]
    return torch.stack(rows) if rows else torch.empty(0, width, dtype=torch.float32, device="cpu")


def activated(moe: SimpleNamespace, experts: Any, x: Tensor) -> Tensor:
    """The input of the expert's down_proj for one token, by the papers' formulas."""
    if moe.kind == "gpt_oss":
        both = x @ experts.gate_up_proj[EXPERT] + experts.gate_up_proj_bias[EXPERT]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    gate, up = (experts.gate_up_proj[EXPERT] @ x).chunk(2)
    return torch.nn.functional.silu(gate) * up


def expected_weight(moe: SimpleNamespace, matrix: str) -> Tensor:
    """[out_features, in_features] of the expert's matrix."""
    experts = moe.model.model.layers[LAYER].mlp.experts
    if moe.kind == "gpt_oss":  # [E, in, out], gate and up in turns
        if matrix == "down_proj":
            return experts.down_proj[EXPERT].T
        return experts.gate_up_proj[EXPERT].T[0 if matrix == "gate_proj" else 1 :: 2]
    if matrix == "down_proj":
        return experts.down_proj[EXPERT]
    gate, up = experts.gate_up_proj[EXPERT].chunk(2)
    return gate if matrix == "gate_proj" else up


@pytest.mark.parametrize("matrix", MATRICES)
def test_an_expert_sees_the_tokens_that_the_router_sends_it(
    moe: SimpleNamespace, matrix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(moe, f"mlp.experts.{EXPERT}.{matrix}")
    inputs = captured(config)
    said = capsys.readouterr().out
    assert torch.equal(inputs.weight, expected_weight(moe, matrix))
    for split, ids in tokens_of(config).items():
        want = torch.cat([plain_loop(moe, batch, matrix) for batch in ids.split(2)])
        got = torch.cat(list(inputs.batches(split)))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        gram = inputs.gram_calibration if split == "calibration" else inputs.gram_heldout
        assert gram is not None
        torch.testing.assert_close(gram, want.T @ want, rtol=1e-4, atol=1e-3)
    count = inputs.tokens_calibration
    assert 0 < count < 12 * 32 and count == sum(len(x) for x in inputs.batches("calibration"))
    assert f"mlp.experts.{EXPERT}.{matrix}: the router sends it {count} of 384 tokens" in said


def test_the_attention_of_an_moe_layer(moe: SimpleNamespace) -> None:
    config = config_for(moe, "self_attn.o_proj")
    inputs = captured(config)
    module = moe.model.model.layers[LAYER].self_attn.o_proj
    assert torch.equal(inputs.weight, module.weight)
    for split, ids in tokens_of(config).items():
        with hooked(module) as calls:
            moe.model(input_ids=ids, use_cache=False)
        want = calls[0][0].reshape(-1, module.in_features)
        torch.testing.assert_close(torch.cat(list(inputs.batches(split))), want, rtol=1e-5, atol=1e-5)
    assert (inputs.tokens_calibration, inputs.tokens_heldout) == (12 * 32, 4 * 32)


def test_an_expert_that_saw_few_tokens_is_said_to_have(
    moe: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = captured(config_for(moe, f"mlp.experts.{EXPERT}.gate_proj", data__samples=2, data__heldout=0.5))
    assert inputs.tokens_calibration < 32
    assert (
        f"sends it {inputs.tokens_calibration} of 32 tokens, fewer than its 32 inputs: too few to calibrate on"
        in capsys.readouterr().out
    )


def test_an_expert_that_no_token_reaches_is_an_error(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", vocab_size=300)
    torch.nn.init.constant_(model.model.layers[LAYER].mlp.router.bias[EXPERT], -1e4)
    model.save_pretrained(tmp_path / "tiny")
    train_tokenizer(tmp_path / "tiny")
    write_text(tmp_path / "texts")
    moe = SimpleNamespace(folder=tmp_path / "tiny", texts=tmp_path / "texts")
    message = rf"experts\.{EXPERT}\.up_proj: the router of layer {LAYER} sends it none of 384 calibration tokens\. "
    with pytest.raises(SourceError, match=message):
        captured(config_for(moe, f"mlp.experts.{EXPERT}.up_proj"))
    assert captured(config_for(moe, "mlp.experts.0.up_proj")).tokens_calibration > 0


def test_the_record_counts_the_tokens_of_an_expert(moe: SimpleNamespace) -> None:
    config = config_for(moe, f"mlp.experts.{EXPERT}.gate_proj", method=MethodConfig("hessian"))
    record, _ = measure(resolve(config))
    assert (record.status, record.reason) == ("ok", None)
    inputs = captured(config)
    assert (record.tokens_calibration, record.tokens_heldout) == (inputs.tokens_calibration, inputs.tokens_heldout)
    assert 0 < record.tokens_calibration < 384
    assert (record.out_features, record.in_features) == tuple(inputs.weight.shape)
    assert 0 < record.output_error_heldout < 1


def test_gate_and_up_share_their_inputs(moe: SimpleNamespace) -> None:
    layers = [LayerConfig(LAYER, f"mlp.experts.{EXPERT}.{matrix}") for matrix in MATRICES]
    resolved = resolve(config_for(moe, layers[0].module))
    forward.capture_layers(resolved, layers)
    gate, up, down = (resolved.layer_folder(layer) for layer in layers)
    assert (gate / "gram.safetensors").stat().st_ino == (up / "gram.safetensors").stat().st_ino
    assert (gate / "gram.safetensors").stat().st_ino != (down / "gram.safetensors").stat().st_ino
    for folder in (gate, up, down):
        assert json.loads((folder / "manifest.json").read_text())["routed"] is True


def test_a_damaged_shard_of_an_expert_is_captured_anew(moe: SimpleNamespace) -> None:
    config = config_for(moe, f"mlp.experts.{EXPERT}.down_proj")
    inputs = captured(config)
    before = [x.clone() for x in inputs.batches()]
    assert len(before) > 1
    folder = resolve(config).layer_folder()
    shard = folder / "calibration-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8] + b"\xff" * 8)
    assert all(torch.equal(x, y) for x, y in zip(inputs.batches(), before, strict=True))
    again = captured(config)
    assert torch.equal(again.gram_calibration, inputs.gram_calibration)
    assert again.tokens_calibration == inputs.tokens_calibration


def test_fewer_tokens_of_an_expert_are_refused(moe: SimpleNamespace) -> None:
    inputs = captured(config_for(moe, f"mlp.experts.{EXPERT}.down_proj"))
    with pytest.raises(SourceError, match=r"data\.calibration_tokens=8: a router sends this expert \d+ tokens"):
        limit_calibration(inputs, 8, 32, 0)


def test_names_of_checkpoints_are_understood(moe: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(config_for(moe, "x").model, moe.folder)
    for stored, matrix in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        layer = LayerConfig(LAYER, f"block_sparse_moe.experts.{EXPERT}.{stored}")
        assert torch.equal(build_decoder(checkpoint, [layer], "float32").weight(layer), expected_weight(moe, matrix))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("mlp.experts.4.down_proj", r"layer 2 of tiny \(local\) has 4 experts, 0 to 3\."),
        ("mlp.experts.0.w4", r"an expert of layer 2 of tiny \(local\) has gate_proj, up_proj, down_proj\."),
        ("mlp.experts", r"It has self_attn\.q_proj, .*mlp\.experts\.0\.down_proj \(experts 0 to 3\)\."),
    ],
)
def test_an_expert_that_is_not_there(moe: SimpleNamespace, module: str, message: str) -> None:
    checkpoint = open_checkpoint(config_for(moe, "x").model, moe.folder)
    with pytest.raises(SourceError, match=message):
        build_decoder(checkpoint, [LayerConfig(LAYER, module)], "float32")
