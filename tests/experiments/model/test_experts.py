"""Whole models with a mixture of experts: each expert's own Hessians, by the tokens that the router sends to it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.capture.losses import load_loss_weights
from experiments.config import LayerConfig
from experiments.model.checkpoint import load_dequantized, open_quantized
from experiments.model.experts import ExpertSums
from experiments.model.job import Listener, quantize_model
from experiments.model.solve import block_hessians
from experiments.model.sums import Inputs
from quantkit import quantize
from quantkit.layouts import exact_global_scale
from tests.experiments.model.test_walk import SEQ_LEN, SEQUENCES, close, ids_of, run_for, watched
from tests.experiments.sources.every_decoder import tiny_model
from tests.experiments.tiny_models import train_tokenizer, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("moe")
    model = tiny_model("qwen3_moe", vocab_size=300, moe_intermediate_size=32)
    model.save_pretrained(root / "tiny")
    train_tokenizer(root / "tiny")
    write_text(root / "texts")
    return SimpleNamespace(folder=root / "tiny", texts=root / "texts", cache=root / "cache", model=model)


def routed(model: Any, other: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Expert → (inputs of gate_up in `model`, the same tokens' inputs in `other`, routing factors), of layer 1; the
    router is that of `model`."""
    calls = {}
    for name, each in (("model", model), ("other", other)):
        handle = each.get_submodule(EXPERTS).register_forward_pre_hook(
            lambda _, args, name=name: calls.__setitem__(name, args)
        )
        with torch.no_grad():
            each(input_ids=ids, use_cache=False)
        handle.remove()
    hidden, index, factor = calls["model"]
    found = {}
    for expert in range(len(model.get_submodule(EXPERTS).gate_up_proj)):
        choice, token = index.T.eq(expert).nonzero(as_tuple=True)
        found[expert] = hidden[token], calls["other"][0][token], factor[token, choice]
    return found


def activated(model: Any, expert: int, x: Tensor) -> Tensor:
    """The input of an expert's down_proj."""
    gate, up = (x @ model.get_submodule(EXPERTS).gate_up_proj[expert].T).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("hessian", ["output", "loss"])
def test_an_expert_is_quantized_for_its_own_tokens(
    moe: SimpleNamespace, tmp_path: Path, hessian: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(moe, tmp_path, f"hessian={hessian}", "calibrate.min_tokens=0")
    with watched(monkeypatch) as seen:
        fields = quantize_model(run, Listener())
    assert fields["few_tokens"] == {} and fields["left_out"]["model.layers.1.mlp.gate"] == "a router"
    model, ids = load_dequantized(run.folder, torch.float32), ids_of(run)
    with torch.no_grad():
        rows = routed(model, moe.model, ids)
    assert sum(len(x) for x, *_ in rows.values()) == 2 * SEQ_LEN * SEQUENCES  # each token has two experts
    for matrix in ("gate_up_proj", "down_proj"):
        work, target = seen[f"{EXPERTS}.{matrix}"]
        weight = getattr(moe.model.get_submodule(EXPERTS), matrix).detach()
        assert torch.equal(work.weight, weight) and isinstance(work.sums, ExpertSums)
        for expert, (x_q, x, factor) in rows.items():
            w = torch.ones(len(x), dtype=torch.float64)
            if hessian == "loss":
                w = weights_of(run, model, ids, expert) * factor.double().square()
            if matrix == "down_proj":
                with torch.no_grad():
                    x_q, x = activated(model, expert, x_q), activated(moe.model, expert, x)
            x_q, x = x_q.double(), x.double()
            h = (w[:, None] * x_q).T @ x_q
            assert work.sums.tokens[expert] == len(x)
            close(work.sums.of_group(expert)[0], h)
            inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64))
            own = weight[expert].double()
            close(target[expert], own + 0.5 * own @ ((w[:, None] * (x - x_q)).T @ x_q) @ inverse)


def weights_of(run: Any, model: Any, ids: Tensor, expert: int) -> Tensor:
    """w of the expert's tokens: the loss weights at the output of all experts, of mean 1."""
    every = load_loss_weights(run.resolved, LayerConfig(1, "mlp.experts"))[:, 0].double()
    calls: list[Any] = []
    handle = model.get_submodule(EXPERTS).register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    _, token = calls[0][1].T.eq(expert).nonzero(as_tuple=True)
    return every[token] / every.mean()


def test_the_folder_holds_each_expert_with_a_global_scale_of_its_own(
    moe: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(moe, tmp_path, "hessian=output", "calibrate=parallel", "model.include=['*.1.mlp.experts.*']")
    with watched(monkeypatch) as seen:
        fields = quantize_model(run, Listener())
    written = open_quantized(run.folder)
    model = load_dequantized(run.folder, torch.float32)
    assert fields["matrices"] == 2 and "model.layers.0.mlp.experts.down_proj" in fields["left_out"]
    for path, (work, target) in seen.items():
        got = written.quantized(path)
        assert work.sums is not None and got.global_scale.shape == (len(target), 1, 1)
        for expert, own in enumerate(target):
            hessian = block_hessians(work.sums.of_group(expert)[0], 16)
            scale = exact_global_scale(quantize(own, "nvfp4", 16, "naive").global_scale)
            want = quantize(own, "nvfp4", 16, "hessian", hessian=hessian, global_scale=scale)
            assert torch.equal(got[expert].codes, want.codes) and torch.equal(got[expert].scales, want.scales)
            assert torch.equal(got[expert].global_scale, want.global_scale)
        assert torch.equal(model.get_parameter(path), got.dequantize())


def test_experts_with_few_tokens_are_listed(moe: SimpleNamespace, tmp_path: Path) -> None:
    run = run_for(moe, tmp_path, "hessian=output", "calibrate=parallel", "calibrate.min_tokens=100000")
    fields = quantize_model(run, Listener())
    number = len(moe.model.get_submodule(EXPERTS).down_proj)
    expected = {
        f"model.layers.{layer}.mlp.experts.{matrix}.{expert}"
        for layer in range(fields["layers"])
        for matrix in ("gate_up_proj", "down_proj")
        for expert in range(number)
    }
    assert set(fields["few_tokens"]) == expected
    assert sum(fields["few_tokens"].values()) == 2 * fields["layers"] * 2 * SEQ_LEN * SEQUENCES


def test_missing_tokens_are_replaced_by_average_ones() -> None:
    rows = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n), dtype=torch.float32) for n in (40, 6, 0)]
    sums = ExpertSums(3, 16, torch.device("cpu"), min_tokens=10, with_shift=True)
    for expert, x in enumerate(rows):
        sums.update(expert, Inputs(x, x + 1))
    grams = [x.double().T @ x.double() for x in rows]
    mean = (grams[0] + grams[1]) / 46
    assert sums.few() == {1: 6, 2: 0} and sums.tokens == [40, 6, 0]
    for expert, lacking in ((0, 0), (1, 4), (2, 10)):
        close(sums.of_group(expert)[0], grams[expert] + lacking * mean)
    shift = sums.of_group(1)[1]
    assert shift is not None
    close(shift, torch.ones(6, 16, dtype=torch.float64).T @ rows[1].double())
    assert sums.of_group(2)[1] is None  # nothing to correct
