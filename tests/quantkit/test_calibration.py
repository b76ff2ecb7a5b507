"""Gram matrices, block Hessians and their factors against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit import calibration
from quantkit.calibration import (
    GramAccumulator,
    block_hessians,
    factorize,
    gram_matrix,
    hessians_from_activations,
)
from tests.inputs import HESSIAN_FAMILIES, hessian_family


def activations(tokens: int = 700, columns: int = 64) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_streamed_batches_give_the_gram_matrix(dtype: torch.dtype) -> None:
    x = activations().to(dtype)
    accumulator = GramAccumulator(64)
    for batch in x.split([1, 300, 0, 399]):
        accumulator.update(batch)
    want = x.double().T @ x.double()
    assert accumulator.tokens == 700
    accumulator.update(torch.zeros(1, 64).requires_grad_() * 2)
    assert not accumulator.gram.requires_grad
    torch.testing.assert_close(accumulator.gram.double(), want, rtol=1e-5, atol=float(want.diagonal().max()) * 1e-6)
    torch.testing.assert_close(gram_matrix(x).double(), want, rtol=1e-5, atol=float(want.diagonal().max()) * 1e-6)


@pytest.mark.parametrize("block_size", [16, 32])
def test_block_hessians_are_the_diagonal_blocks(block_size: int) -> None:
    x = activations().double()
    gram = x.T @ x
    blocks = block_hessians(gram, block_size)
    assert blocks.shape == (64 // block_size, block_size, block_size)
    for j, block in enumerate(blocks):
        part = slice(j * block_size, (j + 1) * block_size)
        assert torch.equal(block, gram[part, part])
    torch.testing.assert_close(hessians_from_activations(x, block_size), blocks)


@pytest.mark.parametrize("family", HESSIAN_FAMILIES)
def test_factors_reproduce_the_hessian(family: str) -> None:
    h = hessian_family(family, 16, np.random.default_rng(0))
    factors = factorize(torch.tensor(h)[None])
    product = (factors.factor[0] @ factors.factor[0].T).numpy()
    mean = np.diag(h).mean()
    want = np.eye(16) if mean == 0 else h / mean
    assert np.abs(product - want).max() <= 1e-6 * np.abs(want).max()  # float32 input that is not quite semi-definite
    inverse = np.linalg.inv(product)
    if np.linalg.cond(product) < 1e9:
        np.testing.assert_allclose(factors.inverse_diagonal[0].numpy(), np.diag(inverse), rtol=1e-4)
    assert torch.isfinite(factors.inverse_diagonal).all()


def test_huge_and_tiny_hessians_have_the_same_factors() -> None:
    h = torch.tensor(hessian_family("activations", 16, np.random.default_rng(1)))[None].double()
    a, b, c = factorize(h), factorize(h * 2.0**120), factorize(h * 2.0**-120)
    assert torch.equal(a.factor, b.factor) and torch.equal(a.factor, c.factor)


def test_errors() -> None:
    with pytest.raises(ValueError, match="32 features, the layer has 64"):
        GramAccumulator(64).update(torch.zeros(3, 32))
    with pytest.raises(ValueError, match=r"activations holds 1 NaN or Inf value, the first at index \(1, 2\)"):
        x = torch.zeros(3, 64)
        x[1, 2] = torch.inf
        GramAccumulator(64).update(x)
    with pytest.raises(ValueError, match=r"float32 or float64, not torch\.bfloat16"):
        GramAccumulator(64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="square"):
        block_hessians(torch.zeros(3, 4), 16)
    with pytest.raises(ValueError, match="40 columns, which block size 16 does not divide"):
        block_hessians(torch.eye(40), 16)
    with pytest.raises(ValueError, match="hessian holds 256 NaN or Inf values"):
        factorize(torch.full((1, 16, 16), torch.nan))


# --- weighted ---------------------------------------------------------------------------------------------------------


def token_weights(tokens: int = 700, *groups: int) -> torch.Tensor:
    return torch.rand(tokens, *groups, generator=torch.Generator().manual_seed(1)).square()


def weighted_sum(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Σ w_t x_t x_tᵀ, term by term in float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row, weight in zip(x.double(), w.double(), strict=True):
        total += weight * row.outer(row)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_weighted_batches_give_the_weighted_gram_matrix(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, w = activations().to(dtype), token_weights().to(weight_dtype)
    w[::7] = 0
    accumulator = GramAccumulator(64, dtype=torch.promote_types(dtype, torch.float32))
    for rows in torch.arange(700).split([1, 300, 0, 399]):
        accumulator.update(x[rows], w[rows])
    want = weighted_sum(x, w)
    rtol = 1e-13 if dtype == torch.float64 else 1e-5  # of 700 terms, each rounded three times
    atol = float(want.diagonal().max()) * rtol / 10
    assert accumulator.tokens == 700
    torch.testing.assert_close(accumulator.gram.double(), want, rtol=rtol, atol=atol)
    torch.testing.assert_close(gram_matrix(x, w).double(), want, rtol=rtol, atol=atol)


def test_groups_have_a_gram_matrix_each() -> None:
    x, w = activations(), token_weights(700, 3)
    grams = gram_matrix(x, w)
    assert grams.shape == (3, 64, 64)
    for group in range(3):
        assert torch.equal(grams[group], gram_matrix(x, w[:, group]))
    accumulator = GramAccumulator(64, groups=3)
    accumulator.update(x, w)
    assert torch.equal(accumulator.gram, grams)


def test_weights_of_one_leave_the_sum_as_it_is() -> None:
    x = activations()
    assert torch.equal(gram_matrix(x, torch.ones(700, dtype=torch.float32)), gram_matrix(x))


def test_chunks_of_activations_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = activations().double(), token_weights()
    whole = gram_matrix(x, w)
    monkeypatch.setattr(calibration, "CHUNK_ELEMENTS", 64 * 33)
    torch.testing.assert_close(gram_matrix(x, w), whole, rtol=1e-13, atol=1e-13 * float(whole.diagonal().max()))


def test_the_tensor_cores_rounding_stays_within_its_bound() -> None:
    """What a GPU does with bfloat16 activations, on a CPU: √w x rounded to bfloat16, products and sums exact."""
    x, w = activations(4096).bfloat16(), token_weights(4096)
    exact = weighted_sum(x, w)
    rounded = (x.float() * w.sqrt()[:, None]).bfloat16().double()
    scale = exact.diagonal().sqrt()
    error = (rounded.T @ rounded - exact) / scale / scale[:, None]
    assert 0 < error.abs().max() <= 2 * 2.0**-8 + 2.0**-16  # a term has two roundings of up to 2⁻⁸
    assert torch.linalg.eigvalsh(rounded.T @ rounded)[0] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_pass_whatever_their_sum_is(dtype: torch.dtype) -> None:
    large = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    calibration.check_finite(large, "x")
    calibration.check_finite(torch.empty(0, 4, dtype=dtype), "x")
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match=r"x holds 1 NaN or Inf value, the first at index \(1, 2\)"):
            calibration.check_finite(torch.where(torch.arange(12).view(3, 4) == 6, bad, large), "x")
    opposite = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    with pytest.raises(ValueError, match="x holds 2 NaN or Inf values"):
        calibration.check_finite(opposite, "x")


@pytest.mark.gpu
def test_tensor_cores_add_the_rounded_products_in_float32() -> None:
    x, w = activations(4096).bfloat16(), token_weights(4096, 2)
    got = gram_matrix(x.cuda(), w.cuda()).cpu().double()
    assert gram_matrix(x.cuda(), w.cuda()).dtype == torch.float32
    for group in range(2):
        rounded = (x.float() * w[:, group, None].sqrt()).bfloat16().double()
        want = rounded.T @ rounded
        torch.testing.assert_close(got[group], want, rtol=1e-5, atol=1e-6 * float(want.diagonal().max()))


@pytest.mark.gpu
def test_bfloat16_without_weights_is_added_in_float32_too() -> None:
    x = activations(4096).bfloat16()
    got, want = gram_matrix(x.cuda()), x.double().T @ x.double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6 * float(want.diagonal().max()))


def test_errors_of_weights() -> None:
    x, w = activations(), token_weights()
    for wrong, message in (
        (w[:5], r"weights must be float32 or float64 \[700\], one weight per token, got float32 \[5\]"),
        (w[:, None], r"weights must be float32 or float64 \[700\], one weight per token, got float32 \[700, 1\]"),
        (w.half(), r"got float16 \[700\]"),
        (w.where(w != w[3], torch.nan), r"weights holds 1 NaN or Inf value, the first at index \(3,\)"),
        (w.where(w != w[2], -0.5), r"weights hold 1 negative values, the first, -0\.5, at index \(2,\); .* clamp it"),
    ):
        with pytest.raises(ValueError, match=message):
            GramAccumulator(64).update(x, wrong)
    with pytest.raises(TypeError, match=r"weights must be a torch\.Tensor, got list"):
        GramAccumulator(64).update(x, w.tolist())
    with pytest.raises(ValueError, match=r"\[700, 2\], one weight per token and group, got float32 \[700\]"):
        GramAccumulator(64, groups=2).update(x, w)
    with pytest.raises(ValueError, match=r"needs weights \[tokens, 2\]"):
        GramAccumulator(64, groups=2).update(x)
    with pytest.raises(ValueError, match="groups must be 1 or more, got 0"):
        GramAccumulator(64, groups=0)


def test_a_sum_takes_another_accumulators_sum() -> None:
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    total, part = GramAccumulator(16), GramAccumulator(16)
    total.update(x[:10])
    part.update(x[10:])
    want = total.gram + part.gram
    total.add(part.gram, part.tokens)
    assert torch.equal(total.gram, want) and total.tokens == 30
    total.add(part.gram.double(), 20)
    assert total.gram.dtype == torch.float64
    with pytest.raises(ValueError, match=r"gram must be \[16, 16\] like this sum, got float32 \[8, 8\]"):
        total.add(torch.zeros(8, 8), 1)
