"""The scale and the codes of least ``r H rᵀ`` found together; the twin of reference/joint.py, where the steps are.

LANES lanes share a row of a tile: each tries every LANES-th scale of the row's window. A lane holds a whole block: its
elements are a tuple of block_size tensors [BLOCK_M · LANES].

With FEEDBACK a program solves the blocks of one panel of columns in order. After each block it adds the block's change,
times the block's rows of the feedback matrix, to the targets of the panel's later blocks. layer/gptq.py and
layer/descent.py define the matrix. Without FEEDBACK a program has one block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import (
    amax_ratio,
    columns,
    element_code,
    load_blocks,
    nearest_signed_level,
    normalizer,
    reciprocal_near,
    scale_ceil_code,
    scale_floor_code,
    scale_value,
    search_unit,
    sse_window,
    zeroing_code,
)

__all__ = ["joint_kernel"]

UNRESOLVED = tl.constexpr(1e-6)


@triton.jit
def product_with_metric(r, metric_ptr, QBLOCK: tl.constexpr):
    """The tuple ``r M`` of a tuple of residuals and the symmetric float32 metric ``[QBLOCK, QBLOCK]``."""
    product = ()
    for column in tl.static_range(QBLOCK):
        total = r[0] * tl.load(metric_ptr + column * QBLOCK)
        for row in tl.static_range(1, QBLOCK):
            total = tl.fma(r[row], tl.zeros_like(total) + tl.load(metric_ptr + column * QBLOCK + row), total)
        product = product + (total,)  # noqa: RUF005  Triton unpacks nothing
    return product


@triton.jit
def energy(r, g):
    """Σ r_i g_i of two tuples."""
    total = r[0] * g[0]
    for index in tl.static_range(1, len(r)):
        total = tl.fma(r[index], g[index], total)
    return total


@triton.jit
def levels_at(x, scale, metric_ptr, inverse_ptr, ROUNDS: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr):
    """(levels, error): element values of x at float32 scales after ROUNDS rounds of coordinate descent, and r M rᵀ.

    x and levels: tuples of QBLOCK tensors. inverse_ptr: float32 1 / M_ii ``[QBLOCK]``.
    """
    QBLOCK: tl.constexpr = len(x)
    reciprocal = reciprocal_near(scale, FMT, TARGET)
    levels = ()
    r = ()
    for index in tl.static_range(QBLOCK):
        level = nearest_signed_level(x[index] * reciprocal, FMT, TARGET)
        levels = levels + (level,)  # noqa: RUF005
        r = r + (tl.fma(level, -scale, x[index]),)  # noqa: RUF005
    g = product_with_metric(r, metric_ptr, QBLOCK)
    for turn in range(ROUNDS):
        hidden = turn >> 20  # see block_search
        for index in tl.static_range(QBLOCK):
            wanted = tl.fma(g[index] * tl.load(inverse_ptr + hidden + index), reciprocal, levels[index])
            level = nearest_signed_level(wanted, FMT, TARGET)
            change = (level - levels[index]) * scale
            new_levels, new_g = (), ()
            for other in tl.static_range(QBLOCK):
                new_levels = new_levels + (level if other == index else levels[other],)  # noqa: RUF005
                weight = tl.load(metric_ptr + hidden + index * QBLOCK + other)
                new_g = new_g + (tl.fma(-change, tl.zeros_like(change) + weight, g[other]),)  # noqa: RUF005
            levels, g = new_levels, new_g
    r = ()
    for index in tl.static_range(QBLOCK):
        r = r + (tl.fma(levels[index], -scale, x[index]),)  # noqa: RUF005
    return levels, energy(r, g)


@triton.jit
def least_of_row(value, LANES: tl.constexpr):
    """The least value among the lanes of a row, for each lane."""
    BLOCK_M: tl.constexpr = value.shape[0] // LANES
    least = tl.min(tl.reshape(value, [BLOCK_M, LANES]), axis=1)
    return tl.reshape(tl.broadcast_to(least[:, None], [BLOCK_M, LANES]), [BLOCK_M * LANES])


@triton.jit
def codes_outside(
    x, least, search_first, search_last, inverse_root_ptr, to_scale, ratio, FMT: tl.constexpr, SLACK: tl.constexpr
):
    """(first, below, start, count) int32: the codes outside search_first … search_last that may bring the error below
    ``least``. ``below`` codes begin at ``first``, the rest of ``count`` at ``start``. See bounds.hessian_window."""
    # Below float32's resolution an error gives no bound: weights are normalized, and the metric's mean diagonal is 1.
    radius = tl.sqrt(tl.maximum(least, UNRESOLVED)) * (1 + SLACK)
    clipping = tl.zeros_like(least)
    beyond = tl.full(least.shape, float("inf"), tl.float32)
    for index in tl.static_range(len(x)):
        reach = radius * tl.load(inverse_root_ptr + index)
        magnitude = tl.abs(x[index])
        clipping = tl.maximum(clipping, magnitude - reach)
        beyond = tl.minimum(beyond, tl.where(magnitude > reach, magnitude + reach, float("inf")))
    first = scale_ceil_code(clipping / FMT.element_max * to_scale * (1 - SLACK), FMT)
    last = scale_floor_code(beyond / FMT.element_smallest * to_scale * (1 + SLACK), FMT)
    first = tl.maximum(first, FMT.scale_min_code)
    last = tl.minimum(last, zeroing_code(ratio, FMT))
    below = tl.maximum(tl.minimum(last, search_first - 1) - first + 1, 0)
    start = tl.maximum(first, search_last + 1)
    above = tl.maximum(last - start + 1, 0)
    return first, below, start, below + above


@triton.jit
def with_candidate(
    best, x, code, valid, unit, metric_ptr, inverse_ptr, ROUNDS: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr
):
    """best (error, code, levels) after one more scale of each lane, where it is valid; ties go to the smaller code."""
    levels, error = levels_at(x, scale_value(code, FMT) * unit, metric_ptr, inverse_ptr, ROUNDS, FMT, TARGET)
    best_error, best_code, best_levels = best
    better = valid & ((error < best_error) | ((error == best_error) & (code < best_code)))
    kept = ()
    for index in tl.static_range(len(x)):
        kept = kept + (tl.where(better, levels[index], best_levels[index]),)  # noqa: RUF005
    return tl.where(better, error, best_error), tl.where(better, code, best_code), kept


@triton.jit
def packed_words(levels, FMT: tl.constexpr):
    """A tuple of int32 words of eight element codes each, the first in the low bits; a zero has no sign."""
    words = ()
    for start in tl.static_range(0, len(levels), 8):
        word = tl.zeros(levels[0].shape, tl.int32)
        for index in tl.static_range(8):
            level = levels[start + index]
            code = element_code(tl.where(level == 0, 0.0, level) * 2.0 ** (FMT.element_bias - 7), FMT)
            word = word | (code.to(tl.int32) << (4 * index))
        words = words + (word,)  # noqa: RUF005
    return words


@triton.jit
def quadratic_form(r, metric_ptr):
    """r M rᵀ of a tuple of residuals."""
    return energy(r, product_with_metric(r, metric_ptr, len(r)))


@triton.jit
def difference(a, b, factor):
    """(a − b) · factor of two tuples, the second of float32, the factor for each lane."""
    result = ()
    for index in tl.static_range(len(a)):
        result = result + ((a[index].to(tl.float32) - b[index]) * factor,)  # noqa: RUF005
    return result


@triton.jit
def store_columns(pointer, values, mask):
    """Writes a tuple of columns from ``pointer`` on, the elements of a lane next to each other."""
    for index in tl.static_range(len(values)):
        tl.store(pointer + index, values[index], mask=mask)


@triton.jit
def block_search(
    x,
    amax,
    normalize,
    global_scale,
    own,
    metric_ptr,
    inverse_ptr,
    inverse_root_ptr,
    FMT: tl.constexpr,
    ROUNDS: tl.constexpr,
    TARGET: tl.constexpr,
    SLACK: tl.constexpr,
    LANES: tl.constexpr,
):
    """(error, code, levels, candidates) of each lane: the best of the scales that it has tried; see bounds.py.

    x: normalized elements. The first turns of the loop go through the squared error's window, the later ones through
    what the best error of the row leaves outside it. One loop serves both, because two of them double the code.
    """
    unit = search_unit(global_scale, normalize, FMT)
    ratio = amax_ratio(amax, global_scale, FMT)
    to_scale = tl.minimum(tl.div_rn(1.0, normalize) / global_scale, 3e38)
    search_first, search_last = sse_window(ratio, FMT)
    inside = search_last - search_first + 1
    levels = ()
    for _index in tl.static_range(len(x)):
        levels = levels + (tl.zeros_like(amax),)  # noqa: RUF005
    best = (tl.full(amax.shape, float("inf"), tl.float32), search_first, levels)
    # Codes of this part of the search: ``below`` of them from ``first`` on, the others from ``start`` on.
    first, below, start, count = search_first, inside, search_first, inside
    outside = inside * 0
    part = 0
    step = 0
    stop = tl.max(count, axis=0)
    while step < stop:
        place = step + own
        code = tl.where(place < below, first + place, start + place - below)
        code = tl.minimum(tl.maximum(code, FMT.scale_min_code), FMT.scale_max_code)
        # Always zero, which the compiler does not know: block_size² loads of the metric, hoisted out of the loop, would
        # need more registers than there are.
        hidden = step >> 20
        best = with_candidate(best, x, code, place < count, unit, metric_ptr + hidden, inverse_ptr, ROUNDS, FMT, TARGET)
        step += LANES
        if step >= stop and part == 0:
            part = 1
            least = least_of_row(best[0], LANES)
            first, below, start, outside = codes_outside(
                x, least, search_first, search_last, inverse_root_ptr, to_scale, ratio, FMT, SLACK
            )
            count = outside
            step = 0
            stop = tl.max(count, axis=0)
    return best[0], best[1], best[2], inside + outside


@triton.jit
def pass_on(
    target_ptr,
    change_ptr,
    feedback_ptr,
    first_row,
    rows,
    column,
    width,
    feedback_stride,
    QBLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds the change of the block at ``column``, times its rows of the feedback, to all later columns of the tile."""
    row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    of_block = column + tl.arange(0, QBLOCK)
    change = tl.load(change_ptr + row[:, None] * width + of_block[None, :], mask=inside[:, None], other=0.0)
    for start in range(column + QBLOCK, width, BLOCK_K):
        later = start + tl.arange(0, BLOCK_K)
        in_panel = later < width
        weights = tl.load(
            feedback_ptr + of_block[:, None] * feedback_stride + later[None, :], mask=in_panel[None, :], other=0.0
        )
        targets = target_ptr + row[:, None] * width + later[None, :]
        mask = inside[:, None] & in_panel[None, :]
        moved = tl.load(targets, mask=mask, other=0.0) + tl.dot(change, weights, input_precision="ieee")
        tl.store(targets, moved, mask=mask)


# Compilation takes most of a minute, and these three need no variants of their own.
@triton.jit(do_not_specialize=["rows", "num_blocks", "first_block"])
def joint_kernel(
    target_ptr,  # [rows, width] bf16, fp16 or fp32; with FEEDBACK fp32, and overwritten
    weight_ptr,  # [rows, K] bf16, fp16 or fp32; None without FEEDBACK
    error_ptr,  # [rows, K] fp32: weight − value, written; with DESCEND read before; None without FEEDBACK
    change_ptr,  # [rows, width] fp32: change of the error, written; with DESCEND zero before; None without FEEDBACK
    metric_ptr,  # [num_blocks, block_size + 2, block_size] fp32: M, then 1 / M_ii, then √(M⁻¹)_ii, see launch_joint.py
    feedback_ptr,  # [width, width] fp32; None without FEEDBACK
    global_scale_ptr,  # [1] fp32
    codes_ptr,  # [rows, K / 8] int32: eight codes per word
    scales_ptr,  # [rows, num_blocks] uint8
    candidates_ptr,  # [rows, num_blocks] uint8; None unless COUNT
    rows,
    num_blocks,  # per row of the weight
    first_block,  # of the panel; 0 without FEEDBACK
    width,  # columns of the target
    feedback_stride,
    FMT: tl.constexpr,
    COUNT: tl.constexpr,
    FEEDBACK: tl.constexpr,
    DESCEND: tl.constexpr,
    ROUNDS: tl.constexpr,
    TARGET: tl.constexpr,
    SLACK: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows per tile
    LANES: tl.constexpr,  # lanes per row
    BLOCK_K: tl.constexpr,  # columns that take feedback at a time
):
    QBLOCK: tl.constexpr = FMT.block_size
    TARGET_VECTOR: tl.constexpr = 128 // target_ptr.dtype.element_ty.primitive_bitwidth
    blocks = width // QBLOCK
    lane = tl.arange(0, BLOCK_M * LANES)
    own = lane % LANES
    global_scale = tl.load(global_scale_ptr)
    if FEEDBACK:
        first_row = tl.program_id(0) * BLOCK_M
        begin, end = 0, blocks
    else:
        first_row = tl.program_id(0) // blocks * BLOCK_M
        begin = tl.program_id(0) % blocks
        end = begin + 1
    row = first_row + lane // LANES
    inside = row < rows
    row = row.to(tl.int64)
    for index_in_panel in range(begin, end):
        column = index_in_panel * QBLOCK
        block = first_block + index_in_panel
        metric = metric_ptr + block * ((QBLOCK + 2) * QBLOCK)
        at = row * (num_blocks * QBLOCK) + block * QBLOCK
        target = columns(load_blocks(target_ptr + row * width + column, inside, QBLOCK, TARGET_VECTOR, ""), QBLOCK)
        amax = tl.abs(target[0].to(tl.float32))
        for index in tl.static_range(1, QBLOCK):
            amax = tl.maximum(amax, tl.abs(target[index].to(tl.float32)))
        normalize = normalizer(amax)
        x = ()
        for index in tl.static_range(QBLOCK):
            x = x + (target[index].to(tl.float32) * normalize,)  # noqa: RUF005
        error, code, levels, count = block_search(
            x,
            amax,
            normalize,
            global_scale,
            own,
            metric,
            metric + QBLOCK * QBLOCK,
            metric + (QBLOCK + 1) * QBLOCK,
            FMT,
            ROUNDS,
            TARGET,
            SLACK,
            LANES,
        )
        least = least_of_row(error, LANES)
        least_code = least_of_row(tl.where(error == least, code, 0x7FFF), LANES)
        # If two lanes win, they have the same code and write the same values.
        winner = inside & (error == least) & (code == least_code)
        if FEEDBACK:
            WEIGHT_VECTOR: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
            weight = columns(load_blocks(weight_ptr + at, inside, QBLOCK, WEIGHT_VECTOR, ""), QBLOCK)
            if DESCEND:
                old_error = columns(load_blocks(error_ptr + at, inside, QBLOCK, 4, ""), QBLOCK)
                old = difference(x, difference(weight, old_error, normalize), tl.full(amax.shape, 1.0, tl.float32))
                winner = winner & (error < energy(old, product_with_metric(old, metric, QBLOCK)))
                tl.debug_barrier()  # all lanes have read the old error before one writes
        words = packed_words(levels, FMT)
        store_columns(codes_ptr + at // 8, words, winner)
        tl.store(scales_ptr + row * num_blocks + block, code.to(tl.uint8), mask=winner)
        if COUNT:
            tl.store(
                candidates_ptr + row * num_blocks + block,
                tl.minimum(count, 255).to(tl.uint8),
                mask=inside & (own == 0),
            )
        if FEEDBACK:
            scale = scale_value(code, FMT) * global_scale
            new_error = ()
            for index in tl.static_range(QBLOCK):
                new_error = new_error + (tl.fma(levels[index], -scale, weight[index].to(tl.float32)),)  # noqa: RUF005
            store_columns(error_ptr + at, new_error, winner)
            if DESCEND:
                change = difference(new_error, old_error, tl.full(amax.shape, 1.0, tl.float32))
                store_columns(change_ptr + row * width + column, change, winner)
            else:
                store_columns(change_ptr + row * width + column, new_error, winner)
            tl.debug_barrier()  # the tile's changes are visible to every lane
            pass_on(
                target_ptr,
                change_ptr,
                feedback_ptr,
                first_row,
                rows,
                column,
                width,
                feedback_stride,
                QBLOCK,
                BLOCK_M,
                BLOCK_K,
            )
            tl.debug_barrier()  # the next block's targets are visible to every lane
