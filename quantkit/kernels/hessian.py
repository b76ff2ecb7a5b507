"""The representable scale of least ``r H rᵀ``; the twin of reference/hessian.py, where the formula and the steps are.

A program takes TILES tiles of BLOCK_M rows and one block column, which share one Hessian, H = A Aᵀ with A lower
triangular.
The error ‖r A‖² is a small matrix product a step, formed in one of three ways (PRODUCT), and each wants the elements of
a tile in its own shape:

    registers   a thread holds a whole block and all of A: half the multiplications of a full product, in float32.
                The fastest while A fits: block size 16. The elements are a tuple of block_size tensors [n]
    mma         on NVIDIA's tensor cores, from three products of operands cut to tf32's 11 bits. Four threads share a
                block as the instruction wants it: a tuple of tensors [n, 8], eight elements of each block
    dot         float32, whatever the device makes of it. A tuple of one tensor [n, block_size]

With the first two, some of the columns can be had alone, and tell of most scales outside the squared error's window
that they cannot be the best.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import (
    flag_not_finite,
    larger_or_nan,
    load_blocks,
    load_global_scale,
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
    search_steps,
    search_unit,
    sse_window,
    zeroing_code,
)

__all__ = ["hessian_kernel"]


# ---- the elements of a tile ------------------------------------------------------------------------------------------


@triton.jit
def columns(x, WIDTH: tl.constexpr):
    """The columns of an [n, WIDTH] tile as a tuple of [n] tensors."""
    if WIDTH == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, WIDTH // 2]), (0, 2, 1)))
        return columns(low, WIDTH // 2) + columns(high, WIDTH // 2)


@triton.jit
def load_eights(pointers, inside, WIDTH: tl.constexpr):
    """A tuple of WIDTH / 8 tensors [n, 8] of what [n] pointers point to, zero where not inside.

    Said to be contiguous by twos, so that on a GPU lane 4 m + t of a warp loads, and holds, elements 2 t and 2 t + 1 of
    rows m and m + 8 of sixteen: what add_eight needs. launch.py checks it in the compiled kernel.
    """
    lane = tl.arange(0, 8)[None, :]
    eights = ()
    for start in tl.static_range(0, WIDTH, 8):
        places = tl.max_contiguous(pointers[:, None] + (start + lane), [1, 2])
        eights = eights + (tl.load(places, mask=inside[:, None], other=0.0),)  # noqa: RUF005  Triton unpacks nothing
    return eights


@triton.jit
def as_elements(tile, PRODUCT: tl.constexpr):
    """An [n, block_size] tile as "registers" and "dot" want it."""
    return columns(tile, tile.shape[1]) if PRODUCT == "registers" else (tile,)


@triton.jit
def load_elements(pointers, inside, WIDTH: tl.constexpr, VECTOR: tl.constexpr, PRODUCT: tl.constexpr):
    """The elements of n blocks as PRODUCT wants them, zero where not inside."""
    if PRODUCT == "mma":
        return load_eights(pointers, inside, WIDTH)
    else:
        return as_elements(load_blocks(pointers, inside, WIDTH, VECTOR), PRODUCT)


@triton.jit
def beside(value, PRODUCT: tl.constexpr):
    """A value a block, [n], in a shape that broadcasts to the elements."""
    return value if PRODUCT == "registers" else value[:, None]


@triton.jit
def over_block(x, LARGEST: tl.constexpr, PRODUCT: tl.constexpr):
    """The largest, or least, of what elements hold for each block, [n]; NaN if one of the largest is NaN."""
    most = x[0]
    for index in tl.static_range(1, len(x)):
        most = larger_or_nan(most, x[index]) if LARGEST else tl.minimum(most, x[index])
    if PRODUCT == "registers":
        return most
    else:
        return tl.reduce(most, 1, larger_or_nan) if LARGEST else tl.min(most, axis=1)


# ---- r A -------------------------------------------------------------------------------------------------------------


@triton.jit
def split_tf32(x):
    """(leading, rest) of float32 x: x rounded to tf32's 11 significant bits, and what that leaves, exactly."""
    leading = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return leading, x - leading


@triton.jit
def load_factor(factor_ptr, QBLOCK: tl.constexpr, PRODUCT: tl.constexpr):
    """A as the product wants it, from Aᵀ in memory.

    registers: its lower triangle row by row, as scalars. mma: for each sixteen columns, all rows in eights, each as a
    pair of tf32 parts.
    """
    if PRODUCT == "registers":
        values = ()
        for row in tl.static_range(QBLOCK):
            for column in tl.static_range(row + 1):
                values = values + (tl.load(factor_ptr + column * QBLOCK + row),)  # noqa: RUF005
        return values
    elif PRODUCT == "mma":
        column = tl.arange(0, 16)
        parts = ()
        for start in tl.static_range(0, QBLOCK, 16):
            eights = load_eights(factor_ptr + (start + column) * QBLOCK, column >= 0, QBLOCK)
            for index in tl.static_range(QBLOCK // 8):
                leading, rest = split_tf32(eights[index])
                parts = parts + ((leading, split_tf32(rest)[0]),)  # noqa: RUF005
        return parts
    else:
        lane = tl.arange(0, QBLOCK)
        return tl.load(factor_ptr + lane[None, :] * QBLOCK + lane[:, None])


@triton.jit
def residual_at(x, scale, reciprocal, rest, FMT: tl.constexpr, CLIPPED: tl.constexpr, TARGET: tl.constexpr):
    """Float32 ``x − S·Q(x / S)`` of signed elements; scale and its reciprocal_of broadcast to them."""
    quotient = rounded_quotient(x, scale, reciprocal, rest, FMT, TARGET)
    return residual(x, nearest_signed_level(quotient, FMT, CLIPPED, TARGET), scale, TARGET)


@triton.jit
def registers_error(
    x,
    scale,
    reciprocal,
    rest,
    factor,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    LAST: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Float32 sum over the last LAST columns of (r A)², from the block's elements as a tuple of [n] tensors.

    A row after the other, from the last, and sums in fours: the compiler then keeps a residual where the next
    multiplications find it without a register port, which is what limits them.
    """
    QBLOCK: tl.constexpr = FMT.block_size
    projected = ()
    for step in tl.static_range(LAST):
        r = residual_at(x[QBLOCK - 1 - step], scale, reciprocal, rest, FMT, CLIPPED, TARGET)
        sums = ()
        for column in tl.static_range(QBLOCK - LAST, QBLOCK - step):
            product = r * factor[(QBLOCK - 1 - step) * (QBLOCK - step) // 2 + column]
            if step > 0:
                product += projected[column - (QBLOCK - LAST)]
            sums = sums + (product,)  # noqa: RUF005
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
    return total if LAST % 4 == 0 else total + part


def _three_products(half: int) -> str:
    """PTX of add_eight; a thread's four values of each operand are those of row m, then of row m + 8."""
    mma = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, "
    leading, rest = "{$8,$10,$9,$11}", "{$12,$14,$13,$15}"
    factor, factor_rest = (f"{{${start + 2 * half},${start + 2 * half + 1}}}" for start in (16, 20))
    return f"""
        {mma} {rest}, {factor}, {{$4,$5,$6,$7}};
        {mma} {leading}, {factor_rest}, {{$0,$1,$2,$3}};
        {mma} {leading}, {factor}, {{$0,$1,$2,$3}};
    """


THREE_PRODUCTS_0 = tl.constexpr(_three_products(0))
THREE_PRODUCTS_1 = tl.constexpr(_three_products(1))


@triton.jit
def add_eight(projected, r, factor, HALF: tl.constexpr, TARGET: tl.constexpr):
    """projected + r A of eight rows and eight columns, the first or (HALF = 1) the second of factor's sixteen.

    projected [n, 8] is held as r is. r and factor: tf32 parts; n is 16 on "cuda".
    """
    if TARGET == "cuda":
        return tl.inline_asm_elementwise(
            THREE_PRODUCTS_1 if HALF else THREE_PRODUCTS_0,
            "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [projected, r[0], r[1], factor[0], factor[1]],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        rows, columns = r[0] + r[1], factor[0] + factor[1]
        product = tl.sum(rows[:, None, :] * columns[None, :, :], axis=2)
        return projected + tl.split(tl.permute(tl.reshape(product, [rows.shape[0], 2, 8]), (0, 2, 1)))[HALF]


@triton.jit
def mma_error(
    x,
    scale,
    reciprocal,
    rest,
    factor,
    FMT: tl.constexpr,
    CLIPPED: tl.constexpr,
    LAST: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The same from the elements in eights; A's eights above the diagonal are zero and are left out."""
    EIGHTS: tl.constexpr = FMT.block_size // 8
    FIRST: tl.constexpr = EIGHTS - LAST // 8
    parts = ()
    for index in tl.static_range(FIRST, EIGHTS):
        r = residual_at(x[index], scale, reciprocal, rest, FMT, CLIPPED, TARGET)
        parts = parts + (split_tf32(r),)  # noqa: RUF005
    total = tl.zeros_like(x[0])
    for back in tl.static_range(EIGHTS - FIRST):
        projected = tl.zeros_like(x[0])
        for index in tl.static_range(EIGHTS - 1 - back, EIGHTS):
            half = factor[(EIGHTS - 1 - back) // 2 * EIGHTS + index]
            projected = add_eight(projected, parts[index - FIRST], half, (EIGHTS - 1 - back) % 2, TARGET)
        total += projected * projected
    return tl.sum(total, axis=1)


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
    """Float32 ‖r A‖² of each block at its scale code, or of the last LAST columns alone.

    A is triangular, so the last columns need the last elements alone, and the sum over all columns adds to theirs: it
    is never less, in float32 either.
    """
    scale = scale_value(code, FMT) * unit
    reciprocal, rest = reciprocal_of(scale, FMT, TARGET)
    scale, reciprocal, rest = beside(scale, PRODUCT), beside(reciprocal, PRODUCT), beside(rest, PRODUCT)
    if PRODUCT == "registers":
        return registers_error(x, scale, reciprocal, rest, factor, FMT, CLIPPED, LAST, TARGET)
    elif PRODUCT == "mma":
        return mma_error(x, scale, reciprocal, rest, factor, FMT, CLIPPED, LAST, TARGET)
    else:
        r = residual_at(x[0], scale, reciprocal, rest, FMT, CLIPPED, TARGET)
        projected = tl.dot(r, factor, input_precision="ieee")
        return tl.sum(projected * projected, axis=1)


# ---- the search ------------------------------------------------------------------------------------------------------


@triton.jit
def hessian_window(
    x,
    error,
    inverse_root_ptr,
    normalize,
    ratio,
    global_scale,
    FMT: tl.constexpr,
    SLACK: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """(first, last) int32 codes outside which r H rᵀ exceeds the incumbent's error; see bounds.hessian_window."""
    QBLOCK: tl.constexpr = FMT.block_size
    VECTOR: tl.constexpr = 4
    every = tl.zeros([1], tl.int32)
    inverse_root = load_elements(inverse_root_ptr + every, every == 0, QBLOCK, VECTOR, PRODUCT)
    radius = beside(tl.sqrt(error) * (1 + SLACK), PRODUCT)
    clipping = ()
    beyond = ()
    for index in tl.static_range(len(x)):
        reach = radius * inverse_root[index]
        magnitude = tl.abs(x[index])
        clipping = clipping + (magnitude - reach,)  # noqa: RUF005
        beyond = beyond + (tl.where(magnitude > reach, magnitude + reach, float("inf")),)  # noqa: RUF005
    to_scale = tl.minimum(tl.div_rn(1.0, normalize) / global_scale, 3e38)  # from normalized magnitudes
    least = tl.maximum(over_block(clipping, True, PRODUCT), 0.0) / FMT.element_max * to_scale * (1 - SLACK)
    most = over_block(beyond, False, PRODUCT) / FMT.element_smallest * to_scale * (1 + SLACK)
    first = tl.maximum(scale_ceil_code(least, FMT), FMT.scale_min_code)
    last = tl.maximum(scale_floor_code(most, FMT), FMT.scale_min_code)
    return first, tl.minimum(last, zeroing_code(ratio, FMT))


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
    SCREEN: tl.constexpr,
):
    """Offers the first count codes of each block that code_outside names.

    With SCREEN > 0 a round first asks of which codes the last SCREEN columns alone do not exceed the best error yet,
    and evaluates those.
    """
    if SCREEN > 0:
        ROUND: tl.constexpr = 31
        for start in range(0, tl.max(count, axis=0), ROUND):
            survivors = tl.zeros_like(best_code)
            for step in range(start, tl.minimum(start + ROUND, tl.max(count, axis=0))):
                code = tl.where(step < count, code_outside(step, first, below, above), best_code)
                error = step_error(x, code, factor, unit, FMT, True, SCREEN, TARGET, PRODUCT)
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
    factor_ptr,  # [num_blocks, block_size, block_size] fp32, Aᵀ, upper triangular
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
    PRODUCT: tl.constexpr,  # "registers", "mma" or "dot"
    SCREEN: tl.constexpr,  # columns that screen what lies outside the squared error's window; 0 for none
    SLACK: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows a tile, 16 for "mma"
    TILES: tl.constexpr,  # tiles a program, one after the other
):
    QBLOCK: tl.constexpr = FMT.block_size
    VECTOR: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth  # what one load instruction takes
    column = tl.program_id(0) % num_blocks
    factor = load_factor(factor_ptr + column * QBLOCK * QBLOCK, QBLOCK, PRODUCT)
    global_scale = load_global_scale(global_scale_ptr, FMT)
    start = tl.program_id(0) // num_blocks * (BLOCK_M * TILES)
    for first_row in range(start, tl.minimum(start + BLOCK_M * TILES, rows), BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        inside = row < rows
        block = row.to(tl.int64) * num_blocks + column
        pointers = weight_ptr + block * QBLOCK
        if PRODUCT == "mma":
            loaded = load_eights(pointers, inside, QBLOCK)
        else:
            tile = load_blocks(pointers, inside, QBLOCK, VECTOR)
            loaded = as_elements(tile, PRODUCT)
        x = ()
        magnitudes = ()
        for index in tl.static_range(len(loaded)):
            x = x + (loaded[index].to(tl.float32),)  # noqa: RUF005
            magnitudes = magnitudes + (tl.abs(x[index]),)  # noqa: RUF005
        amax = over_block(magnitudes, True, PRODUCT)
        flag_not_finite(amax, flag_ptr)
        normalize = normalizer(amax)
        normalized = ()
        for index in tl.static_range(len(x)):
            normalized = normalized + (x[index] * beside(normalize, PRODUCT),)  # noqa: RUF005
        x = normalized
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
        first, last = hessian_window(
            x, error, inverse_root_ptr + column * QBLOCK, normalize, ratio, global_scale, FMT, SLACK, PRODUCT
        )
        below = tl.maximum(tl.minimum(last, search_first - 1) - first + 1, 0)
        above = tl.maximum(first, search_last + 1)
        outside = below + tl.maximum(last - above + 1, 0)
        code, error = search_outside(
            code, error, first, below, above, outside, x, factor, unit, FMT, TARGET, PRODUCT, SCREEN
        )

        if PRODUCT == "mma":  # anew, as the codes want it; by fours, lest the compiler loads the eights so, too
            tile = load_blocks(pointers, inside, QBLOCK, 4)
        even, odd = pairs(tile.to(tl.float32) * normalize[:, None])
        packed = packed_codes(even, odd, code, global_scale * normalize, FMT, TARGET)
        half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
        tl.store(codes_ptr + half, packed, mask=inside[:, None])
        tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)
        if COUNT:
            tl.store(candidates_ptr + block, (search_last - search_first + 1 + outside).to(tl.uint8), mask=inside)
