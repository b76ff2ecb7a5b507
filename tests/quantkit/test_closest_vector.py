"""The exact solver against exhaustive enumeration, and the gap that verify reports with it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from quantkit import E2M1, E4M3, BlockFormat, quantize, verify
from quantkit.calibration import block_hessians
from quantkit.closest_vector import least_error, lower_factor

LEVELS = torch.tensor(E2M1.magnitudes, dtype=torch.float64)
LEVELS = torch.cat((-LEVELS[1:], LEVELS))
FOURS = BlockFormat("fours", E2M1, E4M3, block_sizes=(4,), scale_rules=("nearest",), two_level=False)


def correlated(size: int, seed: int, tokens: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    mix = torch.eye(size, dtype=torch.float64)
    mix += 0.5 * torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return (x @ mix).T @ (x @ mix)


@pytest.mark.parametrize("seed", range(4))
def test_least_error_is_that_of_every_code_at_every_scale(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hessian = correlated(4, seed)
    x = torch.randn(4, generator=generator, dtype=torch.float64)
    scales = torch.tensor([0.1, 0.15, 0.3, 0.5, 2.0], dtype=torch.float64)
    codes = torch.tensor(list(itertools.product(LEVELS.tolist(), repeat=4)), dtype=torch.float64)
    residuals = x - scales.view(-1, 1, 1) * codes
    every = ((residuals @ hessian) * residuals).sum(-1)
    found = least_error(x, lower_factor(hessian), scales.unsqueeze(1).expand(-1, 4), LEVELS, float(every.max()))
    assert found == pytest.approx(float(every.min()), rel=1e-6)


def test_nothing_is_known_beyond_the_budget() -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = torch.full((4, 8), 0.3, dtype=torch.float64)
    assert least_error(x, torch.eye(8, dtype=torch.float64), steps, LEVELS, 100.0, budget=50) is None


def test_an_incumbent_that_nothing_beats_is_returned() -> None:
    hessian = torch.eye(4, dtype=torch.float64)
    x = torch.tensor([0.5, 1.0, 3.0, -6.0], dtype=torch.float64)  # representable at scale 1, so nothing is below 0
    steps = torch.ones(1, 4, dtype=torch.float64)
    assert least_error(x, lower_factor(hessian), steps, LEVELS, 0.0) == 0.0
    assert least_error(x, lower_factor(hessian), steps, LEVELS, 1.0) == pytest.approx(0.0, abs=1e-12)


def test_a_piece_of_one_assignment_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, x = correlated(6, 9), torch.randn(6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    steps = torch.tensor([0.2, 0.4], dtype=torch.float64).unsqueeze(1).expand(-1, 6)
    whole = least_error(x, lower_factor(hessian), steps, LEVELS, 1e9)
    monkeypatch.setattr("quantkit.closest_vector.PIECE", 1)
    assert least_error(x, lower_factor(hessian), steps, LEVELS, 1e9) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("singular", [False, True])
def test_lower_factor_reproduces_the_hessian(singular: bool) -> None:
    hessian = correlated(8, 3, tokens=4 if singular else 50)
    factor = lower_factor(hessian)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.mT, hessian, rtol=1e-6, atol=1e-7 * float(hessian.diagonal().max()))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_the_gap_tells_joint_from_nearest_codes_and_those_from_others(format: str) -> None:
    """On these random Hessians, far worse conditioned than a layer's, coordinate descent ends within some per cent."""
    gram = correlated(64, 1, tokens=200).float()
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float32) * 0.02
    hessians = block_hessians(gram, 16)
    gaps = []
    for method, given in (("joint", {"gram": gram}), ("hessian", {"gram": gram}), ("naive", {})):
        moved = dataclasses.replace(quantize(weight, format, method=method, **given), nearest_codes=False)
        judged = verify(moved, weight, hessians, gap=12)
        assert judged.judged and judged.blocks > 6 and judged.gap is not None
        gaps.append(judged.gap)
    assert 0 <= gaps[0] < 0.1 and gaps[0] < gaps[1] < gaps[2], gaps


def test_the_gap_of_an_optimum_is_zero_and_ok() -> None:
    """Representable blocks under an uncorrelated Hessian: round-to-nearest is optimal, and a code off is seen."""
    weight = torch.tensor([[0.5, 1.0, 3.0, -6.0] * 8], dtype=torch.float32)
    hessians = torch.eye(16, dtype=torch.float32).repeat(2, 1, 1)
    q = dataclasses.replace(
        quantize(weight, method="joint", hessian=hessians, global_scale="none"), nearest_codes=False
    )
    found = verify(q, weight, hessians, gap=2)
    assert found.ok and found.gap == 0 and found.blocks == 2
    codes = q.codes.clone()
    codes[0, 0] ^= 1
    wrong = verify(dataclasses.replace(q, codes=codes), weight + 0.01, hessians, gap=2)
    assert not wrong.ok and wrong.gap is not None and wrong.gap > 0.1


def test_moved_codes_are_not_judged_without_a_sample() -> None:
    gram = correlated(32, 1).float()
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    with pytest.warns(UserWarning, match="gap="):
        assert not verify(quantize(weight, method="joint", gram=gram), weight, block_hessians(gram, 16)).ok
