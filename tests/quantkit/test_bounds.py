"""The windows contain the optimum of an exhaustive search, and are as narrow as docs/theory.md says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit import bounds, quantize
from quantkit.calibration import factorize, hessians_from_activations
from quantkit.formats import E2M1, FORMATS
from tests.inputs import HESSIAN_FAMILIES, WEIGHT_FAMILIES, correlated_tokens, hessian_family, weight_family
from tests.oracle import error_table, scale_codes

ONE = torch.ones(())


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", WEIGHT_FAMILIES)
def test_sse_window_holds_a_minimum(family: str, format: str, block_size: int) -> None:
    blocks = weight_family(family, block_size, np.random.default_rng(3))
    fmt = FORMATS[format]
    amax = torch.tensor(np.abs(blocks).max(1))
    first, last = bounds.sse_window(amax, fmt.element, fmt.scale, ONE, block_size)
    error, _ = error_table(blocks, format, 1.0)
    codes = scale_codes(format)[:, None]
    within = (codes >= first.numpy()) & (codes <= last.numpy())
    assert np.all(np.where(within, error, np.inf).min(0) <= error.min(0) * (1 + 1e-6))


@pytest.mark.parametrize("family", ["activations", "diagonal", "one_weak", "dead_channels"])
def test_sse_window_misses_a_hessian_minimum_that_the_hessian_window_holds(family: str) -> None:
    """A negative control of the tests above and below: the windows differ where they must."""
    rng = np.random.default_rng(4)
    hessian = hessian_family(family, 16, rng)
    blocks = weight_family("student_10", 16, rng)
    each = np.broadcast_to(hessian.astype(np.float64), (len(blocks), 16, 16))
    error, _ = error_table(blocks, "nvfp4", 1.0, each)
    first, last = bounds.sse_window(torch.tensor(np.abs(blocks).max(1)), E2M1, FORMATS["nvfp4"].scale, ONE, 16)
    best = scale_codes("nvfp4")[error.argmin(0)]
    assert ((best < first.numpy()) | (best > last.numpy())).any()


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", HESSIAN_FAMILIES)
def test_hessian_window_holds_every_better_scale(family: str, format: str, block_size: int) -> None:
    """For any incumbent, good or bad: each scale in turn."""
    rng = np.random.default_rng(5)
    hessian = hessian_family(family, block_size, rng)
    blocks = np.concatenate([weight_family(name, block_size, rng)[::8] for name in WEIGHT_FAMILIES])
    factors = factorize(torch.tensor(hessian)[None])
    regularized = (factors.factor[0] @ factors.factor[0].T).numpy()  # what the methods minimise
    each = np.broadcast_to(regularized, (len(blocks), *hessian.shape))
    error, _ = error_table(blocks, format, 1.0, each)
    codes, (element, scale) = scale_codes(format), (FORMATS[format].element, FORMATS[format].scale)
    magnitudes = torch.tensor(np.abs(blocks)).double()
    zero_error = torch.tensor(np.einsum("bi,ij,bj->b", blocks, regularized, blocks, dtype=np.float64))
    sum_of_norms = factors.factor[0].norm(dim=-1).sum()
    for incumbent in range(0, len(codes), 9):
        first, last = bounds.hessian_window(
            magnitudes, torch.tensor(error[incumbent]), factors.inverse_diagonal, element, scale, ONE
        )
        matters = bounds.first_useful_code(
            zero_error, torch.tensor(error[incumbent]), sum_of_norms, element, scale, ONE
        )
        first = torch.maximum(first, matters)
        outside = (codes[:, None] < first.numpy()) | (codes[:, None] > last.numpy())
        # From the zeroing code on, the error is that of all zeros, so a scale beyond the window may tie but never win.
        assert not (outside & (error < error[incumbent] * (1 - 1e-9))).any() or np.all(
            np.where(outside, np.inf, error).min(0) <= error.min(0) * (1 + 1e-9)
        )


@pytest.mark.parametrize("block_size", [16, 32])
def test_correlated_activations_do_not_leave_every_smaller_power_of_two(block_size: int) -> None:
    """Where neighbours correlate, the clipping bound alone would leave many blocks with 120 scales. (These are left
    where all zeros are the best choice, because then every smaller scale is nearly as good.)"""
    generator = torch.Generator().manual_seed(0)
    tokens = correlated_tokens(block_size, generator)
    weight = torch.randn(256, block_size, generator=generator)
    q = quantize(weight, "mxfp4", block_size, "hessian", activations=tokens, count_candidates=True)
    factors = factorize(hessians_from_activations(tokens, block_size))
    error = ((weight - q.dequantize()).double() @ factors.factor[0]).square().sum(-1)
    first, last = bounds.hessian_window(
        weight.abs().double(), error, factors.inverse_diagonal, E2M1, FORMATS["mxfp4"].scale, ONE
    )
    assert q.candidates is not None
    assert ((last - first) > 100).double().mean() > 0.5
    assert (q.candidates < 20).double().mean() > 0.95


@pytest.mark.parametrize(
    ("format", "block_size", "most"), [("nvfp4", 16, 10), ("nvfp4", 32, 12), ("mxfp4", 16, 2), ("mxfp4", 32, 2)]
)
def test_width_of_the_sse_window(format: str, block_size: int, most: int) -> None:
    """Between E4M3's subnormals and its top, and everywhere for UE8M0."""
    grid = FORMATS[format].scale
    amax = torch.logspace(-0.5, 2.8, 20001) if format == "nvfp4" else torch.logspace(-36, 38, 20001)
    first, last = bounds.sse_window(amax, E2M1, grid, ONE, block_size)
    assert int((last - first).max()) + 1 == most


def test_subnormal_scales_are_searched_beyond_the_upper_bound() -> None:
    """A counterexample: the naive scale is 3·2⁻⁹, the optimum 11·2⁻⁹."""
    first, last = bounds.sse_window(torch.tensor([0.035]), E2M1, FORMATS["nvfp4"].scale, ONE, 16)
    assert int(first) <= 3 and int(last) >= 11
