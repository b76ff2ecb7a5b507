"""The representable scale of least squared error; the twin of reference/sse.py, where the formula is.

A program holds a tile of blocks in registers and walks the steps that the widest window among them needs, first those
at which some element of the tile may be clipped. Errors are float32 sums of exact residuals; with at most 32 addends
they stay within the contract's 1e-6.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import (
    block_amax,
    clip_free_code,
    load_blocks,
    nearest_level,
    normalizer,
    packed_codes,
    residual,
    scale_value,
    search_unit,
    sse_window,
)

__all__ = ["sse_kernel"]


@triton.jit
def search(
    best_code,
    best_error,
    first,
    last,
    start,
    stop,
    magnitude,
    unit,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    EXACT_FMA: tl.constexpr,
):
    """Offers the codes first + start … first + stop - 1 of each block; past its last, the last again.

    Codes rise and a tie is no improvement, so ties go to the smaller code.
    """
    for step in range(start, stop):
        code = tl.minimum(first + step, last)
        scale = scale_value(code, FMT) * unit
        reciprocal = 1.0 / scale
        level = nearest_level(magnitude, scale[:, None], reciprocal[:, None], FMT, CLIPPED, False, EXACT_FMA)
        r = residual(magnitude, level, scale[:, None], EXACT_FMA)
        error = tl.sum(r * r, axis=1)
        better = error < best_error
        best_code = tl.where(better, code, best_code)
        best_error = tl.where(better, error, best_error)
    return best_code, best_error


@triton.jit
def sse_kernel(
    weight_ptr,  # [num_blocks, block_size] bf16, fp16 or fp32
    global_scale_ptr,  # [1] fp32
    codes_ptr,  # [num_blocks, block_size / 2] uint8
    scales_ptr,  # [num_blocks] uint8
    candidates_ptr,  # [num_blocks] uint8; unused unless COUNT
    flag_ptr,  # [1] int32, set to 1 where the weight holds NaN or Inf
    num_blocks,
    FMT: tl.constexpr,
    COUNT: tl.constexpr,
    EXACT_FMA: tl.constexpr,
    BLOCK_N: tl.constexpr,  # blocks a program
):
    QBLOCK: tl.constexpr = FMT.block_size
    block = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = block < num_blocks
    VECTOR: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth  # what one load instruction takes
    weight = load_blocks(weight_ptr + block * QBLOCK, inside, QBLOCK, VECTOR).to(tl.float32)
    global_scale = tl.load(global_scale_ptr)

    amax = block_amax(weight, flag_ptr)
    normalize = normalizer(amax)
    magnitude = tl.abs(weight) * normalize[:, None]
    unit = search_unit(global_scale, normalize, FMT)
    ratio = tl.div_rn(amax, tl.zeros_like(amax) + global_scale)
    first, last = sse_window(ratio, FMT)
    steps = tl.max(last - first, axis=0) + 1
    clipped_steps = tl.minimum(tl.max(clip_free_code(ratio, FMT) - first, axis=0), steps)
    best_code = first
    best_error = tl.full([BLOCK_N], float("inf"), tl.float32)
    best_code, best_error = search(
        best_code, best_error, first, last, 0, clipped_steps, magnitude, unit, FMT, True, EXACT_FMA
    )
    best_code, best_error = search(
        best_code, best_error, first, last, clipped_steps, steps, magnitude, unit, FMT, False, EXACT_FMA
    )

    packed = packed_codes(weight, magnitude, best_code, global_scale * normalize, FMT, EXACT_FMA)
    half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
    tl.store(codes_ptr + half, packed, mask=inside[:, None])
    tl.store(scales_ptr + block, best_code.to(tl.uint8), mask=inside)
    if COUNT:
        tl.store(candidates_ptr + block, (last - first + 1).to(tl.uint8), mask=inside)
