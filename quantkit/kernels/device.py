"""Device functions that the kernels share: the grids' arithmetic, the windows, and writing the result.

They restate formats.py, bounds.py and reference/common.py for tiles of float32. A format reaches the device as a
``FormatConstants``, derived from its description, so no kernel knows a format by name.

Searches work on magnitudes scaled by a power of two a block, so that amax lies in [1, 2): squares then neither
overflow nor vanish, and no rounding is added. Residuals are exact: fma on the GPU, float64 under the interpreter,
whose fma rounds twice.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from quantkit import bounds
from quantkit.formats import BlockFormat

__all__ = ["FormatConstants", "format_constants"]


class FormatConstants(NamedTuple):
    """A format and block size as compile-time constants; field names follow formats.py, codes are magnitude codes."""

    block_size: int
    element_mantissa: int
    element_bias: int
    element_min_exponent: int
    element_max_exponent: int
    element_max: float
    element_smallest: float
    element_sign_shift: int
    scale_mantissa: int
    scale_bias: int
    scale_min_exponent: int
    scale_subnormals: bool
    scale_exact_reciprocal: bool
    scale_min_code: int
    scale_max_code: int
    scale_min: float
    scale_max: float
    scale_last_without_half: int
    scale_last_doubling: int
    unit_min: float
    unit_max: float
    sse_lower: float
    sse_upper: float
    zeroing: float
    clip_free: float


def format_constants(fmt: BlockFormat, block_size: int) -> FormatConstants:
    """What the kernels need to know of ``fmt`` at ``block_size``."""
    element, scale = fmt.element, fmt.scale
    lower, upper = bounds.sse_window_factors(element, block_size)
    last_doubling = max(code for code in range(scale.max_code + 1) if 2 * scale.value(code) <= scale.max_value)
    return FormatConstants(
        block_size=block_size,
        element_mantissa=element.mantissa_bits,
        element_bias=element.bias,
        element_min_exponent=element.min_exponent,
        element_max_exponent=element.max_exponent,
        element_max=element.max_value,
        element_smallest=element.value(1),
        element_sign_shift=element.bits - 1,
        scale_mantissa=scale.mantissa_bits,
        scale_bias=scale.bias,
        scale_min_exponent=scale.min_exponent,
        scale_subnormals=scale.subnormals,
        scale_exact_reciprocal=scale.mantissa_bits == 0 and not fmt.two_level,
        scale_min_code=scale.min_code,
        scale_max_code=scale.max_code,
        scale_min=scale.min_value,
        scale_max=scale.max_value,
        scale_last_without_half=scale.last_code_without_half,
        scale_last_doubling=last_doubling,
        # Scales times this range stay normal numbers. A grid as wide as float32's has no global scale to fear.
        unit_min=2.0**-100 if fmt.two_level else 2.0**-126,
        unit_max=2.0**125 / scale.max_value if fmt.two_level else 2.0**127,
        sse_lower=lower * (1 - bounds.SLACK),
        sse_upper=upper * (1 + bounds.SLACK),
        zeroing=4 * (1 + bounds.SLACK),
        # The grid's next value would lie one more step above the largest; up to the tie between them nothing is
        # clipped.
        clip_free=(1 + bounds.SLACK) / (1.5 * element.max_value - element.value(element.max_code - 1) / 2),
    )


# ---- grids (formats.py) ----------------------------------------------------------------------------------------------


@triton.jit
def round_to_grid(y, mantissa: tl.constexpr, min_exponent: tl.constexpr):
    """Nearest value with the grid's mantissa of float32 0 ≤ y < 2^(104 + mantissa), ties to even; not saturated.

    y · 2^(23 - mantissa) has the very quantum in its last place that y is to be rounded to, and an even last place
    where y is a tie; so subtracting y from it rounds. Below the normal range the smallest normal value takes y's
    place, a little enlarged to keep the difference in its binade. (The sum instead of the difference would leave the
    binade upwards, to a coarser quantum.) The product is exact, whether or not it is fused.
    """
    smallest: tl.constexpr = 2.0**min_exponent * (1 + 2.0 ** (mantissa - 22))
    magic = tl.maximum(y, smallest) * 2.0 ** (23 - mantissa)
    return magic - (magic - y)


@triton.jit
def encode_magnitude(value, mantissa: tl.constexpr, bias: tl.constexpr):
    """int32 code of a float32 grid value ≥ 0; a value between two codes gets the smaller one.

    Scaled to float32's own bias, the grid's subnormals are float32's. There the product is rounded: a value less than
    2^-20 of a code's own value below it may get that code, which the windows' slack covers.
    """
    return (value * 2.0 ** (bias - 127)).to(tl.int32, bitcast=True) >> (23 - mantissa)


@triton.jit
def scale_value(code, FMT: tl.constexpr):
    """Float32 value of an int32 scale code."""
    if FMT.scale_subnormals:
        bits = code << (23 - FMT.scale_mantissa)
        return bits.to(tl.float32, bitcast=True) * 2.0 ** (127 - FMT.scale_bias)
    else:
        return tl.maximum(code << 23, 0x400000).to(tl.float32, bitcast=True)  # code 0, 2^-127, is subnormal


@triton.jit
def scale_floor_code(value, FMT: tl.constexpr):
    """int32 largest scale code whose value is ≤ float32 value ≥ 0; scale_min_code - 1 where there is none."""
    if FMT.scale_subnormals:
        code = encode_magnitude(tl.minimum(value, FMT.scale_max), FMT.scale_mantissa, FMT.scale_bias)
    else:
        code = tl.where(value < FMT.scale_min, -1, value.to(tl.int32, bitcast=True) >> 23)
    return tl.minimum(tl.maximum(code, FMT.scale_min_code - 1), FMT.scale_max_code)


@triton.jit
def scale_ceil_code(value, FMT: tl.constexpr):
    """int32 smallest scale code whose value is ≥ float32 value ≥ 0; scale_max_code where there is none."""
    floor = scale_floor_code(value, FMT)
    exact = (floor >= FMT.scale_min_code) & (scale_value(tl.maximum(floor, 0), FMT) == value)
    return tl.minimum(tl.where(exact, floor, floor + 1), FMT.scale_max_code)


# ---- input -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_blocks(pointers, inside, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """[n, WIDTH] elements from [n] pointers, zero where not inside, every row in one thread.

    A thread loads at most VECTOR elements at once, so the row is put together from halves.
    """
    if WIDTH <= VECTOR:
        return tl.load(pointers[:, None] + tl.arange(0, WIDTH)[None, :], mask=inside[:, None], other=0.0)
    else:
        low = load_blocks(pointers, inside, WIDTH // 2, VECTOR)
        high = load_blocks(pointers + WIDTH // 2, inside, WIDTH // 2, VECTOR)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [low.shape[0], WIDTH])


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def block_amax(weight, flag_ptr):
    """Float32 largest magnitude of each block of a float32 tile; sets the flag where one holds NaN or Inf."""
    amax = tl.reduce(tl.abs(weight), 1, _larger)
    tl.store(flag_ptr + tl.zeros_like(amax).to(tl.int32), 1, mask=(amax < float("inf")) == 0)
    return amax


@triton.jit
def normalizer(amax):
    """Float32 power of two that brings amax to [1, 2), as far as float32 reaches."""
    exponent = amax.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(0x7F000000 - exponent, 0x00800000), 0x7F000000).to(tl.float32, bitcast=True)


# ---- windows (bounds.py) ---------------------------------------------------------------------------------------------


@triton.jit
def zeroing_code(ratio, FMT: tl.constexpr):
    """int32 smallest code at which every element rounds to zero; ratio = amax / global_scale."""
    return tl.maximum(scale_ceil_code(ratio * FMT.zeroing, FMT), FMT.scale_min_code)


@triton.jit
def sse_window(ratio, FMT: tl.constexpr):
    """(first, last) int32 codes between which a scale of least squared error lies; ratio = amax / global_scale."""
    first = scale_floor_code(ratio * FMT.sse_lower, FMT) + 1
    first = tl.minimum(tl.maximum(first, FMT.scale_min_code), FMT.scale_last_doubling + 1)
    last = scale_floor_code(ratio * FMT.sse_upper, FMT)
    without_half = tl.minimum(zeroing_code(ratio, FMT), FMT.scale_last_without_half)
    return first, tl.maximum(tl.maximum(last, without_half), first)


@triton.jit
def clip_free_code(ratio, FMT: tl.constexpr):
    """int32 smallest code from which on no element is clipped; ratio = amax / global_scale."""
    return scale_floor_code(ratio * FMT.clip_free, FMT) + 1


# ---- error (reference/common.py) -------------------------------------------------------------------------------------


@triton.jit
def search_unit(global_scale, normalize, FMT: tl.constexpr):
    """global_scale times the block's normalizer, a power of two, so it rounds as the effective scale itself does.

    Clamped to where the scales of a search and their reciprocals are finite. Beyond, a scale is so large that every
    element rounds to zero, or so small that no float32 error tells it from zero.
    """
    return tl.minimum(tl.maximum(global_scale * normalize, FMT.unit_min), FMT.unit_max)


@triton.jit
def reciprocal_of(scale, FMT: tl.constexpr, EXACT_FMA: tl.constexpr):
    """Float32 1/scale, correctly rounded; scale and its reciprocal are normal numbers."""
    if FMT.scale_exact_reciprocal:
        return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    elif EXACT_FMA:
        approximate = 1.0 / scale
        return tl.fma(tl.fma(scale, -approximate, 1.0), approximate, approximate)
    else:
        return tl.div_rn(1.0, scale)


@triton.jit
def nearest_level(
    magnitude,
    scale,
    reciprocal,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    TIES_MATTER: tl.constexpr,
    EXACT_FMA: tl.constexpr,
):
    """Float32 element value ``Q(|x| / S)`` of a tile; scale and reciprocal broadcast to it.

    CLIPPED=False leaves the clamp to the largest level out, for scales at which no quotient reaches the tie above it.
    A product with the reciprocal may fall on the other side of a tie than the quotient that the codes are chosen from.
    Squared error is the same on both sides; where the code or the residual's sign matters, TIES_MATTER corrects the
    product to the rounded quotient (Markstein 1990, one step). A power of two has an exact product.
    """
    y = magnitude * reciprocal
    if TIES_MATTER:
        if EXACT_FMA:
            if not FMT.scale_exact_reciprocal:
                y = tl.fma(tl.fma(y, -scale, magnitude), reciprocal, y)
        else:
            y = tl.div_rn(magnitude, tl.broadcast_to(scale, magnitude.shape))
    if CLIPPED:
        y = tl.minimum(y, FMT.element_max)
    return round_to_grid(y, FMT.element_mantissa, FMT.element_min_exponent)


@triton.jit
def residual(magnitude, level, scale, EXACT_FMA: tl.constexpr):
    """Float32 ``|x| − S·level`` of a tile, exact up to one rounding."""
    if EXACT_FMA:
        return tl.fma(level, -scale, magnitude)  # Triton's -x is a subtraction: one a block, not one an element
    else:
        return (magnitude.to(tl.float64) - level.to(tl.float64) * scale.to(tl.float64)).to(tl.float32)


# ---- output ----------------------------------------------------------------------------------------------------------


@triton.jit
def packed_codes(weight, magnitude, code, unit, FMT: tl.constexpr, EXACT_FMA: tl.constexpr):
    """uint8 [tile, block_size / 2] element codes of float32 [tile, block_size] at int32 scale codes [tile].

    magnitude: the weight's, normalized; unit: global_scale times the normalizer [tile], not clamped.
    """
    scale = tl.minimum(tl.maximum(scale_value(code, FMT) * unit, 2.0**-125), 2.0**125)
    reciprocal = reciprocal_of(scale, FMT, EXACT_FMA)
    level = nearest_level(magnitude, scale[:, None], reciprocal[:, None], FMT, True, True, EXACT_FMA)
    # The code's place in the bits of encode_magnitude, the weight's sign above it.
    shift: tl.constexpr = 23 - FMT.element_mantissa
    nibbles = (level * 2.0 ** (FMT.element_bias - 127)).to(tl.int32, bitcast=True)
    sign = weight.to(tl.int32, bitcast=True) >> (31 - FMT.element_sign_shift - shift)
    nibbles |= sign & (1 << (FMT.element_sign_shift + shift))
    even, odd = tl.split(tl.reshape(nibbles, [weight.shape[0], FMT.block_size // 2, 2]))
    return ((even >> shift) | (odd >> (shift - 4))).to(tl.uint8)
