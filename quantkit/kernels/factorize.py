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
    """Float64 1/√x of a scalar in float32's normal range: float32's, and two Newton steps."""
    y = tl.rsqrt(x.to(tl.float32)).to(tl.float64)
    y = y * (1.5 - 0.5 * x * y * y)
    return y * (1.5 - 0.5 * x * y * y)


@triton.jit
def factorize_kernel(
    hessian_ptr,  # [num_blocks, block_size, block_size] fp32 or fp64, symmetric up to rounding
    factor_ptr,  # [num_blocks, block_size, block_size] fp32
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
    row, column = lane[:, None], lane[None, :]
    hessian = tl.load(hessian_ptr + base + row * QBLOCK + column).to(tl.float64)
    hessian = (hessian + tl.load(hessian_ptr + base + column * QBLOCK + row).to(tl.float64)) * 0.5
    diagonal = tl.sum(tl.where(row == column, hessian, 0.0), axis=1)
    mean = tl.sum(diagonal, axis=0) / QBLOCK
    # Equilibrated: S H S with S_i = 1/√H_ii, and the other way round for the factor. NaN fails every comparison.
    magnitude = tl.sum(tl.sum(tl.abs(hessian), axis=1), axis=0)
    sound = tl.where(magnitude < 1e300, tl.min(diagonal, axis=0), -1.0) >= 0
    relative = tl.where(mean > 0, diagonal / tl.where(mean > 0, mean, 1.0), 1.0)
    root = tl.sqrt(tl.where(relative > 0, relative, DEAD))
    scale = root[:, None] * root[None, :] * tl.where(mean > 0, mean, 1.0)
    equilibrated = tl.where(row == column, 1.0, hessian / scale)

    factor = tl.zeros([QBLOCK, QBLOCK], tl.float64)
    inverse = tl.zeros([QBLOCK, QBLOCK], tl.float64)  # A⁻¹, transposed
    shift = DAMPING
    lowest = tl.where(sound, -1.0, 1.0)  # the least pivot so far; what is not sound is not tried
    lowest = lowest.to(tl.float64)
    while lowest <= 0:
        rest = equilibrated + tl.where(row == column, shift, 0.0)
        inverse = tl.where(row == column, 1.0, 0.0).to(tl.float64)
        lowest = lowest * 0 + 1
        for index in range(QBLOCK):
            step = tl.sum(tl.where(column == index, rest, 0.0), axis=1)
            pivot = tl.sum(tl.where(lane == index, step, 0.0), axis=0)
            lowest = tl.minimum(lowest, tl.where(pivot > DAMPING / 16, pivot, -1.0))
            scaling = inverse_root(tl.maximum(pivot, DAMPING / 16))
            step = tl.where(lane >= index, step * scaling, 0.0)
            factor = tl.where(column == index, step[:, None], factor)
            rest -= step[:, None] * step[None, :]
            solved = tl.sum(tl.where(column == index, inverse, 0.0), axis=1) * scaling
            below = tl.where(lane > index, step, 0.0)
            inverse = tl.where(column == index, solved[:, None], inverse - solved[:, None] * below[None, :])
        shift = tl.maximum(shift * 4, SHIFT)
        if shift > MAX_NEGATIVE * QBLOCK * 16:
            sound = False
            lowest = lowest * 0 + 1
    if sound == 0:
        tl.store(flag_ptr, 1)

    # Back from the equilibrated matrix to H / mean.
    tl.store(factor_ptr + base + row * QBLOCK + column, (factor * root[:, None]).to(tl.float32))
    inverse = inverse / root[:, None]
    solution = tl.sqrt(tl.sum(inverse * inverse, axis=1))
    tl.store(inverse_root_ptr + tl.program_id(0) * QBLOCK + lane, solution.to(tl.float32))
