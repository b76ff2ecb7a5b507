"""verify() against the independent oracle, and against planted violations."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantkit import E2M1, E4M3, FORMATS, quantize, verify
from quantkit.calibration import hessians_from_activations
from quantkit.formats import ElementGrid, ScaleGrid
from tests.inputs import HESSIAN_FAMILIES, SEARCHED_BY_KERNELS, all_families, hessian_family, weight_family
from tests.oracle import contract_violations

CASES = [
    ("nvfp4", "none", "all"),
    ("mxfp4", "none", "all"),
    ("nvfp4", "amax", "student_0.02"),
    ("nvfp4", "amax", "saturated"),
    ("nvfp4", "amax", "float32_subnormal"),
]


@pytest.mark.parametrize(("format", "global_scale", "family"), CASES)
@pytest.mark.parametrize("block_size", [16, 32])
def test_naive_scales_are_judged_as_by_the_oracle(format: str, global_scale: str, family: str, block_size: int) -> None:
    """Naive scales break the contract in many blocks, optimal ones in none; both verdicts must match."""
    rng = np.random.default_rng(11)
    blocks = all_families(block_size, rng) if family == "all" else weight_family(family, block_size, rng)
    weight = torch.tensor(blocks)
    naive = quantize(weight, format, block_size, "naive", global_scale=global_scale)
    found = verify(naive, weight)
    want = contract_violations(naive.scales.numpy().reshape(-1), blocks, format, float(naive.global_scale))
    assert found.violations == len(want) and [row for row, _ in found.where] == want[:10].tolist()
    assert found.blocks == len(blocks) and found.wrong_codes == 0
    assert verify(quantize(weight, format, block_size, "sse", global_scale=global_scale), weight).ok


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("family", HESSIAN_FAMILIES)
def test_hessian_scales_are_judged_as_by_the_oracle(family: str, block_size: int, format: str) -> None:
    rng = np.random.default_rng(12)
    hessian = hessian_family(family, block_size, rng)
    blocks = np.concatenate(
        [weight_family(name, block_size, rng)[::6] for name in ("gaussian_0.02", "spike", "quarter")]
    )
    weight, h = torch.tensor(blocks), torch.tensor(hessian)[None]
    sse = quantize(weight, format, block_size, "sse")
    found = verify(sse, weight, h)
    each = np.broadcast_to(hessian.astype(np.float64), (len(blocks), *hessian.shape))
    want = contract_violations(sse.scales.numpy().reshape(-1), blocks, format, float(sse.global_scale), each)
    assert [row for row, _ in found.where] == want[:10].tolist() and found.violations == len(want)
    best = verify(quantize(weight, format, block_size, "hessian", hessian=h), weight, h)
    assert best.ok and best.worst_excess <= 1e-6


def test_planted_violations_are_found_and_located() -> None:
    weight = torch.randn(3, 700, 64, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, "nvfp4", 16, "sse")
    assert verify(q, weight).ok
    scales, codes = q.scales.clone(), q.codes.clone()
    scales[1, 5, 2] += 3
    scales[2, 699, 0] -= 8
    codes[0, 0, 0] ^= 1
    found = verify(replace(q, scales=scales, codes=codes), weight)
    assert found.violations == 2 and found.where == ((705, 2), (2099, 0)) and found.worst_excess > 1e-3
    assert found.wrong_codes >= 1 and not found.ok


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poisoned", ["scale", "element"])
def test_the_checker_shares_nothing_with_what_it_checks(
    format: str, poisoned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the values of a grid wrong in formats.py, for whatever reason, verify would say so."""
    grid = ScaleGrid if poisoned == "scale" else ElementGrid
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    assert verify(quantize(weight, format), weight).ok
    decode, rounded, encode = grid.decode, grid.round, grid.encode
    shift = 2 if FORMATS[format].scale.is_power_of_two and poisoned == "scale" else 0.75
    monkeypatch.setattr(grid, "decode", lambda self, codes: decode(self, codes) * shift)
    monkeypatch.setattr(grid, "round", lambda self, values: rounded(self, values / shift) * shift)
    monkeypatch.setattr(grid, "encode", lambda self, values: encode(self, values / shift))
    found = verify(quantize(weight, format, global_scale=None), weight)
    assert found.violations > 0 or found.wrong_codes > 0
    stored = quantize(weight, format)
    monkeypatch.undo()
    after = verify(stored, weight)
    assert (after.violations, after.wrong_codes, after.worst_excess) == (
        found.violations,
        found.wrong_codes,
        found.worst_excess,
    )


def test_a_table_in_another_precision_is_no_way_past_the_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales rounded to bfloat16, as a table made under another default dtype would have them."""
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    common = importlib.import_module("quantkit.reference.common")
    exact = common.effective_scale
    for module in ("reference.common", "reference.sse", "search"):
        monkeypatch.setattr(
            importlib.import_module(f"quantkit.{module}"),
            "effective_scale",
            lambda *given: exact(*given).bfloat16().float(),
        )
    assert verify(quantize(weight), weight).violations > 0


def test_a_byte_that_is_no_scale_is_a_violation() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    for format, byte in (("nvfp4", 127), ("nvfp4", 0), ("nvfp4", 200), ("mxfp4", 255)):
        q = quantize(weight, format)
        scales = q.scales.clone()
        scales[1, 2] = byte
        found = verify(replace(q, scales=scales), weight)
        assert found.violations == 1 and found.where == ((1, 2),) and found.worst_excess == torch.inf and not found.ok


def test_codes_that_are_not_meant_to_be_nearest_are_not_judged() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    q = replace(quantize(weight, method="sse"), method="moved", nearest_codes=False)
    with pytest.warns(UserWarning, match=r"codes of method 'moved' are not nearest at their scales, so no block is"):
        found = verify(q, weight)
    assert not found.judged and not found.ok
    assert (found.blocks, found.violations, found.wrong_codes, found.where) == (0, 0, 0, ())
    assert verify(replace(q, nearest_codes=True), weight).judged


def test_empty_and_errors() -> None:
    empty = torch.zeros(0, 32)
    assert verify(quantize(empty), empty).ok
    weight = torch.randn(2, 32)
    with pytest.raises(TypeError, match="a QuantizedTensor and its weight, got Tensor and QuantizedTensor"):
        verify(weight, quantize(weight))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the weight"):
        verify(quantize(weight), weight[:1])
    with pytest.raises(ValueError, match="hessian has shape"):
        verify(quantize(weight), weight, torch.eye(16)[None])
    with pytest.raises(ValueError, match="NaN or Inf"):
        verify(quantize(weight), weight * torch.inf)
    with pytest.warns(UserWarning, match=r"chosen by Hessians.*block_hessians\(gram_matrix\(activations\), 16\)"):
        verify(quantize(weight, method="hessian", hessian=torch.eye(16).expand(2, 16, 16)), weight)


def whole_weight(name: str) -> torch.Tensor:
    """Of the shape of Qwen3-4B's down_proj."""
    generator, shape = torch.Generator().manual_seed(0), (2560, 9728)
    if name == "gaussian":
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    if name == "student":
        normal = torch.randn(4, *shape, generator=generator)
        return (0.02 * normal[0] / (normal[1:].square().mean(0)).sqrt()).half()
    # A hair off the points of a scale for each block.
    scales = E4M3.decode(torch.randint(32, 96, (2560, 608, 1), generator=generator))
    levels = E2M1.decode_signed(torch.randint(0, 16, (2560, 608, 16), generator=generator).to(torch.uint8))
    return (scales * levels * (1 + 4e-6 * (torch.rand(levels.shape, generator=generator) - 0.5))).reshape(shape)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gaussian", "student", "lattice"])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("format", SEARCHED_BY_KERNELS)
def test_no_scale_of_a_whole_weight_breaks_the_contract(format: str, block_size: int, name: str) -> None:
    weight = whole_weight(name).cuda()
    x = torch.randn(4096, 9728, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 9728)
    hessian = hessians_from_activations((x + 0.5 * x.roll(1, 1)).cuda(), block_size)
    for method, h in (("sse", None), ("hessian", hessian)):
        q = quantize(weight, format, block_size, method, backend="triton", hessian=h)
        found = verify(q, weight, h)
        assert found.ok and found.blocks == weight.numel() // block_size, found
