"""The corrected target against its formula in float64, and the sums that it is made from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.model.sums import Inputs, Sums
from experiments.model.targets import corrected

TOKENS, K, N = 200, 48, 32


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def batch() -> dict[str, Tensor]:
    x = normal(TOKENS, K, seed=1) * torch.linspace(0.1, 3, K)
    r = normal(TOKENS, N, seed=2)
    return {
        "x": x + 0.1 * normal(TOKENS, K, seed=3),
        "original": x,
        "residual": r + 0.1 * normal(TOKENS, N, seed=4),
        "residual_original": r,
    }


def summed(inputs: dict[str, Tensor], weights: Tensor | None, groups: int | None) -> Sums:
    """In three batches."""
    sums = Sums(K, torch.device("cpu"), groups, with_shift=True, residual_features=N)
    for rows in torch.arange(TOKENS).split(77):
        sums.update(Inputs(**{name: x[rows] for name, x in inputs.items()}), None if weights is None else weights[rows])
    return sums


def dense(inputs: dict[str, Tensor], weight: Tensor, w: Tensor, alpha: float, residual_alpha: float) -> Tensor:
    """T by the formula with C, in float64."""
    x_q, x, r_q, r = (inputs[name].double() for name in ("x", "original", "residual", "residual_original"))
    w = w.double().unsqueeze(1)
    h = (w * x_q).T @ x_q
    c = (w * x).T @ x_q
    residual = (w * (r - r_q)).T @ x_q
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(K, dtype=torch.float64))
    return weight.double() + alpha * weight.double() @ (c - h) @ inverse + residual_alpha * residual @ inverse


@pytest.mark.parametrize(("alpha", "residual_alpha"), [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_target_follows_the_formula(alpha: float, residual_alpha: float, weighted: bool) -> None:
    inputs, weight = batch(), normal(N, K, seed=5)
    weights = normal(TOKENS, 1, seed=6).square() if weighted else None
    sums = summed(inputs, weights, 1 if weighted else None)
    got = corrected(weight, *sums.of_group(0), alpha, residual_alpha, 0.01)
    want = dense(inputs, weight, torch.ones(TOKENS) if weights is None else weights[:, 0], alpha, residual_alpha)
    assert got.dtype == torch.float32 and float((want - weight).norm()) > 0.005 * float(weight.norm())
    # Float32 sums over 200 tokens, and T itself in float32.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


def test_groups_of_rows_have_their_own_sums() -> None:
    inputs, weight = batch(), normal(N, K, seed=5)
    weights = normal(TOKENS, 2, seed=6).square()
    sums = summed(inputs, weights, 2)
    for group, rows in enumerate((slice(0, N // 2), slice(N // 2, N))):
        hessian, shift, residual = sums.of_group(group)
        assert residual is not None
        got = corrected(weight[rows], hessian, shift, residual[rows], 0.5, 0.5, 0.01)
        want = dense(inputs, weight, weights[:, group], 0.5, 0.5)[rows]
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_inputs_without_error_leave_the_weight_as_it_is(alpha: float) -> None:
    inputs, weight = batch(), normal(N, K, seed=5).bfloat16()
    inputs |= {"x": inputs["original"], "residual": inputs["residual_original"]}
    got = corrected(weight, *summed(inputs, None, None).of_group(0), alpha, alpha, 0.01)
    assert torch.equal(got, weight.float())


def test_full_correction_fits_the_outputs() -> None:
    inputs, weight = batch(), normal(N, K, seed=5)
    target = corrected(weight, *summed(inputs, None, None).of_group(0), 1.0, 0.0, 1e-9).double()
    x_q, want = inputs["x"].double(), inputs["original"].double() @ weight.double().T
    best = torch.linalg.lstsq(x_q, want).solution.T
    error = (x_q @ target.T - want).square().sum()
    # A small difference to the least-squares solution changes its error in second order.
    assert float(error) <= float((x_q @ best.T - want).square().sum()) * (1 + 1e-6)


def test_an_indefinite_hessian_is_refused() -> None:
    indefinite = torch.eye(K)
    indefinite[0, 0] = -1
    with pytest.raises(ValueError, match=r"not positive definite at damping=0.01; raise calibrate\.damping"):
        corrected(normal(N, K, seed=5), indefinite, torch.eye(K), None, 1.0, 0.0, 0.01)
