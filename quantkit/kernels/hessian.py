"""The representable scale of least ``r H rᵀ``; the twin of reference/hessian.py, where the formula and the steps are.

A program takes TILES tiles of BLOCK_M rows and one block column, which share one Hessian, H = A Aᵀ with A lower
triangular.
The error ‖r A‖² is a small matrix product a step, formed in one of three ways (PRODUCT):

    registers   a thread holds a whole block and all of A: half the multiplications of a full product, in float32.
                The fastest, and the most exact, while A fits: block size 16. Its columns are had one by one, so half
                of them tell of most scales outside the squared error's window that they cannot be the best
    tf32        on NVIDIA's tensor cores, from three products of operands cut to tf32's 11 bits
    dot         float32, whatever the device makes of it
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import (
    block_amax,
    load_blocks,
    load_global_scale,
    nearest_signed_level,
    normalizer,
    packed_codes,
    pairs,
    ratio_to,
    reciprocal_of,
    residual,
    scale_ceil_code,
    scale_floor_code,
    scale_value,
    search_steps,
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
    """Float32 ‖r A‖² of each row of r [n, QBLOCK], as a matrix product."""
    if PRODUCT == "tf32":
        leading, rest = split_tf32(r)
        projected = tl.dot(rest, factor[0], input_precision="tf32")
        projected = tl.dot(leading, factor[1], projected, input_precision="tf32")
        projected = tl.dot(leading, factor[0], projected, input_precision="tf32")
    else:
        projected = tl.dot(r, factor[0], input_precision="ieee")
    return tl.sum(projected * projected, axis=1)


@triton.jit
def registers_error(
    elements,
    scale,
    reciprocal,
    factor,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    LAST: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Float32 sum over the last LAST columns of (r A)², from the block's elements as a tuple of [n] tensors.

    A is triangular, so these columns need the last LAST elements alone, and the sum over all columns adds to that over
    the last half: it is never less, in float32 either.
    A row after the other, from the last, and sums in fours: the compiler then keeps a residual where the next
    multiplications find it without a register port, which is what limits them.
    """
    QBLOCK: tl.constexpr = FMT.block_size
    projected = ()
    for step in tl.static_range(LAST):
        x = elements[QBLOCK - 1 - step]
        level = nearest_signed_level(x, scale, reciprocal, FMT, CLIPPED, TARGET)
        r = residual(x, level, scale, TARGET)
        sums = ()
        for column in tl.static_range(QBLOCK - LAST, QBLOCK - step):
            product = r * factor[(QBLOCK - 1 - step) * (QBLOCK - step) // 2 + column]
            if step > 0:
                product += projected[column - (QBLOCK - LAST)]
            sums = sums + (product,)  # noqa: RUF005  Triton unpacks nothing
        projected = sums
        done = projected[LAST - 1 - step]  # type: ignore[var-annotated]
        if step % 4 == 0:
            part = done * done  # type: ignore[var-annotated]
        else:
            part += done * done
        if step == 3:
            total = part  # type: ignore[var-annotated]
        elif step % 4 == 3:
            total += part
    return total


@triton.jit
def step_error(
    x,
    code,
    factor,
    unit,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    LAST: tl.constexpr,
    TARGET: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Float32 ‖r A‖² of each block at its scale code; of the last LAST columns alone where x is a tuple."""
    scale = scale_value(code, FMT) * unit
    reciprocal = reciprocal_of(scale, FMT, TARGET)
    if PRODUCT == "registers":
        return registers_error(x, scale, reciprocal, factor, FMT, CLIPPED, LAST, TARGET)
    else:
        level = nearest_signed_level(x, scale[:, None], reciprocal[:, None], FMT, CLIPPED, TARGET)
        return projected_error(residual(x, level, scale[:, None], TARGET), factor, FMT.block_size, PRODUCT)


@triton.jit
def better_of(best_code, best_error, code, error):
    """The code of less error, and its error; ties go to the smaller code."""
    better = (error < best_error) | ((error == best_error) & (code < best_code))
    return tl.where(better, code, best_code), tl.where(better, error, best_error)


@triton.jit
def search_inside(
    best_code,
    best_error,
    first,
    last,
    start,
    stop,
    x,
    factor,
    unit,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    TARGET: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Offers the codes first + start … first + stop - 1 of each block; past its last, the last again."""
    for step in range(start, stop):
        code = tl.minimum(first + step, last)
        error = step_error(x, code, factor, unit, FMT, CLIPPED, FMT.block_size, TARGET, PRODUCT)
        best_code, best_error = better_of(best_code, best_error, code, error)
    return best_code, best_error


@triton.jit
def code_outside(place, first, below, above):
    """int32 code of place 0, 1, … among those outside: below of them from first on, then from above on."""
    return tl.where(place < below, first + place, above + place - below)


@triton.jit
def search_outside(
    best_code,
    best_error,
    first,
    below,
    above,
    count,
    x,
    factor,
    unit,
    FMT: tl.constexpr,
    TARGET: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Offers the first count codes of each block that code_outside names.

    With a product that can be had in part, a round first asks of which codes the last half of the columns alone does
    not exceed the best error yet, and evaluates those.
    """
    if PRODUCT == "registers":
        ROUND: tl.constexpr = 31
        for start in range(0, tl.max(count, axis=0), ROUND):
            survivors = tl.zeros_like(best_code)
            for step in range(start, tl.minimum(start + ROUND, tl.max(count, axis=0))):
                code = tl.where(step < count, code_outside(step, first, below, above), best_code)
                error = step_error(x, code, factor, unit, FMT, True, FMT.block_size // 2, TARGET, PRODUCT)
                survivors |= tl.where((step < count) & (error <= best_error), 1 << (step - start), 0)
            while tl.max(survivors, axis=0) > 0:
                lowest = survivors & -survivors
                place = start + (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                code = tl.where(survivors > 0, code_outside(place, first, below, above), best_code)
                error = step_error(x, code, factor, unit, FMT, True, FMT.block_size, TARGET, PRODUCT)
                best_code, best_error = better_of(best_code, best_error, code, error)
                survivors &= survivors - 1
    else:
        for step in range(tl.max(count, axis=0)):
            code = tl.where(step < count, code_outside(step, first, below, above), best_code)
            error = step_error(x, code, factor, unit, FMT, True, FMT.block_size, TARGET, PRODUCT)
            best_code, best_error = better_of(best_code, best_error, code, error)
    return best_code, best_error


@triton.jit
def hessian_kernel(
    weight_ptr,  # [rows, num_blocks, block_size] bf16, fp16 or fp32
    factor_ptr,  # [num_blocks, block_size, block_size] fp32, A, lower triangular
    inverse_root_ptr,  # [num_blocks, block_size] fp32, √(H⁻¹)_ii
    global_scale_ptr,  # [1] fp32; written where the format has none
    codes_ptr,  # [rows, num_blocks, block_size / 2] uint8
    scales_ptr,  # [rows, num_blocks] uint8
    candidates_ptr,  # [rows, num_blocks] uint8; unused unless COUNT
    flag_ptr,  # [1] int32, set to 1 where the weight holds NaN or Inf
    rows,
    num_blocks,
    FMT: tl.constexpr,
    COUNT: tl.constexpr,
    TARGET: tl.constexpr,
    PRODUCT: tl.constexpr,  # "registers", "tf32" or "dot"
    SLACK: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows a tile
    TILES: tl.constexpr,  # tiles a program, one after the other
):
    QBLOCK: tl.constexpr = FMT.block_size
    VECTOR: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth  # what one load instruction takes
    column = tl.program_id(0) % num_blocks
    factor = load_factor(factor_ptr + column * QBLOCK * QBLOCK, QBLOCK, PRODUCT)
    lane = tl.arange(0, QBLOCK)
    global_scale = load_global_scale(global_scale_ptr, FMT)
    start = tl.program_id(0) // num_blocks * (BLOCK_M * TILES)
    for first_row in range(start, tl.minimum(start + BLOCK_M * TILES, rows), BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        inside = row < rows
        block = row.to(tl.int64) * num_blocks + column
        tile = load_blocks(weight_ptr + block * QBLOCK, inside, QBLOCK, VECTOR).to(tl.float32)

        even, odd = pairs(tile)
        amax = block_amax(even, odd, flag_ptr)
        normalize = normalizer(amax)
        tile *= normalize[:, None]
        x = columns(tile, QBLOCK) if PRODUCT == "registers" else tile
        unit = search_unit(global_scale, normalize, FMT)
        ratio = ratio_to(amax, global_scale, FMT)
        search_first, search_last = sse_window(ratio, FMT)
        clipped, steps = search_steps(ratio, search_first, search_last, FMT)
        code = search_first
        error = tl.full([BLOCK_M], float("inf"), tl.float32)
        code, error = search_inside(
            code, error, search_first, search_last, 0, clipped, x, factor, unit, FMT, True, TARGET, PRODUCT
        )
        code, error = search_inside(
            code, error, search_first, search_last, clipped, steps, x, factor, unit, FMT, False, TARGET, PRODUCT
        )
        inverse_root = tl.load(inverse_root_ptr + column * QBLOCK + lane)
        first, last = hessian_window(tl.abs(tile), error, inverse_root, normalize, ratio, global_scale, FMT, SLACK)
        below = tl.maximum(tl.minimum(last, search_first - 1) - first + 1, 0)
        above = tl.maximum(first, search_last + 1)
        outside = below + tl.maximum(last - above + 1, 0)
        code, error = search_outside(code, error, first, below, above, outside, x, factor, unit, FMT, TARGET, PRODUCT)

        even, odd = pairs(tile)
        packed = packed_codes(even, odd, code, global_scale * normalize, FMT, TARGET)
        half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
        tl.store(codes_ptr + half, packed, mask=inside[:, None])
        tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)
        if COUNT:
            tl.store(candidates_ptr + block, (search_last - search_first + 1 + outside).to(tl.uint8), mask=inside)
