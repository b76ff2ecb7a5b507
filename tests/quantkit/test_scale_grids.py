"""Scale grids from narrow to wide, by both backends, against the exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit import E2M1, E4M3, FORMATS, BlockFormat, QuantizedTensor, compute_metrics, quantize, search
from quantkit.formats import INT4, ScaleGrid
from quantkit.kernels import SEARCHED_SCALES
from tests.inputs import HESSIAN_FAMILIES, WITHOUT_KERNEL, hessian_family, inputs_of
from tests.oracle import contract_violations, effective_scales, nearest_code, scale_codes, values_of


def grid(exponent_bits: int, max_code: int = 254) -> ScaleGrid:
    """An unsigned grid with the usual bias that uses all codes of a byte but the last."""
    name = f"ue{exponent_bits}m{8 - exponent_bits}"
    return ScaleGrid(name, exponent_bits, 8 - exponent_bits, bias=2 ** (exponent_bits - 1) - 1, max_code=max_code)


def fmt(scale: ScaleGrid, two_level: bool) -> BlockFormat:
    return BlockFormat(f"fp4_{scale.name}", E2M1, scale, (16, 32), scale_rules=("nearest",), two_level=two_level)


SINGLE, TWO = (2, 3, 6, 7), (2, 5, 6, 7)  # exponent bits
WIDTHS = {f"ue{e}m{8 - e}": fmt(grid(e), two_level=False) for e in SINGLE}
WIDTHS |= {f"ue{e}m{8 - e}_two_level": fmt(grid(e), two_level=True) for e in TWO}
SEARCHED = {name: f for name, f in WIDTHS.items() if f.scale.exponent_bits < 7}
NEW = {name: FORMATS[name] for name in FORMATS if name != "nvfp4" and not FORMATS[name].scale.is_power_of_two}


def run(blocks: np.ndarray, f: BlockFormat, method: str, backend: str, device: str, **options) -> QuantizedTensor:
    return quantize(
        torch.tensor(blocks, device=device), f, blocks.shape[1], method, backend=backend, global_scale="none", **options
    )


@pytest.mark.parametrize("name", [*WIDTHS, *NEW])
def test_the_naive_scale_is_the_nearest_one(name: str, backend: str, device: str) -> None:
    """Nearest to amax over the largest element, in float32. The codes are nearest at this scale."""
    f = {**WIDTHS, **NEW}[name]
    blocks = inputs_of(f, 16, np.random.default_rng(0))
    q = run(blocks, f, "naive", backend, device)
    scales, magnitudes = effective_scales(f, 1.0).astype(np.float64), values_of(f.element)
    wanted = (np.abs(blocks).max(1) / np.float32(magnitudes[-1])).astype(np.float64)
    distance = np.abs(np.minimum(wanted, scales[-1])[:, None] - scales)
    tied = distance == distance.min(1, keepdims=True)
    even = tied & (scale_codes(f) % 2 == 0)
    want = scale_codes(f)[np.where(even.any(1), even.argmax(1), tied.argmax(1))]
    assert np.array_equal(q.scales.cpu().numpy().ravel(), want)
    with np.errstate(over="ignore"):
        y = np.abs(blocks) / effective_scales(f, 1.0)[want - scale_codes(f)[0]][:, None]
    code = nearest_code(y.astype(np.float64), magnitudes)
    assert np.array_equal(q.values().abs().cpu().numpy(), magnitudes[code])


@pytest.mark.parametrize("global_scale", ["amax", 2.0**-100, 2.0**60])
@pytest.mark.parametrize("exponent_bits", range(2, 8))
def test_backends_agree_on_the_naive_scale_of_two_levels(exponent_bits: int, global_scale: str | float) -> None:
    """UE6M2 reaches 2^32. A limit of the quotient that suffices for E4M3 would leave the top of this grid unused."""
    f = fmt(grid(exponent_bits), two_level=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 0, 64)[:, None]
    weight = (weight * (1 if global_scale == "amax" else global_scale * f.scale.max_value)).to(device)
    assert weight.isfinite().all()
    want, got = (
        quantize(weight, f, 16, "naive", backend=b, global_scale=global_scale) for b in ("reference", "triton")
    )
    assert torch.equal(got.global_scale, want.global_scale)
    assert torch.equal(got.scales, want.scales) and torch.equal(got.codes, want.codes)
    assert int(want.scales.max()) > f.scale.max_code - 2 ** (f.scale.mantissa_bits + 2)
    top = weight[-4:]  # the rows whose scales are normal numbers of the narrowest grid, too
    assert compute_metrics(top, got.dequantize()[-4:])["weight_error"] < 0.15


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", [*SEARCHED, *NEW])
def test_the_sse_scale_is_optimal(name: str, block_size: int, backend: str, device: str) -> None:
    """Also at the grid's ends: subnormal scales, scales without a double, blocks beyond both ends."""
    f = {**SEARCHED, **NEW}[name]
    if backend == "triton" and (name, "sse") in WITHOUT_KERNEL:
        pytest.skip("this search has no kernel")
    blocks = inputs_of(f, block_size, np.random.default_rng(1))
    q = run(blocks, f, "sse", backend, device)
    assert not len(contract_violations(q.scales.cpu().numpy().ravel(), blocks, f, 1.0))


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", ["ue2m6", "ue6m2_two_level", *NEW])
def test_the_hessian_scale_is_optimal(name: str, block_size: int, backend: str, device: str) -> None:
    f = {**SEARCHED, **NEW}[name]
    if backend == "triton" and (name, "hessian") in WITHOUT_KERNEL:
        pytest.skip("this search has no kernel")
    rng = np.random.default_rng(2)
    hessians = np.stack([hessian_family(kind, block_size, rng) for kind in HESSIAN_FAMILIES])
    blocks = inputs_of(f, block_size, rng)[::8]
    q = quantize(
        torch.tensor(np.tile(blocks, len(hessians)), device=device),
        f,
        block_size,
        "hessian",
        hessian=torch.tensor(hessians, device=device),
        backend=backend,
        global_scale="none",
    )
    each = np.tile(hessians.astype(np.float64), (len(blocks), 1, 1))
    repeated = np.repeat(blocks, len(hessians), axis=0)
    assert not len(contract_violations(q.scales.cpu().numpy().ravel(), repeated, f, 1.0, each))


@pytest.mark.parametrize("method", ["sse", "hessian"])
def test_without_a_proven_window_every_scale_is_evaluated(method: str) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    given = {"activations": torch.randn(90, 64, generator=torch.Generator().manual_seed(4))} if method != "sse" else {}
    q = quantize(weight, "nvint4", 16, method, count_candidates=True, **given)  # type: ignore[arg-type]
    assert q.candidates is not None and q.candidates.eq(126).all()


def test_factors_of_the_kernels_are_refused_where_no_window_is_proven() -> None:
    """Factors do not depend on the format, but decide the backend, which has no kernel here."""
    hessian = torch.eye(16).repeat(4, 1, 1).to("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)).to(hessian.device)
    factors = search.factorize(hessian, backend="triton")
    with pytest.raises(ValueError, match="nvint4 has none: use backend='reference', for factors too"):
        search.quantize_matrix(weight, FORMATS["nvint4"], 16, "hessian", factors=factors)


def test_int4_is_the_integers_from_minus_7_to_7() -> None:
    values = INT4.decode_signed(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == [*range(8), *(-float(n) for n in range(8))]
    assert torch.equal(INT4.encode_signed(values), torch.arange(16, dtype=torch.uint8))
    assert INT4.round(torch.tensor([0.5, 1.5, 2.5, 6.5, 7.4, 9.0])).tolist() == [0, 2, 2, 6, 7, 7]
    assert (INT4.max_exponent, E2M1.max_exponent) == (2, 2)


def test_the_ends_of_the_unsigned_bytes() -> None:
    """254 positive values; the next code, the top one, is NaN as in E4M3."""
    ue5m3, ue4m4 = FORMATS["fp4_ue5m3"].scale, FORMATS["fp4_ue4m4"].scale
    assert (ue5m3.min_value, ue5m3.max_value) == (2.0**-17, 1.75 * 2.0**16)
    assert (ue4m4.min_value, ue4m4.max_value) == (2.0**-10, 1.875 * 2.0**8)
    assert (ue5m3.last_code_without_half, ue4m4.last_code_without_half) == (15, 31)
    assert all(len(set(values_of(g)[1:])) == 254 for g in (ue5m3, ue4m4))
    as_torch = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # UE5M3's values are sparser
    assert torch.equal(E4M3.decode(torch.arange(127)), as_torch)
    least, most = SEARCHED_SCALES
    assert all(least < g.min_value and g.max_value < most for g in (ue5m3, ue4m4, E4M3, grid(6)))


@pytest.mark.parametrize("name", [*SEARCHED, *NEW])
def test_values_and_rounding_follow_from_the_description(name: str) -> None:
    for part in ({**SEARCHED, **NEW}[name].scale, {**SEARCHED, **NEW}[name].element):
        values = values_of(part)
        assert np.array_equal(part.decode(torch.arange(part.max_code + 1)).double().numpy(), values)
        middle = torch.tensor((values[1:] + values[:-1]) / 2).float()
        y = torch.cat([middle, torch.tensor(values).float()])
        y = torch.cat([y, torch.nextafter(y, torch.tensor(torch.inf)), torch.nextafter(y, torch.tensor(0.0))])
        want = torch.tensor(nearest_code(y.double().numpy(), values))
        assert torch.equal(part.encode(part.round(y.clone())), want.int())
