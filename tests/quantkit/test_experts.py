"""Fused weights of experts ``[E, N, K]``, each with Hessians or a global scale of its own: as a loop over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import QuantizedTensor, compute_metrics, quantize, verify
from quantkit.calibration import gram_matrix, hessians_from_activations
from quantkit.metrics import output_error_from_gram

EXPERTS, ROWS, COLUMNS = 3, 4, 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


@pytest.fixture
def weight() -> Tensor:
    """Of experts whose magnitudes differ."""
    return normal(EXPERTS, ROWS, COLUMNS) * torch.tensor([1.0, 0.1, 30.0]).view(-1, 1, 1)


@pytest.fixture
def tokens() -> list[Tensor]:
    """Of each expert as many as it was sent."""
    scale = torch.logspace(-1, 1, COLUMNS, dtype=torch.float32, device="cpu")
    return [normal(number, COLUMNS, seed=number) * scale.roll(number) for number in (50, 40, 70)]


def same(got: QuantizedTensor, want: list[QuantizedTensor], own_scale: bool) -> None:
    assert torch.equal(got.codes, torch.stack([q.codes for q in want]))
    assert torch.equal(got.scales, torch.stack([q.scales for q in want]))
    scales = torch.stack([q.global_scale for q in want])
    assert got.global_scale.dtype == torch.float32
    assert torch.equal(got.global_scale, scales.view(-1, 1, 1) if own_scale else scales[0])
    if want[0].candidates is not None:
        assert torch.equal(got.candidates, torch.stack([q.candidates for q in want]))  # type: ignore[misc, arg-type]
    for expert, q in enumerate(want):
        assert torch.equal(got[expert].dequantize(), q.dequantize())
    assert torch.equal(got.dequantize(torch.bfloat16), torch.stack([q.dequantize(torch.bfloat16) for q in want]))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_experts_with_hessians_of_their_own_are_a_loop(
    weight: Tensor, tokens: list[Tensor], format: str, backend: str, device: str
) -> None:
    """With one global scale for all, that of the whole weight, unless each is asked to have its own."""
    if backend == "triton":
        weight, tokens = weight[:2, :, :16].contiguous(), [x[:, :16].contiguous() for x in tokens[:2]]
    weight, tokens = weight.to(device), [x.to(device) for x in tokens]
    hessian = torch.stack([hessians_from_activations(x, 16) for x in tokens])
    shared = quantize(weight, format, method="naive", backend=backend).global_scale
    call: Callable[..., QuantizedTensor]

    def call(w: Tensor, **given: Any) -> QuantizedTensor:
        return quantize(w, format, 16, "hessian", backend=backend, count_candidates=True, **given)

    one_scale = {"global_scale": shared} if format == "nvfp4" else {}
    loop = [call(w, hessian=h, **one_scale) for w, h in zip(weight, hessian, strict=True)]
    same(call(weight, hessian=hessian), loop, own_scale=False)
    if format == "mxfp4":
        return
    loop = [call(w, hessian=h) for w, h in zip(weight, hessian, strict=True)]
    got = call(weight, hessian=hessian, global_scale="amax_per_expert")
    same(got, loop, own_scale=True)
    assert len(got.global_scale.unique()) == len(weight)
    assert verify(got, weight, hessian).ok


@pytest.mark.parametrize("method", ["naive", "sse"])
def test_experts_with_a_global_scale_of_their_own_are_a_loop(
    weight: Tensor, method: str, backend: str, device: str
) -> None:
    weight = weight.to(device)
    scales = torch.tensor([0.01, 0.002, 0.3], dtype=torch.float32, device=device).view(-1, 1, 1)
    loop = [quantize(w, method=method, backend=backend, global_scale=s) for w, s in zip(weight, scales, strict=True)]
    same(quantize(weight, method=method, backend=backend, global_scale=scales), loop, own_scale=True)
    loop = [quantize(w, method=method, backend=backend) for w in weight]
    same(quantize(weight, method=method, backend=backend, global_scale="amax_per_expert"), loop, own_scale=True)


def test_inputs_of_each_expert_are_given_as_activations_gram_or_hessian(weight: Tensor, tokens: list[Tensor]) -> None:
    gram = torch.stack([gram_matrix(x) for x in tokens])
    want = [
        quantize(w, "mxfp4", method="hessian", activations=x.view(1, *x.shape))
        for w, x in zip(weight, tokens, strict=True)
    ]
    same(quantize(weight, "mxfp4", method="hessian", activations=tokens), want, own_scale=False)
    want = [quantize(w, "mxfp4", method="hessian", gram=g) for w, g in zip(weight, gram, strict=True)]
    same(quantize(weight, "mxfp4", method="hessian", gram=gram), want, own_scale=False)


def test_what_is_given_once_holds_for_all_experts(weight: Tensor, tokens: list[Tensor]) -> None:
    """Without anything of their own, experts are rows of one weight."""
    hessian = hessians_from_activations(tokens[0], 16)
    together = quantize(weight, method="hessian", hessian=hessian)
    flat = quantize(weight.flatten(0, 1), method="hessian", hessian=hessian)
    assert torch.equal(together.codes.flatten(0, 1), flat.codes) and together.global_scale.ndim == 0
    own = quantize(weight, method="hessian", hessian=hessian.expand(EXPERTS, -1, -1, -1))
    assert torch.equal(own.codes, together.codes) and torch.equal(own.global_scale, together.global_scale)


def test_verify_judges_each_expert_by_its_own(weight: Tensor, tokens: list[Tensor]) -> None:
    hessian = torch.stack([hessians_from_activations(x, 16) for x in tokens])
    sse = quantize(weight, method="sse", global_scale="amax_per_expert")
    assert verify(sse, weight).ok
    want = [verify(sse[expert], weight[expert], hessian[expert]) for expert in range(EXPERTS)]
    got = verify(sse, weight, hessian)
    assert got.violations == sum(one.violations for one in want) > 0
    assert got.worst_excess == max(one.worst_excess for one in want) and got.blocks == weight.numel() // 16
    rows = [(expert * ROWS + row, block) for expert, one in enumerate(want) for row, block in one.where]
    assert list(got.where) == rows[:10]
    with pytest.raises(ValueError, match=r"hessian has shape \[2, 2, 16, 16\], this tensor needs \[3, 2, 16, 16\]"):
        verify(sse, weight, hessian[:2])


def test_a_file_keeps_the_global_scale_of_each_expert(tmp_path: Path, weight: Tensor, tokens: list[Tensor]) -> None:
    q = quantize(weight, global_scale="amax_per_expert")
    q.save(tmp_path / "experts.safetensors")
    back = QuantizedTensor.load(tmp_path / "experts.safetensors")
    assert torch.equal(back.global_scale, q.global_scale) and torch.equal(back.dequantize(), q.dequantize())
    assert q.nbytes == q.codes.numel() + q.scales.numel() + 4 * EXPERTS
    assert compute_metrics(weight, back.dequantize(), tokens[0])["weight_error"] < 0.2
    assert output_error_from_gram(weight, back.dequantize(), gram_matrix(tokens[0])) < 0.2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "hessian", "hessian": torch.zeros(2, 2, 16, 16)}, "hessian holds 2 experts, the weight has 3"),
        ({"method": "hessian", "hessian": torch.zeros(3, 1, 16, 16)}, r"expert 0: hessian has shape \[1, 16, 16\]"),
        (
            {"method": "hessian", "activations": [torch.ones(2, 32), torch.ones(0, 32), torch.ones(2, 32)]},
            r"expert 1: activations \[0, 32\] have no token",
        ),
        ({"global_scale": torch.ones(2, 1, 1)}, r"one float32 on cpu, or \[E, 1, 1\] for a weight \[E, N, K\], got"),
        ({"global_scale": torch.zeros(3, 1, 1)}, "expert 0: global_scale must be a positive number"),
        ({"global_scale": "amax_per_expert", "format": "mxfp4"}, "mxfp4 has no global scale"),
        ({"method": "sse", "hessian": torch.zeros(3, 2, 16, 16)}, "method 'sse' does not use hessian"),
    ],
)
def test_errors_name_the_expert(weight: Tensor, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, **given)


def test_errors_of_weights(weight: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"'amax_per_expert' is for a weight \[E, N, K\], of two dimensions use 'amax'"
    ):
        quantize(weight[0], global_scale="amax_per_expert")
    with pytest.raises(ValueError, match=r"weight \[0, 4, 32\] has no expert"):
        quantize(weight[:0], global_scale="amax_per_expert")
    for value in (torch.nan, torch.inf):
        weight[1, 2, 3] = value
        hessian = torch.eye(16).expand(3, 2, 16, 16)
        with pytest.raises(ValueError, match="weight holds 1 NaN or Inf value"):
            quantize(weight, method="hessian", hessian=hessian)
