"""The grids against tables written by hand from the OCP and NVIDIA specifications."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantkit.formats import E2M1, E4M3, FORMATS, INT4, UE8M0, BlockFormat, ElementGrid, ScaleGrid, get_format
from quantkit.tensor import pack_codes, unpack_codes
from tests.oracle import E4M3_VALUES, MAGNITUDES, UE8M0_VALUES, values_of

SIXTEEN_CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
TIES = [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]


def test_e2m1_has_its_sixteen_codes() -> None:
    values = E2M1.decode_signed(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == SIXTEEN_CODES
    assert torch.signbit(values).tolist() == [False] * 8 + [True] * 8
    assert torch.equal(E2M1.encode_signed(values), torch.arange(16, dtype=torch.uint8))


@pytest.mark.parametrize(("tie", "rounded"), TIES)
def test_e2m1_ties_go_to_the_even_code(tie: float, rounded: float) -> None:
    up, down = np.nextafter(np.float32(tie), np.float32(9)), np.nextafter(np.float32(tie), np.float32(0))
    below = max(v for v in E2M1.magnitudes if v < tie)
    above = min(v for v in E2M1.magnitudes if v > tie)
    assert E2M1.round(torch.tensor([tie, float(down), float(up)])).tolist() == [rounded, below, above]


def test_e2m1_saturates_and_keeps_the_sign_of_what_rounds_to_zero() -> None:
    y = torch.tensor([6.0, 7.0, 8.9, 1e30, torch.inf, -100.0, -0.1, -0.0, 0.0, 0.1, 1e-45])
    assert E2M1.encode_signed(y).tolist() == [7, 7, 7, 7, 7, 15, 8, 8, 0, 0, 0]


def test_e4m3_has_126_positive_scales() -> None:
    values = [E4M3.value(code) for code in range(127)]
    assert values[:9] == [n * 2.0**-9 for n in range(9)]
    assert values[126] == 448 and values[119] == 240 and len(set(values)) == 127 and values == sorted(values)
    assert np.array_equal(values, E4M3_VALUES)
    as_torch = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(E4M3.decode(torch.arange(127)), as_torch)


def test_ue8m0_has_255_powers_of_two() -> None:
    assert UE8M0.value(0) == 2.0**-127 and UE8M0.value(127) == 1 and UE8M0.value(254) == 2.0**127
    decoded = UE8M0.decode(torch.arange(255)).double()
    assert torch.equal(decoded, 2.0 ** torch.arange(-127, 128, dtype=torch.float64))


@pytest.mark.parametrize("grid", [E4M3, UE8M0], ids=lambda grid: grid.name)
def test_floor_and_ceil_code_bracket_every_value(grid: ScaleGrid) -> None:
    codes = torch.arange(grid.min_code, grid.max_code + 1)
    exact = grid.decode(codes)
    infinity, zero = torch.tensor(torch.inf), torch.tensor(0.0)
    assert torch.equal(grid.floor_code(exact), codes.int()) and torch.equal(grid.ceil_code(exact), codes.int())
    above, below = torch.nextafter(exact, infinity), torch.nextafter(exact, zero)
    assert torch.equal(grid.floor_code(above), codes.int())
    assert torch.equal(grid.floor_code(below), codes.int() - 1)
    assert torch.equal(grid.ceil_code(below), codes.int())
    assert torch.equal(grid.ceil_code(above), (codes.int() + 1).clamp(max=grid.max_code))
    assert grid.floor_code(infinity) == grid.max_code and grid.floor_code(zero) == grid.min_code - 1


def test_e4m3_rounding_agrees_with_torch() -> None:
    values = torch.cat([torch.rand(4000) * 500, torch.rand(4000) * 0.05, E4M3.decode(torch.arange(127))]).clamp(max=448)
    assert torch.equal(E4M3.round(values), values.to(torch.float8_e4m3fn).float())


def test_the_oracle_derives_what_is_written_there_by_hand() -> None:
    for grid, values in ((E2M1, MAGNITUDES), (E4M3, E4M3_VALUES), (UE8M0, UE8M0_VALUES)):
        assert np.array_equal(values_of(grid), values)


def test_packing_puts_the_even_column_low() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    packed = pack_codes(codes)
    assert packed[0].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert torch.equal(unpack_codes(packed), codes)


def test_formats_are_known_by_name() -> None:
    assert get_format("nvfp4") is FORMATS["nvfp4"] and get_format(FORMATS["mxfp4"]) is FORMATS["mxfp4"]
    with pytest.raises(
        ValueError, match="unknown format 'nvfp8'; known formats: nvfp4, mxfp4, fp4_ue5m3, fp4_ue4m4, nvint4, mxint4"
    ):
        get_format("nvfp8")


def test_a_new_scale_grid_is_data_alone(backend: str, device: str) -> None:
    """UE5M3 scales: no method and no kernel has code for them, and their result is optimal."""
    from quantkit import quantize

    ue5m3 = ScaleGrid("ue5m3", exponent_bits=5, mantissa_bits=3, bias=15, max_code=254)
    fmt = BlockFormat("fp4_ue5m3", E2M1, ue5m3, block_sizes=(16,), scale_rules=("nearest",), two_level=True)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * 1e-3
    weight = weight.to(device)
    scales = ue5m3.decode(torch.arange(1, 255)).to(device)
    blocks = weight.reshape(-1, 1, 16).double()
    s = scales.double()[None, :, None]
    table = (blocks.abs() - s * E2M1.round((blocks.abs() / s).float()).double()).square().sum(-1)
    q = quantize(weight, fmt, 16, "sse", global_scale="none", backend=backend)
    chosen = table.gather(1, q.scales.reshape(-1, 1).long() - 1).squeeze(1)
    assert (chosen <= table.amin(1) * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_sizes": ()}, "test has no block size"),
        ({"block_sizes": (16, 15)}, "block size 15 is not an even number"),
        ({"block_sizes": (16.0,)}, "block size 16.0 is not an even number"),
        ({"element": ElementGrid("e2m3", 2, 3, bias=1, max_code=31)}, "e2m3 has 6 bits; codes are packed by four"),
        ({"scale": ScaleGrid("ue4", 4, 0, bias=7, max_code=15, subnormals=False)}, "ue4 has bias 7; .* bias is 127"),
        ({"scale_rules": ()}, r"scale_rules \(\); scales of e4m3 have one or more of nearest"),
        ({"scale_rules": ("nearest", "ceil")}, "scale_rules .*'ceil'.* of e4m3"),
        ({"scale": UE8M0, "scale_rules": ("floor", "up"), "two_level": False}, "'up'.*of floor, ceil, even, rceil"),
        ({"element": ElementGrid("e3m0", 3, 0, bias=3, max_code=7)}, "e3m0 has no mantissa bit"),
        ({"element": ElementGrid("e2m1", 2, 1, bias=1, max_code=8)}, "e2m1 has max_code 8; .* it is from 1 to 7"),
        ({"element": ElementGrid("e2m1", 2, 1, bias=1, max_code=0)}, "e2m1 has max_code 0; .* it is from 1 to 7"),
        ({"element": ElementGrid("e2m1", 2, 1, bias=60, max_code=7)}, "e2m1 has bias 60; give it one from -2 to 15"),
        ({"element": ElementGrid("e4", 4, -1, bias=1, max_code=7)}, "e4 has a negative number of bits"),
        ({"scale": ScaleGrid("ue5m4", 5, 4, bias=15, max_code=510)}, "max_code 510; a scale is stored in a byte"),
        ({"scale": ScaleGrid("ue5m4", 5, 4, bias=15, max_code=256)}, "max_code 256; a scale is stored in a byte"),
        ({"scale": ScaleGrid("e4m3", 4, 3, bias=7, max_code=128)}, "e4m3 has max_code 128; .* it is from 1 to 127"),
        ({"scale": ScaleGrid("e4m3", 4, 3, bias=7, max_code=0)}, "e4m3 has max_code 0; .* it is from 1 to 127"),
        ({"scale": ScaleGrid("e4m3", 4, 3, bias=7, max_code=126, min_code=0)}, "min_code 0; .*code 0 is the value 0"),
        ({"scale": ScaleGrid("e4m3", 4, 3, bias=7, max_code=126, min_code=127)}, "min_code 127; it is from 1 to max"),
        ({"scale": ScaleGrid("e4m3", 4, 3, bias=7, max_code=126, subnormals=False)}, "subnormals=False, which is for"),
        ({"scale": ScaleGrid("e4m3", 4, 3, bias=140, max_code=126)}, "computed in float32, so give it a bias"),
        ({"scale": ScaleGrid("ue7m1", 7, 1, bias=1, max_code=255)}, "computed in float32, so give it a bias"),
        ({"scale": ScaleGrid("e4m3", 4, 3, bias=0, max_code=126)}, "and bias 0; .* a bias of at least 1"),
        ({"scale": ScaleGrid("ue8m0", 8, 0, bias=127, max_code=255, min_code=0, subnormals=False)}, "2.128, beyond"),
        ({"scale": UE8M0, "scale_rules": ("floor",)}, "ue8m0 scales take no global scale.*use two_level=False"),
    ],
)
def test_formats_that_no_method_could_work_with(change: dict[str, Any], message: str) -> None:
    description = {"element": E2M1, "scale": E4M3, "block_sizes": (16,), "scale_rules": ("nearest",), "two_level": True}
    with pytest.raises(ValueError, match=message):
        BlockFormat("test", **(description | change))


def test_windows_are_refused_for_elements_they_are_not_proven_for() -> None:
    from quantkit import bounds

    with pytest.raises(ValueError, match="proven for e2m1"):
        bounds.sse_window_factors(INT4, 16)
