"""Factors of the block Hessians on the device, in one launch: the twin of calibration.factorize.

    H / mean(diag H) = A Aᵀ, A lower triangular,   and the bounds' √(H⁻¹)_ii

Each program runs a Cholesky factorization of the equilibrated matrix (unit diagonal), in float64. Where it fails,
because rounding made H singular or indefinite, the diagonal is raised, by FIRST_SHIFT and then four times as much each
time, until it succeeds: less than what float32 sums of activations leave undecided. The reference takes eigenvalues
there instead. No host synchronisation is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FIRST_SHIFT", "factorize_kernel"]

FIRST_SHIFT = 1e-8


@triton.jit
def inverse_root(x):
    """Float64 1/√x of values in float32's normal range: float32's, and two Newton steps."""
    y = tl.rsqrt(x.to(tl.float32)).to(tl.float64)
    y = y * (1.5 - 0.5 * x * y * y)
    return y * (1.5 - 0.5 * x * y * y)


@triton.jit
def symmetric_column(pointer, index, SIZE: tl.constexpr):
    """A column of float64 (H + Hᵀ) / 2, [SIZE], of [SIZE, SIZE] elements."""
    lane = tl.arange(0, SIZE)
    return (tl.load(pointer + lane * SIZE + index).to(tl.float64) + tl.load(pointer + index * SIZE + lane)) * 0.5


@triton.jit
def factorize_kernel(
    hessian_ptr,  # [num_blocks, block_size, block_size] fp32 or fp64, symmetric up to rounding
    factor_ptr,  # [num_blocks, block_size, block_size] fp32, Aᵀ
    row_norm_ptr,  # [num_blocks, block_size] fp32, of the rows of A
    inverse_root_ptr,  # [num_blocks, block_size] fp32
    flag_ptr,  # [1] int32, set to 1 where a Hessian holds NaN or Inf or is clearly indefinite
    QBLOCK: tl.constexpr,
    DAMPING: tl.constexpr,
    DEAD: tl.constexpr,
    SHIFT: tl.constexpr,
    MAX_NEGATIVE: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * QBLOCK * QBLOCK
    lane = tl.arange(0, QBLOCK)
    diagonal = tl.load(hessian_ptr + base + lane * (QBLOCK + 1)).to(tl.float64)
    magnitudes = diagonal * 0
    for column in tl.static_range(QBLOCK):
        magnitudes += tl.abs(symmetric_column(hessian_ptr + base, column, QBLOCK))
    mean = tl.sum(diagonal, axis=0) / QBLOCK
    # Equilibrated: S H S with S_i = 1/√H_ii, and the other way round for the factor. NaN fails every comparison.
    sound = tl.where(tl.sum(magnitudes, axis=0) < 1e300, tl.min(diagonal, axis=0), -1.0) >= 0
    relative = tl.where(mean > 0, diagonal / tl.where(mean > 0, mean, 1.0), 1.0)
    root = tl.sqrt(tl.where(relative > 0, relative, DEAD))
    per_root = 1 / root
    per_mean = 1 / tl.where(mean > 0, mean, 1.0)

    shift = DAMPING
    lowest = tl.where(sound, -1.0, 1.0).to(tl.float64)  # the least pivot; what is not sound is not tried
    bound = diagonal
    added = lowest
    while lowest <= 0:
        # Loaded again, so that it need not be held while the factor is found.
        rest = ()
        for column in tl.static_range(QBLOCK):
            across = tl.gather(per_root * per_mean, lane * 0 + column, 0)
            scaled = symmetric_column(hessian_ptr + base, column, QBLOCK) * per_root * across
            rest = rest + (tl.where(lane == column, 1 + shift, scaled),)  # noqa: RUF005
        added = lowest * 0 + shift
        bound = diagonal * 0
        pivots = bound + 1
        for index in range(QBLOCK):
            step = rest[0]
            pivot = tl.gather(step, lane * 0 + index, 0)
            pivots = tl.minimum(pivots, tl.where(pivot > DAMPING / 16, pivot, -1.0))
            scaling = inverse_root(tl.maximum(pivot, DAMPING / 16))
            # Back from the equilibrated matrix to H / mean.
            step_of_factor = tl.where(lane >= index, step * scaling * root, 0.0)
            tl.store(factor_ptr + base + index * QBLOCK + lane, step_of_factor.to(tl.float32))
            solved = tl.where(lane == index, 1.0, step) * scaling
            bound += tl.where(lane <= index, solved * solved, 0.0)
            # In this row pivot · across is what is there, and − across what comes there.
            step += tl.where(lane == index, 1.0, 0.0)
            across = rest[0] * (scaling * scaling)
            turned = ()
            for place in tl.static_range(1, QBLOCK + 1):
                by = tl.gather(across, (lane * 0 + (index + place)) % QBLOCK, 0)
                turned = turned + (rest[place % QBLOCK] - step * by,)  # noqa: RUF005
            rest = turned
        lowest = tl.min(pivots, axis=0)
        shift = tl.maximum(shift * 4, SHIFT)
        if shift > MAX_NEGATIVE * QBLOCK * 16:
            sound = False
            lowest = lowest * 0 + 1
    if sound == 0:
        tl.store(flag_ptr, 1)
    place = tl.program_id(0) * QBLOCK + lane
    tl.store(inverse_root_ptr + place, (tl.sqrt(bound) * per_root).to(tl.float32))
    tl.store(row_norm_ptr + place, (root * tl.sqrt(1 + added)).to(tl.float32))
