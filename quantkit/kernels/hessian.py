"""The representable scale of least ``r H rᵀ``; the twin of reference/hessian.py, where the formula and the steps are.

A program takes TILES tiles of BLOCK_M blocks of one block column, which share one Hessian, H = A Aᵀ with A lower
triangular. A lane has a whole block: its elements are a tuple of block_size tensors [n].

A scale is evaluated twice at most. First in half precision, of which a bound of the rounding makes an interval that
‖r A‖ lies in: a scale whose interval lies above that of another is out. If more than one is left, they are evaluated in
float32. A block has 1.1 of them on average.

What differs from block to block, the scales outside the squared error's window and those left after half precision, is
pooled: the lanes of a tile share all of its pairs of a block and a scale, a lane a pair. Where scales are powers of
two, there are too few outside for that to pay; and 16-bit weights are searched two elements an instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels import ptx
from quantkit.kernels.device import (
    block_amax,
    columns,
    load_blocks,
    load_global_scale,
    nearest_multiple,
    nearest_signed_level,
    normalizer,
    packed_codes,
    pairs,
    ratio_to,
    reciprocal_of,
    residual,
    rounded_quotient,
    scale_ceil_code,
    scale_floor_code,
    scale_value,
    search_unit,
    sse_window,
    wait_for_previous,
    zeroing_code,
)
from quantkit.kernels.factorize import factors_of, rounded_up

__all__ = ["hessian_kernel"]

# Half precision rounds a residual and an element of A by 2^-11 each, relatively, and below 2^-14 by 2^-25; residuals
# found by twos are exact. The rest of these two is for the products' sums, the square root, and the weights' own
# rounding.
ROUNDING = tl.constexpr(2.0**-10 + 2.0**-15)
ROUNDING_BY_TWOS = tl.constexpr(2.0**-11 + 2.0**-15)
SUBNORMAL = tl.constexpr(2.0**-22)
NOTHING = tl.constexpr(0x7FFFFFFF)
# Scales outside the squared error's window, of a block in a tile, beyond which it pays to find the norm of all zeros.
FEW_OUTSIDE = tl.constexpr(7)


# ---- the elements of a tile ------------------------------------------------------------------------------------------


@triton.jit
def tile_of(x, START: tl.constexpr, WIDTH: tl.constexpr):
    """The [n, WIDTH] tile of the columns from START on of a tuple of [n] tensors."""
    if WIDTH == 1:
        return tl.reshape(x[START], [x[START].shape[0], 1])
    else:
        low, high = tile_of(x, START, WIDTH // 2), tile_of(x, START + WIDTH // 2, WIDTH // 2)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [low.shape[0], WIDTH])


@triton.jit
def of_lanes(values, lane):
    """A tuple of [n] tensors, for each lane those of another."""
    taken = ()
    for index in tl.static_range(len(values)):
        taken = taken + (tl.gather(values[index], lane, 0),)  # noqa: RUF005  Triton unpacks nothing
    return taken


@triton.jit
def residuals_at(x, code, unit, FMT: tl.constexpr, TARGET: tl.constexpr):
    """Float32 ``x − S·Q(x / S)`` of signed elements, a tuple as x, at each block's scale code."""
    scale = scale_value(code, FMT) * unit
    reciprocal, rest = reciprocal_of(scale, FMT, TARGET)
    residuals = ()
    for index in tl.static_range(len(x)):
        if FMT.scale_exact_reciprocal and TARGET == "cuda":
            r = x[index] - nearest_multiple(x[index], scale, FMT)
        else:
            quotient = rounded_quotient(x[index], scale, reciprocal, rest, FMT, TARGET)
            r = residual(x[index], nearest_signed_level(quotient, FMT, TARGET), scale, TARGET)
        residuals = residuals + (r,)  # noqa: RUF005
    return residuals


# ---- ‖r A‖ in half precision ----------------------------------------------------------------------------------------
#
# On "cuda" a warp of 32 blocks multiplies by mma.m16n8k16; ptx.py says how residuals get to the lanes that want them.


FP16_NORM = tl.constexpr({size: ptx.fp16_norm(size) for size in (16, 32)})
FP16_NORM_X2 = tl.constexpr({size: ptx.fp16_norm_x2(size) for size in (16, 32)})
RESIDUAL_BUFFER = tl.constexpr({size: ptx.shared_memory("halves", 64 * size, alignment=128) for size in (16, 32)})
TO_FP16X2_NEAREST = tl.constexpr(ptx.convert_to_fp16x2("rn"))
TO_FP16X2_TOWARD_ZERO = tl.constexpr(ptx.convert_to_fp16x2("rz"))


@triton.jit
def pair_of_halves(low, high):
    """int32 of two float32 rounded to half precision; on "cuda"."""
    return tl.inline_asm_elementwise(
        TO_FP16X2_NEAREST.value.text, TO_FP16X2_NEAREST.value.constraints, [low, high], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def load_halves(
    factor_ptr, row_norm_ptr, BLOCK_M: tl.constexpr, QBLOCK: tl.constexpr, BY_TWOS: tl.constexpr, TARGET: tl.constexpr
):
    """(A in half precision, weights, floor, Σ ‖A_i‖): Σ |r_i| weight_i · ROUNDING + floor bounds what half_norm may be
    wrong by, A_i being A's rows; for norm_of_twos ROUNDING_BY_TWOS takes its place.

    A and weights as the product wants them; on "cuda" the latter with where each lane writes and reads shared memory.
    """
    row = tl.arange(0, QBLOCK)
    norms = tl.load(row_norm_ptr + row)
    sum_of_norms = tl.sum(norms, axis=0)
    floor = sum_of_norms * (SUBNORMAL / 3)
    SMALLEST: tl.constexpr = SUBNORMAL / (ROUNDING_BY_TWOS if BY_TWOS else ROUNDING)
    if TARGET == "cuda":
        tl.static_assert(BLOCK_M == 32)
        lane = tl.arange(0, 32)
        quad, twos = lane >> 2, (lane & 3) * 2
        factor = ()
        for column in tl.static_range(QBLOCK // 8):
            for start in tl.static_range(column // 2 * 16, QBLOCK, 8):
                at = factor_ptr + (8 * column + quad) * QBLOCK + start + twos
                factor = factor + (pair_of_halves(tl.load(at), tl.load(at + 1)),)  # noqa: RUF005
        weights = ()
        for start in tl.static_range(0, QBLOCK, 8):
            at = row_norm_ptr + start + twos
            low, high = tl.load(at) + SMALLEST, tl.load(at + 1) + SMALLEST
            weights = weights + (pair_of_halves(low, high),)  # noqa: RUF005
        base = tl.inline_asm_elementwise(
            RESIDUAL_BUFFER[QBLOCK].text, RESIDUAL_BUFFER[QBLOCK].constraints, [lane], tl.int32, is_pure=True, pack=1
        )
        LINES: tl.constexpr = QBLOCK * 16  # bytes a quarter of the tile
        own = (lane & 3) * LINES + 16 * (quad ^ twos)
        eighth, g = lane >> 3, lane & 7
        read = (eighth & 1) * LINES + (eighth >> 1) * 128 + 16 * (g ^ ((eighth & 1) * 2))
        return factor, weights + (base, own, read, lane), floor, sum_of_norms  # noqa: RUF005
    else:
        full = tl.load(factor_ptr + row[None, :] * QBLOCK + row[:, None])
        return full.to(tl.float16), norms + SMALLEST, floor, sum_of_norms


@triton.jit
def half_norm(r, halves, TARGET: tl.constexpr):
    """(norm, margin) float32: ‖r A‖ of each block lies within margin of norm."""
    factor, weights, floor, _ = halves
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
        tile = tile_of(r, 0, len(r)).to(tl.float16)
        projected = tl.dot(tile, factor)
        total = tl.sum(projected * projected, axis=1)
        margin = tl.sum(tl.abs(tile.to(tl.float32)) * weights[None, :], axis=1)
    return tl.sqrt(total), tl.fma(margin, ROUNDING, floor)


@triton.jit
def twos_of(x):
    """Neighbours of a tuple of float32 tensors, in half precision rounded toward zero, as a tuple of int32 tensors; on
    "cuda"."""
    twos = ()
    for index in tl.static_range(0, len(x), 2):
        two = tl.inline_asm_elementwise(
            TO_FP16X2_TOWARD_ZERO.value.text,
            TO_FP16X2_TOWARD_ZERO.value.constraints,
            [x[index], x[index + 1]],
            tl.int32,
            is_pure=True,
            pack=1,
        )
        twos = twos + (two,)  # noqa: RUF005
    return twos


@triton.jit
def norm_of_twos(twos, code, unit, halves, FMT: tl.constexpr):
    """As half_norm of residuals_at, for scales that are powers of two and elements that half precision holds exactly,
    or below 2^-14 within 2^-24; on "cuda".

    The residuals then are exact, too, and so found two an instruction, rounding as nearest_multiple does. (2^-24 is
    what the margin's floor has for them.) Where the smallest tie is not above 2^-14, rounded elements could be
    on its other side, and where the largest level is far above them, numbers overflow: there nothing is known.
    """
    factor, weights, floor, _ = halves
    QBLOCK: tl.constexpr = 2 * len(twos)
    SMALLEST: tl.constexpr = 2.0**FMT.element_min_exponent * (1 + 2.0 ** (FMT.element_mantissa - 9))
    scale = scale_value(code, FMT) * unit
    known = (scale * (FMT.element_smallest / 2) > 2.0**-13) & (scale * FMT.element_max < 2.0**9)
    times = tl.full(code.shape, 2.0 ** (10 - FMT.element_mantissa), tl.float32)
    total, margin = tl.inline_asm_elementwise(
        FP16_NORM_X2[QBLOCK].text,
        FP16_NORM_X2[QBLOCK].constraints,
        twos + (scale * SMALLEST, scale * FMT.element_max, times) + factor + weights,  # noqa: RUF005
        dtype=(tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )
    margin = tl.where(known, tl.fma(margin, ROUNDING_BY_TWOS, floor), float("inf"))
    return tl.where(known, tl.sqrt(total), 0.0), margin


# ---- and in float32 --------------------------------------------------------------------------------------------------


FP32_ERROR = tl.constexpr({size: ptx.fp32_error(size) for size in (16, 32)})


@triton.jit
def full_error(r, factor_ptr, TARGET: tl.constexpr):
    """Float32 ‖r A‖² of each block, from Aᵀ in memory; four lanes have the same block.

    In PTX on "cuda", where A is to be loaded anew each time: the compiler would load it early and hold all of it.
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
        projected = tl.dot(tile_of(r, 0, QBLOCK), factor, input_precision="ieee")
        return tl.sum(projected * projected, axis=1)


# ---- the search ------------------------------------------------------------------------------------------------------


@triton.jit
def code_outside(place, above, aboves, top):
    """int32 code of place 0, 1, … among those outside: aboves of them from above on, then from top downwards."""
    return tl.where(place < aboves, above + place, top - (place - aboves))


HESSIAN_BOUNDS_X2 = tl.constexpr({size: ptx.hessian_bounds_x2(size) for size in (16, 32)})


@triton.jit
def farthest_by_twos(twos, radius, inverse_root_ptr):
    """(clipping, beyond) as farthest, of 16-bit weights; on "cuda". Half precision's roundings are all against the
    bounds: the radius upwards, the elements (twos_of) and the results outwards."""
    QBLOCK: tl.constexpr = 2 * len(twos)
    every = tl.zeros(radius.shape, tl.int32)
    pointers = inverse_root_ptr.to(tl.pointer_type(tl.int32)) + every
    inverse_roots = columns(load_blocks(pointers, every == 0, QBLOCK // 2, 4, ""), QBLOCK // 2)
    clipping, beyond = tl.inline_asm_elementwise(
        HESSIAN_BOUNDS_X2[QBLOCK].text,
        HESSIAN_BOUNDS_X2[QBLOCK].constraints,
        (rounded_up(radius),) + twos + inverse_roots,  # noqa: RUF005
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
    return tl.maximum(clipping * (1 - 2.0**-10) - 2.0**-24, 0.0), tl.fma(beyond, 1 + 2.0**-10, 2.0**-23)


@triton.jit
def farthest(x, radius, inverse_root_ptr):
    """(clipping, beyond) float32: the largest ``|x_i| − t_i``, 0 at least, and the least ``|x_i| + t_i`` of those above
    zero, with t_i = radius · √(H⁻¹)_ii; see bounds.hessian_window."""
    every = tl.zeros(radius.shape, tl.int32)
    inverse_root = columns(load_blocks(inverse_root_ptr + every, every == 0, len(x), 8, ""), len(x))
    clipping = tl.zeros_like(radius)
    beyond = tl.full(radius.shape, float("inf"), tl.float32)
    for index in tl.static_range(len(x)):
        reach = radius * inverse_root[index].to(tl.float32)
        magnitude = tl.abs(x[index])
        clipping = tl.maximum(clipping, magnitude - reach)
        beyond = tl.minimum(beyond, tl.where(magnitude > reach, magnitude + reach, float("inf")))
    return clipping, beyond


@triton.jit
def weights_unit(normalize, global_scale):
    """Float32 factor from normalized magnitudes to the scale grid's unit."""
    return tl.minimum(tl.div_rn(1.0, normalize) / global_scale, 3e38)


@triton.jit
def codes_outside(
    x,
    norm,
    search_first,
    search_last,
    inverse_root_ptr,
    to_scale,
    ratio,
    FMT: tl.constexpr,
    SLACK: tl.constexpr,
    BY_TWOS: tl.constexpr,
):
    """(above, aboves, top, count) int32, as code_outside wants them: the codes other than search_first … search_last at
    which ‖r A‖ may be no more than norm, an upper bound of its least; see bounds.hessian_window. x by twos if
    BY_TWOS."""
    radius = norm * (1 + SLACK)
    if BY_TWOS:
        clipping, beyond = farthest_by_twos(x, radius, inverse_root_ptr)
    else:
        clipping, beyond = farthest(x, radius, inverse_root_ptr)
    least = clipping / FMT.element_max * to_scale * (1 - SLACK)
    most = beyond / FMT.element_smallest * to_scale * (1 + SLACK)
    first = tl.maximum(scale_ceil_code(least, FMT), FMT.scale_min_code)
    last = tl.maximum(scale_floor_code(most, FMT), FMT.scale_min_code)
    last = tl.minimum(last, zeroing_code(ratio, FMT))
    above = tl.maximum(first, search_last + 1)
    aboves = tl.maximum(last - above + 1, 0)
    top = tl.minimum(last, search_first - 1)
    return above, aboves, top, aboves + tl.maximum(top - first + 1, 0)


@triton.jit
def first_that_matters(zero_norm, norm, halves, to_scale, FMT: tl.constexpr, SLACK: tl.constexpr):
    """int32 smallest code that can bring ‖r A‖ from zero_norm, a lower bound of ‖x A‖, down to norm, as in bounds, or
    that changes it by more than 2^-22 of itself: with a scale that leaves all zeros among the candidates, smaller ones
    are as good as that."""
    needed = tl.maximum(zero_norm - norm, zero_norm * 2.0**-22)
    return scale_ceil_code(needed / (FMT.element_max * halves[3]) * to_scale * (1 - SLACK), FMT)


@triton.jit
def with_key(kept, key):
    """The four least of four ascending int32 tensors and another one."""
    result = ()
    for index in tl.static_range(4):
        result = result + (tl.minimum(kept[index], key),)  # noqa: RUF005
        key = tl.maximum(kept[index], key)
    return result


@triton.jit
def key_of(norm, margin, code, valid):
    """int32: the float32 bits of norm − margin, of which the last 8 are the code; so never more than that."""
    lower = tl.maximum(norm - margin, 0.0).to(tl.int32, bitcast=True)
    return tl.where(valid, (lower & -256) | code, NOTHING)


@triton.jit
def norm_at(x, code, unit, halves, FMT: tl.constexpr, BY_TWOS: tl.constexpr, TARGET: tl.constexpr):
    """(norm, margin) of the residuals at each block's code, as half_norm; x by twos if BY_TWOS."""
    if BY_TWOS:
        norm, margin = norm_of_twos(x, code, unit, halves, FMT)
    else:
        norm, margin = half_norm(residuals_at(x, code, unit, FMT, TARGET), halves, TARGET)
    return norm, margin


@triton.jit
def with_interval(kept, upper, norm, margin, code, valid):
    """kept and upper, the least norm + margin, after one more code of each block, where it is valid."""
    kept = with_key(kept, key_of(norm, margin, code, valid))
    return kept, tl.where(valid, tl.minimum(upper, norm + margin), upper)


@triton.jit
def owner_of(place, ends, start, WIDTH: tl.constexpr):
    """The lane whose pairs are those before its end and from the end before, among WIDTH from start on; the last of
    them for places after all."""
    if WIDTH == 1:
        return start
    else:
        end = tl.gather(ends, start + (WIDTH // 2 - 1), 0)
        return owner_of(place, ends, tl.where(end <= place, start + WIDTH // 2, start), WIDTH // 2)


@triton.jit
def share_outside(kept, upper, above, aboves, top, count, x, halves, unit, FMT: tl.constexpr, TARGET: tl.constexpr):
    """kept and upper, likewise, the lanes sharing all pairs of a block and a code."""
    lane = tl.arange(0, count.shape[0])
    ends = tl.cumsum(count, 0)
    total = tl.max(ends, axis=0)
    for start in range(0, total, count.shape[0]):
        place = start + lane
        owner = owner_of(place, ends, tl.zeros_like(lane), lane.shape[0])
        place_of_own = place - tl.gather(ends - count, owner, 0)
        code = code_outside(
            place_of_own, tl.gather(above, owner, 0), tl.gather(aboves, owner, 0), tl.gather(top, owner, 0)
        )
        code = tl.minimum(tl.maximum(code, 0), FMT.scale_max_code)
        norm, margin = norm_at(of_lanes(x, owner), code, tl.gather(unit, owner, 0), halves, FMT, False, TARGET)
        key = key_of(norm, margin, code, place < total)
        left = tl.where(norm - margin <= tl.gather(upper, owner, 0), key, NOTHING)
        least = tl.min(left, axis=0)
        while least < NOTHING:  # a pair after the other
            at = tl.max(tl.where(left == least, lane, -1), axis=0)
            to = tl.max(tl.where(lane == at, owner, -1), axis=0)
            kept = with_key(kept, tl.where(lane == to, least, NOTHING))
            most = tl.max(tl.where(lane == at, norm + margin, 0.0), axis=0)
            upper = tl.where(lane == to, tl.minimum(upper, most), upper)
            left = tl.where(lane == at, NOTHING, left)
            least = tl.min(left, axis=0)
    return kept, upper


@triton.jit
def decide(
    kept,
    upper,
    search_first,
    inside,
    above,
    aboves,
    top,
    outside,
    x,
    factor_ptr,
    unit,
    FMT: tl.constexpr,
    TARGET: tl.constexpr,
):
    """int32 best code of each block, by float32 where more than one is left, the smaller of two that tie."""
    lane = tl.arange(0, outside.shape[0])
    bound = upper.to(tl.int32, bitcast=True) | 0xFF
    left = tl.zeros_like(lane)
    for index in tl.static_range(4):
        left += (kept[index] <= bound).to(tl.int32)
    every = left == 4  # there may be more, which only all of them tell
    count = tl.where(every, inside + outside, tl.where(left > 1, left, 0))
    best = tl.where(left > 0, kept[0] & 0xFF, search_first)
    error = tl.full(upper.shape, float("inf"), tl.float32)
    ends = tl.cumsum(count, 0)
    begins = ends - count
    for start in range(0, tl.max(ends, axis=0), count.shape[0] // 4):
        place = start + (lane >> 2)
        owner = owner_of(place, ends, tl.zeros_like(lane), lane.shape[0])
        place_of_own = place - tl.gather(begins, owner, 0)
        code = tl.gather(kept[3], owner, 0)
        for back in tl.static_range(3):
            code = tl.where(place_of_own == 2 - back, tl.gather(kept[2 - back], owner, 0), code)
        code = code & 0xFF
        if tl.max(every.to(tl.int32), axis=0) > 0:
            own_first, own_inside = tl.gather(search_first, owner, 0), tl.gather(inside, owner, 0)
            own_outside = code_outside(
                place_of_own - own_inside,
                tl.gather(above, owner, 0),
                tl.gather(aboves, owner, 0),
                tl.gather(top, owner, 0),
            )
            any_code = tl.where(place_of_own < own_inside, own_first + place_of_own, own_outside)
            code = tl.where(tl.gather(left, owner, 0) == 4, tl.minimum(any_code, FMT.scale_max_code), code)
        r = residuals_at(of_lanes(x, owner), code, tl.gather(unit, owner, 0), FMT, TARGET)
        found = full_error(r, factor_ptr, TARGET)
        here, stop = tl.maximum(begins - start, 0), tl.minimum(ends - start, count.shape[0] // 4)
        for step in range(tl.max(stop - here, axis=0)):
            at = tl.minimum((here + step) * 4, count.shape[0] - 1)
            other, other_error = tl.gather(code, at, 0), tl.gather(found, at, 0)
            better = (other_error < error) | ((other_error == error) & (other < best))
            better = better & (here + step < stop)
            best, error = tl.where(better, other, best), tl.where(better, other_error, error)
    return best


@triton.jit
def hessian_kernel(
    weight_ptr,  # [rows, num_blocks, block_size] bf16, fp16 or fp32
    factors_ptr,  # [num_blocks, block_size + 2, block_size] fp32, see factors_of
    global_scale_ptr,  # [1] fp32; written where the format has none, or from amax
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
    BLOCK_M: tl.constexpr,  # rows a tile; on "cuda" 32, those of a warp
    TILES: tl.constexpr,  # tiles a program, one after the other
    AMAX_PARTS: tl.constexpr,  # largest magnitudes that give the global scale; 0: it is given
    OVERLAP: tl.constexpr,  # with the kernel before, which factorizes or finds the amax
):
    QBLOCK: tl.constexpr = FMT.block_size
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // BITS  # what one load instruction takes
    # Of 16-bit weights two elements an instruction; residuals, too, where effective scales are powers of two.
    BOUNDS_BY_TWOS: tl.constexpr = TARGET == "cuda" and BITS == 16
    RESIDUALS_BY_TWOS: tl.constexpr = BOUNDS_BY_TWOS and FMT.scale_exact_reciprocal
    column = tl.program_id(0) % num_blocks
    factor_ptr, row_norms, inverse_roots = factors_of(factors_ptr, column, QBLOCK)
    wait_for_previous(OVERLAP)
    halves = load_halves(factor_ptr, row_norms, BLOCK_M, QBLOCK, RESIDUALS_BY_TWOS, TARGET)
    global_scale = load_global_scale(global_scale_ptr, amax_ptr, FMT, AMAX_PARTS)
    start = tl.program_id(0) // num_blocks * (BLOCK_M * TILES)
    for first_row in range(start, tl.minimum(start + BLOCK_M * TILES, rows), BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        in_range = row < rows
        block = row.to(tl.int64) * num_blocks + column
        tile = load_blocks(weight_ptr + block * QBLOCK, in_range, QBLOCK, VECTOR, "evict_first")
        amax = block_amax(tile, flag_ptr, TARGET)
        normalize = normalizer(amax)
        loaded = columns(tile, QBLOCK)
        x = ()
        for index in tl.static_range(QBLOCK):
            x = x + (loaded[index].to(tl.float32) * normalize,)  # noqa: RUF005
        unit = search_unit(global_scale, normalize, FMT)
        ratio = ratio_to(amax, global_scale, FMT)
        search_first, search_last = sse_window(ratio, FMT)
        if FMT.scale_mantissa == 0:  # of two codes at most; the other is, where it must be, outside
            search_first = search_last
        nothing = tl.full([BLOCK_M], NOTHING, tl.int32)
        kept = (nothing, nothing, nothing, nothing)
        upper = tl.full([BLOCK_M], float("inf"), tl.float32)
        inside = search_last - search_first + 1
        to_scale = weights_unit(normalize, global_scale)
        bounded = twos_of(x) if BOUNDS_BY_TWOS else x
        if FMT.scale_mantissa == 0:
            # Step 0 is the one inside, those after it the ones outside. Where a block has many of these, a turn between
            # is for a scale that leaves all zeros, and from then on those too small to matter are left out. In one
            # loop, because two of them fill the instruction cache.
            above, aboves, top, outside = inside * 0, inside * 0, inside * 0, inside * 0
            zero_norm = tl.zeros_like(to_scale)
            code = search_first
            step, steps = 0, 1
            zeros = 0  # 1: this turn is for them, 2: their norm is known
            searched = bounded if RESIDUALS_BY_TWOS else x
            while step < steps:
                norm, margin = norm_at(searched, code, unit, halves, FMT, RESIDUALS_BY_TWOS, TARGET)
                kept, upper = with_interval(kept, upper, norm, margin, code, step <= outside)
                if zeros == 1:
                    # The largest scale of all may leave elements that are not zero.
                    zero_norm = tl.where(code < FMT.scale_max_code, norm - margin, 0.0)
                    zeros = 2
                else:
                    step += 1
                    if step == 1:
                        above, aboves, top, outside = codes_outside(
                            bounded,
                            upper,
                            search_first,
                            search_last,
                            inverse_roots,
                            to_scale,
                            ratio,
                            FMT,
                            SLACK,
                            BOUNDS_BY_TWOS,
                        )
                        steps = tl.max(outside, axis=0) + 1
                        if steps > FEW_OUTSIDE + 1:
                            zeros = 1
                if zeros == 2:
                    matters = first_that_matters(zero_norm, upper, halves, to_scale, FMT, SLACK)
                    outside = tl.minimum(outside, tl.maximum(aboves + tl.maximum(top - matters + 1, 0), step - 1))
                    steps = tl.max(outside, axis=0) + 1
                code = tl.minimum(tl.maximum(code_outside(step - 1, above, aboves, top), 0), FMT.scale_max_code)
                if zeros == 1:
                    code = zeroing_code(ratio, FMT)
        else:
            zeros = 0
            for step in range(tl.max(inside, axis=0)):
                code = tl.minimum(search_first + step, search_last)
                norm, margin = norm_at(x, code, unit, halves, FMT, False, TARGET)
                kept, upper = with_interval(kept, upper, norm, margin, code, step < inside)
            above, aboves, top, outside = codes_outside(
                bounded, upper, search_first, search_last, inverse_roots, to_scale, ratio, FMT, SLACK, BOUNDS_BY_TWOS
            )
            kept, upper = share_outside(kept, upper, above, aboves, top, outside, x, halves, unit, FMT, TARGET)
        code = decide(kept, upper, search_first, inside, above, aboves, top, outside, x, factor_ptr, unit, FMT, TARGET)

        even, odd = pairs(tile.to(tl.float32) * normalize[:, None])
        packed = packed_codes(even, odd, code, global_scale * normalize, BITS, FMT, TARGET)
        half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
        tl.store(codes_ptr + half, packed, mask=in_range[:, None])
        tl.store(scales_ptr + block, code.to(tl.uint8), mask=in_range)
        if COUNT:
            evaluated = tl.minimum(inside + outside + (zeros == 2), 255)
            tl.store(candidates_ptr + block, evaluated.to(tl.uint8), mask=in_range)
