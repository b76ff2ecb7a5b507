"""Starts the kernels: grid and tile sizes, outputs, flags. Nothing here waits for the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from quantkit import bounds
from quantkit.calibration import DEAD_CHANNEL, MAX_RELATIVE_NEGATIVE, RELATIVE_DAMPING
from quantkit.formats import FLOAT32_SMALLEST_NORMAL, BlockFormat
from quantkit.kernels.block_hessians import block_hessians_kernel
from quantkit.kernels.dequantize import dequantize_kernel
from quantkit.kernels.device import FormatConstants, format_constants
from quantkit.kernels.factorize import FIRST_SHIFT, factorize_kernel
from quantkit.kernels.global_scale import global_scale_kernel
from quantkit.kernels.hessian import hessian_kernel
from quantkit.kernels.naive import naive_kernel
from quantkit.kernels.sse import sse_kernel

__all__ = ["block_hessians", "dequantize", "factorize", "global_scale", "quantize"]

INTERPRETED = triton.knobs.runtime.interpret
TARGET = "interpreter" if INTERPRETED else "cuda" if torch.version.cuda else "hip"
# Sizes that were fastest on an H200 (docs/log.md); the interpreter pays by the operation, not by the element.
NAIVE_ELEMENTS = dict.fromkeys((16, 32), 8192) if INTERPRETED else {16: 2048, 32: 1024}  # a program, one warp
NAIVE_REGISTERS = {16: {}, 32: {"maxnreg": 56}} if TARGET == "cuda" else {16: {}, 32: {}}
SSE_ELEMENTS = 8192 if INTERPRETED else 1024  # likewise
SSE_REGISTERS = {16: {"maxnreg": 80}, 32: {"maxnreg": 96}} if TARGET == "cuda" else {16: {}, 32: {}}
AMAX_ELEMENTS = 8192  # a step, and programs at most
AMAX_PROGRAMS = 528
HESSIAN_REGISTERS = {16: 96, 32: 128}  # of the format with many scales; the other takes what it wants
DEQUANTIZE_CHUNKS = 4096 if INTERPRETED else 256  # of eight elements, a program
HESSIAN_WIDTH = 64  # columns, and tokens, a program
HESSIAN_TOKENS = 2048


def _ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, a jit function, whose call takes 3 µs."""
    return -(-a // b)


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
    check_finite: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(packed codes, scale bytes, candidates or None, flags) of a bf16, fp16 or fp32 ``[rows, K]`` matrix.

    hessians: ``[K/block_size, block_size, block_size]`` on the matrix's device, for the method that needs them.
    flags: int32 ``[2]``, 1 where the matrix, or the Hessians, hold what cannot be worked with (NaN, Inf, a clearly
    indefinite Hessian); codes and scales are then undefined. Without check_finite the flags are, too.
    """
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    column_blocks = columns // block_size
    num_blocks = rows * column_blocks
    device = matrix.device
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, column_blocks, dtype=torch.uint8, device=device)
    candidates = torch.empty_like(scales) if count_candidates else None
    new = torch.zeros if check_finite else torch.empty  # nobody looks at the flags then
    flags = new(2, dtype=torch.int32, device=device)
    if num_blocks == 0:
        return codes, scales, candidates, flags
    constants = _constants(fmt, block_size)
    counted = scales if candidates is None else candidates  # any pointer will do where nothing is counted

    if method == "naive":
        if candidates is not None:
            candidates.fill_(1)
        tile = NAIVE_ELEMENTS[block_size] // block_size
        grid = (_ceil_div(num_blocks, tile),)
        naive_kernel[grid](
            matrix,
            global_scale,
            codes,
            scales,
            flags,
            num_blocks,
            FMT=constants,
            RULE=rule,
            TARGET=TARGET,
            BLOCK_N=tile,
            num_warps=1,
            **NAIVE_REGISTERS[block_size],
        )
    elif method == "sse":
        tile = SSE_ELEMENTS // block_size
        grid = (_ceil_div(num_blocks, tile),)
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
            TARGET=TARGET,
            BLOCK_N=tile,
            num_warps=1,
            **SSE_REGISTERS[block_size],
        )
    else:
        assert hessians is not None
        factor, row_norm, inverse_root = factorize(hessians, flags[1:])
        options = _hessian_options(constants)
        grid = (column_blocks * _ceil_div(rows, options["BLOCK_M"] * options["TILES"]),)
        hessian_kernel[grid](
            matrix,
            factor,
            row_norm,
            inverse_root,
            global_scale,
            codes,
            scales,
            counted,
            flags,
            rows,
            column_blocks,
            FMT=constants,
            COUNT=count_candidates,
            TARGET=TARGET,
            SLACK=bounds.SLACK,
            **options,
        )
    return codes, scales, candidates, flags


def factorize(hessians: Tensor, flag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 upper triangular Aᵀ ``[num_blocks, block_size, block_size]``, the norms of A's rows and √(H⁻¹)_ii, both
    ``[num_blocks, block_size]``, of ``hessians``.

    Sets ``flag``, int32 ``[1]``, to 1 for NaN, Inf or a clearly indefinite Hessian.
    """
    if hessians.dtype != torch.float64:
        hessians = hessians.float()
    hessians = hessians.contiguous()
    num_blocks, block_size, _ = hessians.shape
    factor = torch.empty_like(hessians, dtype=torch.float32)
    row_norm, inverse_root = torch.empty(2, num_blocks, block_size, device=hessians.device)
    factorize_kernel[(num_blocks,)](
        hessians,
        factor,
        row_norm,
        inverse_root,
        flag,
        QBLOCK=block_size,
        DAMPING=RELATIVE_DAMPING,
        DEAD=DEAD_CHANNEL,
        SHIFT=FIRST_SHIFT,
        MAX_NEGATIVE=MAX_RELATIVE_NEGATIVE,
        num_warps=1,
    )
    return factor, row_norm, inverse_root


def global_scale(matrix: Tensor, fmt: BlockFormat) -> Tensor:
    """Float32 scalar: the decode multiplier of ``matrix``, bf16, fp16 or fp32 of any shape, from its amax."""
    matrix = matrix.contiguous()
    multiplier = torch.empty((), dtype=torch.float32, device=matrix.device)
    workspace = torch.zeros(2, dtype=torch.int32, device=matrix.device)
    size = matrix.numel()
    programs = min(_ceil_div(size, AMAX_ELEMENTS), AMAX_PROGRAMS)
    global_scale_kernel[(max(programs, 1),)](
        matrix,
        workspace,
        workspace[1:],
        multiplier,
        size,
        LARGEST_PRODUCT=fmt.element.max_value * fmt.scale.max_value,
        SMALLEST_NORMAL=FLOAT32_SMALLEST_NORMAL,
        BLOCK_N=AMAX_ELEMENTS,
        num_warps=8,
    )
    return multiplier


def dequantize(
    codes: Tensor, scales: Tensor, global_scale: Tensor, fmt: BlockFormat, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight ``[..., K]`` in ``dtype`` (bf16, fp16 or fp32) of packed codes ``[..., K/2]`` and scale bytes."""
    codes, scales = codes.contiguous(), scales.contiguous()
    weight = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=dtype, device=codes.device)
    num_chunks = weight.numel() // 8
    if num_chunks:
        dequantize_kernel[(_ceil_div(num_chunks, DEQUANTIZE_CHUNKS),)](
            codes,
            scales,
            global_scale,
            weight,
            num_chunks,
            FMT=_constants(fmt, block_size),
            BLOCK_N=DEQUANTIZE_CHUNKS,
        )
    return weight


def block_hessians(activations: Tensor, block_size: int) -> Tensor:
    """Float32 ``[K/block_size, block_size, block_size]`` of bf16, fp16 or fp32 activations ``[tokens, K]``."""
    activations = activations.contiguous()
    tokens, in_features = activations.shape
    num_blocks = in_features // block_size
    splits = max(1, _ceil_div(tokens, HESSIAN_TOKENS))
    shape = (splits, num_blocks, block_size, block_size)
    parts = torch.empty(shape, dtype=torch.float32, device=activations.device)
    if parts.numel():
        block_hessians_kernel[(_ceil_div(in_features, HESSIAN_WIDTH), splits)](
            activations,
            parts,
            tokens,
            in_features,
            HESSIAN_TOKENS,
            QBLOCK=block_size,
            WIDTH=HESSIAN_WIDTH,
            BLOCK_T=128 if activations.element_size() == 2 else 32,
            UPCAST=INTERPRETED,
            num_warps=4,
        )
    return parts[0] if splits == 1 else parts.sum(0)


def _hessian_options(constants: FormatConstants) -> dict[str, Any]:
    """The Hessian kernel's tiles, and what the compiler is told."""
    if INTERPRETED:
        return {"BLOCK_M": 512, "TILES": 1, "num_warps": 1}
    options = {"BLOCK_M": 32, "TILES": 2, "num_warps": 1}
    if not constants.scale_mantissa:
        return options | {"TILES": 64 // constants.block_size}
    return options | ({"maxnreg": HESSIAN_REGISTERS[constants.block_size]} if TARGET == "cuda" else {})
