"""The kernels' quotient by two multiplications, checked for all operands that could take it to the wrong side of a tie.

A quotient of float32 numbers X/S near a rounding boundary M, half an ulp beside a tie of the grid, obeys
``X 2^k − M S = j`` in integers with a small |j|. So M⁻¹ modulo 2^k gives all pairs of mantissas at which the two
quotients can differ, for each boundary and each j. See docs/theory.md, "The kernels' quotient".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl

from quantkit import FORMATS
from quantkit.formats import ElementGrid, ScaleGrid
from quantkit.kernels import launch
from quantkit.kernels.device import format_constants, reciprocal_of, rounded_quotient
from quantkit.kernels.naive import MULTIPLIED_MANTISSA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# |j| beyond which the quotient's error, under 4 · 2^-48, cannot reach the boundary: M S < 2^49.
NEAREST = 8


def exponent(q: Fraction) -> int:
    estimate = math.frexp(float(q))[1] - 1
    return estimate - (Fraction(2) ** estimate > q)


def rounded(q: Fraction) -> Fraction:
    """To float32, ties to even; exponents without bounds."""
    if q == 0:
        return q
    ulp = Fraction(2) ** (exponent(abs(q)) - 23)
    return round(q / ulp) * ulp


def ties(grid: ElementGrid | ScaleGrid) -> set[Fraction]:
    """Midpoints of neighbours, brought to [1, 2)."""
    codes = range(getattr(grid, "min_code", 0), grid.max_code)
    midpoints = [(Fraction(grid.value(code)) + Fraction(grid.value(code + 1))) / 2 for code in codes]
    return {tie / Fraction(2) ** exponent(tie) for tie in midpoints}


def pairs_near(tie: Fraction) -> Iterator[tuple[Fraction, Fraction]]:
    """(X, S), with S a mantissa of 24 bits, whose quotient is next to the boundary where float32 rounds to the tie."""
    above = tie + Fraction(1, 2**24)
    below = tie - Fraction(1, 2 ** (25 if tie == 1 else 24))
    for boundary in (above, below):
        odd = boundary.numerator
        while odd % 2 == 0:
            odd //= 2
        for k in range(23, 27):
            inverse = pow(odd, -1, 2**k)
            for j in (j for j in range(-NEAREST, NEAREST + 1) if j):
                first = -j * inverse % 2**k
                for s in range(first, 2**24, 2**k):
                    x = (odd * s + j) >> k
                    if s >= 2**23 and x << k == odd * s + j and x // (x & -x) < 2**24:
                        scaled = Fraction(x) * Fraction(2) ** exponent(boundary * s / x)
                        yield min((scaled, 2 * scaled), key=lambda value: abs(value / s - boundary)), Fraction(s)


def quotient(x: Fraction, s: Fraction, near: Fraction) -> Fraction:
    """The formulas of device.reciprocal_of and device.rounded_quotient."""
    leading = rounded(near + rounded(1 - s * near) * near)
    error = rounded(1 - s * leading)
    rest = rounded(error * leading)
    rest = rounded(rounded(error * Fraction(3, 2)) * rest + rest)
    return rounded(x * leading + rounded(x * rest))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("part", ["element", "scale"])
def test_two_multiplications_are_at_a_tie_where_the_quotient_is(format: str, part: str) -> None:
    grid = getattr(FORMATS[format], part)
    if grid.mantissa_bits == 0:
        pytest.skip("a quotient by a power of two is exact")
    if part == "scale" and grid.mantissa_bits > MULTIPLIED_MANTISSA.value:
        pytest.skip("the kernel divides")
    met = 0
    for tie in ties(grid):
        for x, s in pairs_near(tie):
            reciprocal = rounded(1 / s)
            ulp = Fraction(2) ** (exponent(reciprocal) - 23)
            for near in (reciprocal - ulp, reciprocal, reciprocal + ulp):
                got, want = quotient(x, s, near), rounded(x / s)
                assert (got > tie, got < tie) == (want > tie, want < tie), (tie, x, s)
            met += 1
    assert met > 50


@triton.jit
def _quotient_kernel(x_ptr, s_ptr, quotient_ptr, size, FMT: tl.constexpr, TARGET: tl.constexpr, BLOCK_N: tl.constexpr):
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + index, mask=index < size, other=1.0)
    s = tl.load(s_ptr + index, mask=index < size, other=1.0)
    reciprocal, rest = reciprocal_of(s, FMT, TARGET)
    tl.store(quotient_ptr + index, rounded_quotient(x, s, reciprocal, rest, FMT, TARGET), mask=index < size)


def test_the_kernels_quotient_is_at_a_tie_where_the_divisions_is() -> None:
    """On a GPU this checks the formula; the interpreter divides."""
    triples = [
        (tie, x, s)
        for part in ("element", "scale")
        for tie in ties(getattr(FORMATS["nvfp4"], part))
        for x, s in pairs_near(tie)
    ]
    tie, x, s = (torch.tensor([float(value) for value in values]).to(DEVICE) for values in zip(*triples, strict=True))
    # And many on ties and an ulp beside.
    scale = torch.rand(4096, len(tie), generator=torch.Generator().manual_seed(0)).to(DEVICE) + 1
    tied = (tie * scale).view(torch.int32) + torch.arange(-1, 2, device=DEVICE).repeat(4096)[:4096, None]
    x, s = torch.cat([x[None], tied.to(torch.int32).view(torch.float32)]), torch.cat([s[None], scale])
    got = torch.empty_like(x)
    constants = format_constants(FORMATS["nvfp4"], 16)
    _quotient_kernel[(triton.cdiv(x.numel(), 1024),)](
        x, s, got, x.numel(), constants, launch.target_of(torch.device(DEVICE)), BLOCK_N=1024
    )
    want = (x.double() / s.double()).float()  # a quotient of float32 numbers rounds twice as it rounds once
    assert torch.equal(got > tie, want > tie) and torch.equal(got < tie, want < tie)
