"""The representable scale of least ``r H rᵀ``; the twin of reference/hessian.py, where the formula and the steps are.

A program holds blocks of BLOCK_M rows and one block column, which share one Hessian. The error ‖r A‖² is a small matrix
product a step, in float32 or, on tensor cores, in three tf32 products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import (
    block_amax,
    normalized_scale,
    normalizer,
    packed_codes,
    residual,
    scale_ceil_code,
    scale_floor_code,
    sse_window,
    zeroing_code,
)

__all__ = ["hessian_kernel"]


@triton.jit
def hessian_window(
    magnitude, error, inverse_diagonal, normalize, amax, global_scale, FMT: tl.constexpr, SLACK: tl.constexpr
):
    """(first, last) int32 codes outside which r H rᵀ exceeds the incumbent's error; see bounds.hessian_window."""
    reach = tl.sqrt_rn(error[:, None] * inverse_diagonal[None, :]) * (1 + SLACK)
    to_scale = tl.minimum(tl.div_rn(1.0, normalize) / global_scale, 3e38)  # from normalized magnitudes
    clipping = tl.maximum(tl.max(magnitude - reach, axis=1), 0.0) / FMT.element_max
    beyond = tl.where(magnitude > reach, (magnitude + reach) / FMT.element_smallest, float("inf"))
    first = tl.maximum(scale_ceil_code(clipping * to_scale * (1 - SLACK), FMT), FMT.scale_min_code)
    last = tl.maximum(scale_floor_code(tl.min(beyond, axis=1) * to_scale * (1 + SLACK), FMT), FMT.scale_min_code)
    ratio = tl.div_rn(amax, tl.zeros_like(amax) + global_scale)
    return first, tl.minimum(last, zeroing_code(ratio, FMT))


@triton.jit
def search(
    best_code,
    best_error,
    first,
    last,
    magnitude,
    negative,
    factor,
    unit,
    FMT: tl.constexpr,
    EXACT_FMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Offers the codes first … last of each block; ties go to the smaller code."""
    for step in range(tl.max(last - first, axis=0) + 1):
        code = first + step
        scale, reciprocal = normalized_scale(tl.minimum(code, FMT.scale_max_code), unit, FMT, True)
        r = residual(magnitude, scale[:, None], reciprocal[:, None], FMT, True, True, EXACT_FMA)
        r = tl.where(negative, -r, r)
        projected = tl.dot(r, factor, input_precision=PRECISION)
        error = tl.sum(projected * projected, axis=1)
        better = (error < best_error) | ((error == best_error) & (code < best_code))
        better = better & (code <= last)
        best_code = tl.where(better, code, best_code)
        best_error = tl.where(better, error, best_error)
    return best_code, best_error


@triton.jit
def hessian_kernel(
    weight_ptr,  # [rows, num_blocks, block_size] bf16, fp16 or fp32
    factor_ptr,  # [num_blocks, block_size, block_size] fp32, H = factor factorᵀ
    inverse_diagonal_ptr,  # [num_blocks, block_size] fp32
    global_scale_ptr,  # [1] fp32
    codes_ptr,  # [rows, num_blocks, block_size / 2] uint8
    scales_ptr,  # [rows, num_blocks] uint8
    candidates_ptr,  # [rows, num_blocks] uint8; unused unless COUNT
    flag_ptr,  # [1] int32, set to 1 where the weight holds NaN or Inf
    rows,
    num_blocks,
    FMT: tl.constexpr,
    COUNT: tl.constexpr,
    EXACT_FMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SLACK: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows a program
):
    QBLOCK: tl.constexpr = FMT.block_size
    column = tl.program_id(0) % num_blocks
    row = tl.program_id(0) // num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    block = row.to(tl.int64) * num_blocks + column
    lane = tl.arange(0, QBLOCK)
    weight = tl.load(weight_ptr + block[:, None] * QBLOCK + lane[None, :], mask=inside[:, None], other=0.0).to(
        tl.float32
    )
    square = column * QBLOCK * QBLOCK + lane[:, None] * QBLOCK + lane[None, :]
    factor = tl.load(factor_ptr + square)
    inverse_diagonal = tl.load(inverse_diagonal_ptr + column * QBLOCK + lane)
    global_scale = tl.load(global_scale_ptr)

    amax = block_amax(weight, flag_ptr)
    normalize = normalizer(amax)
    magnitude = tl.abs(weight) * normalize[:, None]
    negative = weight < 0
    unit = global_scale * normalize
    search_first, search_last = sse_window(tl.div_rn(amax, tl.zeros_like(amax) + global_scale), FMT)
    code = search_first
    error = tl.full([BLOCK_M], float("inf"), tl.float32)
    code, error = search(
        code,
        error,
        search_first,
        search_last,
        magnitude,
        negative,
        factor,
        unit,
        FMT,
        EXACT_FMA,
        PRECISION,
    )
    first, last = hessian_window(magnitude, error, inverse_diagonal, normalize, amax, global_scale, FMT, SLACK)
    below_last = tl.minimum(last, search_first - 1)
    above_first = tl.maximum(first, search_last + 1)
    code, error = search(code, error, first, below_last, magnitude, negative, factor, unit, FMT, EXACT_FMA, PRECISION)
    code, error = search(code, error, above_first, last, magnitude, negative, factor, unit, FMT, EXACT_FMA, PRECISION)

    packed = packed_codes(weight, magnitude, code, unit, FMT, EXACT_FMA)
    half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
    tl.store(codes_ptr + half, packed, mask=inside[:, None])
    tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)
    if COUNT:
        evaluated = search_last - search_first + 1
        evaluated += tl.maximum(below_last - first + 1, 0) + tl.maximum(last - above_first + 1, 0)
        tl.store(candidates_ptr + block, evaluated.to(tl.uint8), mask=inside)
