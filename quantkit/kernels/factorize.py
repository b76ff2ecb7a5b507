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

from quantkit.kernels.device import load_blocks

__all__ = ["FIRST_SHIFT", "factorize_kernel"]

FIRST_SHIFT = 1e-8


@triton.jit
def inverse_root(x):
    """Float64 1/√x of a scalar in float32's normal range: float32's, and two Newton steps."""
    y = tl.rsqrt(x.to(tl.float32)).to(tl.float64)
    y = y * (1.5 - 0.5 * x * y * y)
    return y * (1.5 - 0.5 * x * y * y)


@triton.jit
def load_symmetric(pointer, SIZE: tl.constexpr):
    """Float64 (H + Hᵀ) / 2 of [SIZE, SIZE] elements; a thread holds whole rows, or where it must, halves."""
    lane = tl.arange(0, SIZE)
    VECTOR: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth  # what one load instruction takes
    x = load_blocks(pointer + lane * SIZE, lane >= 0, SIZE, VECTOR).to(tl.float64)
    return (x + tl.trans(x)) * 0.5


@triton.jit
def one_column(x, chosen):
    """The column of float64 x [n, n] that is chosen, as a sum of integers: shorter to wait for than one of float64."""
    bits = tl.where(chosen, x.to(tl.int64, bitcast=True), 0)
    return tl.sum(bits, axis=1).to(tl.float64, bitcast=True)


@triton.jit
def factorize_kernel(
    hessian_ptr,  # [num_blocks, block_size, block_size] fp32 or fp64, symmetric up to rounding
    factor_ptr,  # [num_blocks, block_size, block_size] fp32, Aᵀ
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
    hessian = load_symmetric(hessian_ptr + base, QBLOCK)
    diagonal = tl.sum(tl.where(row == column, hessian, 0.0), axis=1)
    mean = tl.sum(diagonal, axis=0) / QBLOCK
    # Equilibrated: S H S with S_i = 1/√H_ii, and the other way round for the factor. NaN fails every comparison.
    magnitude = tl.sum(tl.sum(tl.abs(hessian), axis=1), axis=0)
    sound = tl.where(magnitude < 1e300, tl.min(diagonal, axis=0), -1.0) >= 0
    relative = tl.where(mean > 0, diagonal / tl.where(mean > 0, mean, 1.0), 1.0)
    root = tl.sqrt(tl.where(relative > 0, relative, DEAD))
    per_root = 1 / root
    per_mean = 1 / tl.where(mean > 0, mean, 1.0)

    shift = DAMPING
    lowest = tl.where(sound, -1.0, 1.0).to(tl.float64)  # the least pivot; what is not sound is not tried
    bound = diagonal
    while lowest <= 0:
        # Loaded again, so that it need not be held while the factor is found.
        rest = load_symmetric(hessian_ptr + base, QBLOCK) * per_root[:, None] * (per_root * per_mean)[None, :]
        rest = tl.where(row == column, 1 + shift, rest)
        inverse = tl.where(row == column, per_root[:, None], 0.0)  # of A, transposed
        bound = diagonal * 0
        pivots = lowest * 0 + 1
        for index in range(QBLOCK):
            step = one_column(rest, column == index)
            pivot = tl.sum(tl.where(lane == index, step, 0.0), axis=0)
            pivots = tl.minimum(pivots, tl.where(pivot > DAMPING / 16, pivot, -1.0))
            scaling = inverse_root(tl.maximum(pivot, DAMPING / 16))
            solved = one_column(inverse, column == index)
            bound += solved * scaling * (solved * scaling)
            # Back from the equilibrated matrix to H / mean.
            step_of_factor = tl.where(lane >= index, step * scaling * root, 0.0)
            tl.store(factor_ptr + base + index * QBLOCK + lane, step_of_factor.to(tl.float32))
            across = step[None, :] * (scaling * scaling)
            rest -= step[:, None] * across
            inverse -= solved[:, None] * across
        lowest = pivots
        shift = tl.maximum(shift * 4, SHIFT)
        if shift > MAX_NEGATIVE * QBLOCK * 16:
            sound = False
            lowest = lowest * 0 + 1
    if sound == 0:
        tl.store(flag_ptr, 1)
    tl.store(inverse_root_ptr + tl.program_id(0) * QBLOCK + lane, tl.sqrt(bound).to(tl.float32))
