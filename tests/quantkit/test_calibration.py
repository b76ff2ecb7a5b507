"""Gram matrices, block Hessians and their factors against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
