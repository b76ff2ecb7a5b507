"""Starts the kernels: grid and tile sizes, outputs, and the float32 forms of the Hessian factors."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from quantkit import bounds
from quantkit.calibration import HessianFactors
from quantkit.formats import BlockFormat
from quantkit.kernels.device import FormatConstants, format_constants
from quantkit.kernels.hessian import hessian_kernel
from quantkit.kernels.naive import naive_kernel
from quantkit.kernels.sse import sse_kernel

__all__ = ["quantize"]

INTERPRETED = triton.knobs.runtime.interpret


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
    factors: HessianFactors | None,
    count_candidates: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(packed codes, scale bytes, candidates or None, flag) of a bf16, fp16 or fp32 ``[rows, K]`` matrix.

    The flag, int32 ``[1]``, is 1 where the matrix holds NaN or Inf; codes and scales are then undefined.
    """
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    column_blocks = columns // block_size
    num_blocks = rows * column_blocks
    device = matrix.device
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, column_blocks, dtype=torch.uint8, device=device)
    candidates = torch.empty_like(scales) if count_candidates else None
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    if num_blocks == 0:
        return codes, scales, candidates, flag
    constants = _constants(fmt, block_size)
    counted = scales if candidates is None else candidates  # any pointer will do where nothing is counted
    exact_fma = not INTERPRETED

    if method == "naive":
        if candidates is not None:
            candidates.fill_(1)
        tile = 2048 // block_size
        grid = (triton.cdiv(num_blocks, tile),)
        naive_kernel[grid](
            matrix, global_scale, codes, scales, flag, num_blocks, FMT=constants, RULE=rule, BLOCK_N=tile
        )
    elif method == "sse":
        tile = 2048 // block_size
        grid = (triton.cdiv(num_blocks, tile),)
        sse_kernel[grid](
            matrix,
            global_scale,
            codes,
            scales,
            counted,
            flag,
            num_blocks,
            FMT=constants,
            COUNT=count_candidates,
            EXACT_FMA=exact_fma,
            BLOCK_N=tile,
        )
    else:
        assert factors is not None
        tile = 64
        grid = (column_blocks * triton.cdiv(rows, tile),)
        hessian_kernel[grid](
            matrix,
            factors.factor.float(),
            factors.inverse_diagonal.float(),
            global_scale,
            codes,
            scales,
            counted,
            flag,
            rows,
            column_blocks,
            FMT=constants,
            COUNT=count_candidates,
            EXACT_FMA=exact_fma,
            PRECISION=_dot_precision(),
            SLACK=bounds.SLACK,
            BLOCK_M=tile,
        )
    return codes, scales, candidates, flag


def _dot_precision() -> str:
    """Triton's name of a float32-accurate product: three tf32 products on NVIDIA's tensor cores, float32 elsewhere."""
    return "tf32x3" if torch.version.cuda else "ieee"
