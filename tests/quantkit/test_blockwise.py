"""The function-per-format API: all fourteen functions, explicit blocks, any block dimension."""

from __future__ import annotations

import pytest
import torch

import quantkit
from quantkit import compute_metrics, nvfp4_dequantize, nvfp4_optimal, nvfp4_optimal_hessian, quantize

NAMES = [
    f"{fmt}_{name}{suffix}"
    for fmt in ("nvfp4", "mxfp4")
    for name in ("naive", "optimal", "optimal_hessian")
    for suffix in ("", "_triton")
]
METHOD = {"naive": "naive", "optimal": "sse", "optimal_hessian": "hessian"}
CUDA = torch.cuda.is_available()


def blocks(block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(6, 64 // block_size, block_size, generator=g) * 0.1, torch.randn(80, 64, generator=g)
    return (w.cuda(), x.cuda()) if CUDA else (w, x)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", NAMES)
def test_every_function_gives_what_quantize_gives(name: str, block_size: int) -> None:
    w, x = blocks(block_size)
    options = {"X": x} if "hessian" in name else {}
    scales, quants, dequantized = getattr(quantkit, name)(w, dim=-1, return_dequant=True, **options)
    assert scales.shape == w.shape[:-1] and quants.shape == dequantized.shape == w.shape
    format, _, method = name.removesuffix("_triton").partition("_")
    want = quantize(
        w.reshape(6, 64), format, block_size, METHOD[method], global_scale="none",
        activations=options.get("X"), backend="triton" if name.endswith("triton") else "reference",
    )  # fmt: skip
    assert torch.equal(dequantized.reshape(6, 64), want.dequantize())
    assert torch.equal(scales, want.scale_values())
    assert torch.equal(getattr(quantkit, f"{format}_dequantize")(scales, quants, dim=-1), dequantized)
    two = getattr(quantkit, name)(w, **options)
    assert len(two) == 2 and torch.equal(two[0], scales) and torch.equal(two[1], quants)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_blocks_along_another_dimension(name: str, dim: int) -> None:
    w, x = blocks(16)
    options = {"X": x} if "hessian" in name else {}
    function = getattr(quantkit, name)
    scales, quants, dequantized = function(w, return_dequant=True, **options)
    moved = w.movedim(-1, dim)
    got = function(moved, dim=dim, return_dequant=True, **options)
    assert torch.equal(got[0], scales)
    assert torch.equal(got[1].movedim(dim, -1), quants) and torch.equal(got[2].movedim(dim, -1), dequantized)


def test_the_snippet_of_the_readme() -> None:
    g = torch.Generator().manual_seed(1)
    M, K = 8, 64
    W, X = torch.randn(M, K, generator=g), torch.randn(50, K, generator=g)
    W_blocked = W.reshape(M, K // 32, 32)
    scales, quants = nvfp4_optimal(W_blocked, dim=-1)
    W_dq = nvfp4_dequantize(scales, quants, dim=-1)
    metrics = compute_metrics(W, W_dq.reshape(M, K), X)
    assert 0 < metrics["weight_error"] < 0.2 and 0 < metrics["output_error"] < 0.2


def test_errors() -> None:
    w, x = blocks(16)
    with pytest.raises(ValueError, match="needs the layer's inputs"):
        nvfp4_optimal_hessian(w)
    with pytest.raises(ValueError, match="does not fit blocks"):
        nvfp4_optimal_hessian(w, X=x[:, :32])
    with pytest.raises(ValueError, match="dim 3 is out of range"):
        nvfp4_optimal(w, dim=3)
    with pytest.raises(ValueError, match="no block size 64"):
        nvfp4_optimal(w.reshape(6, 64))
