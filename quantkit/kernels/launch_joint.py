"""Launches the joint kernel: on a whole matrix, or on the blocks of a panel in turn.

Nothing here synchronizes with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit import bounds
from quantkit.calibration import HessianFactors
from quantkit.formats import BlockFormat
from quantkit.kernels.device import search_constants
from quantkit.kernels.joint import joint_kernel
from quantkit.kernels.launch import INTERPRETED, target_of

__all__ = ["pack_metrics", "quantize_blocks", "quantize_panel"]

# Fastest on an H200 (docs/log.md). A whole matrix has rows enough for a lane each; a panel's rows are few, so that
# lanes share them. The interpreter pays by the operation.
MATRIX_TILE = (32, 16) if INTERPRETED else (64, 1)  # rows, lanes a row
PANEL_TILE = (32, 16) if INTERPRETED else (32, 4)
FEEDBACK_COLUMNS = 64


def pack_metrics(factors: HessianFactors) -> Tensor:
    """Float32 ``[num_blocks, block_size + 2, block_size]``: M = A Aᵀ, then a row 1 / M_ii and a row √(M⁻¹)_ii.

    A is the factors', so the mean diagonal of M is 1.
    """
    metric = factors.factor @ factors.factor.mT
    inverse = metric.diagonal(dim1=1, dim2=2).reciprocal().unsqueeze(1)
    reach = (factors.inverse_diagonal.sqrt() * (1 + bounds.SLACK)).unsqueeze(1)
    return torch.cat((metric, inverse, reach), dim=1).float().contiguous()


def _grid(rows: int, tile: tuple[int, int], per_row: int) -> tuple[int]:
    return (-(-rows // tile[0]) * per_row,)


def quantize_blocks(
    matrix: Tensor,
    fmt: BlockFormat,
    block_size: int,
    global_scale: Tensor,
    metrics: Tensor,
    rounds: int,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(packed codes, scale bytes, candidates if counted) of a bf16, fp16 or fp32 ``[rows, K]`` matrix."""
    matrix = matrix.contiguous()
    (rows, columns), device = matrix.shape, matrix.device
    num_blocks = columns // block_size
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, num_blocks, dtype=torch.uint8, device=device)
    candidates = torch.empty_like(scales) if count else None
    joint_kernel[_grid(rows, MATRIX_TILE, num_blocks)](
        matrix,
        None,
        None,
        None,
        metrics,
        None,
        global_scale,
        codes.view(torch.int32),
        scales,
        candidates,
        rows,
        num_blocks,
        0,
        columns,
        0,
        **_constants(fmt, block_size, MATRIX_TILE, rounds, device, FEEDBACK=False, DESCEND=False, COUNT=count),
    )
    return codes, scales, candidates


def quantize_panel(
    weight: Tensor,
    error: Tensor,
    codes: Tensor,
    scales: Tensor,
    candidates: Tensor,
    columns: slice,
    target: Tensor,
    metrics: Tensor,
    feedback: Tensor,
    *,
    fmt: BlockFormat,
    block_size: int,
    global_scale: Tensor,
    rounds: int,
    descend: bool,
) -> Tensor:
    """Solves the blocks of ``columns`` in turn and returns the change of the error, float32 ``[rows, width]``.

    weight ``[rows, K]`` and float32 error ``[rows, K]``, codes, scales and candidates as in layer/common.py, all
    contiguous and written in place; target: contiguous float32 ``[rows, width]``, overwritten; feedback: float32
    ``[width, width]``, a view of rows of one stride.
    """
    rows = weight.shape[0]
    change = torch.zeros_like(target) if descend else torch.empty_like(target)
    joint_kernel[_grid(rows, PANEL_TILE, 1)](
        target,
        weight,
        error,
        change,
        metrics,
        feedback,
        global_scale,
        codes.view(torch.int32),
        scales,
        candidates,
        rows,
        scales.shape[1],
        columns.start // block_size,
        target.shape[1],
        feedback.stride(0),
        **_constants(fmt, block_size, PANEL_TILE, rounds, weight.device, FEEDBACK=True, DESCEND=descend, COUNT=True),
    )
    return change


def _constants(
    fmt: BlockFormat, block_size: int, tile: tuple[int, int], rounds: int, device: torch.device, **switches: bool
) -> dict[str, object]:
    return {
        "FMT": search_constants(fmt, block_size),
        "ROUNDS": rounds,
        "TARGET": target_of(device),
        "SLACK": bounds.SLACK,
        "BLOCK_M": tile[0],
        "LANES": tile[1],
        "BLOCK_K": FEEDBACK_COLUMNS,
        "num_warps": max(1, tile[0] * tile[1] // 32),
        **switches,
    }
