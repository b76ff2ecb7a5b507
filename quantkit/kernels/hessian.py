"""The representable scale of least ``r H rᵀ``; the twin of reference/hessian.py, where the formula and the steps are.

A program takes TILES tiles of BLOCK_M blocks. The blocks of a program lie in one block column, so they share one
Hessian, H = A Aᵀ with A lower triangular. Each lane holds a whole block, as a tuple of block_size tensors [n].

The search has two passes. The first computes ‖r A‖ in fp16 on tensor cores. A bound of the rounding turns each result
into an interval, and a scale is dropped when its interval lies above another scale's. The second pass computes the
scales that remain in float32, if more than one remains; there are 1.1 per block on average.

Blocks differ in how many scales they have outside the squared error's window, and in how many remain after fp16. The
warp balances both: it lists all (block, scale) pairs of a tile, and each lane evaluates one pair at a time. With
power-of-two scales there are too few pairs outside the window for that, so each lane keeps to its own block. Elements
of 16-bit weights are processed in pairs, in fp16x2 registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels import ptx
from quantkit.kernels.device import (
    amax_ratio,
    block_amax,
    columns,
    load_blocks,
    load_global_scale,
    nearest_scaled_level,
    nearest_signed_level,
    normalizer,
    packed_codes,
    pairs,
    pdl_wait,
    reciprocal_of,
    residual,
    rounded_quotient,
    scale_ceil_code,
    scale_floor_code,
    scale_value,
    search_unit,
    sse_window,
    zeroing_code,
)
from quantkit.kernels.factorize import factors_of, rounded_up

__all__ = ["hessian_kernel"]

# fp16 rounds a residual and an element of A by a relative 2^-11 each, or by an absolute 2^-25 below 2^-14. Residuals
# that are computed in fp16x2 are exact, so only A's rounding counts there. The additional 2^-15 covers the sums of
# products, the square root and the rounding of the weights w.
ROUNDING = tl.constexpr(2.0**-10 + 2.0**-15)
ROUNDING_X2 = tl.constexpr(2.0**-11 + 2.0**-15)
SUBNORMAL = tl.constexpr(2.0**-22)
NO_KEY = tl.constexpr(0x7FFFFFFF)
# With more scales than this outside the squared error's window, the error of all zeros is computed to exclude some.
FEW_OUTSIDE = tl.constexpr(7)


# ---- the elements of a tile ------------------------------------------------------------------------------------------


@triton.jit
def join_columns(x, START: tl.constexpr, WIDTH: tl.constexpr):
    """[n, WIDTH] tile of WIDTH tensors [n] of a tuple, from START on; the inverse of ``columns``."""
    if WIDTH == 1:
        return tl.reshape(x[START], [x[START].shape[0], 1])
    else:
        low, high = join_columns(x, START, WIDTH // 2), join_columns(x, START + WIDTH // 2, WIDTH // 2)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [low.shape[0], WIDTH])


@triton.jit
def gather_lanes(values, lane):
    """A tuple of [n] tensors: lane i gets the values of lane ``lane[i]``."""
    taken = ()
    for index in tl.static_range(len(values)):
        taken = taken + (tl.gather(values[index], lane, 0),)  # noqa: RUF005  Triton unpacks nothing
    return taken


@triton.jit
def residuals_at(x, code, unit, FMT: tl.constexpr, TARGET: tl.constexpr):
    """Float32 ``x − S·Q(x / S)`` of signed elements x at each block's scale code; x and the result are tuples."""
    scale = scale_value(code, FMT) * unit
    reciprocal, rest = reciprocal_of(scale, FMT, TARGET)
    residuals = ()
    for index in tl.static_range(len(x)):
        if FMT.scale_exact_reciprocal and TARGET == "cuda":
            r = x[index] - nearest_scaled_level(x[index], scale, FMT)
        else:
            quotient = rounded_quotient(x[index], scale, reciprocal, rest, FMT, TARGET)
            r = residual(x[index], nearest_signed_level(quotient, FMT, TARGET), scale, TARGET)
        residuals = residuals + (r,)  # noqa: RUF005
    return residuals


# ---- ‖r A‖ in fp16 ---------------------------------------------------------------------------------------------------
#
# On "cuda" a warp multiplies its 32 blocks by mma.m16n8k16; ptx.py describes how residuals move through shared memory.


FP16_NORM = tl.constexpr({size: ptx.fp16_norm(size) for size in (16, 32)})
FP16_NORM_X2 = tl.constexpr({size: ptx.fp16_norm_x2(size) for size in (16, 32)})
RESIDUAL_BUFFER = tl.constexpr({size: ptx.shared_memory("residuals", 64 * size, alignment=128) for size in (16, 32)})
TO_FP16X2_NEAREST = tl.constexpr(ptx.convert_to_fp16x2("rn"))
TO_FP16X2_TOWARD_ZERO = tl.constexpr(ptx.convert_to_fp16x2("rz"))


@triton.jit
def to_fp16x2(low, high):
    """int32 that holds two float32 values rounded to fp16; on "cuda" only."""
    return tl.inline_asm_elementwise(
        TO_FP16X2_NEAREST.value.text, TO_FP16X2_NEAREST.value.constraints, [low, high], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def load_fp16_factor(
    factor_ptr, row_norm_ptr, BLOCK_M: tl.constexpr, QBLOCK: tl.constexpr, X2: tl.constexpr, TARGET: tl.constexpr
):
    """(A in fp16, weights, floor, Σ ‖A_i‖), A_i the rows of A.

    Σ |r_i| weight_i · ROUNDING + floor bounds the error of fp16_norm; with ROUNDING_X2, that of fp16_norm_x2. On "cuda"
    A and the weights have the register layout of mma, and the lane's shared-memory addresses follow the weights.
    """
    row = tl.arange(0, QBLOCK)
    norms = tl.load(row_norm_ptr + row)
    sum_of_norms = tl.sum(norms, axis=0)
    floor = sum_of_norms * (SUBNORMAL / 3)
    SMALLEST: tl.constexpr = SUBNORMAL / (ROUNDING_X2 if X2 else ROUNDING)
    if TARGET == "cuda":
        tl.static_assert(BLOCK_M == 32)
        lane = tl.arange(0, 32)
        quad, pair = lane >> 2, (lane & 3) * 2
        factor = ()
        for column in tl.static_range(QBLOCK // 8):
            for start in tl.static_range(column // 2 * 16, QBLOCK, 8):
                at = factor_ptr + (8 * column + quad) * QBLOCK + start + pair
                factor = factor + (to_fp16x2(tl.load(at), tl.load(at + 1)),)  # noqa: RUF005
        weights = ()
        for start in tl.static_range(0, QBLOCK, 8):
            at = row_norm_ptr + start + pair
            low, high = tl.load(at) + SMALLEST, tl.load(at + 1) + SMALLEST
            weights = weights + (to_fp16x2(low, high),)  # noqa: RUF005
        base = tl.inline_asm_elementwise(
            RESIDUAL_BUFFER[QBLOCK].text, RESIDUAL_BUFFER[QBLOCK].constraints, [lane], tl.int32, is_pure=True, pack=1
        )
        LINES: tl.constexpr = QBLOCK * 16  # bytes of a quarter of the tile
        own = (lane & 3) * LINES + 16 * (quad ^ pair)
        eighth, g = lane >> 3, lane & 7
        read = (eighth & 1) * LINES + (eighth >> 1) * 128 + 16 * (g ^ ((eighth & 1) * 2))
        return factor, weights + (base, own, read, lane), floor, sum_of_norms  # noqa: RUF005
    else:
        full = tl.load(factor_ptr + row[None, :] * QBLOCK + row[:, None])
        return full.to(tl.float16), norms + SMALLEST, floor, sum_of_norms


@triton.jit
def fp16_norm(r, fp16_factor, TARGET: tl.constexpr):
    """(norm, margin) float32: ‖r A‖ of each block differs from norm by margin at most."""
    factor, weights, floor, _ = fp16_factor
    if TARGET == "cuda":
        total, margin = tl.inline_asm_elementwise(
            FP16_NORM[len(r)].text,
            FP16_NORM[len(r)].constraints,
            r + factor + weights,
            dtype=(tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        tile = join_columns(r, 0, len(r)).to(tl.float16)
        projected = tl.dot(tile, factor)
        total = tl.sum(projected * projected, axis=1)
        margin = tl.sum(tl.abs(tile.to(tl.float32)) * weights[None, :], axis=1)
    return tl.sqrt(total), tl.fma(margin, ROUNDING, floor)


@triton.jit
def columns_to_fp16x2(x):
    """Tuple of int32: neighbouring float32 tensors of a tuple as fp16x2, rounded toward zero; on "cuda" only."""
    converted = ()
    for index in tl.static_range(0, len(x), 2):
        pair = tl.inline_asm_elementwise(
            TO_FP16X2_TOWARD_ZERO.value.text,
            TO_FP16X2_TOWARD_ZERO.value.constraints,
            [x[index], x[index + 1]],
            tl.int32,
            is_pure=True,
            pack=1,
        )
        converted = converted + (pair,)  # noqa: RUF005
    return converted


@triton.jit
def fp16_norm_x2(x, code, unit, fp16_factor, FMT: tl.constexpr):
    """fp16_norm of the residuals of fp16x2 elements x at power-of-two scales; on "cuda" only.

    fp16 must hold the elements exactly, or within 2^-24 where they are below 2^-14; the margin's floor covers that
    error. The residuals are then exact. Rounding is that of nearest_scaled_level. A block's norm is unknown (0, with an
    infinite margin) in two cases: the smallest tie is not above 2^-14, so an inexact element could cross it; or the
    largest level is so large that fp16 may overflow.
    """
    factor, weights, floor, _ = fp16_factor
    QBLOCK: tl.constexpr = 2 * len(x)
    SMALLEST: tl.constexpr = 2.0**FMT.element_min_exponent * (1 + 2.0 ** (FMT.element_mantissa - 9))
    scale = scale_value(code, FMT) * unit
    known = (scale * (FMT.element_smallest / 2) > 2.0**-13) & (scale * FMT.element_max < 2.0**9)
    times = tl.full(code.shape, 2.0 ** (10 - FMT.element_mantissa), tl.float32)
    total, margin = tl.inline_asm_elementwise(
        FP16_NORM_X2[QBLOCK].text,
        FP16_NORM_X2[QBLOCK].constraints,
        x + (scale * SMALLEST, scale * FMT.element_max, times) + factor + weights,  # noqa: RUF005
        dtype=(tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )
    margin = tl.where(known, tl.fma(margin, ROUNDING_X2, floor), float("inf"))
    return tl.where(known, tl.sqrt(total), 0.0), margin


# ---- ‖r A‖² in float32 -----------------------------------------------------------------------------------------------


FP32_ERROR = tl.constexpr({size: ptx.fp32_error(size) for size in (16, 32)})


@triton.jit
def fp32_error(r, factor_ptr, TARGET: tl.constexpr):
    """Float32 ‖r A‖² of each block, from Aᵀ in memory; four lanes hold the same block.

    On "cuda", PTX loads A at each call. The compiler would hoist the loads out of the loop and hold A in registers.
    """
    QBLOCK: tl.constexpr = len(r)
    if TARGET == "cuda":
        address = factor_ptr.to(tl.int64) + ((tl.arange(0, r[0].shape[0]) & 3) * (4 * QBLOCK)).to(tl.int64)
        operands = r + (address,)  # noqa: RUF005
        return tl.inline_asm_elementwise(
            FP32_ERROR[QBLOCK].text, FP32_ERROR[QBLOCK].constraints, operands, tl.float32, is_pure=False, pack=1
        )
    else:
        lane = tl.arange(0, QBLOCK)
        factor = tl.load(factor_ptr + lane[None, :] * QBLOCK + lane[:, None])
        projected = tl.dot(join_columns(r, 0, QBLOCK), factor, input_precision="ieee")
        return tl.sum(projected * projected, axis=1)


# ---- the window (bounds.py) ------------------------------------------------------------------------------------------


HESSIAN_BOUNDS_X2 = tl.constexpr({size: ptx.hessian_bounds_x2(size) for size in (16, 32)})


@triton.jit
def hessian_bounds_x2(x, radius, inverse_root_ptr):
    """hessian_bounds of fp16x2 elements of 16-bit weights; on "cuda" only.

    Every fp16 rounding widens the window: the radius is rounded up, the elements toward zero (columns_to_fp16x2), and
    both results outwards.
    """
    QBLOCK: tl.constexpr = 2 * len(x)
    every = tl.zeros(radius.shape, tl.int32)
    pointers = inverse_root_ptr.to(tl.pointer_type(tl.int32)) + every
    inverse_roots = columns(load_blocks(pointers, every == 0, QBLOCK // 2, 4, ""), QBLOCK // 2)
    clipping, dead_zone = tl.inline_asm_elementwise(
        HESSIAN_BOUNDS_X2[QBLOCK].text,
        HESSIAN_BOUNDS_X2[QBLOCK].constraints,
        (rounded_up(radius),) + x + inverse_roots,  # noqa: RUF005
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
    return tl.maximum(clipping * (1 - 2.0**-10) - 2.0**-24, 0.0), tl.fma(dead_zone, 1 + 2.0**-10, 2.0**-23)


@triton.jit
def hessian_bounds(x, radius, inverse_root_ptr):
    """(clipping, dead_zone) float32, with t_i = radius · √(H⁻¹)_ii as in bounds.hessian_window.

    clipping: the largest ``|x_i| − t_i``, at least 0; dead_zone: the least ``|x_i| + t_i`` with ``|x_i| > t_i``.
    """
    every = tl.zeros(radius.shape, tl.int32)
    inverse_root = columns(load_blocks(inverse_root_ptr + every, every == 0, len(x), 8, ""), len(x))
    clipping = tl.zeros_like(radius)
    dead_zone = tl.full(radius.shape, float("inf"), tl.float32)
    for index in tl.static_range(len(x)):
        reach = radius * inverse_root[index].to(tl.float32)
        magnitude = tl.abs(x[index])
        clipping = tl.maximum(clipping, magnitude - reach)
        dead_zone = tl.minimum(dead_zone, tl.where(magnitude > reach, magnitude + reach, float("inf")))
    return clipping, dead_zone


@triton.jit
def magnitude_to_scale(normalize, global_scale):
    """Float32 factor that takes a normalized magnitude to the scale grid's unit."""
    return tl.minimum(tl.div_rn(1.0, normalize) / global_scale, 3e38)


@triton.jit
def codes_outside(x, norm, inside, inverse_root_ptr, to_scale, ratio, FMT: tl.constexpr, SLACK: tl.constexpr):
    """(above, num_above, top, count) int32: the codes of bounds.hessian_window that are not ``inside``.

    The first num_above codes ascend from above, the others descend from top; count is the number of all. inside:
    (first, last, count) int32 of the codes already evaluated; norm: an upper bound of their least ‖r A‖. x: float32 or
    fp16x2.
    """
    search_first, search_last, _ = inside
    radius = norm * (1 + SLACK)
    if len(x) == FMT.block_size:
        clipping, dead_zone = hessian_bounds(x, radius, inverse_root_ptr)
    else:
        clipping, dead_zone = hessian_bounds_x2(x, radius, inverse_root_ptr)
    least = clipping / FMT.element_max * to_scale * (1 - SLACK)
    most = dead_zone / FMT.element_smallest * to_scale * (1 + SLACK)
    first = tl.maximum(scale_ceil_code(least, FMT), FMT.scale_min_code)
    last = tl.maximum(scale_floor_code(most, FMT), FMT.scale_min_code)
    last = tl.minimum(last, zeroing_code(ratio, FMT))
    above = tl.maximum(first, search_last + 1)
    num_above = tl.maximum(last - above + 1, 0)
    top = tl.minimum(last, search_first - 1)
    return above, num_above, top, num_above + tl.maximum(top - first + 1, 0)


@triton.jit
def code_outside(index, outside):
    """int32 code number ``index`` in the order of codes_outside; beyond the last it may be invalid."""
    above, num_above, top, _ = outside
    return tl.where(index < num_above, above + index, top - (index - num_above))


@triton.jit
def first_useful_code(zero_norm, norm, sum_of_norms, to_scale, FMT: tl.constexpr, SLACK: tl.constexpr):
    """int32 smallest code whose ‖r A‖ can be as small as norm, see bounds.py; zero_norm: a lower bound of ‖x A‖.

    Codes that change ‖x A‖ by less than a relative 2^-22 count as useless, too. All zeros are as good, and a scale that
    gives them is among the candidates.
    """
    needed = tl.maximum(zero_norm - norm, zero_norm * 2.0**-22)
    return scale_ceil_code(needed / (FMT.element_max * sum_of_norms) * to_scale * (1 - SLACK), FMT)


# ---- the search ------------------------------------------------------------------------------------------------------
#
# Each block has ``keys``, the four least lower bounds of ‖r A‖ with their codes, in ascending order, and ``upper``, the
# least upper bound. A key is an int32: the bits of a float32 lower bound with the code in the last eight.


@triton.jit
def norm_key(norm, margin, code, valid):
    """int32 key of the lower bound norm − margin at ``code``; NO_KEY where not valid."""
    lower = tl.maximum(norm - margin, 0.0).to(tl.int32, bitcast=True)
    return tl.where(valid, (lower & -256) | code, NO_KEY)


@triton.jit
def insert_key(keys, key):
    """The four least of ``keys``, four in ascending order, and ``key``; in ascending order."""
    result = ()
    for index in tl.static_range(4):
        result = result + (tl.minimum(keys[index], key),)  # noqa: RUF005
        key = tl.maximum(keys[index], key)
    return result


@triton.jit
def insert_interval(keys, upper, norm, margin, code, valid):
    """(keys, upper) with one more code of each block, where valid."""
    keys = insert_key(keys, norm_key(norm, margin, code, valid))
    return keys, tl.where(valid, tl.minimum(upper, norm + margin), upper)


@triton.jit
def norm_at(x, code, unit, fp16_factor, FMT: tl.constexpr, TARGET: tl.constexpr):
    """(norm, margin) of the residuals at each block's code, see fp16_norm; x: float32 or fp16x2 elements."""
    if len(x) == FMT.block_size:
        norm, margin = fp16_norm(residuals_at(x, code, unit, FMT, TARGET), fp16_factor, TARGET)
    else:
        norm, margin = fp16_norm_x2(x, code, unit, fp16_factor, FMT)
    return norm, margin


@triton.jit
def owner_lane(pair, ends, start, WIDTH: tl.constexpr):
    """The lane that owns ``pair``, among WIDTH lanes from start on, by bisection.

    ends: inclusive prefix sums of the number of pairs per lane; the owner is the first lane whose end is above the
    pair. A pair beyond the total gets the last lane.
    """
    if WIDTH == 1:
        return start
    else:
        end = tl.gather(ends, start + (WIDTH // 2 - 1), 0)
        return owner_lane(pair, ends, tl.where(end <= pair, start + WIDTH // 2, start), WIDTH // 2)


@triton.jit
def evaluate_outside(keys, upper, outside, x, fp16_factor, unit, FMT: tl.constexpr, TARGET: tl.constexpr):
    """(keys, upper) with all codes outside; each lane evaluates one (block, code) pair of the tile at a time."""
    above, num_above, top, count = outside
    lane = tl.arange(0, count.shape[0])
    ends = tl.cumsum(count, 0)
    total = tl.max(ends, axis=0)
    for start in range(0, total, count.shape[0]):
        pair = start + lane
        owner = owner_lane(pair, ends, tl.zeros_like(lane), lane.shape[0])
        index = pair - tl.gather(ends - count, owner, 0)
        code = code_outside(index, gather_lanes((above, num_above, top, count), owner))
        code = tl.minimum(tl.maximum(code, 0), FMT.scale_max_code)
        norm, margin = norm_at(gather_lanes(x, owner), code, tl.gather(unit, owner, 0), fp16_factor, FMT, TARGET)
        key = norm_key(norm, margin, code, pair < total)
        left = tl.where(norm - margin <= tl.gather(upper, owner, 0), key, NO_KEY)
        least = tl.min(left, axis=0)
        while least < NO_KEY:  # one result at a time goes to the lane of its block
            at = tl.max(tl.where(left == least, lane, -1), axis=0)
            to = tl.max(tl.where(lane == at, owner, -1), axis=0)
            keys = insert_key(keys, tl.where(lane == to, least, NO_KEY))
            most = tl.max(tl.where(lane == at, norm + margin, 0.0), axis=0)
            upper = tl.where(lane == to, tl.minimum(upper, most), upper)
            left = tl.where(lane == at, NO_KEY, left)
            least = tl.min(left, axis=0)
    return keys, upper


@triton.jit
def kept_code(keys, index, owner):
    """int32 code of key number ``index`` of each lane's owner; an index above 2 gives the last key's."""
    key = tl.gather(keys[3], owner, 0)
    for back in tl.static_range(3):
        key = tl.where(index == 2 - back, tl.gather(keys[2 - back], owner, 0), key)
    return key & 0xFF


@triton.jit
def any_code(index, inside, outside, owner):
    """int32 code number ``index`` of all codes of each lane's owner: the codes inside, then the codes outside.

    Beyond the last it may be invalid.
    """
    own_first, own_inside = tl.gather(inside[0], owner, 0), tl.gather(inside[2], owner, 0)
    own_outside = code_outside(index - own_inside, gather_lanes(outside, owner))
    return tl.where(index < own_inside, own_first + index, own_outside)


@triton.jit
def best_code(keys, upper, inside, outside, x, factor_ptr, unit, FMT: tl.constexpr, TARGET: tl.constexpr):
    """int32 code of least error of each block; ties go to the smaller code.

    float32 decides among the codes whose lower bound is not above ``upper``. A block with four such keys may have had
    more such codes, so it evaluates all its codes again. Four lanes share a (block, code) pair.
    """
    lane = tl.arange(0, upper.shape[0])
    bound = upper.to(tl.int32, bitcast=True) | 0xFF
    left = tl.zeros_like(lane)
    for index in tl.static_range(4):
        left += (keys[index] <= bound).to(tl.int32)
    every = left == 4
    count = tl.where(every, inside[2] + outside[3], tl.where(left > 1, left, 0))
    best = tl.where(left > 0, keys[0] & 0xFF, inside[0])
    error = tl.full(upper.shape, float("inf"), tl.float32)
    ends = tl.cumsum(count, 0)
    begins = ends - count
    for start in range(0, tl.max(ends, axis=0), count.shape[0] // 4):
        pair = start + (lane >> 2)
        owner = owner_lane(pair, ends, tl.zeros_like(lane), lane.shape[0])
        own_index = pair - tl.gather(begins, owner, 0)
        code = kept_code(keys, own_index, owner)
        if tl.max(every.to(tl.int32), axis=0) > 0:
            one_of_all = any_code(own_index, inside, outside, owner)
            code = tl.where(tl.gather(left, owner, 0) == 4, tl.minimum(one_of_all, FMT.scale_max_code), code)
        r = residuals_at(gather_lanes(x, owner), code, tl.gather(unit, owner, 0), FMT, TARGET)
        found = fp32_error(r, factor_ptr, TARGET)
        here, stop = tl.maximum(begins - start, 0), tl.minimum(ends - start, count.shape[0] // 4)
        for step in range(tl.max(stop - here, axis=0)):
            at = tl.minimum((here + step) * 4, count.shape[0] - 1)
            other, other_error = tl.gather(code, at, 0), tl.gather(found, at, 0)
            better = (other_error < error) | ((other_error == error) & (other < best))
            better = better & (here + step < stop)
            best, error = tl.where(better, other, best), tl.where(better, other_error, error)
    return best


@triton.jit
def search_powers_of_two(
    x,
    bounded,
    inside,
    fp16_factor,
    inverse_root_ptr,
    unit,
    to_scale,
    ratio,
    RESIDUALS_X2: tl.constexpr,
    FMT: tl.constexpr,
    SLACK: tl.constexpr,
    TARGET: tl.constexpr,
):
    """(keys, upper, outside, zeros): see the head of this section, codes_outside and hessian_kernel.

    inside holds one code. Step 0 evaluates it, and the later steps evaluate the codes outside. A tile with many codes
    outside evaluates a scale at which every element is zero after step 0. The later steps then skip the codes that
    first_useful_code excludes. One loop does it all, because two loops would exceed the instruction cache.
    """
    keys = (tl.full(ratio.shape, NO_KEY, tl.int32),) * 4
    upper = tl.full(ratio.shape, float("inf"), tl.float32)
    none = inside[0] * 0
    outside = (none, none, none, none)
    zero_norm = tl.zeros_like(to_scale)
    code = inside[0]
    step, steps = 0, 1
    zeros = 0  # 1: this turn evaluates all zeros; 2: their norm is known
    searched = bounded if RESIDUALS_X2 else x
    while step < steps:
        norm, margin = norm_at(searched, code, unit, fp16_factor, FMT, TARGET)
        keys, upper = insert_interval(keys, upper, norm, margin, code, step <= outside[3])
        if zeros == 1:
            # Even the largest scale of the grid may leave elements that are not zero.
            zero_norm = tl.where(code < FMT.scale_max_code, norm - margin, 0.0)
            zeros = 2
        else:
            step += 1
            if step == 1:
                outside = codes_outside(bounded, upper, inside, inverse_root_ptr, to_scale, ratio, FMT, SLACK)
                steps = tl.max(outside[3], axis=0) + 1
                if steps > FEW_OUTSIDE + 1:
                    zeros = 1
        if zeros == 2:
            above, num_above, top, count = outside
            useful = first_useful_code(zero_norm, upper, fp16_factor[3], to_scale, FMT, SLACK)
            count = tl.minimum(count, tl.maximum(num_above + tl.maximum(top - useful + 1, 0), step - 1))
            outside = (above, num_above, top, count)
            steps = tl.max(count, axis=0) + 1
        code = tl.minimum(tl.maximum(code_outside(step - 1, outside), 0), FMT.scale_max_code)
        if zeros == 1:
            code = zeroing_code(ratio, FMT)
    return keys, upper, outside, zeros


@triton.jit
def search_window(
    x,
    bounded,
    inside,
    fp16_factor,
    inverse_root_ptr,
    unit,
    to_scale,
    ratio,
    FMT: tl.constexpr,
    SLACK: tl.constexpr,
    TARGET: tl.constexpr,
):
    """(keys, upper, outside) of scales with a mantissa: each lane searches its own block's codes inside, then the warp
    shares the codes outside."""
    keys = (tl.full(ratio.shape, NO_KEY, tl.int32),) * 4
    upper = tl.full(ratio.shape, float("inf"), tl.float32)
    first, last, count = inside
    for step in range(tl.max(count, axis=0)):
        code = tl.minimum(first + step, last)
        norm, margin = norm_at(x, code, unit, fp16_factor, FMT, TARGET)
        keys, upper = insert_interval(keys, upper, norm, margin, code, step < count)
    outside = codes_outside(bounded, upper, inside, inverse_root_ptr, to_scale, ratio, FMT, SLACK)
    keys, upper = evaluate_outside(keys, upper, outside, x, fp16_factor, unit, FMT, TARGET)
    return keys, upper, outside


@triton.jit
def normalized_columns(tile, normalize, QBLOCK: tl.constexpr):
    """Float32 columns of a tile times each block's normalizer, as a tuple."""
    loaded = columns(tile, QBLOCK)
    x = ()
    for index in tl.static_range(QBLOCK):
        x = x + (loaded[index].to(tl.float32) * normalize,)  # noqa: RUF005
    return x


@triton.jit
def hessian_kernel(
    weight_ptr,  # [rows, num_blocks, block_size] bf16, fp16 or fp32
    factors_ptr,  # [num_blocks, block_size + 2, block_size] fp32, see factors_of
    global_scale_ptr,  # [1] fp32; an output for single-level formats and with AMAX_PARTS
    amax_ptr,  # [AMAX_PARTS] int32; None without them
    codes_ptr,  # [rows, num_blocks, block_size / 2] uint8
    scales_ptr,  # [rows, num_blocks] uint8
    candidates_ptr,  # [rows, num_blocks] uint8; None unless COUNT
    flag_ptr,  # [1] int32, set to 1 where the weight holds NaN or Inf
    rows,
    num_blocks,
    FMT: tl.constexpr,
    COUNT: tl.constexpr,
    TARGET: tl.constexpr,
    SLACK: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows per tile; on "cuda" 32, one per lane of a warp
    TILES: tl.constexpr,  # tiles per program, in sequence
    AMAX_PARTS: tl.constexpr,  # partial amax values for the global scale; 0: the global scale is given
    PDL: tl.constexpr,  # programmatic dependent launch: starts before the factorization or amax kernel has ended
):
    QBLOCK: tl.constexpr = FMT.block_size
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // BITS  # elements per load instruction
    # 16-bit weights use fp16x2 arithmetic for the window, and for residuals where effective scales are powers of two.
    BOUNDS_X2: tl.constexpr = TARGET == "cuda" and BITS == 16
    RESIDUALS_X2: tl.constexpr = BOUNDS_X2 and FMT.scale_exact_reciprocal
    column = tl.program_id(0) % num_blocks
    factor_ptr, row_norms, inverse_roots = factors_of(factors_ptr, column, QBLOCK)
    pdl_wait(PDL)
    fp16_factor = load_fp16_factor(factor_ptr, row_norms, BLOCK_M, QBLOCK, RESIDUALS_X2, TARGET)
    global_scale = load_global_scale(global_scale_ptr, amax_ptr, FMT, AMAX_PARTS)
    start = tl.program_id(0) // num_blocks * (BLOCK_M * TILES)
    for first_row in range(start, tl.minimum(start + BLOCK_M * TILES, rows), BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        in_range = row < rows
        block = row.to(tl.int64) * num_blocks + column
        tile = load_blocks(weight_ptr + block * QBLOCK, in_range, QBLOCK, VECTOR, "evict_first")
        amax = block_amax(tile, flag_ptr, TARGET)
        normalize = normalizer(amax)
        x = normalized_columns(tile, normalize, QBLOCK)
        unit = search_unit(global_scale, normalize, FMT)
        ratio = amax_ratio(amax, global_scale, FMT)
        first, last = sse_window(ratio, FMT)
        if FMT.scale_mantissa == 0:
            first = last  # the window has at most two codes; the other one is then a code outside
        inside = (first, last, last - first + 1)
        to_scale = magnitude_to_scale(normalize, global_scale)
        bounded = columns_to_fp16x2(x) if BOUNDS_X2 else x
        zeros = 0
        if FMT.scale_mantissa == 0:
            keys, upper, outside, zeros = search_powers_of_two(
                x, bounded, inside, fp16_factor, inverse_roots, unit, to_scale, ratio, RESIDUALS_X2, FMT, SLACK, TARGET
            )
        else:
            keys, upper, outside = search_window(
                x, bounded, inside, fp16_factor, inverse_roots, unit, to_scale, ratio, FMT, SLACK, TARGET
            )
        code = best_code(keys, upper, inside, outside, x, factor_ptr, unit, FMT, TARGET)

        even, odd = pairs(tile.to(tl.float32) * normalize[:, None])
        packed = packed_codes(even, odd, code, global_scale * normalize, BITS, FMT, TARGET)
        half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
        tl.store(codes_ptr + half, packed, mask=in_range[:, None])
        tl.store(scales_ptr + block, code.to(tl.uint8), mask=in_range)
        if COUNT:
            evaluated = tl.minimum(inside[2] + outside[3] + (zeros == 2), 255)
            tl.store(candidates_ptr + block, evaluated.to(tl.uint8), mask=in_range)
