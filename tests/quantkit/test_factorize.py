"""The factorization kernel against the reference's, and its flag."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.calibration import factorize as reference
from quantkit.kernels.launch import factorize, unpack_factors
from tests.inputs import HESSIAN_FAMILIES, hessian_family

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(hessians: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    flags = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    factor, row_norm, inverse_root = unpack_factors(factorize(hessians.to(DEVICE), flags))
    assert flags[0] == 0
    if not flags[1]:
        torch.testing.assert_close(row_norm, factor.norm(dim=1), rtol=1e-6, atol=0)
    return factor.mT.cpu().double(), inverse_root.cpu().double().square(), int(flags[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("family", HESSIAN_FAMILIES)
def test_factors_reproduce_the_hessian(family: str, block_size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    h = torch.tensor(np.stack([hessian_family(family, block_size, rng) for _ in range(3)])).to(dtype)
    factor, inverse_diagonal, flag = run(h)
    want = reference(h)
    regularized = want.factor @ want.factor.mT
    largest = torch.linalg.eigvalsh(regularized)[:, -1]
    assert flag == 0
    assert torch.equal(factor, factor.tril())
    assert ((factor @ factor.mT - regularized).abs().amax((1, 2)) <= 3e-7 * largest).all()
    assert (inverse_diagonal > 0).all()
    if family != "rank_deficient":  # there the inverse is rounding noise, in either
        root, exact = inverse_diagonal.sqrt(), want.inverse_diagonal.sqrt()
        assert (root >= exact).all()  # rounded up to half precision, which may be infinity
        assert ((root <= exact * (1 + 2**-9) + 2**-23) | (exact > 6.5e4)).all()


def test_the_bound_holds_for_what_the_kernel_minimises() -> None:
    """r_i² ≤ ‖r A‖²·(H⁻¹)_ii, also for a rank-deficient H, along the directions where it is tight."""
    h = torch.tensor(hessian_family("rank_deficient", 16, np.random.default_rng(3)))[None]
    factor, inverse_diagonal, _ = run(h)
    inverse = torch.linalg.inv(factor[0])
    r = inverse.T @ inverse  # rows H⁻¹ e_i
    energy = (r @ factor[0]).square().sum(-1)
    assert (r.diagonal().square() <= energy * inverse_diagonal[0] * (1 + 1e-4)).all()


@pytest.mark.parametrize("bad", ["nan", "inf", "negative", "indefinite"])
def test_what_is_no_hessian_is_flagged(bad: str) -> None:
    h = torch.tensor(np.stack([hessian_family("activations", 16, np.random.default_rng(seed)) for seed in range(3)]))
    if bad == "nan":
        h[1, 2, 3] = torch.nan
    elif bad == "inf":
        h[1, 2, 2] = torch.inf
    elif bad == "negative":
        h[1] = -h[1]
    else:
        h[1, 2, 3] = h[1, 3, 2] = 5 * h[1].abs().max()
    assert run(h)[2] == 1
