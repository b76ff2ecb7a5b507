"""Numbers at the ends of a dtype's range: saturated where they are written, scaled where they are squared."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit import compute_metrics, kernels, mxfp4_dequantize, mxfp4_optimal, quantize, verify
from quantkit.calibration import GramAccumulator, gram_matrix, hessians_from_activations
from quantkit.metrics import output_error, output_error_from_gram

LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_beyond_a_dtype_saturates(dtype: torch.dtype, backend: str, device: str) -> None:
    """The largest finite number of the dtype with the weight's sign, where the nearest scale's product overflows."""
    weight = torch.full((2, 16), LARGEST[dtype], dtype=torch.float32, device=device)
    weight[1] *= -1
    weight[:, 1:] *= 0.999  # 2^128 is the nearest level of float32's largest number
    q = quantize(weight, "mxfp4", 16, "sse", backend=backend)
    if backend == "triton":
        found = kernels.launcher().dequantize(q.codes, q.scales, q.global_scale, q.format, 16, dtype)
    else:
        found = q.dequantize(dtype)
    assert found.dtype == dtype and torch.equal(found.float(), weight.sign() * LARGEST[dtype])
    assert torch.equal(q.to("cpu").dequantize(dtype), found.cpu())


def test_every_dtype_and_level_saturates_and_the_rest_stays() -> None:
    weight = normal(4, 16)
    q = quantize(weight, "mxfp4", 16)
    for dtype in LARGEST:
        assert torch.equal(q.dequantize(dtype), (q.values() * q.scale_values().repeat_interleave(16, 1)).to(dtype))
        huge = replace(q, scales=torch.full_like(q.scales, 254))
        exact = q.values().double() * 2.0**127
        largest = min(LARGEST[dtype], LARGEST[torch.float32])
        assert torch.equal(huge.dequantize(dtype).double(), exact.clamp(-largest, largest).to(dtype).double())
    scales, quants = mxfp4_optimal(torch.full((1, 16), LARGEST[torch.float32], dtype=torch.float32, device="cpu"))
    assert bool(mxfp4_dequantize(scales, quants).isfinite().all())


def test_verify_judges_without_a_limit_of_range() -> None:
    weight = torch.full((1, 16), LARGEST[torch.float32], dtype=torch.float32, device="cpu")
    assert verify(quantize(weight, "mxfp4", 16), weight).ok
    assert "without a limit of range" in (verify.__globals__["__doc__"] or "")


@pytest.mark.parametrize("exponent", [-60, -90, -110])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_activations_are_not_lost(dtype: torch.dtype, exponent: int) -> None:
    """A power of two times the activations is that power's square times the Hessian, also below float32's range."""
    tokens = (normal(50, 32) * torch.logspace(-1, 1, 32, dtype=torch.float32, device="cpu")).to(dtype)
    small = tokens * 2.0**exponent
    assert torch.equal(small.double(), tokens.double() * 2.0**exponent)
    want, got = hessians_from_activations(tokens.double(), 16), hessians_from_activations(small, 16)
    torch.testing.assert_close(got.double() * 2.0 ** (-2 * exponent), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gram_matrix(small).double() * 2.0 ** (-2 * exponent), gram_matrix(tokens.double()), rtol=1e-5, atol=1e-5
    )
    weight = normal(8, 32)
    want_q = quantize(weight, method="hessian", hessian=want)
    for given in ({"activations": small}, {"gram": gram_matrix(small)}):
        q = quantize(weight, method="hessian", **given)
        assert torch.equal(q.scales, want_q.scales) and torch.equal(q.codes, want_q.codes)


def test_the_kernel_s_hessians_of_small_activations_are_not_lost() -> None:
    """As on a GPU: what the kernel lost shows on its diagonal."""
    by_kernel = importlib.import_module("quantkit.quantize")._hessians_from_activations
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = normal(20, 32).to(device)
    assert torch.equal(by_kernel(tokens, 32, 16), kernels.launcher().block_hessians(tokens, 16))
    tokens[:, 1] = 0
    assert by_kernel(tokens, 32, 16).dtype == torch.float32
    small = tokens * 2.0**-80
    assert torch.equal(by_kernel(small, 32, 16), hessians_from_activations(small.double(), 16))
    tokens[3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"activations holds 1 NaN or Inf value, the first at index \(3, 2\)"):
        by_kernel(tokens, 32, 16)
    tokens[3, 2] = 1e30
    with pytest.raises(ValueError, match="their squares exceed float32"):
        by_kernel(tokens, 32, 16)


def test_one_small_channel_among_large_ones_is_not_lost() -> None:
    tokens = normal(50, 32)
    tokens[:, 3] *= 2.0**-90
    for got in (gram_matrix(tokens), hessians_from_activations(tokens, 32)[0]):
        exact = tokens.double().T @ tokens.double()
        torch.testing.assert_close(got.double()[3], exact[3], rtol=1e-5, atol=0)
        assert got.dtype == torch.float64


def test_small_weights_of_tokens_lose_no_channel() -> None:
    """Each group's sum is that of its own weights, in one dtype for all."""
    tokens = normal(50, 32)
    weights = normal(50, 2, seed=1).square() * torch.tensor([2.0**-130, 1.0], dtype=torch.float32, device="cpu")
    weights[:, 0] *= 2.0**-10
    got, exact = gram_matrix(tokens * 2.0**-20, weights), gram_matrix(tokens.double() * 2.0**-20, weights)
    assert got.dtype == torch.float64 and got.shape == (2, 32, 32)
    for group in range(2):
        largest = float(exact[group].diagonal().max())
        torch.testing.assert_close(got[group], exact[group], rtol=1e-5, atol=1e-6 * largest)


def test_a_sum_that_float32_holds_stays_the_same_float32() -> None:
    """Also with dead channels, single small elements, and small batches of channels that were large before."""
    tokens = normal(60, 32)
    tokens[:, 0] = 0
    tokens[5, 1] = 1e-30
    accumulator = GramAccumulator(32)
    accumulator.update(tokens[:30])
    accumulator.update(tokens[30:])
    assert accumulator.gram.dtype == torch.float32
    assert torch.equal(accumulator.gram, torch.addmm(tokens[:30].T @ tokens[:30], tokens[30:].T, tokens[30:]))
    accumulator.update(tokens[:, :] * 1e-30)
    assert accumulator.gram.dtype == torch.float32
    assert gram_matrix(tokens * 1e-30).dtype == torch.float64


def test_errors_on_small_and_large_activations_are_those_of_ordinary_ones() -> None:
    weight, tokens = normal(8, 32), normal(50, 32)
    rough = quantize(weight).dequantize()
    want = output_error(tokens, weight, rough)
    for exponent in (-110, -70, 70, 100):
        scaled = tokens * 2.0**exponent
        assert compute_metrics(weight, rough, scaled)["output_error"] == pytest.approx(want, rel=1e-5)
        if exponent < 0:
            assert output_error_from_gram(weight, rough, gram_matrix(scaled)) == pytest.approx(want, rel=1e-5)
    tiny = 2.0**-80
    assert output_error_from_gram(weight * tiny, rough * tiny, gram_matrix(tokens)) == pytest.approx(want, rel=1e-5)
