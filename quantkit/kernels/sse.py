"""The representable scale of least squared error; the twin of reference/sse.py, where the formula is.

A program holds a tile of blocks in registers. It takes one step per code of the tile's widest window. The steps at
which an element may be clipped come first. Residuals are rounded once, and their squares are summed in float32;
docs/theory.md bounds the error. The first search approximates quotients by products with the reciprocal. If the two
least errors of a block are too close for that, the tile is searched again with rounded quotients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import (
    amax_ratio,
    block_amax,
    load_blocks,
    load_global_scale,
    nearest_level,
    normalizer,
    packed_codes,
    pairs,
    pdl_wait,
    reciprocal_near,
    reciprocal_of,
    residual,
    rounded_quotient,
    scale_value,
    search_steps,
    search_unit,
    squared_error,
    sse_window,
)

__all__ = ["sse_kernel"]

CLOSE = tl.constexpr(1e-5)  # relative; twice the error's largest change by quotients on the wrong side of a tie


@triton.jit
def step_error(
    even,
    odd,
    code,
    unit,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    EXACT: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Float32 squared error of each block at its scale code, from magnitudes.

    EXACT=False multiplies by the reciprocal. Such a quotient may fall on the wrong side of a tie, which raises the
    error by a relative 5e-6 at most.
    """
    scale = scale_value(code, FMT) * unit
    if EXACT:
        reciprocal, rest = reciprocal_of(scale, FMT, TARGET)
        scale, reciprocal, rest = scale[:, None], reciprocal[:, None], rest[:, None]
        even_quotient = rounded_quotient(even, scale, reciprocal, rest, FMT, TARGET)
        odd_quotient = rounded_quotient(odd, scale, reciprocal, rest, FMT, TARGET)
    else:
        reciprocal = reciprocal_near(scale, FMT, TARGET)[:, None]
        scale = scale[:, None]
        even_quotient, odd_quotient = even * reciprocal, odd * reciprocal
    even_level = nearest_level(even_quotient, FMT, CLIPPED)
    odd_level = nearest_level(odd_quotient, FMT, CLIPPED)
    return squared_error(residual(even, even_level, scale, TARGET), residual(odd, odd_level, scale, TARGET))


@triton.jit
def search(
    first,
    last,
    stop,
    steps,
    even,
    odd,
    unit,
    FMT: tl.constexpr,
    EXACT: tl.constexpr,
    TARGET: tl.constexpr,
):
    """(code, error, next_error): the least error among codes first … last of each block, and the second least error.

    The tile takes ``steps`` steps, the first ``stop`` of them with clipping. A block repeats its last code once its
    window ends. Codes ascend and only a smaller error replaces the best, so ties go to the smaller code.
    """
    best_code = first
    best_error = tl.full(first.shape, float("inf"), tl.float32)
    next_error = best_error
    for CLIPPED in tl.static_range(1, -1, -1):
        for step in range(0 if CLIPPED else stop, stop if CLIPPED else steps):
            code = tl.minimum(first + step, last)
            error = step_error(even, odd, code, unit, FMT, CLIPPED, EXACT, TARGET)
            if not EXACT:
                again = first + step > last
                next_error = tl.minimum(next_error, tl.where(again, float("inf"), tl.maximum(error, best_error)))
            better = error < best_error
            best_code = tl.where(better, code, best_code)
            best_error = tl.where(better, error, best_error)
    return best_code, best_error, next_error


@triton.jit
def best_scale(first, last, ratio, even, odd, unit, FMT: tl.constexpr, TARGET: tl.constexpr):
    """int32 code of least error among first … last of each block, from magnitudes."""
    if FMT.scale_mantissa == 0:  # at most two codes
        at_first = step_error(even, odd, first, unit, FMT, True, True, TARGET)
        at_last = step_error(even, odd, last, unit, FMT, True, True, TARGET)
        return tl.where(at_last < at_first, last, first)
    else:
        clipped, steps = search_steps(ratio, first, last, FMT)
        code, error, next_error = search(first, last, clipped, steps, even, odd, unit, FMT, False, TARGET)
        if tl.max((next_error <= error * (1 + CLOSE)).to(tl.int32), axis=0) > 0:
            code, error, next_error = search(first, last, clipped, steps, even, odd, unit, FMT, True, TARGET)
        return code


@triton.jit
def sse_kernel(
    weight_ptr,  # [num_blocks, block_size] bf16, fp16 or fp32
    global_scale_ptr,  # [1] fp32; an output for single-level formats and with AMAX_PARTS
    amax_ptr,  # [AMAX_PARTS] int32; None without them
    codes_ptr,  # [num_blocks, block_size / 2] uint8
    scales_ptr,  # [num_blocks] uint8
    candidates_ptr,  # [num_blocks] uint8; None unless COUNT
    flag_ptr,  # [1] int32, set to 1 where the weight holds NaN or Inf
    num_blocks,
    FMT: tl.constexpr,
    COUNT: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,  # blocks per program
    AMAX_PARTS: tl.constexpr,  # partial amax values for the global scale; 0: the global scale is given
    PDL: tl.constexpr,  # programmatic dependent launch: starts before the amax kernel has ended
):
    QBLOCK: tl.constexpr = FMT.block_size
    # Last blocks first: the amax kernel read them last, so they are in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = block < num_blocks
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // BITS  # elements per load instruction
    blocks = load_blocks(weight_ptr + block * QBLOCK, inside, QBLOCK, VECTOR, "evict_first")
    pdl_wait(PDL)
    global_scale = load_global_scale(global_scale_ptr, amax_ptr, FMT, AMAX_PARTS)

    amax = block_amax(blocks, flag_ptr, TARGET)
    normalize = normalizer(amax)
    even, odd = pairs(blocks.to(tl.float32))
    even, odd = even * normalize[:, None], odd * normalize[:, None]
    unit = search_unit(global_scale, normalize, FMT)
    ratio = amax_ratio(amax, global_scale, FMT)
    first, last = sse_window(ratio, FMT)
    code = best_scale(first, last, ratio, tl.abs(even), tl.abs(odd), unit, FMT, TARGET)

    packed = packed_codes(even, odd, code, global_scale * normalize, BITS, FMT, TARGET)
    half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
    tl.store(codes_ptr + half, packed, mask=inside[:, None])
    tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)
    if COUNT:
        tl.store(candidates_ptr + block, (last - first + 1).to(tl.uint8), mask=inside)
