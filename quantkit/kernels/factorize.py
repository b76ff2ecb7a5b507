"""Factors of the block Hessians on the device, in one launch: the twin of calibration.factorize.

    H / mean(diag H) = A Aᵀ, A lower triangular,   and the bounds' √(H⁻¹)_ii

Each program factorizes one equilibrated matrix (unit diagonal) by Cholesky in float64. Cholesky fails where rounding
made H singular or indefinite. The program then raises the diagonal by FIRST_SHIFT and tries again, with four times the
shift at each further failure. The first shifts are below the rounding of float32 sums of activations. The reference
clips eigenvalues instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels import ptx
from quantkit.kernels.device import RECIPROCAL, pdl_launch_dependents

__all__ = ["EXTRA_ROWS", "FIRST_SHIFT", "factorize_kernel", "factors_of", "rounded_up"]

FIRST_SHIFT = 1e-8
EXTRA_ROWS = tl.constexpr(2)


@triton.jit
def factors_of(factors_ptr, block, QBLOCK: tl.constexpr):
    """Pointers to a block's factors in float32 ``[num_blocks, QBLOCK + EXTRA_ROWS, QBLOCK]``.

    The pointers are to Aᵀ, to the norms of A's rows, and to QBLOCK fp16 values √(H⁻¹)_ii, which start the last row.
    """
    factor_ptr = factors_ptr + block * ((QBLOCK + EXTRA_ROWS) * QBLOCK)
    norm_ptr = factor_ptr + QBLOCK * QBLOCK
    return factor_ptr, norm_ptr, (norm_ptr + QBLOCK).to(tl.pointer_type(tl.float16))


@triton.jit
def rounded_up(x):
    """Float32 that rounds to a positive fp16 number ≥ x; x ≥ 0."""
    return tl.fma(x, 1 + 2.0**-10, 2.0**-24)


@triton.jit
def reciprocal(x, TARGET: tl.constexpr):
    """Float64 1/x of values in float32's normal range, within an ulp or two."""
    if TARGET == "cuda":  # IEEE division would first branch on the operands' range
        near = tl.inline_asm_elementwise(
            RECIPROCAL[x.dtype].text, RECIPROCAL[x.dtype].constraints, [x], tl.float64, is_pure=True, pack=1
        )
        error = 1.0 - x * near
        return tl.fma(tl.fma(error, error, error), near, near)
    else:
        return 1.0 / x


RECIPROCAL_ROOT = tl.constexpr(ptx.reciprocal_root())


@triton.jit
def inverse_root(x, TARGET: tl.constexpr):
    """Float64 1/√x of values in float32's normal range, within an ulp or two."""
    if TARGET == "cuda":
        near = tl.inline_asm_elementwise(
            RECIPROCAL_ROOT.value.text, RECIPROCAL_ROOT.value.constraints, [x], tl.float64, is_pure=True, pack=1
        )
        error = 1.0 - x * near * near
        return tl.fma(tl.fma(error, 0.375, 0.5) * error, near, near)
    else:
        return 1.0 / tl.sqrt(x)


ROTATE = tl.constexpr({size: ptx.rotate(size) for size in (16, 32)})
ROTATE_TYPES = tl.constexpr({size: (tl.float64,) * size for size in (16, 32)})
ROTATION_BUFFER = tl.constexpr({size: ptx.shared_memory("rotation", 8 * size, alignment=16) for size in (16, 32)})


@triton.jit
def rotation_buffer(lane, SIZE: tl.constexpr, TARGET: tl.constexpr):
    """The buffer of broadcast_rotated: an address in shared memory on "cuda", else unused."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise(
            ROTATION_BUFFER[SIZE].text, ROTATION_BUFFER[SIZE].constraints, [lane], tl.int32, is_pure=True, pack=1
        )
    else:
        return lane


@triton.jit
def broadcast_rotated(x, index, buffer, SIZE: tl.constexpr, TARGET: tl.constexpr):
    """Tuple of SIZE tensors [SIZE]: elements index + 1 … index + SIZE, modulo SIZE, of float64 x [SIZE], broadcast.

    On "cuda" they pass through shared memory; shuffles would take four times as many instructions.
    """
    lane = tl.arange(0, SIZE)
    if TARGET == "cuda":
        own = buffer + ((lane - index - 1) & (SIZE - 1)) * 8
        return tl.inline_asm_elementwise(
            ROTATE[SIZE].text, ROTATE[SIZE].constraints, [x, own, buffer], ROTATE_TYPES[SIZE], is_pure=False, pack=1
        )
    else:
        elements = ()
        for place in tl.static_range(1, SIZE + 1):
            elements = elements + (tl.gather(x, lane * 0 + (index + place) % SIZE, 0),)  # noqa: RUF005
        return elements


@triton.jit
def rotate_tuple(x, COUNT: tl.constexpr):
    """A tuple rotated left by COUNT."""
    rotated = ()
    for place in tl.static_range(len(x)):
        rotated = rotated + (x[(place + COUNT) % len(x)],)  # noqa: RUF005
    return rotated


@triton.jit
def symmetric_column(pointer, index, SIZE: tl.constexpr):
    """Float64 column ``index`` of (H + Hᵀ) / 2, [SIZE]; pointer: H, [SIZE, SIZE]."""
    lane = tl.arange(0, SIZE)
    return (tl.load(pointer + lane * SIZE + index).to(tl.float64) + tl.load(pointer + index * SIZE + lane)) * 0.5


@triton.jit
def factorize_kernel(
    hessian_ptr,  # [num_blocks, block_size, block_size] fp32 or fp64, symmetric up to rounding
    factors_ptr,  # [num_blocks, block_size + 2, block_size] fp32, see factors_of
    flags_ptr,  # [2] int32; element 1 is set to 1 where a Hessian holds NaN or Inf or is clearly indefinite
    QBLOCK: tl.constexpr,
    DAMPING: tl.constexpr,
    DEAD: tl.constexpr,
    SHIFT: tl.constexpr,
    MAX_NEGATIVE: tl.constexpr,
    TARGET: tl.constexpr,
    PDL: tl.constexpr,  # programmatic dependent launch: the next kernel may start before this one has ended
):
    pdl_launch_dependents(PDL)
    UNROLL: tl.constexpr = 4  # steps per iteration, which ends by rotating the tuple of columns
    base = tl.program_id(0).to(tl.int64) * QBLOCK * QBLOCK
    factor_ptr, norm_ptr, inverse_root_ptr = factors_of(factors_ptr, tl.program_id(0).to(tl.int64), QBLOCK)
    lane = tl.arange(0, QBLOCK)
    diagonal = tl.load(hessian_ptr + base + lane * (QBLOCK + 1)).to(tl.float64)
    mean = tl.sum(diagonal, axis=0) / QBLOCK
    # NaN fails every comparison. NaN off the diagonal makes a pivot fail, and so does an indefinite H.
    sound = tl.where(mean < 1e300, tl.min(diagonal, axis=0), -1.0) >= 0
    # Equilibrated: S H S with S_i = 1/√H_ii; the factor is scaled back by 1/S_i.
    per_mean = 1 / tl.where(mean > 0, mean, 1.0)
    relative = tl.where(mean > 0, diagonal * per_mean, 1.0)
    root = tl.sqrt(tl.where(relative > 0, relative, DEAD))
    per_root = 1 / root

    buffer = rotation_buffer(lane, QBLOCK, TARGET)
    shift = DAMPING
    failed = tl.where(sound, 1, 0)  # number of failed pivots; 0 skips a matrix that is not sound
    bound = diagonal
    added = mean
    while failed > 0:
        rest = ()
        for column in tl.static_range(QBLOCK):
            across = tl.gather(per_root * per_mean, lane * 0 + column, 0)
            scaled = symmetric_column(hessian_ptr + base, column, QBLOCK) * per_root * across
            rest = rest + (tl.where(lane == column, 1 + shift, scaled),)  # noqa: RUF005
        added = mean * 0 + shift
        bound = diagonal * 0
        failures = lane * 0
        remaining = bound + (1 + shift)  # diagonal of the Schur complement: the next pivot, before its column is swept
        pivot = remaining
        per_pivot = reciprocal(pivot, TARGET)
        for start in range(0, QBLOCK, UNROLL):
            for turn in tl.static_range(UNROLL):
                index = start + turn
                step = rest[turn]  # type: ignore[var-annotated]
                # Row ``index`` holds pivot · across; the sweep replaces it by −across.
                across = step * per_pivot
                swept = step + tl.where(lane == index, 1.0, 0.0)
                remaining -= step * across
                next_pivot = tl.gather(remaining, lane * 0 + (index + 1) % QBLOCK, 0)
                next_pivot = tl.where(next_pivot > DAMPING / 16, next_pivot, DAMPING / 32)
                per_next = reciprocal(next_pivot, TARGET)
                by = broadcast_rotated(across, index, buffer, QBLOCK, TARGET)
                rotated = ()
                for place in tl.static_range(QBLOCK):
                    rotated = rotated + (rest[place] - swept * by[(place - turn - 1) % QBLOCK],)  # noqa: RUF005
                # Back from the equilibrated matrix to H / mean.
                column_of_factor = tl.where(lane >= index, step * inverse_root(pivot, TARGET) * root, 0.0)
                tl.store(factor_ptr + index * QBLOCK + lane, column_of_factor.to(tl.float32))
                solved = tl.where(lane == index, 1.0, step)
                bound += tl.where(lane <= index, solved * solved * per_pivot, 0.0)
                failures += (pivot < DAMPING / 16).to(tl.int32)
                rest, pivot, per_pivot = rotated, next_pivot, per_next
            rest = rotate_tuple(rest, UNROLL)
        failed = tl.max(failures, axis=0)
        shift = tl.maximum(shift * 4, SHIFT)
        if (failed > 0) & (shift > MAX_NEGATIVE * QBLOCK * 16):
            sound = False
            failed = 0
    if sound == 0:
        tl.store(flags_ptr + 1, 1)
    tl.store(norm_ptr + lane, (root * tl.sqrt(1 + added)).to(tl.float32))
    inverse = (tl.sqrt(bound) * per_root).to(tl.float32)
    tl.store(inverse_root_ptr + lane, rounded_up(inverse).to(tl.float16))
