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
    element_min_exponent: int
    element_max_exponent: int
    element_max: float
    element_smallest: float
    element_sign_shift: int
    scale_mantissa: int
    scale_bias: int
    scale_min_exponent: int
    scale_subnormals: bool
    scale_min_code: int
    scale_max_code: int
    scale_min: float
    scale_max: float
    scale_last_without_half: int
    scale_last_doubling: int
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
        element_min_exponent=element.min_exponent,
        element_max_exponent=element.max_exponent,
        element_max=element.max_value,
        element_smallest=element.value(1),
        element_sign_shift=element.bits - 1,
        scale_mantissa=scale.mantissa_bits,
        scale_bias=scale.bias,
        scale_min_exponent=scale.min_exponent,
        scale_subnormals=scale.subnormals,
        scale_min_code=scale.min_code,
        scale_max_code=scale.max_code,
        scale_min=scale.min_value,
        scale_max=scale.max_value,
        scale_last_without_half=scale.last_code_without_half,
        scale_last_doubling=last_doubling,
        sse_lower=lower * (1 - bounds.SLACK),
        sse_upper=upper * (1 + bounds.SLACK),
        zeroing=4 * (1 + bounds.SLACK),
        # The grid's next value would lie one more step above the largest; up to the tie between them nothing is
        # clipped.
        clip_free=(1 + bounds.SLACK) / (1.5 * element.max_value - element.value(element.max_code - 1) / 2),
    )


# ---- grids (formats.py) ----------------------------------------------------------------------------------------------


@triton.jit
def round_magnitude(y, mantissa: tl.constexpr, min_exponent: tl.constexpr, max_value: tl.constexpr):
    """Nearest grid value of float32 y ≥ 0, ties to even, saturated."""
    return round_to_quantum(tl.minimum(y, max_value), mantissa, min_exponent)


@triton.jit
def round_to_quantum(y, mantissa: tl.constexpr, min_exponent: tl.constexpr):
    """Nearest value with the grid's mantissa of float32 y ≥ 0: adding 1.5·2^23 quanta rounds to whole quanta."""
    binade = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, (min_exponent + 127) << 23)
    magic = ((binade + ((23 - mantissa) << 23)) | 0x400000).to(tl.float32, bitcast=True)
    return (y + magic) - magic


@triton.jit
def encode_magnitude(value, mantissa: tl.constexpr, bias: tl.constexpr, min_exponent: tl.constexpr):
    """int32 code of a float32 grid value ≥ 0; a value between two codes gets the smaller one."""
    normal = (value.to(tl.int32, bitcast=True) >> (23 - mantissa)) - ((127 - bias) << mantissa)
    # The clamp keeps the unused branch within int32.
    subnormal = tl.minimum(value * 2.0 ** (mantissa - min_exponent), 1.0 * (1 << mantissa)).to(tl.int32)
    return tl.where(value >= 2.0**min_exponent, normal, subnormal)


@triton.jit
def scale_value(code, FMT: tl.constexpr):
    """Float32 value of an int32 scale code."""
    if FMT.scale_subnormals:
        normal = (((code) << (23 - FMT.scale_mantissa)) + ((127 - FMT.scale_bias) << 23)).to(tl.float32, bitcast=True)
        subnormal = code.to(tl.float32) * 2.0 ** (FMT.scale_min_exponent - FMT.scale_mantissa)
        return tl.where(code < (1 << FMT.scale_mantissa), subnormal, normal)
    else:
        # 2^-127, code 0, is a float32 subnormal.
        return tl.where(code == 0, 0x400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_floor_code(value, FMT: tl.constexpr):
    """int32 largest scale code whose value is ≤ float32 value ≥ 0; scale_min_code - 1 where there is none."""
    if FMT.scale_subnormals:
        code = encode_magnitude(
            tl.minimum(value, FMT.scale_max), FMT.scale_mantissa, FMT.scale_bias, FMT.scale_min_exponent
        )
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
def block_amax(weight, flag_ptr):
    """Float32 largest magnitude of each block of a float32 tile; sets the flag where one holds NaN or Inf."""
    bits = tl.max(weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    if tl.max(bits, axis=0) >= 0x7F800000:
        tl.store(flag_ptr, 1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def normalizer(amax):
    """Float32 power of two that brings amax to [1, 2), as far as float32 reaches."""
    exponent = amax.to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(tl.maximum(254 - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)


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


# ---- error (reference/common.py) -------------------------------------------------------------------------------------


@triton.jit
def normalized_scale(code, unit, FMT: tl.constexpr, TIES_MATTER: tl.constexpr):
    """Effective scale times the block's normalizer, and the reciprocal that elements are scaled with; both finite.

    unit is global_scale times the normalizer, a power of two, so the product rounds as the effective scale itself does.
    TIES_MATTER: the reciprocal is correctly rounded, as residual() wants it.
    """
    scale = tl.minimum(scale_value(code, FMT) * unit, 1e38)
    reciprocal = tl.div_rn(1.0, scale) if TIES_MATTER else 1.0 / scale
    return scale, tl.minimum(reciprocal, 5e37)  # times a magnitude below 4: finite


@triton.jit
def quotient(magnitude, scale, reciprocal, EXACT_FMA: tl.constexpr):
    """Correctly rounded float32 magnitude / scale, from the correctly rounded reciprocal (Markstein 1990, one step)."""
    if EXACT_FMA:
        y = magnitude * reciprocal
        return tl.fma(tl.fma(-y, scale, magnitude), reciprocal, y)
    else:
        return tl.div_rn(magnitude, tl.broadcast_to(scale, magnitude.shape))


@triton.jit
def residual(
    magnitude,
    scale,
    reciprocal,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    TIES_MATTER: tl.constexpr,
    EXACT_FMA: tl.constexpr,
):
    """Float32 ``|x| − S·Q(|x|/S)`` of a tile, scale and reciprocal broadcast to it; exact up to one rounding.

    CLIPPED=False leaves the clamp to the largest level out, for scales at which no quotient reaches the tie above it.
    A product with the reciprocal may fall on the other side of a tie than the quotient that the codes are chosen from.
    Squared error is the same on both sides; where the residual's sign matters, TIES_MATTER asks for the quotient.
    """
    y = quotient(magnitude, scale, reciprocal, EXACT_FMA) if TIES_MATTER else magnitude * reciprocal
    if CLIPPED:
        y = tl.minimum(y, FMT.element_max)
    level = round_to_quantum(y, FMT.element_mantissa, FMT.element_min_exponent)
    if EXACT_FMA:
        return tl.fma(-level, scale, magnitude)
    else:
        return (magnitude.to(tl.float64) - level.to(tl.float64) * scale.to(tl.float64)).to(tl.float32)


# ---- output ----------------------------------------------------------------------------------------------------------


@triton.jit
def element_codes(y, FMT: tl.constexpr):
    """int32 magnitude codes of float32 y ≥ 0: round_magnitude's quanta, counted on from the binade's first code."""
    y = tl.minimum(y, FMT.element_max)
    binade = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, (FMT.element_min_exponent + 127) << 23)
    magic = ((binade + ((23 - FMT.element_mantissa) << 23)) | 0x400000).to(tl.float32, bitcast=True)
    quanta = (y + magic).to(tl.int32, bitcast=True) & ((4 << FMT.element_mantissa) - 1)
    shift: tl.constexpr = 23 - FMT.element_mantissa
    return quanta + ((binade >> shift) - ((FMT.element_min_exponent + 127) << FMT.element_mantissa))


@triton.jit
def packed_codes(weight, magnitude, code, unit, FMT: tl.constexpr, EXACT_FMA: tl.constexpr):
    """uint8 [tile, block_size / 2] element codes of float32 [tile, block_size] at int32 scale codes [tile].

    magnitude: the weight's, normalized; unit: global_scale times the normalizer [tile].
    """
    scale, reciprocal = normalized_scale(code, unit, FMT, True)
    nibbles = element_codes(quotient(magnitude, scale[:, None], reciprocal[:, None], EXACT_FMA), FMT)
    sign = weight.to(tl.int32, bitcast=True) >> (31 - FMT.element_sign_shift)
    nibbles |= sign & (1 << FMT.element_sign_shift)
    even, odd = tl.split(tl.reshape(nibbles, [weight.shape[0], FMT.block_size // 2, 2]))
    return (even | (odd << 4)).to(tl.uint8)
