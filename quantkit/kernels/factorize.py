"""Factors of the block Hessians on the device, in one launch: the twin of calibration.factorize.

    H / mean(diag H) = A Aᵀ,   and the bounds' (H⁻¹)_ii

The reference takes a plain Cholesky factorization and, where that fails, eigenvalues. Here each program runs a Cholesky
with diagonal pivoting on the equilibrated matrix (unit diagonal), in float64, and stops once every remaining pivot is
below FLOOR: what is left is below float32's resolution of r H rᵀ, and of an H accumulated in float32. Pivoting keeps
rounding noise in a rank-deficient H from being divided by a smaller piece of noise. No host synchronisation is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FLOOR", "factorize_kernel"]

FLOOR = 1e-8


@triton.jit
def factorize_kernel(
    hessian_ptr,  # [num_blocks, block_size, block_size] fp32 or fp64, symmetric up to rounding
    factor_ptr,  # [num_blocks, block_size, block_size] fp32
    inverse_diagonal_ptr,  # [num_blocks, block_size] fp32
    flag_ptr,  # [1] int32, set to 1 where a Hessian holds NaN or Inf or is clearly indefinite
    QBLOCK: tl.constexpr,
    PIVOT_FLOOR: tl.constexpr,
    DAMPING: tl.constexpr,
    DEAD: tl.constexpr,
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
    alive = diagonal > 0
    root = tl.where(alive, tl.sqrt(tl.where(alive, diagonal, 1.0)), 1.0)
    rest = hessian / (root[:, None] * root[None, :])
    magnitude = tl.sum(tl.sum(tl.abs(rest), axis=1), axis=0)
    if tl.where(magnitude < 1e300, tl.min(diagonal, axis=0), -1.0) < 0:
        tl.store(flag_ptr, 1)

    factor = tl.zeros([QBLOCK, QBLOCK], tl.float64)
    inverse = tl.where(row == column, 1.0, 0.0).to(tl.float64)  # becomes A⁻¹, row by row of the pivot order
    pending = lane >= 0
    lowest = mean * 0.0
    for _ in range(QBLOCK):
        pivots = tl.sum(tl.where(row == column, rest, 0.0), axis=1)
        offered = tl.where(pending, pivots, -float("inf"))
        pivot = tl.max(offered, axis=0)
        chosen = tl.min(tl.where(pending & (offered >= pivot), lane, QBLOCK - 1), axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(pending, pivots, 0.0), axis=0))
        dead = tl.sum(tl.where(lane == chosen, tl.where(alive, 0, 1), 0), axis=0) > 0
        # Below the floor only the diagonal of what remains is kept; a dead channel has DEAD alone.
        kept = tl.where(pivot > PIVOT_FLOOR, pivot, tl.where(dead, DEAD * mean, tl.maximum(pivot, DAMPING)))
        kept = tl.sqrt(tl.where(kept > 0, kept, 1.0))
        step = tl.sum(tl.where(column == chosen, rest, 0.0), axis=1) / kept
        step = tl.where(pending & (lane != chosen), tl.where(pivot > PIVOT_FLOOR, step, 0.0), 0.0)
        entry = tl.where(lane == chosen, kept, step)
        factor = tl.where(column == chosen, entry[:, None], factor)
        rest -= step[:, None] * step[None, :]
        pivot_row = tl.sum(tl.where(row == chosen, inverse, 0.0), axis=0) / kept
        inverse = tl.where(row == chosen, pivot_row[None, :], inverse - step[:, None] * pivot_row[None, :])
        pending = pending & (lane != chosen)
    if lowest < -MAX_NEGATIVE * QBLOCK:
        tl.store(flag_ptr, 1)

    # Back from the equilibrated matrix to H / mean; an all-zero H becomes the identity.
    unit = tl.where(mean > 0, 1.0 / tl.sqrt(tl.where(mean > 0, mean, 1.0)), 1.0)
    identity = tl.where(row == column, 1.0, 0.0)
    factor = tl.where(mean > 0, factor * root[:, None] * unit, identity)
    inverse = tl.where(mean > 0, inverse / (root[None, :] * unit), identity)
    tl.store(factor_ptr + base + row * QBLOCK + column, factor.to(tl.float32))
    tl.store(inverse_diagonal_ptr + tl.program_id(0) * QBLOCK + lane, tl.sum(inverse * inverse, axis=0).to(tl.float32))
