"""Device functions that the kernels share: the grids' arithmetic, the windows, and writing the result.

They restate formats.py, bounds.py and reference/common.py for tiles of float32. A format reaches the device as a
``FormatConstants``, derived from its description, so no kernel knows a format by name.

Each block is scaled by a power of two that brings its amax to [1, 2). Squares then neither overflow nor vanish, and
the scaling rounds nothing. Residuals are exact: by fma on a GPU, in float64 under the interpreter, whose fma rounds
twice.

TARGET is "cuda", "plain" or "interpreter". "cuda" uses PTX (ptx.py) for instructions that the compiler does not select.
"plain" computes the same without PTX, for GPUs that lack these instructions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit import bounds
from quantkit.formats import E2M1, FLOAT32_SMALLEST_NORMAL, BlockFormat, ScaleGrid
from quantkit.kernels import ptx

__all__ = ["FormatConstants", "format_constants", "search_constants"]

SMALLEST_NORMAL = tl.constexpr(FLOAT32_SMALLEST_NORMAL)


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
    two_level: bool
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
    sse_lower: float | None
    sse_upper: float | None
    zeroing: float
    clip_free: float
    largest_quotient: float


@functools.cache
def format_constants(fmt: BlockFormat, block_size: int) -> FormatConstants:
    """The constants of ``fmt`` at ``block_size``; without a proven window, for kernels that do not search."""
    element, scale = fmt.element, fmt.scale
    lower = upper = None
    if bounds.has_windows(element):
        lower, upper = bounds.sse_window_factors(element, block_size)
    unit_min, unit_max = _units(scale)
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
        two_level=fmt.two_level,
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
        unit_min=unit_min,
        unit_max=unit_max,
        sse_lower=None if lower is None else lower * (1 - bounds.SLACK),
        sse_upper=None if upper is None else upper * (1 + bounds.SLACK),
        zeroing=bounds.zeroing_factor(element) * (1 + bounds.SLACK),
        # Nothing is clipped up to the tie between the largest value and the next, one more step above it.
        clip_free=(1 + bounds.SLACK) / (1.5 * element.max_value - element.value(element.max_code - 1) / 2),
        largest_quotient=2 * scale.max_value,
    )


def search_constants(fmt: BlockFormat, block_size: int) -> FormatConstants:
    """As format_constants, for kernels that search. Raises ValueError for elements without a proven window."""
    if not bounds.has_windows(fmt.element):
        raise ValueError(
            f"the kernels search proven windows, and {fmt.name} has none: use backend='reference', for factors too"
        )
    return format_constants(fmt, block_size)


def _units(scale: ScaleGrid) -> tuple[float, float]:
    """(least, most) value of search_unit: with these, a search's scales and their reciprocals are normal numbers.

    Powers of two take no global scale, so there the unit is the block's normalizer. Products near the ends of float32's
    range then belong to scales that are not searched.
    """
    if scale.is_power_of_two:
        return 2.0**-126, 2.0**127
    return max(2.0**-100, FLOAT32_SMALLEST_NORMAL / scale.min_value), min(2.0**125 / scale.max_value, 2.0**125)


# ---- grids (formats.py) ----------------------------------------------------------------------------------------------


@triton.jit
def round_to_grid(y, mantissa: tl.constexpr, min_exponent: tl.constexpr, SIGNED: tl.constexpr = False):
    """Nearest value with the grid's mantissa of float32 0 ≤ y < 2^(104 + mantissa), ties to even; not saturated.

    SIGNED ("cuda" only) allows y < 0; a zero may then have either sign.

    The last place of magic = y · 2^(23 - mantissa) is the grid's quantum at y, and magic is an even multiple of it
    where y is a tie. So magic - y rounds y. Below the normal range, magic comes from the smallest normal value instead,
    enlarged a little to keep the difference in its binade. (A sum would leave the binade upwards, to a coarser
    quantum.) The product is exact, fused or not.
    """
    smallest: tl.constexpr = 2.0**min_exponent * (1 + 2.0 ** (mantissa - 22))
    magic = (max_magnitude(y, smallest) if SIGNED else tl.maximum(y, smallest)) * 2.0 ** (23 - mantissa)
    return magic - (magic - y)


@triton.jit
def encode_magnitude(value, mantissa: tl.constexpr, bias: tl.constexpr):
    """int32 code of a float32 grid value ≥ 0; a value between two codes gets the smaller one.

    The product has float32's bias, so the grid's subnormals become float32's and are rounded there. A value within a
    relative 2^-20 below a code's value may get that code; the windows' slack covers it.
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
    """int32 largest scale code with a value ≤ float32 ``value`` ≥ 0; scale_min_code - 1 where there is none."""
    if FMT.scale_subnormals:
        code = encode_magnitude(tl.minimum(value, FMT.scale_max), FMT.scale_mantissa, FMT.scale_bias)
    else:
        bits = value.to(tl.int32, bitcast=True)
        code = tl.where(bits < 0x400000, -1, bits >> 23)  # below the smallest scale, 2^-127
    return tl.minimum(tl.maximum(code, FMT.scale_min_code - 1), FMT.scale_max_code)


@triton.jit
def scale_ceil_code(value, FMT: tl.constexpr):
    """int32 smallest scale code with a value ≥ float32 ``value`` ≥ 0; scale_max_code where there is none."""
    floor = scale_floor_code(value, FMT)
    exact = (floor >= FMT.scale_min_code) & (scale_value(tl.maximum(floor, 0), FMT) == value)
    return tl.minimum(tl.where(exact, floor, floor + 1), FMT.scale_max_code)


# ---- input -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_blocks(pointers, inside, WIDTH: tl.constexpr, VECTOR: tl.constexpr, POLICY: tl.constexpr):
    """[n, WIDTH] elements from [n] pointers, zero where not inside; one thread holds a whole row.

    One instruction loads at most VECTOR elements, so a longer row is joined from two halves. POLICY: the cache eviction
    policy, "evict_first" for data that is read once, or "".
    """
    if WIDTH <= VECTOR:
        return tl.load(
            pointers[:, None] + tl.arange(0, WIDTH)[None, :], mask=inside[:, None], other=0.0, eviction_policy=POLICY
        )
    else:
        low = load_blocks(pointers, inside, WIDTH // 2, VECTOR, POLICY)
        high = load_blocks(pointers + WIDTH // 2, inside, WIDTH // 2, VECTOR, POLICY)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [low.shape[0], WIDTH])


@triton.jit
def columns(x, WIDTH: tl.constexpr):
    """The columns of an [n, WIDTH] tile as a tuple of [n] tensors."""
    if WIDTH == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, WIDTH // 2]), (0, 2, 1)))
        return columns(low, WIDTH // 2) + columns(high, WIDTH // 2)


@triton.jit
def pairs(blocks):
    """(even, odd) columns of an [n, block_size] tile, two tiles [n, block_size / 2]; a pair shares a byte of codes."""
    return tl.split(tl.reshape(blocks, [blocks.shape[0], blocks.shape[1] // 2, 2]))


@triton.jit
def max_or_nan(a, b):
    """Elementwise maximum; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def flag_nonfinite(amax, flag_ptr):
    """Sets the flag where an amax is NaN or Inf."""
    if tl.max(amax.to(tl.int32, bitcast=True), axis=0) >= 0x7F800000:
        tl.store(flag_ptr, 1)


@triton.jit
def block_amax(blocks, flag_ptr, TARGET: tl.constexpr):
    """Float32 largest magnitude of each row of an [n, block_size] tile; sets the flag where one holds NaN or Inf."""
    if TARGET == "cuda" and blocks.dtype.primitive_bitwidth == 16:
        blocks = row_amax_x2(blocks)
    even, odd = pairs(blocks.to(tl.float32))
    amax = tl.reduce(max_or_nan(tl.abs(even), tl.abs(odd)), 1, max_or_nan)
    flag_nonfinite(amax, flag_ptr)
    return amax


MAX_MAGNITUDE_X2 = tl.constexpr({tl.bfloat16: ptx.max_magnitude_x2("bf16"), tl.float16: ptx.max_magnitude_x2("f16")})


@triton.jit
def max_magnitude_x2(a, b):
    """Larger magnitude of two bf16 or fp16 tiles, with an arbitrary sign; NaN if either is NaN; on "cuda" only."""
    return tl.inline_asm_elementwise(
        MAX_MAGNITUDE_X2[a.dtype].text, MAX_MAGNITUDE_X2[a.dtype].constraints, [a, b], a.dtype, is_pure=True, pack=2
    )


@triton.jit
def row_amax_x2(x):
    """[n, 2] amax of the even and of the odd columns of bf16 or fp16 [n, 2^k], with arbitrary signs; NaN if any is.

    Neighbouring columns share a register, in which load_blocks has put them, so they are never split.
    """
    if x.shape[1] == 2:
        return x
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
        return max_magnitude_x2(row_amax_x2(low), row_amax_x2(high))


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Waits for the end of the previous kernel, under programmatic dependent launch.

    It precedes every read of that kernel's outputs, and every write to its inputs.
    """
    if PDL:
        gdc_wait()


@triton.jit
def pdl_launch_dependents(PDL: tl.constexpr):
    """Lets the next kernel start once all programs have called this, under programmatic dependent launch."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def global_scale_of(amax_ptr, PARTS: tl.constexpr, LARGEST_PRODUCT: tl.constexpr):
    """Float32 decode multiplier: amax / LARGEST_PRODUCT, from PARTS partial amax values (int32 bits).

    LARGEST_PRODUCT is the largest element times the largest scale. The multiplier is 1 for a zero weight, and at least
    float32's smallest normal number, because a subnormal multiplier would lose precision.
    """
    amax = tl.max(tl.load(amax_ptr + tl.arange(0, PARTS)), axis=0).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(amax, amax * 0.0 + LARGEST_PRODUCT)
    return tl.where(amax > 0, tl.maximum(quotient, SMALLEST_NORMAL), 1.0)


@triton.jit
def load_global_scale(global_scale_ptr, amax_ptr, FMT: tl.constexpr, AMAX_PARTS: tl.constexpr):
    """Float32 decode multiplier.

    A two-level format without AMAX_PARTS loads it from memory. Otherwise it is global_scale_of AMAX_PARTS partial amax
    values, or 1 for a single-level format, and the first program stores it.
    """
    if FMT.two_level and not AMAX_PARTS:
        return tl.load(global_scale_ptr)
    else:
        global_scale = 1.0
        if FMT.two_level:
            global_scale = global_scale_of(amax_ptr, AMAX_PARTS, FMT.element_max * FMT.scale_max)
        if tl.program_id(0) == 0:
            tl.store(global_scale_ptr, global_scale)
        return global_scale


@triton.jit
def amax_ratio(amax, global_scale, FMT: tl.constexpr):
    """Float32 amax / global_scale, correctly rounded."""
    if FMT.two_level:
        return tl.div_rn(amax, tl.zeros_like(amax) + global_scale)
    else:
        return amax


@triton.jit
def normalizer(amax):
    """Float32 power of two whose product with amax lies in [1, 2), clamped to float32's normal range."""
    exponent = amax.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(0x7F000000 - exponent, 0x00800000), 0x7F000000).to(tl.float32, bitcast=True)


# ---- windows (bounds.py) ---------------------------------------------------------------------------------------------


@triton.jit
def zeroing_code(ratio, FMT: tl.constexpr):
    """int32 smallest code at which every element rounds to zero; ratio = amax / global_scale."""
    return tl.maximum(scale_ceil_code(ratio * FMT.zeroing, FMT), FMT.scale_min_code)


@triton.jit
def sse_window(ratio, FMT: tl.constexpr):
    """(first, last) int32 codes: a scale of least squared error is in this range; ratio = amax / global_scale."""
    first = scale_floor_code(ratio * FMT.sse_lower, FMT) + 1
    first = tl.minimum(tl.maximum(first, FMT.scale_min_code), FMT.scale_last_doubling + 1)
    last = scale_floor_code(ratio * FMT.sse_upper, FMT)
    without_half = tl.minimum(zeroing_code(ratio, FMT), FMT.scale_last_without_half)
    return first, tl.maximum(tl.maximum(last, without_half), first)


@triton.jit
def search_steps(ratio, first, last, FMT: tl.constexpr):
    """(clipped, all) int32 numbers of steps that a tile of blocks needs, from each block's ``first`` on.

    After the clipped steps, no element of the tile is clipped. If a block has clipped elements even at its last code,
    all steps count as clipped.
    """
    clip_free = scale_floor_code(ratio * FMT.clip_free, FMT) + 1
    steps = tl.max(last - first, axis=0) + 1
    return tl.minimum(tl.max(tl.where(clip_free > last, 256, clip_free - first), axis=0), steps), steps


# ---- error (reference/common.py) -------------------------------------------------------------------------------------


@triton.jit
def search_unit(global_scale, normalize, FMT: tl.constexpr):
    """Float32 global_scale times the block's normalizer, a power of two, so the product rounds nothing.

    The clamp keeps the scales of a search and their reciprocals finite. Scales beyond it are so large that every
    element rounds to zero, or so small that their float32 error equals that of scale zero.
    """
    return tl.minimum(tl.maximum(global_scale * normalize, FMT.unit_min), FMT.unit_max)


RECIPROCAL = tl.constexpr({tl.float32: ptx.reciprocal("f32"), tl.float64: ptx.reciprocal("f64")})


@triton.jit
def reciprocal_near(scale, FMT: tl.constexpr, TARGET: tl.constexpr):
    """Float32 1/scale within an ulp, exact for powers of two; scale and its reciprocal are normal numbers."""
    if FMT.scale_exact_reciprocal:
        return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    elif TARGET == "cuda":  # IEEE division would first branch on the operand's range
        return tl.inline_asm_elementwise(
            RECIPROCAL[scale.dtype].text, RECIPROCAL[scale.dtype].constraints, [scale], tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / scale


@triton.jit
def reciprocal_of(scale, FMT: tl.constexpr, TARGET: tl.constexpr):
    """(leading, rest) float32, 1/scale as their sum; scale and its reciprocal are normal numbers."""
    near = reciprocal_near(scale, FMT, TARGET)
    if FMT.scale_exact_reciprocal or TARGET == "interpreter":
        return near, tl.zeros_like(near)
    else:
        leading = tl.fma(tl.fma(scale, -near, 1.0), near, near)
        error = tl.fma(scale, -leading, 1.0)
        rest = error * leading
        return leading, tl.fma(error * 1.5, rest, rest)  # the factor 1.5: see the enumeration in docs/theory.md


@triton.jit
def rounded_quotient(x, scale, reciprocal, rest, FMT: tl.constexpr, TARGET: tl.constexpr):
    """Float32 x / scale from reciprocal_of(scale), on the same side of every tie as the correctly rounded quotient.

    docs/theory.md proves that two multiplications suffice. x is normalized or zero, or negligible beside other elements
    of its block. scale and its reciprocal broadcast to x.
    """
    if TARGET == "interpreter":
        return tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    elif FMT.scale_exact_reciprocal:
        return x * reciprocal
    else:
        return tl.fma(x, reciprocal, x * rest)


@triton.jit
def nearest_level(y, FMT: tl.constexpr, CLIPPED: tl.constexpr, SHIFT: tl.constexpr = 0):
    """Float32 2^SHIFT · Q(y / 2^SHIFT) of y ≥ 0, a quotient times 2^SHIFT.

    CLIPPED=False omits the clamp to the largest level, for scales at which no quotient reaches the tie above it.
    """
    if CLIPPED:
        y = tl.minimum(y, FMT.element_max * 2.0**SHIFT)
    return round_to_grid(y, FMT.element_mantissa, FMT.element_min_exponent + SHIFT)


@triton.jit
def nearest_scaled_level(x, scale, FMT: tl.constexpr):
    """Float32 scale · Q(x / scale) of signed x, for power-of-two scales; on "cuda" only.

    This is nearest_signed_level with all numbers multiplied by the scale, which is exact.
    """
    SMALLEST: tl.constexpr = 2.0**FMT.element_min_exponent * (1 + 2.0 ** (FMT.element_mantissa - 22))
    magic = max_magnitude(x, scale * SMALLEST) * 2.0 ** (23 - FMT.element_mantissa)
    return min_magnitude(magic - (magic - x), scale * FMT.element_max)


MAX_MAGNITUDE = tl.constexpr(ptx.magnitude("max"))
MIN_MAGNITUDE = tl.constexpr(ptx.magnitude("min"))


@triton.jit
def max_magnitude(y, least):
    """Float32 max(|y|, least) with y's sign, one instruction; on "cuda" only."""
    least = tl.zeros_like(y) + least
    return tl.inline_asm_elementwise(
        MAX_MAGNITUDE.value.text, MAX_MAGNITUDE.value.constraints, [y, least], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def min_magnitude(y, most):
    """Float32 min(|y|, most) with y's sign, one instruction; on "cuda" only."""
    most = tl.zeros_like(y) + most
    return tl.inline_asm_elementwise(
        MIN_MAGNITUDE.value.text, MIN_MAGNITUDE.value.constraints, [y, most], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def nearest_signed_level(y, FMT: tl.constexpr, TARGET: tl.constexpr):
    """Float32 element value Q(y) of a signed quotient; a zero may have either sign. See nearest_level.

    On "cuda" rounding keeps the sign, and the level is clamped instead of the quotient.
    """
    if TARGET == "cuda":
        level = round_to_grid(y, FMT.element_mantissa, FMT.element_min_exponent, SIGNED=True)
        return min_magnitude(level, FMT.element_max)
    else:
        return with_sign_of(nearest_level(tl.abs(y), FMT, True), y)


@triton.jit
def with_sign_of(magnitude, x):
    """Float32 magnitude with the sign of float32 x."""
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def residual(x, level, scale, TARGET: tl.constexpr):
    """Float32 ``x − S·level`` of a tile, exact up to one rounding."""
    if TARGET != "interpreter":
        return tl.fma(level, -scale, x)  # Triton's -x is a subtraction: negate once per block
    else:
        return (x.to(tl.float64) - level.to(tl.float64) * scale.to(tl.float64)).to(tl.float32)


@triton.jit
def pairwise_sum(x):
    """Pairwise sums of the rows of float32 [n, 2^k]: k roundings each."""
    if x.shape[1] == 1:
        return tl.reshape(x, [x.shape[0]])
    else:
        return pairwise_sum(tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2))


@triton.jit
def squared_error(even, odd):
    """Float32 sums of squares of the rows of residuals, with 6 roundings on any path (docs/theory.md)."""
    CHAIN: tl.constexpr = 4 if even.shape[1] <= 8 else 2
    groups: tl.constexpr = even.shape[1] // CHAIN
    even = tl.sum(tl.reshape(even * even, [even.shape[0], groups, CHAIN]), axis=2)
    odd = tl.sum(tl.reshape(odd * odd, [odd.shape[0], groups, CHAIN]), axis=2)
    return pairwise_sum(even + odd)


# ---- output ----------------------------------------------------------------------------------------------------------


PACK_LEVELS = tl.constexpr(ptx.pack_levels())
PACK_QUOTIENTS = tl.constexpr(ptx.pack_quotients(E2M1))
PACK_QUOTIENTS_BIAS = tl.constexpr(E2M1.bias)


@triton.jit
def packed_codes(even, odd, code, unit, BITS: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr):
    """uint8 [tile, block_size / 2] element codes of float32 normalized pairs at int32 scale codes [tile].

    unit: global_scale times the normalizer [tile], not clamped. BITS: the width of the weight's type. A 16-bit element
    has 11 significant bits at most, so fp16 holds its quotient by an effective scale that is a power of two.
    """
    # Levels are element values times 2^SHIFT, so that their codes have E4M3's bias.
    SHIFT: tl.constexpr = FMT.element_bias - 7
    TO_E2M1: tl.constexpr = TARGET == "cuda" and FMT.element_mantissa == 1 and FMT.element_sign_shift == 3
    scale = tl.minimum(tl.maximum(scale_value(code, FMT) * unit, 2.0**-118), 2.0**118) * 2.0**-SHIFT
    reciprocal, rest = reciprocal_of(scale, FMT, TARGET)
    scale, reciprocal, rest = scale[:, None], reciprocal[:, None], rest[:, None]
    if TO_E2M1 and FMT.element_bias == PACK_QUOTIENTS_BIAS and BITS == 16 and FMT.scale_exact_reciprocal:
        even, odd = even * reciprocal, odd * reciprocal
        return tl.inline_asm_elementwise(
            PACK_QUOTIENTS.value.text, PACK_QUOTIENTS.value.constraints, [even, odd], tl.uint8, is_pure=True, pack=4
        )
    even_level = nearest_level(rounded_quotient(tl.abs(even), scale, reciprocal, rest, FMT, TARGET), FMT, True, SHIFT)
    odd_level = nearest_level(rounded_quotient(tl.abs(odd), scale, reciprocal, rest, FMT, TARGET), FMT, True, SHIFT)
    even, odd = with_sign_of(even_level, even), with_sign_of(odd_level, odd)
    if TO_E2M1:
        return tl.inline_asm_elementwise(
            PACK_LEVELS.value.text, PACK_LEVELS.value.constraints, [even, odd], tl.uint8, is_pure=True, pack=4
        )
    else:
        return element_code(even, FMT) | (element_code(odd, FMT) << 4)


@triton.jit
def element_code(level, FMT: tl.constexpr):
    """uint8 code, sign included, of a float32 signed level in the element grid times 2^(element_bias - 7)."""
    bits = (level * 2.0**-120).to(tl.int32, bitcast=True)
    sign = (bits >> (31 - FMT.element_sign_shift)) & (1 << FMT.element_sign_shift)
    return (((bits & 0x7FFFFFFF) >> (23 - FMT.element_mantissa)) | sign).to(tl.uint8)
