"""Starts the kernels: grid and tile sizes, outputs, flags. Nothing here waits for the device."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from quantkit import bounds
from quantkit.calibration import DEAD_CHANNEL, MAX_RELATIVE_NEGATIVE, RELATIVE_DAMPING
from quantkit.formats import BlockFormat
from quantkit.kernels.device import FormatConstants, format_constants
from quantkit.kernels.factorize import FLOOR, factorize_kernel
from quantkit.kernels.hessian import hessian_kernel
from quantkit.kernels.naive import naive_kernel
from quantkit.kernels.sse import sse_kernel

__all__ = ["factorize", "quantize"]

INTERPRETED = triton.knobs.runtime.interpret
# Elements a program of the naive and SSE kernels holds, and rows one of the Hessian kernel. The interpreter pays by the
# operation, not by the element.
TILE_ELEMENTS = 8192 if INTERPRETED else 2048
TILE_ROWS = 1024 if INTERPRETED else 64


@functools.cache
def _constants(fmt: BlockFormat, block_size: int) -> FormatConstants:
    return format_constants(fmt, block_size)


def quantize(
    matrix: Tensor,
    fmt: BlockFormat,
    block_size: int,
    method: str,
    global_scale: Tensor,
    rule: str,
    hessians: Tensor | None,
    count_candidates: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(packed codes, scale bytes, candidates or None, flags) of a bf16, fp16 or fp32 ``[rows, K]`` matrix.

    hessians: ``[K/block_size, block_size, block_size]`` on the matrix's device, for the method that needs them.
    flags: int32 ``[2]``, 1 where the matrix, or the Hessians, hold what cannot be worked with (NaN, Inf, a clearly
    indefinite Hessian); codes and scales are then undefined.
    """
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    column_blocks = columns // block_size
    num_blocks = rows * column_blocks
    device = matrix.device
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, column_blocks, dtype=torch.uint8, device=device)
    candidates = torch.empty_like(scales) if count_candidates else None
    flags = torch.zeros(2, dtype=torch.int32, device=device)
    if num_blocks == 0:
        return codes, scales, candidates, flags
    constants = _constants(fmt, block_size)
    counted = scales if candidates is None else candidates  # any pointer will do where nothing is counted
    exact_fma = not INTERPRETED

    if method == "naive":
        if candidates is not None:
            candidates.fill_(1)
        tile = TILE_ELEMENTS // block_size
        grid = (triton.cdiv(num_blocks, tile),)
        naive_kernel[grid](
            matrix,
            global_scale,
            codes,
            scales,
            flags,
            num_blocks,
            FMT=constants,
            RULE=rule,
            EXACT_FMA=exact_fma,
            BLOCK_N=tile,
        )
    elif method == "sse":
        tile = TILE_ELEMENTS // block_size
        grid = (triton.cdiv(num_blocks, tile),)
        sse_kernel[grid](
            matrix,
            global_scale,
            codes,
            scales,
            counted,
            flags,
            num_blocks,
            FMT=constants,
            COUNT=count_candidates,
            EXACT_FMA=exact_fma,
            BLOCK_N=tile,
        )
    else:
        assert hessians is not None
        factor, inverse_diagonal = factorize(hessians, flags[1:])
        tile = TILE_ROWS
        grid = (column_blocks * triton.cdiv(rows, tile),)
        hessian_kernel[grid](
            matrix,
            factor,
            inverse_diagonal,
            global_scale,
            codes,
            scales,
            counted,
            flags,
            rows,
            column_blocks,
            FMT=constants,
            COUNT=count_candidates,
            EXACT_FMA=exact_fma,
            PRECISION=_dot_precision(),
            SLACK=bounds.SLACK,
            BLOCK_M=tile,
        )
    return codes, scales, candidates, flags


def factorize(hessians: Tensor, flag: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 factor ``[num_blocks, block_size, block_size]`` and (H⁻¹)_ii ``[num_blocks, block_size]`` of
    ``hessians``.

    Sets ``flag``, int32 ``[1]``, to 1 for NaN, Inf or a clearly indefinite Hessian.
    """
    if hessians.dtype != torch.float64:
        hessians = hessians.float()
    hessians = hessians.contiguous()
    num_blocks, block_size, _ = hessians.shape
    factor = torch.empty_like(hessians, dtype=torch.float32)
    inverse_diagonal = torch.empty(num_blocks, block_size, device=hessians.device)
    factorize_kernel[(num_blocks,)](
        hessians,
        factor,
        inverse_diagonal,
        flag,
        QBLOCK=block_size,
        PIVOT_FLOOR=FLOOR,
        DAMPING=RELATIVE_DAMPING,
        DEAD=DEAD_CHANNEL,
        MAX_NEGATIVE=MAX_RELATIVE_NEGATIVE,
    )
    return factor, inverse_diagonal


def _dot_precision() -> str:
    """Triton's name of a float32-accurate product: three tf32 products on NVIDIA's tensor cores, float32 elsewhere."""
    return "tf32x3" if torch.version.cuda else "ieee"
