"""The representable scale of least ``r H rᵀ``; the twin of reference/hessian.py, where the formula and the steps are.

A program takes TILES tiles of BLOCK_M rows and one block column, which share one Hessian, H = A Aᵀ with A lower
triangular.
The error ‖r A‖² is a small matrix product a step, formed in one of three ways (PRODUCT):

    registers   a thread holds a whole block and all of A: half the multiplications of a full product, in float32.
                The fastest, and the most exact, while A fits: block size 16
    tf32        on NVIDIA's tensor cores, from three products of operands cut to tf32's 11 bits
    dot         float32, whatever the device makes of it
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
    reciprocal_of,
    residual,
    scale_ceil_code,
    scale_floor_code,
    scale_value,
    search_unit,
    sse_window,
    zeroing_code,
)

__all__ = ["hessian_kernel"]


@triton.jit
def hessian_window(
    magnitude, error, inverse_root, normalize, ratio, global_scale, FMT: tl.constexpr, SLACK: tl.constexpr
):
    """(first, last) int32 codes outside which r H rᵀ exceeds the incumbent's error; see bounds.hessian_window."""
    reach = (tl.sqrt(error) * (1 + SLACK))[:, None] * inverse_root[None, :]
    to_scale = tl.minimum(tl.div_rn(1.0, normalize) / global_scale, 3e38)  # from normalized magnitudes
    clipping = tl.maximum(tl.max(magnitude - reach, axis=1), 0.0) / FMT.element_max
    beyond = tl.min(tl.where(magnitude > reach, magnitude + reach, float("inf")), axis=1) / FMT.element_smallest
    first = tl.maximum(scale_ceil_code(clipping * to_scale * (1 - SLACK), FMT), FMT.scale_min_code)
    last = tl.maximum(scale_floor_code(beyond * to_scale * (1 + SLACK), FMT), FMT.scale_min_code)
    return first, tl.minimum(last, zeroing_code(ratio, FMT))


@triton.jit
def split_tf32(x):
    """(leading, rest) of float32 x: x rounded to tf32's 11 significant bits, and what that leaves, exactly."""
    leading = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return leading, x - leading


@triton.jit
def load_factor(factor_ptr, QBLOCK: tl.constexpr, PRODUCT: tl.constexpr):
    """A as projected_error wants it: its lower triangle row by row as scalars, or its tf32 parts, or itself."""
    if PRODUCT == "registers":
        values = ()
        for row in tl.static_range(QBLOCK):
            for column in tl.static_range(row + 1):
                values = values + (tl.load(factor_ptr + row * QBLOCK + column),)  # noqa: RUF005  Triton unpacks nothing
        return values
    else:
        lane = tl.arange(0, QBLOCK)
        factor = tl.load(factor_ptr + lane[:, None] * QBLOCK + lane[None, :])
        if PRODUCT == "tf32":
            return split_tf32(factor)
        else:
            return (factor,)


@triton.jit
def columns(x, WIDTH: tl.constexpr):
    """The columns of an [n, WIDTH] tile as a tuple of [n] tensors."""
    if WIDTH == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, WIDTH // 2]), (0, 2, 1)))
        return columns(low, WIDTH // 2) + columns(high, WIDTH // 2)


@triton.jit
def projected_error(r, factor, QBLOCK: tl.constexpr, PRODUCT: tl.constexpr):
    """Float32 ‖r A‖² of each row of r [n, QBLOCK]."""
    if PRODUCT == "registers":
        elements = columns(r, QBLOCK)
        projected = ()
        for row in tl.static_range(QBLOCK):
            sums = ()
            for column in tl.static_range(row):
                sums = sums + (projected[column] + elements[row] * factor[row * (row + 1) // 2 + column],)  # noqa: RUF005
            projected = sums + (elements[row] * factor[row * (row + 1) // 2 + row],)  # noqa: RUF005
        error = projected[0] * projected[0]
        for column in tl.static_range(1, QBLOCK):
            error += projected[column] * projected[column]
        return error
    else:
        if PRODUCT == "tf32":
            leading, rest = split_tf32(r)
            projected = tl.dot(rest, factor[0], input_precision="tf32")
            projected = tl.dot(leading, factor[1], projected, input_precision="tf32")
            projected = tl.dot(leading, factor[0], projected, input_precision="tf32")
        else:
            projected = tl.dot(r, factor[0], input_precision="ieee")
        return tl.sum(projected * projected, axis=1)


@triton.jit
def search(
    best_code,
    best_error,
    first,
    last,
    x,
    factor,
    unit,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    EXACT_FMA: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Offers the codes first … last of each block, past the end the last one again; ties go to the smaller code.

    A block with nothing to offer repeats its best.
    """
    length = tl.maximum(last - first + 1, 0)
    first = tl.where(length > 0, first, best_code)
    last = tl.where(length > 0, last, best_code)
    for step in range(tl.max(length, axis=0)):
        code = tl.minimum(first + step, last)
        scale = scale_value(code, FMT) * unit
        reciprocal = reciprocal_of(scale, FMT, EXACT_FMA)
        magnitude = tl.abs(x)
        level = nearest_level(magnitude, scale[:, None], reciprocal[:, None], FMT, CLIPPED, True, EXACT_FMA)
        r = residual(magnitude, level, scale[:, None], EXACT_FMA).to(tl.int32, bitcast=True)
        r = (r ^ (x.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)  # with the weight's sign
        error = projected_error(r, factor, FMT.block_size, PRODUCT)
        better = (error < best_error) | ((error == best_error) & (code < best_code))
        best_code = tl.where(better, code, best_code)
        best_error = tl.where(better, error, best_error)
    return best_code, best_error


@triton.jit
def hessian_kernel(
    weight_ptr,  # [rows, num_blocks, block_size] bf16, fp16 or fp32
    factor_ptr,  # [num_blocks, block_size, block_size] fp32, A, lower triangular
    inverse_root_ptr,  # [num_blocks, block_size] fp32, √(H⁻¹)_ii
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
    PRODUCT: tl.constexpr,  # "registers", "tf32" or "dot"
    SLACK: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows a tile
    TILES: tl.constexpr,  # tiles a program, one after the other
):
    QBLOCK: tl.constexpr = FMT.block_size
    VECTOR: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth  # what one load instruction takes
    column = tl.program_id(0) % num_blocks
    factor = load_factor(factor_ptr + column * QBLOCK * QBLOCK, QBLOCK, PRODUCT)
    inverse_root = tl.load(inverse_root_ptr + column * QBLOCK + tl.arange(0, QBLOCK))
    global_scale = tl.load(global_scale_ptr)
    start = tl.program_id(0) // num_blocks * (BLOCK_M * TILES)
    for first_row in range(start, tl.minimum(start + BLOCK_M * TILES, rows), BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        inside = row < rows
        block = row.to(tl.int64) * num_blocks + column
        weight = load_blocks(weight_ptr + block * QBLOCK, inside, QBLOCK, VECTOR).to(tl.float32)

        amax = block_amax(weight, flag_ptr)
        normalize = normalizer(amax)
        x = weight * normalize[:, None]
        unit = search_unit(global_scale, normalize, FMT)
        ratio = tl.div_rn(amax, tl.zeros_like(amax) + global_scale)
        search_first, search_last = sse_window(ratio, FMT)
        clip_free = tl.maximum(clip_free_code(ratio, FMT), search_first)
        code = search_first
        error = tl.full([BLOCK_M], float("inf"), tl.float32)
        clipped = tl.minimum(clip_free - 1, search_last)
        code, error = search(code, error, search_first, clipped, x, factor, unit, FMT, True, EXACT_FMA, PRODUCT)
        code, error = search(code, error, clip_free, search_last, x, factor, unit, FMT, False, EXACT_FMA, PRODUCT)
        first, last = hessian_window(tl.abs(x), error, inverse_root, normalize, ratio, global_scale, FMT, SLACK)
        below = tl.minimum(last, search_first - 1)
        above = tl.maximum(first, search_last + 1)
        code, error = search(code, error, first, below, x, factor, unit, FMT, True, EXACT_FMA, PRODUCT)
        code, error = search(code, error, above, last, x, factor, unit, FMT, False, EXACT_FMA, PRODUCT)

        packed = packed_codes(weight, tl.abs(x), code, global_scale * normalize, FMT, EXACT_FMA)
        half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
        tl.store(codes_ptr + half, packed, mask=inside[:, None])
        tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)
        if COUNT:
            evaluated = search_last - search_first + 1
            evaluated += tl.maximum(below - first + 1, 0) + tl.maximum(last - above + 1, 0)
            tl.store(candidates_ptr + block, evaluated.to(tl.uint8), mask=inside)
